//! The log that the clone starts on: from the checkpoint to the point.
//!
//! ```text
//! head      of the server's log, with the one checkpoint
//! records   from the spool: they never change once they are there, so that a recipient reads them
//!           while the log grows
//! tail      MySQL: the last block, cut at the point
//! zeros     so that recovery finds an end
//! ```

use std::{collections::HashSet, fs::File, sync::Arc};

use marcot_common::{entry::Attributes, failure::Failure, path::RelativePath};

use super::{
    follower::Hold,
    mariadb, mysql,
    redo_log::{Head, log_name},
    redo_spool::RedoSpool,
    snapshot::path,
    tablespace::open_any,
};
use crate::{
    Content, FileReader, Span,
    files::{
        tree::{Tree, changed},
        walk::attributes_of_file,
    },
};

/// A composed log file.
#[derive(Debug, Clone)]
pub(super) struct RedoFile {
    head: Arc<[u8]>,
    spool: Arc<RedoSpool>,
    /// LSN of the first byte after the head.
    start: u64,
    /// LSN of the first byte after what the spool gives.
    end: u64,
    tail: Arc<[u8]>,
    size: u64,
    /// Whether more of it is still to come.
    growing: bool,
    /// Keeps the spool's bytes.
    hold: Arc<Hold>,
}

/// What makes a log whole at its end.
#[derive(Debug)]
pub(super) struct End {
    /// LSN of the first byte that the spool does not give.
    pub(super) lsn: u64,
    /// What comes then.
    pub(super) tail: Vec<u8>,
    /// Bytes that the file has after its head, zeros counted.
    pub(super) bytes: u64,
}

impl RedoFile {
    /// Composes the log from the hold's checkpoint to `end`, which has been followed, and walks
    /// along all of it once more.
    pub(super) fn compose(hold: &Arc<Hold>, end: u64) -> Result<Self, Failure> {
        let spool = hold.spool();
        let whole = match &hold.head {
            Head::MariaDb { header, checkpoint } => {
                mariadb::composed::end(&spool, *checkpoint, end, header.is_encrypted())?
            }
            Head::MySql { checkpoint, .. } => mysql::composed::end(&spool, *checkpoint, end)?,
        };
        let head: Arc<[u8]> = head(hold).into();
        let size = head.len() as u64 + whole.bytes;
        let (start, end, tail) = (hold.head.start(), whole.lsn, whole.tail.into());
        let hold = Arc::clone(hold);
        Ok(Self { head, spool, start, end, tail, size, growing: false, hold })
    }

    /// What there is of the log so far: it is as `compose` will have it, up to its present end.
    /// Once the follower has lost the log nothing is added any more.
    pub(super) fn so_far(hold: &Arc<Hold>) -> Self {
        let start = hold.head.start();
        let followed = hold.end().unwrap_or(start);
        let end = match &hold.head {
            Head::MariaDb { .. } => followed,
            Head::MySql { .. } => mysql::redo::block_start(followed),
        };
        let head: Arc<[u8]> = head(hold).into();
        let size = head.len() as u64 + (end - start);
        let (spool, tail) = (hold.spool(), Vec::new().into());
        Self { head, spool, start, end, tail, size, growing: true, hold: Arc::clone(hold) }
    }

    /// Redo that one file may hold, with room for what comes while a round is made of it.
    pub(super) fn bytes_max(hold: &Hold) -> u64 {
        match &hold.head {
            Head::MariaDb { .. } => u64::MAX,
            Head::MySql { .. } => mysql::composed::SIZE_BYTES_MAX / 2,
        }
    }

    /// Tablespaces whose first page it makes, by id; nothing where it does not tell.
    pub(super) fn made_spaces(&self) -> Result<Option<HashSet<u32>>, Failure> {
        match &self.hold.head {
            Head::MariaDb { header, .. } if header.hides_ids() => Ok(None),
            Head::MariaDb { header, checkpoint } => {
                let encrypted = header.is_encrypted();
                mariadb::composed::made_spaces(&self.spool, *checkpoint, self.end, encrypted)
                    .map(Some)
            }
            // It writes the first page as it makes a file.
            Head::MySql { .. } => Ok(Some(HashSet::new())),
        }
    }

    /// Fails when a log from the hold's checkpoint to `end` is longer than its server takes.
    pub(super) fn check_size(hold: &Hold, end: u64) -> Result<(), Failure> {
        match &hold.head {
            Head::MariaDb { .. } => Ok(()),
            Head::MySql { checkpoint, .. } => mysql::composed::check_size(*checkpoint, end),
        }
    }

    /// Its bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// An error once redo of it may have been freed.
    pub(super) fn check_kept(&self) -> Result<(), Failure> {
        match self.hold.check_kept() {
            // What comes instead of it, a later list has.
            Err(_) if self.growing => Err(changed(&path(log_name(self.hold.flavor()))?)),
            kept => kept,
        }
    }

    /// Reads it.
    pub(super) fn reader(&self) -> RedoReader {
        RedoReader(self.clone())
    }

    /// Where its parts end: head, records, tail, all of it.
    fn part_ends(&self) -> [u64; 4] {
        let head = self.head.len() as u64;
        let records = head + (self.end - self.start);
        [head, records, records + self.tail.len() as u64, self.size]
    }
}

fn head(hold: &Hold) -> Vec<u8> {
    match &hold.head {
        Head::MariaDb { header, checkpoint } => mariadb::composed::head(header, *checkpoint),
        Head::MySql { header, checkpoint } => header.starting_at(*checkpoint).to_vec(),
    }
}

/// Attributes for files that the clone gets and the donor has not: those of a file of its own.
pub(super) fn attributes(tree: &Tree, like: &[u8]) -> Result<Attributes, Failure> {
    let path = RelativePath::new(like)
        .map_err(|e| Failure::bug(format!("{}: {e}", like.escape_ascii())))?;
    let file = open_any(tree, &path)?;
    attributes_of_file(&file, &tree.shown(Some(&path)))
}

/// Reads a composed log.
#[derive(Debug)]
pub(super) struct RedoReader(RedoFile);

impl FileReader for RedoReader {
    fn size(&self) -> u64 {
        self.0.size
    }

    fn is_growing(&self) -> bool {
        self.0.growing
    }

    fn span(&mut self, offset: u64, end: u64) -> Result<Span, Failure> {
        // A span does not cross from one part to another.
        let bound = self.0.part_ends().into_iter().find(|&bound| offset < bound);
        Ok(Span { end: bound.unwrap_or(self.0.size).min(end), content: Content::Data })
    }

    fn read_exact_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        let [head_end, records_end, tail_end, size] = self.0.part_ends();
        let copy = |from: &[u8], at: u64, part: &mut [u8]| {
            let from = from.get(usize::try_from(at).unwrap_or(usize::MAX)..);
            from.and_then(|from| from.get(..part.len())).map(|from| part.copy_from_slice(from))
        };
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let end = self.span(at, size.max(at + 1))?.end;
            let left = buffer.len() - done;
            let length = usize::try_from(end - at).unwrap_or(left).clamp(1, left);
            let part = &mut buffer[done..done + length];
            let copied = match at {
                _ if at < head_end => copy(&self.0.head, at, part),
                _ if at < records_end => {
                    let read = self.0.spool.read(self.0.start + (at - head_end), part);
                    // It says why; the spool only that it was freed.
                    self.0.check_kept()?;
                    read?;
                    Some(())
                }
                _ if at < tail_end => copy(&self.0.tail, at - records_end, part),
                _ => {
                    part.fill(0);
                    Some(())
                }
            };
            copied
                .ok_or_else(|| Failure::bug(format!("the redo log is read at {at} of {size}")))?;
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
