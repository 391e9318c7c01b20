//! What a running clone has done so far: counters that streams add to and the status reads.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use marcot_common::{
    entry::{Change, Entry, Kind},
    failure::Failure,
    path::RelativePath,
};
use marcot_proto::recipient::v1 as pb;
use tonic::Code;

use crate::{
    copy_journal::{CopyFound, record::UnitDone},
    plan::SEGMENT_BYTES,
    retry::Retries,
    writer::Unfinished,
};

/// Most files that may be unfinished at the end of a round: held in memory, some 300 bytes each.
const UNFINISHED_MAX: usize = 16 << 10;

/// A counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Subtracts.
    pub fn subtract(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    fn reset(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// Reads.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of one clone.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes of data written, holes not among them.
    pub data_bytes: Counter,
    /// Bytes of holes passed over.
    pub hole_bytes: Counter,
    /// Bytes received from the network.
    pub network_bytes: Counter,
    /// Bytes whose checksum was right.
    pub verified_bytes: Counter,
    /// Files finished.
    pub files_copied: Counter,
    /// Bytes that an older copy on this host has given.
    pub reused_bytes: Counter,
    /// Bytes that were asked for again.
    pub resent_bytes: Counter,
    /// Nanoseconds that streams have waited for a limit, of all of them together.
    pub throttled: Counter,
    /// Streams at work.
    pub streams: Counter,
    /// What was tried again.
    pub retries: Retries,
    /// By path: what stands there in a later round may be another file.
    unfinished: Mutex<BTreeMap<RelativePath, Unfinished>>,
}

impl Progress {
    /// Another snapshot begins, from its first file on. What the network has carried stays counted.
    pub fn begin_again(&self, cause: String) {
        self.files_copied.reset();
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.retries.note(cause);
    }

    /// Counts what an earlier run of the clone has copied.
    pub fn go_on_from(&self, found: &CopyFound, clone: &pb::Clone) {
        if let Some(round) = &found.round {
            let grown: u64 = round.growing.iter().map(|file| file.durable).sum();
            let data = round.done.data_bytes.saturating_add(grown);
            self.data_bytes.add(data);
            let verified = data.saturating_sub(round.done.reused_bytes);
            self.verified_bytes.add(verified);
            // What had come of units that were not recorded yet, which is bounded; a snapshot that was
            // lost before is no part of it.
            let lost = clone.verified_bytes.saturating_sub(verified);
            self.resent_bytes.add(lost.min(SEGMENT_BYTES));
            self.hole_bytes.add(round.done.hole_bytes);
            self.reused_bytes.add(round.done.reused_bytes);
            self.files_copied.add(round.done.files);
        }
        self.network_bytes.add(clone.stages.iter().map(|row| row.network_bytes).sum());
        self.resent_bytes.add(clone.resent_bytes);
        self.retries.count.add(clone.retries.into());
    }

    /// A unit that was counted has to be copied again.
    pub fn take_back(&self, done: &UnitDone) {
        self.data_bytes.subtract(done.data_bytes);
        self.verified_bytes.subtract(done.data_bytes.saturating_sub(done.reused_bytes));
        self.hole_bytes.subtract(done.hole_bytes);
        self.reused_bytes.subtract(done.reused_bytes);
        self.files_copied.subtract(done.files);
    }

    /// Notes files that the next round must list again.
    pub fn note_unfinished(&self, files: Vec<Unfinished>) -> Result<(), Failure> {
        let mut noted = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner);
        for file in files {
            noted.insert(file.part.path.clone(), file);
        }
        if noted.len() > UNFINISHED_MAX {
            return Err(Failure::new(
                Code::Aborted,
                "SOURCE_CHANGED",
                format!(
                    "more than {UNFINISHED_MAX} files changed on the donor while they were copied; \
                     stop what writes there, or use an engine for a live server"
                ),
            ));
        }
        Ok(())
    }

    /// Takes note of what a later round lists: what it reads in full, or removes, is unfinished no
    /// more; a file that it renames still is.
    pub fn listed_again(&self, entry: &Entry) {
        let mut unfinished = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner);
        if unfinished.is_empty() {
            return;
        }
        match entry.change {
            Change::Add | Change::Replace | Change::Remove => {
                unfinished.remove(&entry.path);
                if entry.kind != Some(Kind::Directory) {
                    unfinished.retain(|path, _| !path.is_below(&entry.path));
                }
            }
            Change::Rename => {
                let id = entry.file_id;
                let old = unfinished.iter().find(|(_, file)| file.part.file_id == id);
                if let Some(old) = old.map(|(path, _)| path.clone())
                    && let Some(file) = unfinished.remove(&old)
                {
                    unfinished.insert(entry.path.clone(), file);
                }
            }
            Change::Truncate | Change::Patch => {}
        }
    }

    /// All files that are still unfinished.
    #[must_use]
    pub fn unfinished(&self) -> Vec<Unfinished> {
        let unfinished = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner);
        unfinished.values().cloned().collect()
    }

    /// A file that is still unfinished.
    #[must_use]
    pub fn any_unfinished(&self) -> Option<Unfinished> {
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner).values().next().cloned()
    }
}

#[cfg(test)]
mod tests {
    use marcot_common::entry::{Attributes, FileId};

    use super::*;
    use crate::plan::Part;

    fn path(text: &str) -> RelativePath {
        RelativePath::new(text.as_bytes()).unwrap()
    }

    fn entry(text: &str, id: u64, change: Change, kind: Option<Kind>) -> Entry {
        let attributes = Attributes::default();
        let (path, file_id) = (path(text), FileId(id));
        Entry { number: 0, file_id, change, path, kind, attributes, growing: false }
    }

    fn unfinished(text: &str, id: u64) -> Unfinished {
        let part = Part {
            file_id: FileId(id),
            path: path(text),
            size: 1,
            offset: 0,
            length: 1,
            whole: None,
            patches: false,
        };
        Unfinished { part, failure: Failure::bug("changed") }
    }

    /// Guards that an unfinished file is known by its path: by its id alone, one that another file
    /// has replaced would fail the clone, and one that was only renamed or patched would pass.
    #[test]
    fn only_what_is_read_again_or_gone_is_unfinished_no_more() {
        let regular = || Some(Kind::Regular { size: 1, allocated: 1 });
        for (change, kind, id, is_left) in [
            (Change::Replace, regular(), 9, false),
            (Change::Replace, regular(), 7, false),
            (Change::Remove, None, 7, false),
            (Change::Patch, regular(), 7, true),
        ] {
            let progress = Progress::default();
            progress.note_unfinished(vec![unfinished("d/f", 7)]).unwrap();
            progress.listed_again(&entry("d/f", id, change, kind));
            assert_eq!(progress.any_unfinished().is_some(), is_left, "{change:?} of {id}");
        }
        let progress = Progress::default();
        progress.note_unfinished(vec![unfinished("d/f", 7)]).unwrap();
        progress.listed_again(&entry("d", 3, Change::Replace, Some(Kind::Directory)));
        assert!(progress.any_unfinished().is_some(), "the directory has new attributes only");
        progress.listed_again(&entry("d/g", 7, Change::Rename, regular()));
        progress.listed_again(&entry("d/f", 8, Change::Add, regular()));
        assert!(progress.any_unfinished().is_some(), "it has another name now");
        progress.listed_again(&entry("d", 3, Change::Remove, None));
        assert!(progress.any_unfinished().is_none());
    }
}
