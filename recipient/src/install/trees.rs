//! How trees change places, in either form. Every move can be made again from wherever it stopped.
//!
//! While entries move one by one, directories stand where the server expects the files that it opens
//! first: one that somebody starts on a half of a tree ends with an error, and does not make a new
//! database of it.

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

use tracing::warn;

use super::{hold::hold, place::INNER_DIRECTORY};
use crate::{order, sabotage};

/// Files that a server opens first, and in whose places the guards stand: without these MariaDB and
/// MySQL make new ones, and with them a new database.
const GUARDED_FILES: [&str; 2] = ["aria_log_control", "ibdata1"];

/// Two directories change places by one rename, durable when this returns. `at` names the moment before
/// that, for tests.
pub(super) fn exchange(one: &Path, two: &Path, at: &str) -> Result<(), Failure> {
    rustix::fs::renameat_with(CWD, one, CWD, two, RenameFlags::EXCHANGE)
        .map_err(|e| Failure::io("exchange with the clone", one, &e.into()))?;
    order::renamed(one, two);
    hold(at);
    if !sabotage::leaves_out("exchange") {
        for path in [one, two] {
            sync_directory(path.parent().unwrap_or(Path::new("/")))?;
        }
    }
    Ok(())
}

/// Moves all entries of a data directory out into `aside`; guards stay.
///
/// A server that somebody has started meanwhile may have made files before it met a guard. One whose
/// name has been moved out already is such a stray, and goes to `strays`. `half` names the moment in which
/// half of the entries have moved, for tests.
pub(super) fn take_out(
    data_directory: &Path,
    aside: &Path,
    strays: &Path,
    half: &str,
) -> Result<(), Failure> {
    make_directory(aside)?;
    // Entries that move out must not lose the directory that they are in.
    sync_moved(aside.parent().unwrap_or(Path::new("/")))?;
    for name in GUARDED_FILES {
        let guarded = data_directory.join(name);
        match guarded.symlink_metadata() {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => {
                rename(&guarded, &aside.join(name))?;
                make_directory(&guarded)?;
            }
            // A crash may have come between the two; or there was none.
            Err(e) if e.kind() == io::ErrorKind::NotFound => make_directory(&guarded)?,
            Err(e) => return Err(Failure::io("look at", &guarded, &e)),
        }
    }
    sync_moved(data_directory)?;
    let names = entries(data_directory)?;
    for (moved, name) in names.iter().enumerate() {
        if moved == names.len() / 2 {
            hold(half);
        }
        let (from, to) = (data_directory.join(name), aside.join(name));
        if to.symlink_metadata().is_ok() {
            set_stray_aside(&from, strays)?;
        } else {
            rename(&from, &to)?;
        }
    }
    sync_moved(aside)?;
    sync_moved(data_directory)
}

/// Moves all entries of `from` into a data directory; the guards go last. What stands in the way
/// there is a stray, as above, and `half` as well.
pub(super) fn put_in(
    from: &Path,
    data_directory: &Path,
    strays: &Path,
    half: &str,
) -> Result<(), Failure> {
    if !from.is_dir() {
        // A crash came before the first entry had moved out to it.
        return Ok(());
    }
    let names = entries(from)?;
    for (moved, name) in names.iter().enumerate() {
        if moved == names.len() / 2 {
            hold(half);
        }
        let to = data_directory.join(name);
        if to.symlink_metadata().is_ok() {
            set_stray_aside(&to, strays)?;
        }
        rename(&from.join(name), &to)?;
    }
    sync_moved(data_directory)?;
    for name in GUARDED_FILES {
        let (guarded, file) = (data_directory.join(name), from.join(name));
        match rustix::fs::rmdir(&guarded) {
            // A file: this was done before.
            Ok(()) => order::removed(&guarded),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(e) => return Err(Failure::io("remove the guard", &guarded, &e.into())),
        }
        if file.symlink_metadata().is_ok() {
            rename(&file, &guarded)?;
        }
    }
    sync_moved(from)?;
    sync_moved(data_directory)
}

fn set_stray_aside(path: &Path, strays: &Path) -> Result<(), Failure> {
    make_directory(strays)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let to = strays.join(format!("{name}-{}", uuid::Uuid::new_v4()));
    warn!(path = %path.display(), "somebody has made this while trees moved; it is set aside");
    rename(path, &to)
}

/// What stays where it is: the directory that the install works in, and the file system's own.
const LEFT_IN_PLACE: [&str; 2] = [INNER_DIRECTORY, "lost+found"];

/// Names of what moves, guarded files not among them.
fn entries(directory: &Path) -> Result<Vec<OsString>, Failure> {
    let failed = |e: io::Error| Failure::io("read directory", directory, &e);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let stays = LEFT_IN_PLACE.iter().any(|stays| name == OsStr::new(stays));
        let is_guarded = GUARDED_FILES.iter().any(|guarded| name == OsStr::new(guarded));
        if !stays && !is_guarded {
            names.push(name);
        }
    }
    Ok(names)
}

fn rename(from: &Path, to: &Path) -> Result<(), Failure> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => {
            order::renamed(from, to);
            Ok(())
        }
        // A file system without the flag; nothing else moves files here.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) if to.symlink_metadata().is_err() => {
            rustix::fs::rename(from, to).map_err(|e| Failure::io("move", from, &e.into()))?;
            order::renamed(from, to);
            Ok(())
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
        Ok(()) => {
            order::made(path);
            Ok(())
        }
        Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(Failure::io("create directory", path, &e.into())),
    }
}

fn sync_moved(path: &Path) -> Result<(), Failure> {
    if sabotage::leaves_out("move") { Ok(()) } else { sync_directory(path) }
}

pub(super) fn sync_directory(path: &Path) -> Result<(), Failure> {
    let sync = || File::open(path)?.sync_all();
    sync().map_err(|e| Failure::io("sync directory", path, &e))?;
    order::synced(path);
    Ok(())
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
        let (directory, data, new, old) = prepared();
        let strays = directory.path().join("strays");
        std::fs::create_dir(&old).unwrap();
        rustix::fs::rename(data.join("schema"), old.join("schema")).unwrap();
        let (first, second) = (content(&new), 3);
        for _ in 0..2 {
            take_out(&data, &old, &strays, "").unwrap();
        }
        assert_eq!(content(&old).len(), second);
        assert!(data.join("ibdata1").is_dir(), "no server starts on half a tree");
        rustix::fs::rename(new.join("schema"), data.join("schema")).unwrap();
        for _ in 0..2 {
            put_in(&new, &data, &strays, "").unwrap();
        }
        assert_eq!(content(&data), first);
        for _ in 0..2 {
            take_out(&data, &new, &strays, "").unwrap();
        }
        for _ in 0..2 {
            put_in(&old, &data, &strays, "").unwrap();
        }
        assert!(content(&data).values().all(|mark| mark == "old"));
        assert_eq!(content(&new), first);
    }

    /// Guards against a server that somebody has started on half a tree: what it has made before it
    /// met a guard is in nobody's way, and nothing of either tree is overwritten.
    #[test]
    fn strays_are_set_aside() {
        let (directory, data, new, old) = prepared();
        let strays = directory.path().join("strays");
        take_out(&data, &old, &strays, "").unwrap();
        std::fs::write(data.join("ib_logfile0"), "stray").unwrap();
        std::fs::write(data.join("ddl_recovery.log"), "stray").unwrap();
        put_in(&new, &data, &strays, "").unwrap();
        assert!(content(&data).values().all(|mark| mark == "new"));
        take_out(&data, &new, &strays, "").unwrap();
        std::fs::write(data.join("ib_logfile0"), "stray").unwrap();
        take_out(&data, &new, &strays, "").unwrap();
        put_in(&old, &data, &strays, "").unwrap();
        assert!(content(&data).values().all(|mark| mark == "old"));
        assert!(content(&new).values().all(|mark| mark == "new"));
        assert_eq!(std::fs::read_dir(&strays).unwrap().count(), 2);
    }
}
