//! MySQL's redo log: no panic, and what is made of a header or a block is read again.
//!
//! Input: a file's header, then blocks; read as they are, and with right checksums and numbers.

use marcot_engine::innodb::mysql::redo::{
    BLOCK_BYTES, BLOCK_HEAD_BYTES, CHECKPOINT_OFFSETS, HEADER_BYTES, Header, check_block, cut_block,
};

use crate::put;

/// The parser's files.
pub const FILES: &[&str] = &["donor/engine/src/innodb/mysql/redo.rs"];

/// Where the blocks are said to be.
const LSN: u64 = 1 << 24;

/// Runs one input.
pub fn run(data: &[u8]) {
    look(data);
    let mut bytes = data.to_vec();
    bytes.resize(HEADER_BYTES + 2 * BLOCK_BYTES, 0);
    put(&mut bytes, 0, 6);
    for offset in [0].into_iter().chain(CHECKPOINT_OFFSETS) {
        seal(&mut bytes[offset..offset + BLOCK_BYTES]);
    }
    for (index, block) in bytes[HEADER_BYTES..].chunks_mut(BLOCK_BYTES).enumerate() {
        let number = 1 + LSN / BLOCK_BYTES as u64 + index as u64;
        put(block, 0, u32::try_from(number).unwrap_or(0));
        put(block, 8, 1);
        seal(block);
    }
    look(&bytes);
}

fn seal(block: &mut [u8]) {
    let checksum = crc32c::crc32c(&block[..BLOCK_BYTES - 4]);
    put(block, BLOCK_BYTES - 4, checksum);
}

fn look(bytes: &[u8]) {
    if let Ok(header) = Header::parse(bytes) {
        let _ = (header.creator(), header.is_disabled(), format!("{header:?}"));
        let _ = header.checkpoint();
        let moved = Header::parse(&header.starting_at(LSN + 100)).expect("it was right before");
        assert_eq!((moved.start_lsn(), moved.checkpoint()), (LSN, Ok(Some(LSN + 100))));
    }
    let blocks = bytes.get(HEADER_BYTES..).unwrap_or_default().chunks_exact(BLOCK_BYTES);
    for (index, block) in blocks.enumerate() {
        let lsn = LSN + (index * BLOCK_BYTES) as u64;
        let (Ok(found), Some(block)) = (check_block(block, lsn), block.first_chunk()) else {
            continue;
        };
        assert!(found.used <= BLOCK_BYTES && found.first_group <= found.used);
        assert!(check_block(block, lsn + BLOCK_BYTES as u64).is_err(), "of one LSN alone");
        for end in [BLOCK_HEAD_BYTES + 1, found.used / 2, found.used] {
            let end = end.clamp(BLOCK_HEAD_BYTES, BLOCK_BYTES - 4);
            let cut = cut_block(block, lsn + end as u64);
            assert_eq!(check_block(&cut, lsn).map(|cut| cut.used), Ok(end));
        }
    }
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut header = vec![0; HEADER_BYTES + 2 * BLOCK_BYTES];
    put(&mut header, 0, 6);
    header[8..16].copy_from_slice(&LSN.to_be_bytes());
    header[16..27].copy_from_slice(b"MySQL 9.7.0");
    for offset in CHECKPOINT_OFFSETS {
        header[offset + 8..offset + 16].copy_from_slice(&(LSN + 40).to_be_bytes());
    }
    // A full block, then one of 100 bytes in which a group begins.
    header[HEADER_BYTES + 4..HEADER_BYTES + 8].copy_from_slice(&[2, 0, 0, 0]);
    let second = HEADER_BYTES + BLOCK_BYTES;
    header[second + 4..second + 8].copy_from_slice(&[0, 100, 0, 12]);
    vec![header, vec![0, 0, 0, 6]]
}
