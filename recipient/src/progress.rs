//! What a running clone has done so far: counters that streams add to and the status reads.

use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use marcot_common::{entry::FileId, failure::Failure};
use tonic::Code;

use crate::writer::Unfinished;

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
    /// Bytes that were asked for again.
    pub resent_bytes: Counter,
    /// Streams at work.
    pub streams: Counter,
    unfinished: Mutex<HashMap<FileId, Unfinished>>,
}

impl Progress {
    /// Notes files that the next round must list again.
    pub fn note_unfinished(&self, files: Vec<Unfinished>) -> Result<(), Failure> {
        let mut noted = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner);
        for file in files {
            noted.insert(file.part.file_id, file);
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

    /// Takes note that a file is listed again.
    pub fn listed_again(&self, file: FileId) {
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner).remove(&file);
    }

    /// A file that is still unfinished.
    #[must_use]
    pub fn any_unfinished(&self) -> Option<Unfinished> {
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner).values().next().cloned()
    }
}
