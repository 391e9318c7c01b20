//! Whether a server has the data directory open.
//!
//! InnoDB and Aria lock their files with fcntl. This process holds no such lock on any file of a
//! data directory: were it to, closing any descriptor of that file, as done here after each look,
//! would drop it.

use std::os::fd::{AsFd as _, BorrowedFd};

use marcot_common::{failure::Failure, file_lock, path::RelativePath};
use rustix::{
    fs::{FileType, Mode},
    io::Errno,
};

use super::{
    names::{self, NAMES_BYTES_MAX, Names},
    tree::{LOOK, LOOK_DIRECTORY, Tree, failure},
};

/// Fails if another process holds a lock on a file that servers lock.
pub(crate) fn refuse_running_server(tree: &Tree) -> Result<(), Failure> {
    let io = |error| failure("look for file locks in", tree.path(), error);
    let top = rustix::fs::openat(tree.root(), c".", LOOK_DIRECTORY, Mode::empty()).map_err(io)?;
    let names = Names::read(top.as_fd(), NAMES_BYTES_MAX).map_err(|error| match error {
        names::Error::TooMany => super::walk::directory_too_large(tree.path()),
        names::Error::System(error) => io(error),
    })?;
    for name in (0..names.len()).map(|i| names.get(i)) {
        if !is_locked_by_servers(name) {
            continue;
        }
        let Ok(path) = RelativePath::new(name) else {
            continue;
        };
        match holder(top.as_fd(), name) {
            Ok(None) => {}
            Ok(Some(pid)) => return Err(server_running(tree, &path, pid)),
            // Gone meanwhile, or no regular file: the walk has its own word on it.
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => {}
            Err(error) => {
                return Err(failure("look for locks on", &tree.shown(Some(&path)), error));
            }
        }
    }
    Ok(())
}

/// Whether another process holds a lock on the file `name` in the top directory; `None` when that
/// cannot be told.
pub(crate) fn is_locked(tree: &Tree, name: &[u8]) -> Option<bool> {
    let top = rustix::fs::openat(tree.root(), c".", LOOK_DIRECTORY, Mode::empty()).ok()?;
    holder(top.as_fd(), name).ok().map(|holder| holder.is_some())
}

/// Names in the top directory that a server holds locked: InnoDB's system, undo, temporary and
/// log files, MySQL's dictionary, tablespaces, Aria's control file.
fn is_locked_by_servers(name: &[u8]) -> bool {
    name.starts_with(b"ibdata")
        || name.starts_with(b"ib_logfile")
        || name.starts_with(b"ibtmp")
        || name.starts_with(b"undo")
        || name.ends_with(b".ibd")
        || name == b"aria_log_control"
}

fn holder(directory: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<Option<i32>> {
    let fd = rustix::fs::openat(directory, name, LOOK, Mode::empty())?;
    let stat = rustix::fs::fstat(&fd)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    file_lock::holder(fd.as_fd())
}

fn server_running(tree: &Tree, path: &RelativePath, pid: i32) -> Failure {
    // Open-file-description locks, and holders in other PID namespaces, have no number here.
    let who = if pid > 0 {
        format!("process {pid}")
    } else {
        "a process that cannot be seen from here".to_owned()
    };
    Failure::precondition(
        "SERVER_RUNNING",
        format!(
            "{who} holds a lock on {path} in {}: a server is running on it; stop the server, or \
             use --engine innodb",
            tree.path().display()
        ),
    )
    .with("path", path)
    .with("pid", pid)
}
