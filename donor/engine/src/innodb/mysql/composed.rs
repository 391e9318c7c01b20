//! A clone's log of MySQL: one file, from the block of the checkpoint to the block of the point.

use marcot_common::failure::Failure;
use tonic::Code;

use super::{
    log_files::written_end,
    redo::{BLOCK_BYTES, HEADER_BYTES, block_start, check_block, cut_block},
};
use crate::innodb::{redo_file::End, redo_spool::RedoSpool, sabotage};

/// The file's size is a multiple of this: LOG_FILE_MIN_SIZE, and of every page size.
const SIZE_UNIT_BYTES: u64 = 64 << 10;

/// Largest file that the server takes: LOG_FILE_MAX_SIZE, the most that it may hold in all (128 GiB
/// in 8.0) by the number of its files.
pub(in crate::innodb) const SIZE_BYTES_MAX: u64 = 4 << 30;

/// Bytes of one read while the log is checked.
const WALK_BYTES: usize = 4 << 20;

/// Walks along all of the log up to `end`, and says how it ends.
pub(in crate::innodb) fn end(spool: &RedoSpool, checkpoint: u64, end: u64) -> Result<End, Failure> {
    let end = match sabotage::is("old-redo") {
        true => checkpoint + (end - checkpoint) / 2,
        false => end,
    };
    let last = block_start(written_end(end));
    check_size(checkpoint, last)?;
    check(spool, checkpoint, last)?;
    let mut tail = Vec::new();
    if written_end(end) > last {
        let mut block = [0; BLOCK_BYTES];
        spool.read(last, &mut block)?;
        let found = check_block(&block, last).map_err(|error| invalid(checkpoint, end, &error))?;
        if last + (found.used as u64) < end {
            let why = format!("its last block ends at LSN {}", last + found.used as u64);
            return Err(invalid(checkpoint, end, &why));
        }
        tail.extend_from_slice(&cut_block(&block, end));
        check_block(&tail, last).map_err(|error| invalid(checkpoint, end, &error))?;
    }
    Ok(End { lsn: last, tail, bytes: size(checkpoint, last) - HEADER_BYTES as u64 })
}

/// Bytes of the file that is a log from a checkpoint to an LSN.
fn size(checkpoint: u64, end: u64) -> u64 {
    // A block more, so that there is an end.
    let blocks = block_start(end).saturating_sub(block_start(checkpoint)) + 2 * BLOCK_BYTES as u64;
    (HEADER_BYTES as u64 + blocks).next_multiple_of(SIZE_UNIT_BYTES)
}

/// Fails when a log from a checkpoint to an LSN is more than a server takes in one file: a log only
/// grows, so that a clone which recovers from this checkpoint can be given up at once.
pub(in crate::innodb) fn check_size(checkpoint: u64, end: u64) -> Result<(), Failure> {
    let bytes = size(checkpoint, end);
    if bytes <= SIZE_BYTES_MAX {
        return Ok(());
    }
    let text = format!(
        "the server's last checkpoint is at LSN {checkpoint}, its redo log is at LSN {end}: a clone \
         that recovers from there needs {bytes} bytes of redo, and its one redo log file may have \
         {SIZE_BYTES_MAX}; have the server write its changed pages (SET GLOBAL \
         innodb_max_dirty_pages_pct=0 for a while, or a smaller innodb_redo_log_capacity), and clone \
         again"
    );
    Err(Failure::precondition("CHECKPOINT_TOO_OLD", text).with("bytes", bytes))
}

/// Every block up to `end` is there, of its LSN, right and full; recovery can begin in the first.
fn check(spool: &RedoSpool, checkpoint: u64, end: u64) -> Result<(), Failure> {
    let mut buffer = vec![0; WALK_BYTES];
    let mut at = block_start(checkpoint);
    let mut has_group = false;
    while at < end {
        let length = usize::try_from(end - at).unwrap_or(WALK_BYTES).min(WALK_BYTES);
        let bytes = &mut buffer[..length];
        spool.read(at, bytes)?;
        for block in bytes.chunks_exact(BLOCK_BYTES) {
            let found = check_block(block, at).map_err(|error| invalid(checkpoint, end, &error))?;
            if found.used != BLOCK_BYTES {
                let why = format!("the block at LSN {at} is not full");
                return Err(invalid(checkpoint, end, &why));
            }
            has_group |= found.first_group != 0;
            at += BLOCK_BYTES as u64;
        }
    }
    // A log of one block has its group there, or nothing to recover.
    if !has_group && end > block_start(checkpoint) + BLOCK_BYTES as u64 {
        return Err(invalid(checkpoint, end, &"no group of records begins in it"));
    }
    Ok(())
}

fn invalid(checkpoint: u64, end: u64, why: &dyn std::fmt::Display) -> Failure {
    let text =
        format!("the redo log from LSN {checkpoint} to {end} would not start the clone: {why}");
    Failure::new(Code::DataLoss, "REDO_INVALID", text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards against a log that no server starts on: it is refused as soon as its length is known, at
    /// the last byte that fits and not before. Without it that is found after all rounds.
    #[test]
    fn a_checkpoint_too_far_back_for_one_file_is_named_with_both_values() {
        let checkpoint = (5 << 30) + 77;
        let start = block_start(checkpoint);
        let most = SIZE_BYTES_MAX - HEADER_BYTES as u64 - 2 * BLOCK_BYTES as u64;
        let last = block_start(start + most);
        assert_eq!(size(checkpoint, last), SIZE_BYTES_MAX);
        check_size(checkpoint, last + BLOCK_BYTES as u64 - 1).unwrap();
        let end = last + BLOCK_BYTES as u64;
        let failure = check_size(checkpoint, end).unwrap_err();
        assert_eq!(failure.reason, "CHECKPOINT_TOO_OLD");
        let bytes = SIZE_BYTES_MAX + SIZE_UNIT_BYTES;
        for value in [checkpoint, end, bytes, SIZE_BYTES_MAX] {
            assert!(failure.message.contains(&value.to_string()), "{failure}");
        }
    }
}
