//! What makes a server itself and not its donor: it stays the recipient's (R13).
//!
//! Names as MySQL 8.0's and MariaDB's manuals give them: the server's UUID, its persisted
//! variables, and the keys and certificates that it has made for itself.

use std::{
    fs::{File, Metadata, Permissions},
    io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use marcot_common::failure::Failure;

use super::{generation, locks::TreeLocks, mounts::refuse_mounts_in, place::INNER_DIRECTORY};
use crate::{label::Label, sabotage};

/// Files at the top of a data directory that are the server's own.
const FILES: [&str; 11] = [
    "auto.cnf",
    "mysqld-auto.cnf",
    "component_keyring_file",
    "ca.pem",
    "ca-key.pem",
    "server-cert.pem",
    "server-key.pem",
    "client-cert.pem",
    "client-key.pem",
    "private_key.pem",
    "public_key.pem",
];

/// Largest file that is taken for one of them: a keyring of thousands of keys.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Whether the identity of a tree can be carried over: told before anything is copied.
pub fn check(old: &Path) -> Result<(), Failure> {
    FILES.iter().try_for_each(|name| found(&old.join(name)).map(drop))
}

/// A file of the identity; an error when it is nothing that can be carried over.
fn found(path: &Path) -> Result<Option<Metadata>, Failure> {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_file() && metadata.len() <= FILE_BYTES_MAX => {
            Ok(Some(metadata))
        }
        Ok(_) => Err(Failure::precondition(
            "IDENTITY_FILE",
            format!(
                "{} is no regular file of at most {FILE_BYTES_MAX} bytes, so it cannot be carried \
                 over to the clone; make it one, or move it away",
                path.display()
            ),
        )),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::io("look at", path, &e)),
    }
}

/// Makes the new tree's identity that of the old tree; durable when this returns.
pub fn carry(old: &Path, new: &Path) -> Result<(), Failure> {
    for name in FILES {
        let (from, to) = (old.join(name), new.join(name));
        if let Some(metadata) = found(&from)? {
            copy(&from, &to, &metadata).map_err(|e| Failure::io("carry over", &from, &e))?;
            continue;
        }
        // The donor's must not stay in its place.
        match std::fs::remove_file(&to) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Failure::io("remove", &to, &e));
            }
            _ => {}
        }
    }
    if sabotage::leaves_out("identity") {
        return Ok(());
    }
    let sync = || File::open(new)?.sync_all();
    sync().map_err(|e| Failure::io("sync directory", new, &e))
}

/// Removes all that is in a data directory but the server's identity, and what an install keeps
/// there. Its server must have been stopped; a mark keeps it so.
pub fn discard_all_else(data_directory: &Path, clone_id: &str) -> Result<(), Failure> {
    let _locks = TreeLocks::take(data_directory)?;
    refuse_mounts_in(data_directory)?;
    generation::mark_discarded(data_directory, clone_id)?;
    let failed = |e: io::Error| Failure::io("empty", data_directory, &e);
    for entry in std::fs::read_dir(data_directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let kept = [INNER_DIRECTORY, generation::DISCARDED_FILE, "lost+found"];
        let stays = kept.iter().chain(&FILES).any(|file| name == *file);
        if stays {
            continue;
        }
        let removed = if entry.file_type().map_err(failed)?.is_dir() {
            std::fs::remove_dir_all(entry.path())
        } else {
            std::fs::remove_file(entry.path())
        };
        removed.map_err(|e| Failure::io("remove", &entry.path(), &e))?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path, metadata: &Metadata) -> io::Result<()> {
    match std::fs::remove_file(to) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    std::fs::copy(from, to)?;
    let file = File::open(to)?;
    std::os::unix::fs::fchown(&file, Some(metadata.uid()), Some(metadata.gid()))?;
    if let Some(label) = Label::of(from) {
        label.give(&file)?;
    }
    file.set_permissions(Permissions::from_mode(metadata.mode() & 0o777))?;
    if sabotage::leaves_out("identity") { Ok(()) } else { file.sync_all() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards R13: the recipient's files win, and the donor's never come with the clone.
    #[test]
    fn the_recipients_identity_stays() {
        let directory = tempfile::tempdir().unwrap();
        let (old, new) = (directory.path().join("old"), directory.path().join("new"));
        for tree in [&old, &new] {
            std::fs::create_dir(tree).unwrap();
        }
        std::fs::write(old.join("auto.cnf"), "mine").unwrap();
        std::fs::write(new.join("auto.cnf"), "the donor's").unwrap();
        std::fs::write(new.join("server-key.pem"), "the donor's").unwrap();
        std::fs::write(old.join("server-cert.pem"), "mine").unwrap();
        std::fs::write(new.join("ibdata1"), "data").unwrap();
        carry(&old, &new).unwrap();
        assert_eq!(std::fs::read_to_string(new.join("auto.cnf")).unwrap(), "mine");
        assert_eq!(std::fs::read_to_string(new.join("server-cert.pem")).unwrap(), "mine");
        assert!(!new.join("server-key.pem").exists());
        assert!(new.join("ibdata1").exists());
        assert_eq!(std::fs::read_to_string(old.join("auto.cnf")).unwrap(), "mine");
        check(&old).unwrap();
        std::os::unix::fs::symlink("/nowhere", old.join("ca.pem")).unwrap();
        assert_eq!(check(&old).unwrap_err().reason, "IDENTITY_FILE");
    }
}
