//! How trees change places, in either form. Every move can be made again from wherever it stopped.
//!
//! While entries move one by one, a directory stands where the server expects its system
//! tablespace: a server that somebody starts on a half of a tree ends with an error, and does not
//! make a new database of it.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    path::Path,
};

use marcot_common::failure::Failure;
use rustix::{
    fs::{CWD, RenameFlags},
    io::Errno,
};

use super::place::INNER_DIRECTORY;

/// The file without which no server starts, and in whose place the guard stands.
const GUARDED_FILE: &str = "ibdata1";

/// Two directories change places by one rename, durable when this returns.
pub(super) fn exchange(one: &Path, two: &Path) -> Result<(), Failure> {
    rustix::fs::renameat_with(CWD, one, CWD, two, RenameFlags::EXCHANGE)
        .map_err(|e| Failure::io("exchange with the clone", one, &e.into()))?;
    for path in [one, two] {
        sync_directory(path.parent().unwrap_or(Path::new("/")))?;
    }
    Ok(())
}

/// Moves all entries of a data directory out into `aside`; a guard stays.
pub(super) fn take_out(data_directory: &Path, aside: &Path) -> Result<(), Failure> {
    make_directory(aside)?;
    let guarded = data_directory.join(GUARDED_FILE);
    match guarded.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => {
            rename(&guarded, &aside.join(GUARDED_FILE))?;
            make_directory(&guarded)?;
        }
        // A crash may have come between the two.
        Err(e) if e.kind() == io::ErrorKind::NotFound => make_directory(&guarded)?,
        Err(e) => return Err(Failure::io("look at", &guarded, &e)),
    }
    sync_directory(data_directory)?;
    for name in entries(data_directory)? {
        rename(&data_directory.join(&name), &aside.join(&name))?;
    }
    sync_directory(aside)?;
    sync_directory(data_directory)
}

/// Moves all entries of `from` into a data directory; the guard goes last.
pub(super) fn put_in(from: &Path, data_directory: &Path) -> Result<(), Failure> {
    if !from.is_dir() {
        // A crash came before the first entry had moved out to it.
        return Ok(());
    }
    for name in entries(from)? {
        rename(&from.join(&name), &data_directory.join(&name))?;
    }
    sync_directory(data_directory)?;
    let (guarded, file) = (data_directory.join(GUARDED_FILE), from.join(GUARDED_FILE));
    match rustix::fs::rmdir(&guarded) {
        // A file: this was done before.
        Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => {}
        Err(e) => return Err(Failure::io("remove the guard", &guarded, &e.into())),
    }
    if file.symlink_metadata().is_ok() {
        rename(&file, &guarded)?;
    }
    sync_directory(from)?;
    sync_directory(data_directory)
}

/// What stays where it is: the directory that the install works in, and the file system's own.
const LEFT_IN_PLACE: [&str; 2] = [INNER_DIRECTORY, "lost+found"];

/// Names of what moves, the guarded file not among them.
fn entries(directory: &Path) -> Result<Vec<OsString>, Failure> {
    let failed = |e: io::Error| Failure::io("read directory", directory, &e);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let stays = LEFT_IN_PLACE.iter().any(|stays| name == OsStr::new(stays));
        if !stays && name != OsStr::new(GUARDED_FILE) {
            names.push(name);
        }
    }
    Ok(names)
}

fn rename(from: &Path, to: &Path) -> Result<(), Failure> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        // A file system without the flag; nothing else moves files here.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) if to.symlink_metadata().is_err() => {
            rustix::fs::rename(from, to).map_err(|e| Failure::io("move", from, &e.into()))
        }
        Err(Errno::EXIST | Errno::NOTEMPTY) => {
            let text = format!("{} stands in the way of {}", to.display(), from.display());
            Err(Failure::io("move", from, &io::Error::other(text)))
        }
        Err(e) => Err(Failure::io("move", from, &e.into())),
    }
}

fn make_directory(path: &Path) -> Result<(), Failure> {
    match rustix::fs::mkdir(path, rustix::fs::Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(Failure::io("create directory", path, &e.into())),
    }
}

pub(super) fn sync_directory(path: &Path) -> Result<(), Failure> {
    let sync = || File::open(path)?.sync_all();
    sync().map_err(|e| Failure::io("sync directory", path, &e))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::PathBuf};

    use super::*;

    fn tree(path: &Path, mark: &str) {
        std::fs::create_dir_all(path.join("schema")).unwrap();
        for file in ["ibdata1", "ib_logfile0", "schema/t.ibd"] {
            std::fs::write(path.join(file), mark).unwrap();
        }
    }

    fn content(path: &Path) -> BTreeMap<String, String> {
        ["ibdata1", "ib_logfile0", "schema/t.ibd"]
            .into_iter()
            .filter_map(|file| {
                Some((file.to_owned(), std::fs::read_to_string(path.join(file)).ok()?))
            })
            .collect()
    }

    fn prepared() -> (tempfile::TempDir, PathBuf, PathBuf, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        tree(&data, "old");
        let inner = data.join(INNER_DIRECTORY);
        let new = inner.join("tree");
        std::fs::create_dir_all(&inner).unwrap();
        tree(&new, "new");
        let old = inner.join("old");
        (directory, data, new, old)
    }

    /// Guards that a move that stopped anywhere can be made again: each call is made twice, with
    /// one entry moved by hand before.
    #[test]
    fn entries_move_out_and_in_and_back_from_wherever_they_stopped() {
        let (_directory, data, new, old) = prepared();
        std::fs::create_dir(&old).unwrap();
        rustix::fs::rename(data.join("schema"), old.join("schema")).unwrap();
        let (first, second) = (content(&new), 3);
        for _ in 0..2 {
            take_out(&data, &old).unwrap();
        }
        assert_eq!(content(&old).len(), second);
        assert!(data.join(GUARDED_FILE).is_dir(), "no server starts on half a tree");
        rustix::fs::rename(new.join("schema"), data.join("schema")).unwrap();
        for _ in 0..2 {
            put_in(&new, &data).unwrap();
        }
        assert_eq!(content(&data), first);
        for _ in 0..2 {
            take_out(&data, &new).unwrap();
        }
        for _ in 0..2 {
            put_in(&old, &data).unwrap();
        }
        assert!(content(&data).values().all(|mark| mark == "old"));
        assert_eq!(content(&new), first);
    }

    #[test]
    fn nothing_is_overwritten() {
        let (_directory, data, _new, old) = prepared();
        std::fs::create_dir_all(&old).unwrap();
        std::fs::write(old.join("ib_logfile0"), "someone's").unwrap();
        take_out(&data, &old).unwrap_err();
        assert_eq!(std::fs::read_to_string(old.join("ib_logfile0")).unwrap(), "someone's");
    }
}
