//! A verified tree becomes a directory that was not there, by one rename.

use std::{fs::File, io, path::Path};

use marcot_common::failure::Failure;
use rustix::{
    fs::{CWD, RenameFlags},
    io::Errno,
};

use crate::{staging::Staging, verify::VerifiedTree};

/// Whether the target is the recipient server's own data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnDirectory {
    /// It is, and is empty or not there.
    Yes,
    /// It is a new one.
    No,
}

/// Gives the tree its place. Until the rename there is no target, after it all of it.
///
/// A server's own data directory may stand there empty; it makes way.
pub fn install(
    staging: &Staging,
    _: &VerifiedTree,
    target: &Path,
    own: OwnDirectory,
) -> Result<(), Failure> {
    let tree = staging.tree();
    if own == OwnDirectory::Yes {
        match rustix::fs::rmdir(target) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::EXIST | Errno::NOTEMPTY) => return Err(exists(target)),
            Err(e) => return Err(Failure::io("make way at", target, &e.into())),
        }
    }
    match rustix::fs::renameat_with(CWD, &tree, CWD, target, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        // Not every file system knows the flag (NFS, some FUSE). A target that another process
        // has made meanwhile is then found by name; an empty directory is all that could be lost.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            if target.symlink_metadata().is_ok() {
                return Err(exists(target));
            }
            rustix::fs::rename(&tree, target)
                .map_err(|e| Failure::io("rename the staged tree to", target, &e.into()))?;
        }
        Err(Errno::EXIST | Errno::NOTEMPTY) => return Err(exists(target)),
        Err(e) => return Err(Failure::io("rename the staged tree to", target, &e.into())),
    }
    let parent = target.parent().unwrap_or(Path::new("/"));
    // Without this a power cut could take the new name back.
    sync_directory(parent).map_err(|e| Failure::io("sync directory", parent, &e))
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn exists(target: &Path) -> Failure {
    let shown = target.display();
    Failure::new(
        tonic::Code::AlreadyExists,
        "TARGET_EXISTS",
        format!("{shown} has appeared while its clone was made; move it away and clone again"),
    )
    .mysql(1007)
}
