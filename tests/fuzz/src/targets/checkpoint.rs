//! The redo log's header and checkpoints: no panic, and what is written is read again.
//!
//! Input: the header, then two checkpoint blocks; read as they are, and with right checksums.

use marcot_engine::innodb::mariadb::redo::{
    CHECKPOINT_BYTES, Checkpoint, HEADER_BYTES, Header, START_OFFSET, capacity,
};

use crate::put;

/// The parser's files.
pub const FILES: &[&str] = &["donor/engine/src/innodb/mariadb/redo.rs"];

/// Runs one input.
pub fn run(data: &[u8]) {
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
}

fn look(bytes: &[u8]) {
    let header = Header::parse(bytes);
    let first_lsn = header.as_ref().map_or(START_OFFSET, Header::first_lsn);
    if let Ok(header) = &header {
        let _ = (header.creator(), format!("{header:?}"));
        assert!(header.is_encrypted() || !header.hides_ids());
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

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let header = |format: u32, first_lsn: u64| {
        let mut bytes = vec![0; HEADER_BYTES + 2 * CHECKPOINT_BYTES];
        put(&mut bytes, 0, format);
        bytes[8..16].copy_from_slice(&first_lsn.to_be_bytes());
        bytes[16..31].copy_from_slice(b"MariaDB 10.11.6");
        for block in bytes[HEADER_BYTES..].chunks_mut(CHECKPOINT_BYTES) {
            block[..8].copy_from_slice(&(first_lsn + 100).to_be_bytes());
            block[8..16].copy_from_slice(&(first_lsn + 200).to_be_bytes());
        }
        bytes
    };
    let plain = header(0x5068_7973, 12_288);
    // Each is refused for something else, some only where checksums are right as they are.
    let other = |change: fn(&mut [u8])| {
        let mut spoilt = plain.clone();
        change(&mut spoilt);
        spoilt
    };
    let sealed = |mut bytes: Vec<u8>| {
        let checksum = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
        put(&mut bytes, HEADER_BYTES - 4, checksum);
        for block in bytes[HEADER_BYTES..].chunks_mut(CHECKPOINT_BYTES) {
            let checksum = crc32c::crc32c(&block[..CHECKPOINT_BYTES - 4]);
            put(block, CHECKPOINT_BYTES - 4, checksum);
        }
        bytes
    };
    // Behind the header are the checkpoints; `look` also reads one at the very beginning.
    let behind = |bytes: &[u8]| bytes[HEADER_BYTES..].to_vec();
    let in_front = |lsn: u64, end_lsn: u64, reserved: u8| {
        let numbers = [lsn.to_be_bytes(), end_lsn.to_be_bytes()].concat();
        let mut block = [numbers, vec![reserved; CHECKPOINT_BYTES - 16]].concat();
        let checksum = crc32c::crc32c(&block[..CHECKPOINT_BYTES - 4]);
        put(&mut block, CHECKPOINT_BYTES - 4, checksum);
        block
    };
    vec![
        plain.clone(),
        header(0xf09f_979d, 1 << 40),
        header(0x5068_7973, 12_287),
        sealed(plain.clone()),
        sealed(other(|bytes| bytes[7] = 1)),
        sealed(other(|bytes| bytes[51] = 1)),
        // One checkpoint is older than the log, ends before it begins, or is not there.
        other(|bytes| bytes[HEADER_BYTES..HEADER_BYTES + 8].fill(0)),
        other(|bytes| bytes[HEADER_BYTES + 8..HEADER_BYTES + 16].fill(0)),
        sealed(other(|bytes| bytes[HEADER_BYTES + 20] = 1)),
        behind(&sealed(plain.clone())),
        in_front(1 << 20, 1 << 20, 0),
        in_front(1, 2, 0),
        in_front(1 << 20, 1, 0),
        in_front(1 << 20, 1 << 20, 1),
        b"Phys".to_vec(),
    ]
}
