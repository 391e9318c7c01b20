//! What a running clone has done so far: counters that streams add to and the status reads.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use marcot_common::{
    entry::{Change, Entry, Kind},
    failure::Failure,
    path::RelativePath,
    shown::clean,
    time,
};
use marcot_proto::recipient::v1 as pb;
use prometheus_client::metrics::counter::Counter as Total;
use tonic::Code;

use crate::{
    copy_journal::{CopyFound, record::UnitDone},
    counts::{Counts, ResumeCause},
    plan::under_way_bytes_max,
    retry::Retries,
    settings::CONCURRENCY_MAX,
    writer::Unfinished,
};

/// Most files that may be unfinished at the end of a round: held in memory, some 300 bytes each.
const UNFINISHED_MAX: usize = 16 << 10;

/// Most bytes of their paths and of why: 500 for each.
const UNFINISHED_BYTES_MAX: usize = 8 << 20;

/// Longest word of a donor on its pace, characters: a line of its own makes 120.
const HELD_BACK_MAX: usize = 400;

/// A counter of one clone, which counts for the process as well.
#[derive(Debug, Default)]
pub struct Counter {
    own: AtomicU64,
    total: Total,
}

impl Counter {
    fn of(total: &Total) -> Self {
        Self { own: AtomicU64::new(0), total: total.clone() }
    }

    /// Adds.
    pub fn add(&self, n: u64) {
        self.restore(n);
        self.total.inc_by(n);
    }

    /// Adds what an earlier process has counted.
    fn restore(&self, n: u64) {
        self.own.fetch_add(n, Ordering::Relaxed);
    }

    /// Subtracts: of the clone, for what the process has done it has done.
    pub fn subtract(&self, n: u64) {
        self.own.fetch_sub(n, Ordering::Relaxed);
    }

    fn reset(&self) {
        self.own.store(0, Ordering::Relaxed);
    }

    /// Reads.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.own.load(Ordering::Relaxed)
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
    /// Bytes that came again: what a call had brought when it was cut, blocks that had come before and are
    /// others now, and what was lost with an earlier run.
    pub resent_bytes: Counter,
    /// Bytes that had come, of units that are copied again: what is not found here comes again.
    lost: Mutex<u64>,
    /// Nanoseconds that streams have waited for a limit, of all of them together.
    pub throttled: Counter,
    /// Streams at work.
    pub streams: Counter,
    /// What was tried again.
    pub retries: Retries,
    /// Why the donor reads more slowly than it could.
    held_back: Mutex<String>,
    /// What all clones of this process have counted.
    pub counts: Arc<Counts>,
    /// By path: what stands there in a later round may be another file.
    unfinished: Mutex<BTreeMap<RelativePath, Unfinished>>,
}

impl Progress {
    /// Why the donor reads more slowly than it could, as it has said last; empty: it does not.
    #[must_use]
    pub fn held_back(&self) -> String {
        self.held_back.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes what the donor says, cut to what a person reads.
    pub fn set_held_back(&self, reason: &str) {
        let reason = clean(reason).chars().take(HELD_BACK_MAX).collect();
        *self.held_back.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }

    /// Nothing has been done yet; what will be counts in `counts` too.
    #[must_use]
    pub fn new(counts: &Arc<Counts>) -> Self {
        Self {
            data_bytes: Counter::of(&counts.data_bytes),
            network_bytes: Counter::of(&counts.network_bytes),
            verified_bytes: Counter::of(&counts.verified_bytes),
            reused_bytes: Counter::of(&counts.reused_bytes),
            resent_bytes: Counter::of(&counts.resent_bytes),
            throttled: Counter::of(&counts.throttled_nanoseconds),
            retries: Retries::new(counts),
            counts: Arc::clone(counts),
            ..Self::default()
        }
    }

    /// Another snapshot begins, from its first file on. What the network has carried stays counted.
    pub fn begin_again(&self, failure: Failure) {
        self.files_copied.reset();
        // What is here is compared, block by block.
        *self.lost() = 0;
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.counts.resume(ResumeCause::Snapshot);
        self.retries.note(&failure);
    }

    /// Counts what an earlier run of the clone has copied.
    pub fn go_on_from(&self, found: &CopyFound, clone: &pb::Clone) {
        if let Some(round) = &found.round {
            let grown: u64 = round.growing.iter().map(|file| file.durable).sum();
            let data = round.done.data_bytes.saturating_add(grown);
            self.data_bytes.restore(data);
            let verified = data.saturating_sub(round.done.reused_bytes);
            let verified = verified.saturating_add(found.snapshot.verified_before);
            self.verified_bytes.restore(verified);
            // What had come of units that were not recorded yet, which is bounded. Most of it is here still.
            let lost = clone.verified_bytes.saturating_sub(verified);
            let streams = clone.limits.as_ref().map_or(1, pb::CloneLimits::concurrency_max);
            let streams = usize::try_from(streams).unwrap_or(CONCURRENCY_MAX).min(CONCURRENCY_MAX);
            *self.lost() = lost.min(under_way_bytes_max(streams));
            self.hole_bytes.restore(round.done.hole_bytes);
            self.reused_bytes.restore(round.done.reused_bytes);
            self.files_copied.restore(round.done.files);
        }
        self.network_bytes.restore(clone.stages.iter().map(|row| row.network_bytes).sum());
        self.resent_bytes.restore(clone.resent_bytes);
        self.retries.count.restore(clone.retries.into());
        let throttled = clone.throttled_duration.map(time::duration_from_wire);
        if let Some(Ok(throttled)) = throttled {
            self.throttled.restore(u64::try_from(throttled.as_nanos()).unwrap_or(u64::MAX));
        }
    }

    /// A unit that was counted has to be copied again.
    pub fn take_back(&self, done: &UnitDone) {
        self.data_bytes.subtract(done.data_bytes);
        let came = done.data_bytes.saturating_sub(done.reused_bytes);
        self.verified_bytes.subtract(came);
        *self.lost() += came;
        self.hole_bytes.subtract(done.hole_bytes);
        self.reused_bytes.subtract(done.reused_bytes);
        self.files_copied.subtract(done.files);
    }

    /// So many bytes came that had come before.
    pub fn came_again(&self, bytes: u64) {
        if bytes > 0 {
            self.resent_bytes.add(bytes);
            self.was_here(bytes);
        }
    }

    /// So many bytes that had come before were found here.
    pub fn was_here(&self, bytes: u64) {
        let mut lost = self.lost();
        *lost = lost.saturating_sub(bytes);
    }

    fn lost(&self) -> MutexGuard<'_, u64> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that an earlier run had not recorded is copied: what was not found here has come again.
    pub fn settle_lost(&self) {
        let lost = std::mem::take(&mut *self.lost());
        self.resent_bytes.add(lost);
    }

    /// Notes files that the next round must list again.
    pub fn note_unfinished(&self, files: Vec<Unfinished>) -> Result<(), Failure> {
        if files.is_empty() {
            return Ok(());
        }
        let mut noted = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner);
        for mut file in files {
            file.part.whole = None;
            noted.insert(file.part.path.clone(), file);
        }
        let held = noted.values().map(Unfinished::held_bytes).sum::<usize>();
        if noted.len() > UNFINISHED_MAX || held > UNFINISHED_BYTES_MAX {
            return Err(Failure::new(
                Code::Aborted,
                "SOURCE_CHANGED",
                format!(
                    "more than {UNFINISHED_MAX} files, or {UNFINISHED_BYTES_MAX} bytes of their \
                     paths, changed on the donor while they were copied; \
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
