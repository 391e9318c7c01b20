//! Redo of the server's log in a file without a name.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use marcot_common::failure::Failure;
use rustix::fs::FallocateFlags;
use tonic::Code;

/// Parts of the spool are freed in blocks of this many bytes.
pub(super) const FREED_BYTES: u64 = 4096;

/// Redo in a file without a name.
#[derive(Debug)]
pub(super) struct RedoSpool {
    file: File,
    base: u64,
    /// What was freed and reads as zeros, in order and apart from each other.
    freed: Mutex<Vec<Range<u64>>>,
    directory: PathBuf,
}

impl RedoSpool {
    /// An empty one, whose first byte is that of LSN `base`.
    pub(super) fn create(directory: &Path, base: u64) -> Result<Self, Failure> {
        let file = tempfile::tempfile_in(directory)
            .map_err(|e| Failure::io("create the redo spool in", directory, &e))?;
        Ok(Self { file, base, freed: Mutex::default(), directory: directory.to_owned() })
    }

    /// One that holds `bytes`.
    #[cfg(test)]
    pub(super) fn holding(directory: &Path, base: u64, bytes: &[u8]) -> Self {
        let spool = Self::create(directory, base).unwrap();
        spool.write(base, bytes).unwrap();
        spool
    }

    /// Writes redo of `lsn` and on.
    pub(super) fn write(&self, lsn: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.file.write_all_at(bytes, lsn - self.base).map_err(|e| self.failed(&e))
    }

    /// LSN of the first byte.
    pub(super) fn base(&self) -> u64 {
        self.base
    }

    /// Reads records of the first lap.
    pub(super) fn read(&self, lsn: u64, buffer: &mut [u8]) -> Result<(), Failure> {
        let offset = lsn.checked_sub(self.base).ok_or_else(|| {
            Failure::bug(format!("redo at {lsn} was asked for, the spool begins at {}", self.base))
        })?;
        self.file.read_exact_at(buffer, offset).map_err(|e| self.failed(&e))?;
        // Asked after the read: what is freed is noted first.
        let end = offset + buffer.len() as u64;
        if self.freed().iter().any(|freed| freed.start < end && offset < freed.end) {
            return Err(Failure::new(
                Code::Aborted,
                "REDO_OVERRUN",
                format!(
                    "redo from LSN {lsn} to {} was asked for, part of it was freed",
                    lsn + buffer.len() as u64
                ),
            ));
        }
        Ok(())
    }

    /// Frees the whole blocks between two LSNs.
    pub(super) fn free(&self, from: u64, until: u64) {
        let start = from.saturating_sub(self.base).next_multiple_of(FREED_BYTES);
        let end = until.saturating_sub(self.base) / FREED_BYTES * FREED_BYTES;
        let mut freed = self.freed();
        if start >= end || freed.iter().any(|f| f.start <= start && end <= f.end) {
            return;
        }
        freed.push(start..end);
        freed.sort_unstable_by_key(|range| range.start);
        freed.dedup_by(|next, last| {
            let joins = next.start <= last.end;
            if joins {
                last.end = last.end.max(next.end);
            }
            joins
        });
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // Where the file system cannot, the bytes stay until the spool goes.
        let _ = rustix::fs::fallocate(&self.file, flags, start, end - start);
    }

    fn freed(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        // Every change is whole before anything can panic.
        self.freed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: &io::Error) -> Failure {
        Failure::io("use the redo spool in", &self.directory, error)
    }
}
