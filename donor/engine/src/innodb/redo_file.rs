//! The log that the clone starts on: one lap from the checkpoint to the point.
//!
//! Head and records never change once they are there, so that a recipient reads it while it grows.

use std::{fs::File, sync::Arc};

use marcot_common::{entry::Attributes, failure::Failure, path::RelativePath};
use tonic::Code;

use super::{
    follower::{Hold, RedoSpool},
    log_file::LOG_NAME,
    redo::{self, CHECKPOINT_OFFSETS, Checkpoint, MTR_BYTES_MAX, Parsed, START_OFFSET, TAIL_BYTES},
    sabotage,
    tablespace::open_any,
};
use crate::{
    Content, FileReader, Span,
    files::{tree::Tree, walk::attributes_of_file},
};

/// The file's size is a multiple of this.
const BLOCK_BYTES: u64 = 4096;

/// Bytes of one read while the log is checked; holds several of the longest mini-transactions.
const WALK_BYTES: usize = 4 << 20;

/// A composed log file.
#[derive(Debug, Clone)]
pub(super) struct RedoFile {
    head: Arc<[u8]>,
    spool: Arc<RedoSpool>,
    checkpoint: u64,
    end: u64,
    /// Whether more of it is still to come.
    growing: bool,
    /// Keeps the spool's bytes.
    _hold: Arc<Hold>,
}

impl RedoFile {
    /// Composes the log from the hold's checkpoint to `end`, which has been followed, and walks
    /// along all of it once more.
    pub(super) fn compose(hold: &Arc<Hold>, end: u64) -> Result<Self, Failure> {
        let checkpoint = hold.checkpoint;
        let spool = hold.spool();
        let end =
            if sabotage::is("old-redo") { earlier_end(&spool, checkpoint, end)? } else { end };
        check(&spool, checkpoint, end, hold.header.is_encrypted())?;
        Ok(Self {
            head: head(hold).into(),
            spool,
            checkpoint: checkpoint.lsn,
            end,
            growing: false,
            _hold: Arc::clone(hold),
        })
    }

    /// What there is of the log so far: it is as `compose` will have it, up to its present end.
    /// Once the follower has lost the log nothing is added any more.
    pub(super) fn so_far(hold: &Arc<Hold>) -> Self {
        let checkpoint = hold.checkpoint.lsn;
        Self {
            head: head(hold).into(),
            spool: hold.spool(),
            checkpoint,
            end: hold.end().unwrap_or(checkpoint),
            growing: true,
            _hold: Arc::clone(hold),
        }
    }

    fn records_end(&self) -> u64 {
        START_OFFSET + (self.end - self.checkpoint)
    }

    /// Its bytes.
    pub(super) fn size(&self) -> u64 {
        if self.growing {
            return self.records_end();
        }
        (self.records_end() + TAIL_BYTES).next_multiple_of(BLOCK_BYTES)
    }

    /// Reads it.
    pub(super) fn reader(&self) -> RedoReader {
        RedoReader(self.clone())
    }
}

/// Sabotage: the end of a mini-transaction well before `end`.
fn earlier_end(spool: &RedoSpool, checkpoint: Checkpoint, end: u64) -> Result<u64, Failure> {
    let half = checkpoint.end_lsn.max(checkpoint.lsn) + (end - checkpoint.end_lsn) / 2;
    let mut bytes = vec![0; usize::try_from(half - checkpoint.lsn).unwrap_or(0)];
    spool.read(checkpoint.lsn, &mut bytes)?;
    Ok(checkpoint.lsn + redo::walk(&bytes, false).bytes as u64)
}

/// Header and checkpoint. The log starts at the checkpoint, so all of it is one lap.
fn head(hold: &Hold) -> Vec<u8> {
    let mut head = vec![0; usize::try_from(START_OFFSET).unwrap_or(0)];
    let header = hold.header.starting_at(hold.checkpoint.lsn);
    head[..header.len()].copy_from_slice(&header);
    let block = hold.checkpoint.to_bytes();
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

/// Attributes for files that the clone gets and the donor has not: those of its log.
pub(super) fn attributes(tree: &Tree) -> Result<Attributes, Failure> {
    let path = RelativePath::new(LOG_NAME.as_bytes())
        .map_err(|e| Failure::bug(format!("{LOG_NAME}: {e}")))?;
    let file = open_any(tree, &path)?;
    attributes_of_file(&file, &tree.shown(Some(&path)))
}

/// Reads a composed log.
#[derive(Debug)]
pub(super) struct RedoReader(RedoFile);

impl FileReader for RedoReader {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn is_growing(&self) -> bool {
        self.0.growing
    }

    fn span(&mut self, offset: u64, end: u64) -> Result<Span, Failure> {
        // Head, records, zeros: a span does not cross from one to another.
        let records_end = self.0.records_end();
        let bound = match offset {
            n if n < START_OFFSET => START_OFFSET,
            n if n < records_end => records_end,
            _ => self.0.size(),
        };
        Ok(Span { end: bound.min(end), content: Content::Data })
    }

    fn read_exact_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let end = self.span(at, self.size().max(at + 1))?.end;
            let left = buffer.len() - done;
            let length = usize::try_from(end - at).unwrap_or(left).clamp(1, left);
            let part = &mut buffer[done..done + length];
            if at < START_OFFSET {
                let from = usize::try_from(at).unwrap_or(0);
                part.copy_from_slice(&self.0.head[from..from + length]);
            } else if at < self.0.records_end() {
                self.0.spool.read(self.0.checkpoint + (at - START_OFFSET), part)?;
            } else {
                part.fill(0);
            }
            done += length;
        }
        Ok(())
    }

    fn check_unchanged(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    fn file(&self) -> Option<&File> {
        None
    }
}
