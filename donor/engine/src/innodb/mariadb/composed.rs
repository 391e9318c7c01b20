//! A clone's log of MariaDB: one lap from the checkpoint to the point.
//!
//! Head and records never change once they are there, so that a recipient reads it while it grows.

use std::collections::HashSet;

use marcot_common::failure::Failure;
use tonic::Code;

use super::redo::{
    self, CHECKPOINT_OFFSETS, Checkpoint, Header, MTR_BYTES_MAX, Parsed, START_OFFSET, TAIL_BYTES,
};
use crate::innodb::{redo_file::End, redo_spool::RedoSpool, sabotage};

/// The file's size is a multiple of this.
const BLOCK_BYTES: u64 = 4096;

/// Bytes of one read while the log is checked; holds several of the longest mini-transactions.
const WALK_BYTES: usize = 4 << 20;

/// Walks along all of the log up to `end`, and says how it ends.
pub(in crate::innodb) fn end(
    spool: &RedoSpool,
    checkpoint: Checkpoint,
    end: u64,
    encrypted: bool,
) -> Result<End, Failure> {
    let end = if sabotage::is("old-redo") { earlier_end(spool, checkpoint, end)? } else { end };
    check(spool, checkpoint, end, encrypted)?;
    let size = START_OFFSET + (end - checkpoint.lsn) + TAIL_BYTES;
    let bytes = size.next_multiple_of(BLOCK_BYTES) - START_OFFSET;
    Ok(End { lsn: end, tail: Vec::new(), bytes })
}

/// Sabotage: the end of a mini-transaction well before `end`.
fn earlier_end(spool: &RedoSpool, checkpoint: Checkpoint, end: u64) -> Result<u64, Failure> {
    let half = checkpoint.end_lsn.max(checkpoint.lsn) + (end - checkpoint.end_lsn) / 2;
    let mut bytes = vec![0; usize::try_from(half - checkpoint.lsn).unwrap_or(0)];
    spool.read(checkpoint.lsn, &mut bytes)?;
    Ok(checkpoint.lsn + redo::walk(&bytes, false).bytes as u64)
}

/// Header and checkpoint. The log starts at the checkpoint, so all of it is one lap.
pub(in crate::innodb) fn head(header: &Header, checkpoint: Checkpoint) -> Vec<u8> {
    let mut head = vec![0; usize::try_from(START_OFFSET).unwrap_or(0)];
    let header = header.starting_at(checkpoint.lsn);
    head[..header.len()].copy_from_slice(&header);
    let block = checkpoint.to_bytes();
    let at = usize::try_from(CHECKPOINT_OFFSETS[0]).unwrap_or(0);
    head[at..at + block.len()].copy_from_slice(&block);
    head
}

/// Walks along the log as recovery will.
fn check(
    spool: &RedoSpool,
    checkpoint: Checkpoint,
    end: u64,
    encrypted: bool,
) -> Result<(), Failure> {
    let wrong = |why: String| {
        let text = format!(
            "the redo log from LSN {} to {end} would not start the clone: {why}",
            checkpoint.lsn
        );
        Err(Failure::new(Code::DataLoss, "REDO_INVALID", text))
    };
    if checkpoint.end_lsn >= end {
        return wrong(format!("its checkpoint ends at LSN {}", checkpoint.end_lsn));
    }
    let mut buffer = vec![0; WALK_BYTES];
    let mut at = checkpoint.lsn;
    let mut is_ended = false;
    while at < end {
        let length = usize::try_from(end - at).unwrap_or(WALK_BYTES).min(WALK_BYTES);
        let bytes = &mut buffer[..length];
        spool.read(at, bytes)?;
        let walked = redo::walk(bytes, encrypted);
        let passed = at + walked.bytes as u64;
        if !is_ended && (at..passed).contains(&checkpoint.end_lsn) {
            let offset = usize::try_from(checkpoint.end_lsn - at).unwrap_or(0);
            let records = &bytes[offset..];
            match redo::ends_checkpoint(records, checkpoint.lsn, encrypted) {
                Some(true) => is_ended = true,
                Some(false) => {
                    let lsn = checkpoint.end_lsn;
                    return wrong(format!("no checkpoint ends at LSN {lsn}"));
                }
                None if passed == end => return wrong("its checkpoint has no end".to_owned()),
                // Its records go on in the next bytes: read again from here.
                None if offset > 0 => {
                    at = checkpoint.end_lsn;
                    continue;
                }
                None => return wrong("its checkpoint's records are too long".to_owned()),
            }
        }
        if walked.bytes == 0
            || (passed < end && end - passed < MTR_BYTES_MAX as u64 && length as u64 == end - at)
        {
            return wrong(match walked.then {
                Parsed::Bad(bad) => format!("at LSN {passed} {bad}"),
                _ => format!("LSN {end} is within a mini-transaction"),
            });
        }
        at = passed;
    }
    if is_ended { Ok(()) } else { wrong("its checkpoint has no end".to_owned()) }
}

/// Tablespaces whose first page the log makes, by id; its walk has found it right. Only for one that
/// does not hide ids.
pub(in crate::innodb) fn made_spaces(
    spool: &RedoSpool,
    checkpoint: Checkpoint,
    end: u64,
    encrypted: bool,
) -> Result<HashSet<u32>, Failure> {
    let mut made = HashSet::new();
    let mut buffer = vec![0; WALK_BYTES];
    let mut lsn = checkpoint.lsn;
    while lsn < end {
        let length = usize::try_from(end - lsn).unwrap_or(WALK_BYTES).min(WALK_BYTES);
        let bytes = &mut buffer[..length];
        spool.read(lsn, bytes)?;
        let mut at = 0;
        while let Parsed::Mtr(mtr) = redo::parse_mtr(&bytes[at..], encrypted) {
            redo::made_spaces(&bytes[at..at + mtr.record_bytes], &mut |space| {
                made.insert(space);
            });
            at += mtr.bytes;
        }
        if at == 0 {
            return Err(Failure::bug(format!("redo at LSN {lsn} was right and does not parse")));
        }
        lsn += at as u64;
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: u64 = 20_000;

    fn mtr(records: &[u8], bit: u8) -> Vec<u8> {
        let crc = crc32c::crc32c(records);
        [records, &[bit], &crc.to_be_bytes()].concat()
    }

    /// A log: some records, those that end the checkpoint at `lsn`, some more. Also where each
    /// mini-transaction ends, and which of them ends the checkpoint.
    fn log(lsn: u64) -> (Vec<u8>, Vec<u64>, u64) {
        let page = |n: u8| mtr(&[0x35, 7, n, 1, 2, n.max(2)], 1);
        let ends = [&[0xfa, 0, 0][..], &lsn.to_be_bytes()].concat();
        let named = mtr(&[&[0xb9, 5, 0][..], b"./a.ibd"].concat(), 1);
        let parts = [page(1), page(2), named, mtr(&ends, 1), page(3), page(4), page(5)];
        let mut boundaries = Vec::new();
        let mut at = FIRST;
        for part in &parts {
            at += part.len() as u64;
            boundaries.push(at);
        }
        let end_lsn = boundaries[1];
        (parts.concat(), boundaries, end_lsn)
    }

    fn checked(bytes: &[u8], end_lsn: u64, end: u64) -> Result<(), Failure> {
        let directory = tempfile::tempdir().unwrap();
        let spool = RedoSpool::holding(directory.path(), FIRST, bytes);
        check(&spool, Checkpoint { lsn: FIRST, end_lsn }, end, false)
    }

    fn refused(bytes: &[u8], end_lsn: u64, end: u64) -> String {
        let failure = checked(bytes, end_lsn, end).unwrap_err();
        assert_eq!((failure.code, &*failure.reason), (Code::DataLoss, "REDO_INVALID"));
        for lsn in [FIRST, end] {
            assert!(failure.message.contains(&lsn.to_string()), "{failure}");
        }
        failure.message
    }

    /// Guards T as an end of a mini-transaction: recovery would drop the one that it cuts.
    #[test]
    fn a_log_ends_where_a_mini_transaction_ends() {
        let (bytes, boundaries, end_lsn) = log(FIRST);
        for end in boundaries[3] + 1..=FIRST + bytes.len() as u64 {
            if boundaries.contains(&end) {
                assert!(checked(&bytes, end_lsn, end).is_ok(), "{end}");
            } else {
                assert!(refused(&bytes, end_lsn, end).contains("within"), "{end}");
            }
        }
    }

    /// Guards the bit that ends each: a server that meets another one takes it for the log's end.
    #[test]
    fn a_mini_transaction_of_another_lap_is_refused() {
        let (mut bytes, boundaries, end_lsn) = log(FIRST);
        let (after, end) = (boundaries[4], boundaries[6]);
        let at = usize::try_from(after - FIRST).unwrap() - 5;
        assert_eq!(bytes[at], 1);
        bytes[at] = 0;
        refused(&bytes, end_lsn, end);
    }

    /// Guards what a server looks for first: without it it refuses the log, `Missing FILE_CHECKPOINT`.
    #[test]
    fn a_log_without_its_checkpoints_end_is_refused() {
        let (bytes, boundaries, end_lsn) = log(FIRST + 1);
        assert!(refused(&bytes, end_lsn, boundaries[6]).contains("no checkpoint ends"));
        let (bytes, boundaries, _) = log(FIRST);
        // Where pages are changed, not where files are named.
        assert!(refused(&bytes, boundaries[4], boundaries[6]).contains("no checkpoint ends"));
        assert!(refused(&bytes, FIRST, boundaries[6]).contains("no checkpoint ends"));
    }

    #[test]
    fn a_log_that_is_cut_before_its_checkpoint_ends_is_refused() {
        let (bytes, boundaries, end_lsn) = log(FIRST);
        assert!(refused(&bytes, end_lsn, end_lsn).contains("its checkpoint ends at"));
        assert!(refused(&bytes, end_lsn, boundaries[0]).contains("its checkpoint ends at"));
        assert!(refused(&bytes, end_lsn, boundaries[2]).contains("no end"));
    }
}
