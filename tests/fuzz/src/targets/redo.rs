//! The redo parser: no panic, and a mini-transaction is what its own bytes say, whatever follows.
//!
//! Input: whether the log is encrypted, then its bytes. Where only a checksum is wrong it is put
//! right, so that what comes after is reached.

use marcot_engine::innodb::mariadb::redo::{
    BadMtr, Parsed, deleted_spaces, ends_checkpoint, made_spaces, parse_mtr, walk,
};

use crate::put;

/// The parser's files.
pub const FILES: &[&str] = &["donor/engine/src/innodb/mariadb/redo.rs"];

/// Checksums put right in one input.
const MENDED_MAX: usize = 64;

/// Runs one input.
pub fn run(data: &[u8]) {
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
        deletes(&own[..mtr.record_bytes]);
        assert_eq!(parse_mtr(&own[..own.len() - 1], encrypted), Parsed::Cut);
        at += mtr.bytes;
    }
    assert_eq!(at, walked.bytes);
    let _ = ends_checkpoint(&log, 8, encrypted);
    deletes(&log);
}

/// Where ids are hidden as many files are deleted, of tablespaces that are not told.
fn deletes(records: &[u8]) {
    let (mut told, mut hidden) = (0, 0);
    deleted_spaces(records, false, &mut |_| told += 1);
    deleted_spaces(records, true, &mut |id| {
        assert_eq!(id, None);
        hidden += 1;
    });
    assert_eq!(told, hidden);
    let mut made = 0;
    made_spaces(records, &mut |_| made += 1);
    // A record has at least two bytes.
    assert!(made <= records.len() / 2);
}

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

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    // Records of pages and files, short and long, each mini-transaction with its end and checksum.
    let mtr = |records: &[u8]| {
        let crc = crc32c::crc32c(records).to_be_bytes();
        [records, &[1], &crc].concat()
    };
    // With a nonce, and a checksum that `mend` puts right.
    let encrypted = |records: &[u8]| [records, &[1], &[9; 8], &[0; 4]].concat();
    let plain_log = |mtrs: &[Vec<u8>]| [vec![0], mtrs.concat()].concat();
    let encrypted_log = |mtrs: &[Vec<u8>]| [vec![1], mtrs.concat()].concat();
    let checkpoint = |lsn: u64| [&[0xfa, 0, 0][..], &lsn.to_be_bytes()].concat();
    let file = |kind: u8| [kind | 5, 0x81, 0x00, 0, 0x2f, 0x61].to_vec();
    // A record whose length takes two bytes, and one whose length takes three.
    let long = [&[0x30, 0x80, 0x10][..], &[5; 160]].concat();
    let longer = [&[0x30, 0xc0, 0x00, 0x01][..], &[5; 16_526]].concat();
    // Deletions of tablespaces whose ids take one byte to six, of which there are none.
    let deleted: Vec<Vec<u8>> = [
        &[0x91, 0x7f][..],
        &[0x92, 0xbf, 0xff],
        &[0x93, 0xdf, 0xff, 0xff],
        &[0x94, 0xef, 0xff, 0xff, 0xff],
        &[0x95, 0xf0, 0xde, 0xdf, 0xbf, 0x7f],
        &[0x92, 0xf8, 0x00],
        &[0x91, 0xef],
        &[0x90, 0x01, 0x07, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    .map(<[u8]>::to_vec)
    .into();
    vec![
        plain_log(&[mtr(&checkpoint(8))]),
        plain_log(&[mtr(&file(0x90)), mtr(&file(0xa0)), mtr(&checkpoint(8))]),
        plain_log(&[mtr(&file(0xb0)), mtr(&checkpoint(9)), mtr(&checkpoint(8))]),
        plain_log(&[mtr(&[file(0xb0), checkpoint(9), file(0xa0)].concat())]),
        plain_log(&[mtr(&[0x91, 7, 0x93, 0xc1, 2, 3])]),
        plain_log(&[mtr(&deleted.concat())]),
        plain_log(&[mtr(&[0x32, 1, 2, 0x21, 7]), mtr(&long)]),
        plain_log(&[mtr(&longer)]),
        encrypted_log(&[encrypted(&checkpoint(8))]),
        encrypted_log(&[encrypted(&[0x31, 2]), encrypted(&file(0xb0))]),
        encrypted_log(&[vec![0x31, 2, 1], vec![0; 12]]),
        // Longer than a mini-transaction may be, by one record's length and by the sum.
        plain_log(&[vec![0x30, 0xe0, 0, 0, 0]]),
        plain_log(&[vec![0x30, 0xcf, 0xff, 0xff]]),
        plain_log(&[vec![0x30, 0xcf, 0xbf, 0x7f]]),
        plain_log(&[vec![0x30, 0xff]]),
        plain_log(&[vec![0x30, 0xc0]]),
        plain_log(&[vec![0x30]]),
        plain_log(&[vec![0x31, 2, 1, 0]]),
        plain_log(&[vec![1]]),
    ]
}
