//! The redo log's header and checkpoints: no panic, and what is written is read again.
//!
//! Input: the header, then two checkpoint blocks; read as they are, and with right checksums.

#![no_main]

use libfuzzer_sys::fuzz_target;
use marcot_fuzz::{
    innodb::mariadb::redo::{
        CHECKPOINT_BYTES, Checkpoint, HEADER_BYTES, Header, START_OFFSET, capacity,
    },
    put,
};

fuzz_target!(|data: &[u8]| {
    look(data);
    let mut bytes = data.to_vec();
    bytes.resize(HEADER_BYTES + 2 * CHECKPOINT_BYTES, 0);
    // One of both formats, else nothing else is looked at.
    let format = if bytes[0] & 1 == 0 { 0x5068_7973 } else { 0xf09f_979d };
    put(&mut bytes, 0, format);
    put(&mut bytes, 4, 0);
    let checksum = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
    put(&mut bytes, HEADER_BYTES - 4, checksum);
    for block in bytes[HEADER_BYTES..].chunks_mut(CHECKPOINT_BYTES) {
        block[16..CHECKPOINT_BYTES - 4].fill(0);
        let checksum = crc32c::crc32c(&block[..CHECKPOINT_BYTES - 4]);
        put(block, CHECKPOINT_BYTES - 4, checksum);
    }
    look(&bytes);
});

fn look(bytes: &[u8]) {
    let header = Header::parse(bytes);
    let first_lsn = header.as_ref().map_or(START_OFFSET, Header::first_lsn);
    if let Ok(header) = &header {
        let _ = (header.creator(), header.is_encrypted(), format!("{header:?}"));
        for (lsn, file_bytes) in [(0, 0), (first_lsn, 1 << 20), (u64::MAX, u64::MAX)] {
            let offset = header.offset(lsn, file_bytes);
            assert!((START_OFFSET..START_OFFSET + capacity(file_bytes)).contains(&offset));
            assert!(header.sequence_bit(lsn, file_bytes) <= 1);
        }
        let moved = Header::parse(&header.starting_at(START_OFFSET)).expect("it was right before");
        assert_eq!(moved.first_lsn(), START_OFFSET);
    }
    let block = |number: usize| {
        let start = HEADER_BYTES + number * CHECKPOINT_BYTES;
        bytes.get(start..).unwrap_or_default()
    };
    let _ = Checkpoint::parse(bytes, first_lsn);
    if let Ok(latest) = Checkpoint::latest([block(0), block(1)], first_lsn) {
        assert!(latest.lsn >= first_lsn && latest.end_lsn >= latest.lsn);
        assert_eq!(Checkpoint::parse(&latest.to_bytes(), first_lsn), Ok(latest));
    }
}
