//! Blocks and headers as MySQL 9.7 writes them, made here by the rules of the format.

use super::*;

/// Bytes of a block that holds `used` bytes, at `lsn`.
fn block(lsn: u64, used: u16, first_group: u16) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    let (number, epoch) = number_and_epoch(lsn);
    block[..4].copy_from_slice(&u32::try_from(number).unwrap_or(0).to_be_bytes());
    block[4..6].copy_from_slice(&used.to_be_bytes());
    block[6..8].copy_from_slice(&first_group.to_be_bytes());
    block[8..12].copy_from_slice(&u32::try_from(epoch).unwrap_or(0).to_be_bytes());
    block[12..usize::from(used).min(508)].fill(0xab);
    seal(&mut block);
    block
}

fn header(start_lsn: u64, checkpoints: [u64; 2]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    bytes[3] = 6;
    bytes[8..16].copy_from_slice(&start_lsn.to_be_bytes());
    bytes[16..27].copy_from_slice(b"MySQL 9.7.4");
    bytes[51] = 8;
    seal(&mut bytes[..BLOCK_BYTES]);
    for (offset, lsn) in CHECKPOINT_OFFSETS.into_iter().zip(checkpoints) {
        bytes[offset + 8..offset + 16].copy_from_slice(&lsn.to_be_bytes());
        seal(&mut bytes[offset..offset + BLOCK_BYTES]);
    }
    bytes
}

#[test]
fn a_block_is_known_by_its_lsn() {
    let lsn = 19_050_496;
    let full = block(lsn, 512, 12);
    assert_eq!(check_block(&full, lsn), Ok(Block { used: 512, first_group: 12 }));
    let other = check_block(&full, lsn + 512);
    assert!(matches!(other, Err(FormatError::OtherBlock { .. })), "{other:?}");
    // As many blocks later the number is the same, the epoch is not.
    let round = lsn + BLOCK_NUMBERS * 512;
    assert!(matches!(check_block(&full, round), Err(FormatError::OtherBlock { .. })));
}

#[test]
fn every_damaged_byte_of_a_block_is_seen() {
    let lsn = 19_050_496;
    for at in 0..BLOCK_BYTES {
        let mut damaged = block(lsn, 200, 12);
        damaged[at] ^= 0x10;
        assert!(check_block(&damaged, lsn).is_err(), "byte {at}");
    }
}

/// Guards the point: what came after it in its block is gone, and the block is right again.
#[test]
fn a_block_that_is_cut_ends_at_the_point() {
    let lsn = 1 << 30;
    let cut = cut_block(&block(lsn, 400, 300), lsn + 200);
    assert_eq!(check_block(&cut, lsn), Ok(Block { used: 200, first_group: 0 }));
    assert!(cut[200..508].iter().all(|&b| b == 0));
    let kept = cut_block(&block(lsn, 400, 100), lsn + 200);
    assert_eq!(check_block(&kept, lsn), Ok(Block { used: 200, first_group: 100 }));
}

#[test]
fn the_later_checkpoint_counts_and_one_that_is_being_written_does_not() {
    let header = |bytes: &[u8]| Header::parse(bytes).expect("a header");
    assert_eq!(header(&header_of([0, 0])).checkpoint(), Ok(None));
    assert_eq!(header(&header_of([9000, 8000])).checkpoint(), Ok(Some(9000)));
    let mut torn = header_of([9000, 8000]);
    torn[CHECKPOINT_OFFSETS[0] + 15] ^= 1;
    assert_eq!(header(&torn).checkpoint(), Ok(Some(8000)));
}

fn header_of(checkpoints: [u64; 2]) -> Vec<u8> {
    header(8192, checkpoints)
}

/// Guards the head of a clone's log: recovery begins at its checkpoint, in a file that is not full.
#[test]
fn a_log_that_starts_elsewhere_has_one_checkpoint_and_is_not_full() {
    let made = Header::parse(&header_of([9000, 12_000])).expect("a header").starting_at(10_000);
    let again = Header::parse(&made).expect("a header");
    assert_eq!((again.start_lsn(), again.flags()), (9728, 0));
    assert_eq!(again.checkpoint(), Ok(Some(10_000)));
}

#[test]
fn other_formats_are_refused_by_name() {
    let mut other = header_of([0, 0]);
    other[3] = 5;
    let error = Header::parse(&other).expect_err("another format").to_string();
    assert!(error.contains("format is 5") && error.contains("MySQL 9.7.4"), "{error}");
}
