//! Who uses a data directory, across processes: donors of running clones share it, a clone that
//! replaces it has it alone. A lock (flock) on the directory itself, of which nothing stays.

use std::{fs::File, io, path::Path};

use rustix::{fs::FlockOperation, io::Errno};

/// A use of a data directory, until it is dropped.
#[derive(Debug)]
pub struct InUse {
    _directory: File,
}

/// Why a directory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum InUseError {
    /// Another process uses it.
    #[error("another process uses it")]
    Taken,
    /// It could not be asked for.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl InUse {
    /// For a clone that reads it: others may read it as well.
    pub fn shared(directory: &Path) -> Result<Self, InUseError> {
        Self::take(directory, FlockOperation::NonBlockingLockShared)
    }

    /// For a clone that replaces it.
    pub fn alone(directory: &Path) -> Result<Self, InUseError> {
        Self::take(directory, FlockOperation::NonBlockingLockExclusive)
    }

    fn take(directory: &Path, operation: FlockOperation) -> Result<Self, InUseError> {
        let directory = File::open(directory)?;
        match rustix::fs::flock(&directory, operation) {
            Ok(()) => Ok(Self { _directory: directory }),
            Err(Errno::WOULDBLOCK) => Err(InUseError::Taken),
            Err(e) => Err(InUseError::Io(e.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_share_it_and_a_replacement_has_it_alone() {
        let directory = tempfile::tempdir().unwrap();
        let readers = [(); 2].map(|()| InUse::shared(directory.path()).unwrap());
        assert!(matches!(InUse::alone(directory.path()), Err(InUseError::Taken)));
        drop(readers);
        let alone = InUse::alone(directory.path()).unwrap();
        assert!(matches!(InUse::shared(directory.path()), Err(InUseError::Taken)));
        drop(alone);
        InUse::shared(directory.path()).unwrap();
    }
}
