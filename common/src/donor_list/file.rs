//! A donor list that is read again when its file has changed.
//!
//! ```text
//! # a remark
//! db-0.db.svc:4407
//! 10.0.0.0/8:*, *.db.svc:4407
//! ```

use std::{
    fs::File,
    io::{self, Read as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use tracing::warn;

use super::{DonorEntry, DonorList, DonorListError, DonorMatch};
use crate::reloaded::Reloaded;

/// Longest file: a thousand entries are a quarter of it.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What is wrong with a donor list's file.
#[derive(Debug, thiserror::Error)]
pub enum DonorFileError {
    /// The file cannot be read.
    #[error("donor list {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others can write the file.
    #[error("donor list {path} has mode {mode:04o}: others could name donors; chmod go-w {path}")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// An entry is wrong.
    #[error("donor list {path}, line {line}: {source}")]
    Entry {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// Why.
        #[source]
        source: DonorListError,
    },
    /// The entries together are wrong.
    #[error(transparent)]
    List(#[from] DonorListError),
}

/// Donors that may be cloned from: those that were listed at the start, and those of a file.
#[derive(Debug)]
pub struct Donors(Reloaded<DonorList, DonorFileError>);

impl Default for Donors {
    fn default() -> Self {
        Self(Reloaded::fixed(DonorList::default()))
    }
}

impl Donors {
    /// These entries, and those of `file`, which must be right at the start.
    pub fn open(
        entries: Vec<DonorEntry>,
        file: Option<&Path>,
        matching: DonorMatch,
    ) -> Result<Self, DonorFileError> {
        let Some(file) = file.map(Path::to_owned) else {
            return Ok(Self(Reloaded::fixed(DonorList::new(entries, matching)?)));
        };
        Reloaded::open(vec![file.clone()], move || {
            let entries = entries.iter().cloned().chain(read(&file)?).collect();
            Ok(DonorList::new(entries, matching)?)
        })
        .map(Self)
    }

    /// The list as it is now. A file that has become wrong lists nobody, nor does the option beside it:
    /// a donor that was taken out must not live on.
    #[must_use]
    pub fn current(&self) -> Arc<DonorList> {
        self.0.current().unwrap_or_else(|e| {
            warn!(error = %e, "no donor may be cloned from");
            Arc::default()
        })
    }
}

fn read(path: &Path) -> Result<Vec<DonorEntry>, DonorFileError> {
    let io = |source| DonorFileError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    let mode = file.metadata().map_err(io)?.permissions().mode() & 0o777;
    if mode & 0o022 != 0 {
        return Err(DonorFileError::Exposed { path: path.to_owned(), mode });
    }
    let mut text = String::new();
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(io)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        let why = format!("it has more than {FILE_BYTES_MAX} bytes");
        return Err(io(io::Error::new(io::ErrorKind::InvalidData, why)));
    }
    let mut entries = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default();
        for entry in line.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            let entry = entry.parse().map_err(|source| DonorFileError::Entry {
                path: path.to_owned(),
                line: number + 1,
                source,
            })?;
            entries.push(entry);
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};

    use super::*;

    /// Guards a donor that was taken out of the file, and a file that others may write: either way
    /// it is not cloned from. With `last_right` in the place of `current` the first one still is.
    #[test]
    fn a_file_holds_as_it_is_now_and_a_wrong_one_lists_nobody() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("donors");
        fs::write(&path, "# ours\ndb-0:4407, db-1:4407 # both\n\n").unwrap();
        let option = vec!["db-9:1".parse().unwrap()];
        let donors = Donors::open(option, Some(&path), DonorMatch::Address).unwrap();
        let shown = || donors.current().to_string();
        assert_eq!(shown(), "db-9:1,db-0:4407,db-1:4407");
        fs::write(&path, "db-1:4407").unwrap();
        assert_eq!(shown(), "db-9:1,db-1:4407");
        for wrong in ["db-1", "db-1:4407\nx y:1"] {
            fs::write(&path, wrong).unwrap();
            assert_eq!(shown(), "NULL", "{wrong}");
        }
        fs::write(&path, "db-2:1").unwrap();
        assert_eq!(shown(), "db-9:1,db-2:1");
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        assert_eq!(shown(), "NULL");
        let opened = Donors::open(Vec::new(), Some(&path), DonorMatch::Address);
        assert!(opened.unwrap_err().to_string().contains("has mode 0666"));
    }

    #[test]
    fn an_entry_that_is_wrong_is_told_with_its_line() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("donors");
        fs::write(&path, "db-0:4407\ndb-1:0\n").unwrap();
        let opened = Donors::open(Vec::new(), Some(&path), DonorMatch::Address);
        let text = opened.unwrap_err().to_string();
        assert!(text.contains("donors, line 2: donor `db-1:0`: `0` is no port"), "{text}");
    }
}
