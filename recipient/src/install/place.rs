//! Where an install does its work: which form, and the paths of that form.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
};

use marcot_common::failure::Failure;
use rustix::{
    fs::{AtFlags, CWD, RenameFlags, StatxFlags},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::staging::STAGING_PREFIX;

/// Directory inside a data directory that holds all that the form `move` keeps there. One name for
/// all clones, so that MariaDB's `ignore_db_dirs` can name it.
pub const INNER_DIRECTORY: &str = ".marcot-install";

/// How two trees change places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// The data directory and the staged tree change places by one rename.
    Exchange,
    /// Entries move one by one, within the data directory's own file system.
    Move,
}

impl Form {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Exchange => "exchange",
            Self::Move => "move",
        }
    }

    /// The form of that name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Exchange, Self::Move].into_iter().find(|form| form.name() == name)
    }

    /// The form that this data directory allows: `Exchange` where one rename can do it.
    pub fn of(data_directory: &Path) -> Result<Self, Failure> {
        let parent = data_directory.parent().unwrap_or(Path::new("/"));
        if is_mount_point(data_directory)? || !can_exchange(parent)? {
            return Ok(Self::Move);
        }
        Ok(Self::Exchange)
    }

    /// The directory that staging directories are made in.
    #[must_use]
    pub fn staging_parent(self, data_directory: &Path) -> PathBuf {
        match self {
            Self::Exchange => data_directory.parent().unwrap_or(Path::new("/")).to_owned(),
            Self::Move => data_directory.join(INNER_DIRECTORY),
        }
    }
}

/// Whether a directory is the root of what is mounted there.
pub fn is_mount_point(path: &Path) -> Result<bool, Failure> {
    let failed = |e: Errno| Failure::io("look at", path, &e.into());
    let flags = AtFlags::empty();
    let stat = rustix::fs::statx(CWD, path, flags, StatxFlags::BASIC_STATS).map_err(failed)?;
    if stat.stx_attributes_mask.contains(rustix::fs::StatxAttributes::MOUNT_ROOT) {
        return Ok(stat.stx_attributes.contains(rustix::fs::StatxAttributes::MOUNT_ROOT));
    }
    // Before Linux 5.8: another device than its parent's; a bind mount is then not noticed here,
    // but when the exchange fails, before anything has moved.
    let parent = rustix::fs::stat(path.join("..")).map_err(failed)?;
    let own = rustix::fs::stat(path).map_err(failed)?;
    Ok(parent.st_dev != own.st_dev)
}

/// Whether two directories in `parent` can change places; tried.
fn can_exchange(parent: &Path) -> Result<bool, Failure> {
    let probe = parent.join(format!("{STAGING_PREFIX}probe-{}", std::process::id()));
    let (one, two) = (probe.join("1"), probe.join("2"));
    match std::fs::create_dir_all(&one).and_then(|()| std::fs::create_dir_all(&two)) {
        Ok(()) => {}
        // What cannot be written cannot hold a staging directory either.
        Err(_) => return Ok(false),
    }
    let tried = rustix::fs::renameat_with(CWD, &one, CWD, &two, RenameFlags::EXCHANGE);
    std::fs::remove_dir_all(&probe).map_err(|e| Failure::io("remove", &probe, &e))?;
    match tried {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::XDEV) => Ok(false),
        Err(e) => Err(Failure::io("exchange two directories in", parent, &e.into())),
    }
}

/// The paths of one install.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// How the trees change places.
    pub form: Form,
    /// The server's data directory.
    pub data_directory: PathBuf,
    /// The clone's staging directory, which holds the journal and whatever tree is not in place.
    pub staging: PathBuf,
}

impl Place {
    /// Of a clone.
    #[must_use]
    pub fn new(form: Form, data_directory: &Path, clone_id: &str) -> Self {
        let staging =
            form.staging_parent(data_directory).join(format!("{STAGING_PREFIX}{clone_id}"));
        Self { form, data_directory: data_directory.to_owned(), staging }
    }

    /// Where the new tree is staged, and where it goes when it is rolled back.
    #[must_use]
    pub fn new_tree(&self) -> PathBuf {
        self.staging.join("tree")
    }

    /// Where the old tree is kept.
    #[must_use]
    pub fn old_tree(&self) -> PathBuf {
        match self.form {
            // It has changed places with the new one.
            Form::Exchange => self.staging.join("tree"),
            Form::Move => self.staging.join("old"),
        }
    }

    /// Where files are set aside that somebody has made while trees moved.
    #[must_use]
    pub fn strays(&self) -> PathBuf {
        self.staging.join("strays")
    }

    /// The journal.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.staging.join("journal")
    }

    /// Staging directories of clones of a data directory, in either form.
    #[must_use]
    pub fn all(data_directory: &Path) -> Vec<Self> {
        let mut found = Vec::new();
        for form in [Form::Exchange, Form::Move] {
            let Ok(entries) = std::fs::read_dir(form.staging_parent(data_directory)) else {
                continue;
            };
            for entry in entries.flatten() {
                let name = entry.file_name();
                let is_staging = clone_id(&name).is_some() && entry.path().join("journal").exists();
                if is_staging {
                    let data_directory = data_directory.to_owned();
                    found.push(Self { form, data_directory, staging: entry.path() });
                }
            }
        }
        found.sort_by(|a, b| a.staging.file_name().cmp(&b.staging.file_name()));
        found
    }
}

/// Makes the directory that the form `move` works in.
pub fn make_inner(inner: &Path) -> Result<(), Failure> {
    match rustix::fs::mkdir(inner, rustix::fs::Mode::RWXU) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(e) => Err(Failure::io("create directory", inner, &e.into())),
    }
}

/// Removes the directory that the form `move` works in, once it is empty.
pub fn remove_inner(data_directory: &Path) {
    match std::fs::remove_dir(data_directory.join(INNER_DIRECTORY)) {
        Ok(()) => {}
        Err(e)
            if matches!(
                e.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::DirectoryNotEmpty
            ) => {}
        Err(e) => warn!(error = %e, "{INNER_DIRECTORY} is left in the data directory"),
    }
}

/// The clone's id in the name of its staging directory.
#[must_use]
pub fn clone_id(name: &OsStr) -> Option<String> {
    let id = name.to_str()?.strip_prefix(STAGING_PREFIX)?;
    uuid::Uuid::parse_str(id).ok()?;
    Some(id.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_directory_is_exchanged_and_a_mount_point_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        std::fs::create_dir(&data).unwrap();
        assert_eq!(Form::of(&data).unwrap(), Form::Exchange);
        assert_eq!(Form::of(Path::new("/proc")).unwrap(), Form::Move);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "the probe has gone");
    }
}
