//! The redo parser: no panic, and a mini-transaction is what its own bytes say, whatever follows.
//!
//! Input: whether the log is encrypted, then its bytes. Where only a checksum is wrong it is put
//! right, so that what comes after is reached.

#![no_main]

use libfuzzer_sys::fuzz_target;
use marcot_fuzz::{
    innodb::mariadb::redo::{BadMtr, Parsed, ends_checkpoint, parse_mtr, walk},
    put,
};

/// Checksums put right in one input.
const MENDED_MAX: usize = 64;

fuzz_target!(|data: &[u8]| {
    let [options, log @ ..] = data else {
        return;
    };
    let encrypted = options & 1 != 0;
    let mut log = log.to_vec();
    mend(&mut log, encrypted);
    let walked = walk(&log, encrypted);
    assert!(walked.bytes <= log.len());
    let mut at = 0;
    for _ in 0..walked.mtrs {
        let Parsed::Mtr(mtr) = parse_mtr(&log[at..], encrypted) else {
            panic!("a walk has found what is not there");
        };
        assert!(mtr.record_bytes > 0 && mtr.record_bytes + 5 <= mtr.bytes);
        let own = &log[at..at + mtr.bytes];
        assert_eq!(parse_mtr(own, encrypted), Parsed::Mtr(mtr));
        assert_eq!(parse_mtr(&own[..own.len() - 1], encrypted), Parsed::Cut);
        at += mtr.bytes;
    }
    assert_eq!(at, walked.bytes);
    let _ = ends_checkpoint(&log, 8, encrypted);
});

fn mend(log: &mut [u8], encrypted: bool) {
    let mut at = 0;
    for _ in 0..MENDED_MAX {
        match parse_mtr(&log[at..], encrypted) {
            Parsed::Mtr(mtr) => at += mtr.bytes,
            Parsed::Bad(BadMtr::Checksum { stored, computed }) => {
                // Somewhere behind the records: the first place that makes it right.
                let Some(place) = (at..log.len().saturating_sub(3)).find(|place| {
                    log[*place..*place + 4] == stored.to_be_bytes() && {
                        let mut mended = log.to_vec();
                        put(&mut mended, *place, computed);
                        matches!(parse_mtr(&mended[at..], encrypted), Parsed::Mtr(_))
                    }
                }) else {
                    return;
                };
                put(log, place, computed);
            }
            _ => return,
        }
    }
}
