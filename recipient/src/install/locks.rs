//! The server's own file locks, held while trees move: no server can start on either (R11).

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsFd as _,
    path::Path,
};

use marcot_common::{failure::Failure, file_lock};
use rustix::io::Errno;

/// Files that MariaDB and MySQL lock for as long as they run.
const LOCKED_FILES: [&str; 2] = ["ibdata1", "aria_log_control"];

/// What a MySQL has at the top of its data directory, whatever its system tablespace is called. A MariaDB
/// has `aria_log_control`.
const MYSQL: [&str; 2] = ["mysql.ibd", "#innodb_redo"];

/// The locks of one tree, until they are dropped. They follow the files wherever these move.
#[derive(Debug)]
pub struct TreeLocks {
    _files: Vec<File>,
}

impl TreeLocks {
    /// Takes the locks of the files that are there; fails when a server holds one.
    pub fn take(tree: &Path) -> Result<Self, Failure> {
        let mut files = Vec::new();
        for name in LOCKED_FILES {
            let path = tree.join(name);
            let file = match OpenOptions::new().read(true).write(true).open(&path) {
                Ok(file) => file,
                // A directory of that name is the guard of a move.
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::IsADirectory
                    ) =>
                {
                    continue;
                }
                Err(e) => return Err(Failure::io("open", &path, &e)),
            };
            match file_lock::take(file.as_fd()) {
                Ok(()) => files.push(file),
                Err(Errno::AGAIN) => return Err(running(&path, &file)),
                Err(e) => return Err(Failure::io("lock", &path, &e.into())),
            }
        }
        Ok(Self { _files: files })
    }
}

/// The process of the server that runs on a tree; 0 or less when it has no number here.
#[must_use]
pub fn server_on(tree: &Path) -> Option<i32> {
    LOCKED_FILES.iter().find_map(|name| {
        let file = File::open(tree.join(name)).ok()?;
        file_lock::holder(file.as_fd()).ok()?
    })
}

/// Fails where no lock would tell whether a server runs on the data that stand in a directory: it would be
/// taken for stopped, and its trees would move beneath it.
pub fn check_seen(data_directory: &Path) -> Result<(), Failure> {
    let is_there = |name: &&str| data_directory.join(name).exists();
    let Some(has) = MYSQL.iter().find(|name| is_there(name)) else {
        return Ok(());
    };
    if LOCKED_FILES.iter().any(is_there) {
        return Ok(());
    }
    Err(Failure::precondition(
        "LOCK_FILE_MISSING",
        format!(
            "{} holds a MySQL's data ({has}), and neither {}: its system tablespace has another name \
             (innodb_data_file_path), so that nobody sees whether a server runs on it; clone to a new \
             directory (DATA DIRECTORY), and have the server start there",
            data_directory.display(),
            LOCKED_FILES.join(" nor ")
        ),
    ))
}

fn running(path: &Path, file: &File) -> Failure {
    let who = match file_lock::holder(file.as_fd()) {
        Ok(Some(pid)) if pid > 0 => format!("process {pid}"),
        _ => "a process that cannot be seen from here".to_owned(),
    };
    Failure::precondition(
        "SERVER_RUNNING",
        format!("{who} holds a lock on {}: a server is running on it; stop it", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards R11 where no lock is to be seen.
    #[test]
    fn data_without_a_file_that_is_locked_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        check_seen(directory.path()).unwrap();
        std::fs::write(directory.path().join("mysql.ibd"), "x").unwrap();
        let failure = check_seen(directory.path()).unwrap_err();
        assert_eq!(failure.reason, "LOCK_FILE_MISSING", "{failure}");
        std::fs::write(directory.path().join("ibdata1"), "x").unwrap();
        check_seen(directory.path()).unwrap();
    }

    /// Guards R11: a lock that another descriptor holds is seen, and is not dropped by looking.
    #[test]
    fn a_tree_is_locked_once() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ibdata1"), "x").unwrap();
        let locks = TreeLocks::take(directory.path()).unwrap();
        for _ in 0..2 {
            assert_eq!(TreeLocks::take(directory.path()).unwrap_err().reason, "SERVER_RUNNING");
            assert!(server_on(directory.path()).is_some());
        }
        drop(locks);
        assert_eq!(server_on(directory.path()), None);
        TreeLocks::take(directory.path()).unwrap();
    }
}
