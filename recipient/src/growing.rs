//! Files that grow on the donor while they are read: how far each is durable here.

use std::{
    collections::BTreeMap,
    fs::File,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use marcot_common::{
    entry::{Change, Entry, FileId, Kind},
    failure::Failure,
    path::RelativePath,
};

use crate::{
    certificate::digests::{PartHasher, read_unknown},
    copy_journal::CopyJournal,
    progress::Progress,
    staging::Staging,
    writer::{ChunkSink, write_all_at},
};

/// Most files of one clone that grow at a time: engines have one, the redo log.
const GROWING_MAX: usize = 16;

/// Growing files of a clone.
#[derive(Debug, Default)]
pub struct GrowingFiles {
    files: Mutex<BTreeMap<FileId, GrowingFile>>,
    /// Of a file, what hashes it: the block that was begun goes on with the next bytes.
    hashers: Mutex<BTreeMap<FileId, (u64, PartHasher)>>,
}

/// A file that grows on the donor.
#[derive(Debug, Clone)]
pub struct GrowingFile {
    /// Its id on the donor.
    pub file_id: FileId,
    /// Where it goes.
    pub path: RelativePath,
    /// Bytes that are durable here.
    pub durable: u64,
    /// Whether its whole size is known.
    pub is_whole: bool,
}

impl GrowingFiles {
    /// Takes note of a listed entry.
    pub fn listed(&self, entry: &Entry) -> Result<(), Failure> {
        let mut files = self.lock();
        if entry.growing && matches!(entry.kind, Some(Kind::Regular { .. })) {
            if files.len() >= GROWING_MAX {
                return Err(Failure::peer_misbehaved(format!(
                    "list of files: more than {GROWING_MAX} files grow"
                )));
            }
            let path = entry.path.clone();
            let file = GrowingFile { file_id: entry.file_id, path, durable: 0, is_whole: false };
            files.insert(entry.file_id, file);
            self.hashers.lock().unwrap_or_else(PoisonError::into_inner).remove(&entry.file_id);
            return Ok(());
        }
        match (entry.change, files.get_mut(&entry.file_id)) {
            (Change::Patch, Some(file)) if file.path == entry.path => {
                file.is_whole = true;
                let (read, size) = (file.durable, entry.content_bytes());
                if read > size {
                    return Err(Failure::peer_misbehaved(format!(
                        "list of files: {} has {size} bytes, {read} of it were sent",
                        file.path
                    )));
                }
                tracing::info!(path = %file.path, read, size, "a file grows no more");
            }
            _ if entry.kind == Some(Kind::Directory) => {}
            // Another file, or none.
            _ => files.retain(|_, f| f.path != entry.path && !f.path.is_below(&entry.path)),
        }
        Ok(())
    }

    /// Forgets all: another snapshot begins.
    pub fn clear(&self) {
        self.lock().clear();
        self.hashers.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// All that grow, or have grown.
    #[must_use]
    pub fn all(&self) -> Vec<GrowingFile> {
        self.lock().values().cloned().collect()
    }

    /// Goes on with these.
    pub fn restore(&self, files: Vec<GrowingFile>) {
        *self.lock() = files.into_iter().map(|file| (file.file_id, file)).collect();
    }

    /// Files that still grow.
    #[must_use]
    pub fn growing(&self) -> Vec<GrowingFile> {
        self.lock().values().filter(|file| !file.is_whole).cloned().collect()
    }

    /// Bytes of a file that need not be read again.
    #[must_use]
    pub fn durable_bytes(&self, file: FileId) -> u64 {
        self.lock().get(&file).map_or(0, |file| file.durable)
    }

    fn set_durable(&self, file: FileId, bytes: u64) {
        if let Some(file) = self.lock().get_mut(&file) {
            file.durable = bytes;
        }
    }

    /// A hasher of what comes at `at`, with what it has seen of the block before.
    fn take_hasher(&self, file: FileId, at: u64) -> PartHasher {
        let kept = self.hashers.lock().unwrap_or_else(PoisonError::into_inner).remove(&file);
        let kept = kept.filter(|(end, _)| *end == at).map(|(_, hasher)| hasher);
        // Its size is not known: no block is its last.
        kept.unwrap_or_else(|| PartHasher::new(file.0, u64::MAX, at))
    }

    fn keep_hasher(&self, file: FileId, at: u64, hasher: PartHasher) {
        self.hashers.lock().unwrap_or_else(PoisonError::into_inner).insert(file, (at, hasher));
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<FileId, GrowingFile>> {
        // Every change is one assignment.
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Appends to one growing file, in order.
#[derive(Debug)]
pub struct GrowingWriter<'a> {
    progress: &'a Progress,
    growing: GrowingFile,
    file: File,
    hasher: PartHasher,
    /// Where the next byte goes, and the end of what was asked for.
    at: u64,
    end: u64,
}

impl<'a> GrowingWriter<'a> {
    /// Takes up to `length` bytes after what is durable.
    pub fn open(
        staging: &Staging,
        progress: &'a Progress,
        files: &GrowingFiles,
        growing: GrowingFile,
        length: u64,
    ) -> Result<Self, Failure> {
        let at = growing.durable;
        // What an earlier try has left beyond goes.
        let file = staging.open_file(&growing.path, at)?;
        let hasher = files.take_hasher(growing.file_id, at);
        Ok(Self { progress, growing, file, hasher, at, end: at.saturating_add(length) })
    }

    /// Makes durable, and records, what has come; returns its bytes.
    pub fn finish(
        mut self,
        files: &GrowingFiles,
        journal: Option<&CopyJournal>,
    ) -> Result<u64, Failure> {
        let bytes = self.at - self.growing.durable;
        if bytes > 0 {
            // A failed fsync is never tried again: the kernel has dropped the pages.
            let synced = self.file.sync_data();
            synced.map_err(|e| Failure::io("sync", self.growing.path.as_path(), &e))?;
            files.set_durable(self.growing.file_id, self.at);
            self.growing.durable = self.at;
            if let Some(journal) = journal {
                let runs = self.hasher.take_runs();
                // A block that another run of this service has begun.
                let runs = read_unknown(&self.file, self.at, self.at, runs)
                    .map_err(|e| Failure::io("read", self.growing.path.as_path(), &e))?;
                journal.grown(&self.growing, runs)?;
            }
        }
        files.keep_hasher(self.growing.file_id, self.at, self.hasher);
        Ok(bytes)
    }
}

impl ChunkSink for GrowingWriter<'_> {
    fn write(
        &mut self,
        file_id: u64,
        offset: u64,
        length: u64,
        pieces: &[Bytes],
    ) -> Result<(), Failure> {
        let is_next = file_id == self.growing.file_id.0 && offset == self.at;
        if !is_next || length > self.end - self.at {
            return Err(Failure::peer_misbehaved(format!(
                "bytes {offset}+{length} of file {file_id} came where {}+{} of file {} were awaited",
                self.at,
                self.end - self.at,
                self.growing.file_id.0
            )));
        }
        let end = write_all_at(&self.file, pieces, offset)
            .map_err(|e| Failure::io("write", self.growing.path.as_path(), &e))?;
        if end != offset + length {
            return Err(Failure::bug(format!("{} bytes written, {length} asked", end - offset)));
        }
        pieces.iter().for_each(|piece| self.hasher.data(piece));
        self.progress.data_bytes.add(length);
        self.at = end;
        Ok(())
    }

    fn skip_hole(&mut self, file_id: u64, offset: u64, _: u64) -> Result<(), Failure> {
        Err(Failure::peer_misbehaved(format!(
            "a hole at {offset} of file {file_id}, which grows, was sent"
        )))
    }

    fn keep(&mut self, file_id: u64, offset: u64, _: u64) -> Result<(), Failure> {
        Err(Failure::peer_misbehaved(format!(
            "bytes at {offset} of file {file_id}, which grows, are said to be unchanged"
        )))
    }

    fn give_up(&mut self, _: u64, _: Failure) -> Result<(), Failure> {
        // The next list says what has become of it.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use marcot_common::entry::Attributes;

    use super::*;

    fn entry(id: u64, change: Change, growing: bool) -> Entry {
        Entry {
            number: 0,
            file_id: FileId(id),
            change,
            path: RelativePath::new(b"log").unwrap(),
            kind: (change != Change::Remove).then_some(Kind::Regular { size: 9, allocated: 9 }),
            attributes: Attributes::default(),
            growing,
        }
    }

    /// Guards that bytes of one log are not taken for those of another that has its place.
    #[test]
    fn only_a_patch_keeps_what_was_read() {
        for (change, growing, kept) in [
            (Change::Patch, false, 5),
            (Change::Replace, true, 0),
            (Change::Replace, false, 0),
            (Change::Remove, false, 0),
        ] {
            let files = GrowingFiles::default();
            files.listed(&entry(7, Change::Add, true)).unwrap();
            files.set_durable(FileId(7), 5);
            files.listed(&entry(7, change, growing)).unwrap();
            assert_eq!(files.durable_bytes(FileId(7)), kept, "{change:?}");
            assert_eq!(files.growing().len(), usize::from(growing), "{change:?}");
        }
    }

    /// Guards the end of a log: a donor that has sent more than it lists has sent what is none of it.
    #[test]
    fn a_file_that_was_read_beyond_its_size_is_refused() {
        let files = GrowingFiles::default();
        files.listed(&entry(7, Change::Add, true)).unwrap();
        files.set_durable(FileId(7), 10);
        let failure = files.listed(&entry(7, Change::Patch, false)).unwrap_err();
        assert_eq!(failure.reason, "PEER_MISBEHAVED", "{failure}");
    }

    #[test]
    fn a_list_of_too_many_growing_files_is_refused() {
        let files = GrowingFiles::default();
        for id in 1..=16 {
            files.listed(&entry(id, Change::Add, true)).unwrap();
        }
        let failure = files.listed(&entry(17, Change::Add, true)).unwrap_err();
        assert_eq!(failure.reason, "PEER_MISBEHAVED");
    }
}
