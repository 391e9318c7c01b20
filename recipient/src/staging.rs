//! The staging directory: where a copy grows beside its target, on the target's file system.
//!
//! Invariants:
//! * Every path is opened beneath the tree's root and through no symbolic link (openat2), so
//!   nothing that a donor lists is ever written elsewhere.
//! * Final modes are set last and from the leaves up: a directory that forbids writing is filled
//!   before it forbids it.
//! * Setuid and setgid are never set, nor a security attribute but the label of what is replaced.
//!
//! Layout, in the directory that the target will stand in:
//!     .marcot-{clone id}/        mode 0700
//!         tree/                  becomes the target by one rename
//!         aside/                 files on their way from one name to another

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use marcot_common::{
    entry::{Attributes, Entry, FileId, Kind},
    failure::Failure,
    in_use::{InUse, InUseError},
    path::RelativePath,
};
use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Timespec, Timestamps, Uid,
        XattrFlags,
    },
    io::Errno,
};

use crate::{label::Label, list::TreeChange};

/// Prefix of a staging directory's name. Engines leave such directories out.
pub const STAGING_PREFIX: &str = ".marcot-";

/// Who owns what is staged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owners {
    /// All is owned by this user and group.
    Fixed {
        /// User.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// As on the donor, by number.
    Preserved,
}

impl Owners {
    fn of(self, attributes: &Attributes) -> (u32, u32) {
        match self {
            Self::Fixed { uid, gid } => (uid, gid),
            Self::Preserved => (attributes.uid, attributes.gid),
        }
    }
}

/// The tree of a snapshot that was lost.
#[derive(Debug)]
pub struct OlderTree(OwnedFd);

impl OlderTree {
    /// Opens the tree in a staging directory; `None` when there is none.
    pub fn open(directory: &Path) -> Result<Option<Self>, Failure> {
        let tree = directory.join("tree");
        // Its directories may forbid what must be done in them.
        if let Err(e) = open_up(directory)
            && e.kind() != io::ErrorKind::NotFound
        {
            return Err(Failure::io("open the older staging directory", directory, &e));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        match rustix::fs::open(&tree, flags, Mode::empty()) {
            Ok(root) => Ok(Some(Self(root))),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(Failure::io("open the older staging directory", &tree, &e.into())),
        }
    }

    fn open_parent(&self, path: &RelativePath) -> rustix::io::Result<OwnedFd> {
        let Some(parent) = path.parent() else {
            return rustix::io::fcntl_dupfd_cloexec(&self.0, 0);
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        rustix::fs::openat2(&self.0, parent.as_path(), flags, Mode::empty(), BENEATH)
    }
}

/// A staging directory.
#[derive(Debug)]
pub struct Staging {
    directory: PathBuf,
    root: OwnedFd,
    owners: Owners,
    label: Option<Label>,
    /// For recipients beside this one, which see the directory: somebody works here.
    _in_use: Option<InUse>,
}

/// Marks a staging directory as one that somebody works in. A neighbour that looks whether it is holds it
/// for a moment; a file system without locks has no such mark.
fn hold(directory: &Path) -> Option<InUse> {
    for _ in 0..20 {
        match InUse::alone(directory) {
            Ok(in_use) => return Some(in_use),
            Err(InUseError::Taken) => std::thread::sleep(Duration::from_millis(5)),
            Err(InUseError::Io(_)) => return None,
        }
    }
    None
}

impl Staging {
    /// Creates an empty staging directory in `parent`.
    pub fn create(parent: &Path, clone_id: &str, owners: Owners) -> Result<Self, Failure> {
        let directory = parent.join(format!("{STAGING_PREFIX}{clone_id}"));
        let failed = |e: io::Error| Failure::io("create staging directory", &directory, &e);
        let make = || -> io::Result<OwnedFd> {
            make_private_directory(&directory)?;
            make_private_directory(&directory.join("aside"))?;
            make_private_directory(&directory.join("tree"))?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            Ok(rustix::fs::open(directory.join("tree"), flags, Mode::empty())?)
        };
        let root = make().map_err(failed)?;
        let _in_use = hold(&directory);
        Ok(Self { directory, root, owners, label: None, _in_use })
    }

    /// Gives all that is staged from now on the label of `model`.
    #[must_use]
    pub fn labelled_as(self, model: &Path) -> Self {
        Self { label: Label::of(model), ..self }
    }

    /// Opens a staging directory that an earlier run of this service has left.
    pub fn open(parent: &Path, clone_id: &str, owners: Owners) -> Result<Self, Failure> {
        let directory = parent.join(format!("{STAGING_PREFIX}{clone_id}"));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let root = rustix::fs::open(directory.join("tree"), flags, Mode::empty())
            .map_err(|e| Failure::io("open staging directory", &directory, &e.into()))?;
        let _in_use = hold(&directory);
        Ok(Self { directory, root, owners, label: None, _in_use })
    }

    /// The staging directory itself.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The tree that becomes the target.
    #[must_use]
    pub fn tree(&self) -> PathBuf {
        self.directory.join("tree")
    }

    /// Removes a staging directory and all that is in it; nothing happens when there is none.
    pub fn remove(directory: &Path) -> Result<(), Failure> {
        // What is staged may forbid its own removal: a directory of mode 0500.
        match open_up(directory).and_then(|()| std::fs::remove_dir_all(directory)) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Failure::io("remove staging directory", directory, &e)),
        }
    }

    /// Makes what an entry stands for, other than a regular file's content.
    pub fn make(&self, entry: &Entry) -> Result<(), Failure> {
        let made = match &entry.kind {
            Some(Kind::Directory) => self.make_directory(&entry.path),
            Some(Kind::Symlink { target }) => self.make_symlink(entry, target),
            _ => Ok(()),
        };
        made.map_err(|e| self.failed("create", &entry.path, e))
    }

    fn make_directory(&self, path: &RelativePath) -> io::Result<()> {
        let parent = self.open_parent(path)?;
        match rustix::fs::mkdirat(&parent, path.name(), Mode::RWXU) {
            // A later round lists a directory again when its attributes have changed.
            Err(Errno::EXIST) if self.open_directory(path).is_ok() => Ok(()),
            other => Ok(other?),
        }
    }

    fn make_symlink(&self, entry: &Entry, target: &[u8]) -> io::Result<()> {
        let parent = self.open_parent(&entry.path)?;
        let name = entry.path.name();
        match rustix::fs::symlinkat(target, &parent, name) {
            // Made before the recipient was killed.
            Err(Errno::EXIST)
                if rustix::fs::readlinkat(&parent, name, Vec::new())?.as_bytes() == target => {}
            other => other?,
        }
        let (uid, gid) = self.owners.of(&entry.attributes);
        change_owner_at(&parent, name, uid, gid)?;
        let times = timestamps(&entry.attributes);
        rustix::fs::utimensat(&parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }

    /// Makes a hard link to a staged file.
    pub fn make_link(&self, path: &RelativePath, target: &RelativePath) -> Result<(), Failure> {
        let link = || -> io::Result<()> {
            let from = self.open_parent(target)?;
            let to = self.open_parent(path)?;
            match rustix::fs::unlinkat(&to, path.name(), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(e) => return Err(e.into()),
            }
            rustix::fs::linkat(&from, target.name(), &to, path.name(), AtFlags::empty())?;
            Ok(())
        };
        link().map_err(|e| self.failed("link", path, e))
    }

    /// Opens a staged regular file for writing, making it if need be, at its full size.
    pub fn open_file(&self, path: &RelativePath, size: u64) -> Result<File, Failure> {
        let open = || -> io::Result<File> {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let mode = Mode::RUSR | Mode::WUSR;
            let open = || rustix::fs::openat2(&self.root, path.as_path(), flags, mode, BENEATH);
            let file = match open() {
                // It has its final mode from before the recipient was killed.
                Err(Errno::ACCESS) => {
                    self.make_writable(path)?;
                    open()?
                }
                other => other?,
            };
            let file = File::from(file);
            if file.metadata()?.len() != size {
                file.set_len(size)?;
            }
            Ok(file)
        };
        open().map_err(|e| self.failed("create", path, e))
    }

    /// Opens a staged file, which is there, for writing past the page cache; `None` where the file
    /// system has no such way.
    pub fn open_direct(&self, path: &RelativePath) -> Result<Option<File>, Failure> {
        let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        match rustix::fs::openat2(&self.root, path.as_path(), flags, Mode::empty(), BENEATH) {
            Ok(file) => Ok(Some(File::from(file))),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(None),
            Err(e) => Err(self.failed("open", path, e.into())),
        }
    }

    fn make_writable(&self, path: &RelativePath) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::openat2(&self.root, path.as_path(), flags, Mode::empty(), BENEATH)?;
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        Ok(rustix::fs::chmod(link.as_str(), Mode::RUSR | Mode::WUSR)?)
    }

    /// Gives an open staged file its owner, mode, attributes and times.
    pub fn finish_file(&self, file: &File, entry: &Entry) -> Result<(), Failure> {
        self.set_attributes(file, &entry.attributes)
            .map_err(|e| self.failed("set attributes of", &entry.path, e))
    }

    /// Gives a staged file or directory its attributes, by name.
    pub fn finish_path(&self, entry: &Entry) -> Result<(), Failure> {
        let finish = || {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
            let path = entry.path.as_path();
            let fd = rustix::fs::openat2(&self.root, path, flags, Mode::empty(), BENEATH)?;
            self.set_attributes(&File::from(fd), &entry.attributes)
        };
        finish().map_err(|e| self.failed("set attributes of", &entry.path, e))
    }

    fn set_attributes(&self, file: &File, attributes: &Attributes) -> io::Result<()> {
        let (uid, gid) = self.owners.of(attributes);
        let now = file.metadata()?;
        if (now.uid(), now.gid()) != (uid, gid) {
            rustix::fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
        if let Some(label) = &self.label {
            label.give(file)?;
        }
        for (name, value) in &attributes.extended {
            rustix::fs::fsetxattr(file, &name[..], value, XattrFlags::empty())?;
        }
        // After the ACL: its mask and the mode's group bits are one and the same.
        rustix::fs::fchmod(file, Mode::from_raw_mode(attributes.mode & 0o1777))?;
        rustix::fs::futimens(file, &timestamps(attributes))?;
        Ok(())
    }

    /// Gives the tree's own directory its attributes.
    pub fn finish_root(&self, attributes: &Attributes) -> Result<(), Failure> {
        let tree = self.tree();
        File::open(&tree)
            .and_then(|file| self.set_attributes(&file, attributes))
            .map_err(|e| Failure::io("set attributes of", &tree, &e))
    }

    /// Takes a regular file out of an older staged tree, unless one is here already.
    ///
    /// One with several names is left there: here they may be files of their own.
    pub fn take(&self, older: &OlderTree, path: &RelativePath) -> Result<(), Failure> {
        let take = || -> io::Result<()> {
            let from = match older.open_parent(path) {
                Ok(from) => from,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => return Ok(()),
                Err(e) => return Err(e.into()),
            };
            let name = path.name();
            match rustix::fs::statat(&from, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat)
                    if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
                        && stat.st_nlink == 1 => {}
                Ok(_) | Err(Errno::NOENT) => return Ok(()),
                Err(e) => return Err(e.into()),
            }
            if has_own_attributes(&from, name)? {
                return Ok(());
            }
            let to = self.open_parent(path)?;
            let flags = RenameFlags::NOREPLACE;
            match rustix::fs::renameat_with(&from, name, &to, name, flags) {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                // Where a file system has no such rename, the file comes from the donor.
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(()),
                Err(e) => Err(e.into()),
            }
        };
        take().map_err(|e| self.failed("take from the older staging", path, e))
    }

    /// Opens a staged regular file for reading.
    pub fn read_file(&self, path: &RelativePath) -> Result<File, Failure> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        rustix::fs::openat2(&self.root, path.as_path(), flags, Mode::empty(), BENEATH)
            .map(File::from)
            .map_err(|e| self.failed("open", path, e.into()))
    }

    /// Gives a file of this service's own to whom the tree belongs, where that is one user.
    pub fn give(&self, file: &File) -> io::Result<()> {
        let Owners::Fixed { uid, gid } = self.owners else {
            return Ok(());
        };
        let now = file.metadata()?;
        if (now.uid(), now.gid()) != (uid, gid) {
            rustix::fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
        Ok(())
    }

    /// Looks at what is staged at a path, through no link.
    pub fn look(&self, path: &RelativePath) -> Result<rustix::fs::Stat, Failure> {
        let look = || -> io::Result<rustix::fs::Stat> {
            let parent = self.open_parent(path)?;
            Ok(rustix::fs::statat(&parent, path.name(), AtFlags::SYMLINK_NOFOLLOW)?)
        };
        look().map_err(|e| self.failed("look at", path, e))
    }

    /// Size of a staged file; 0 when there is none.
    pub fn size_of(&self, path: &RelativePath) -> Result<u64, Failure> {
        let look = || -> io::Result<u64> {
            let parent = self.open_parent(path)?;
            match rustix::fs::statat(&parent, path.name(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => Ok(u64::try_from(stat.st_size).unwrap_or(0)),
                Err(Errno::NOENT) => Ok(0),
                Err(e) => Err(e.into()),
            }
        };
        look().map_err(|e| self.failed("look at", path, e))
    }

    /// Reads a staged symbolic link.
    pub fn read_link(&self, path: &RelativePath) -> Result<Vec<u8>, Failure> {
        let read = || -> io::Result<Vec<u8>> {
            let parent = self.open_parent(path)?;
            Ok(rustix::fs::readlinkat(&parent, path.name(), Vec::new())?.into_bytes())
        };
        read().map_err(|e| self.failed("read link", path, e))
    }

    /// Puts a file that was set aside at its new place.
    pub fn put_back(&self, file: FileId, path: &RelativePath) -> Result<(), Failure> {
        let put = || -> io::Result<()> {
            let parent = self.open_parent(path)?;
            rustix::fs::renameat(rustix::fs::CWD, self.aside(file), &parent, path.name())?;
            Ok(())
        };
        put().map_err(|e| self.failed("rename", path, e))
    }

    /// Changes of a later round.
    #[must_use]
    pub fn changes(&self) -> StagedChanges<'_> {
        StagedChanges(self)
    }

    /// Makes all that is staged durable: content, attributes and names.
    pub fn sync(&self) -> Result<(), Failure> {
        rustix::fs::syncfs(&self.root)
            .map_err(|e| Failure::io("sync the file system of", &self.directory, &e.into()))
    }

    fn aside(&self, file: FileId) -> PathBuf {
        self.directory.join("aside").join(file.0.to_string())
    }

    fn open_parent(&self, path: &RelativePath) -> io::Result<OwnedFd> {
        match path.parent() {
            Some(parent) => self.open_directory(&parent),
            None => Ok(rustix::io::fcntl_dupfd_cloexec(&self.root, 0)?),
        }
    }

    fn open_directory(&self, path: &RelativePath) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(rustix::fs::openat2(&self.root, path.as_path(), flags, Mode::empty(), BENEATH)?)
    }

    /// What is said of a path that something could not be done with.
    pub fn failed(&self, action: &str, path: &RelativePath, error: io::Error) -> Failure {
        let shown = self.tree().join(path.as_bytes().escape_ascii().to_string());
        match error.raw_os_error() {
            // A path through a link, or through a file, is what a hostile list would hold.
            Some(libc::ELOOP | libc::EXDEV | libc::ENOTDIR) => Failure::peer_misbehaved(format!(
                "{action} {path}: it does not lie in a directory of the staged tree: {error}"
            )),
            Some(libc::EOPNOTSUPP) => Failure::precondition(
                "UNSUPPORTED_BY_FILE_SYSTEM",
                format!(
                    "{action} {}: the file system does not take its extended attributes or ACL",
                    shown.display()
                ),
            ),
            _ => Failure::io(action, &shown, &error),
        }
    }
}

/// What a later round changes in a tree that is already staged.
#[derive(Debug)]
pub struct StagedChanges<'a>(&'a Staging);

impl TreeChange for StagedChanges<'_> {
    fn remove(&mut self, path: &RelativePath) -> Result<(), Failure> {
        let remove = || -> io::Result<()> {
            let parent = self.0.open_parent(path)?;
            match rustix::fs::unlinkat(&parent, path.name(), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(Errno::ISDIR | Errno::PERM) => {
                    let link = PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd()));
                    std::fs::remove_dir_all(
                        link.join(path.as_path().file_name().unwrap_or_default()),
                    )
                }
                Err(e) => Err(e.into()),
            }
        };
        remove().map_err(|e| self.0.failed("remove", path, e))
    }

    fn set_aside(&mut self, file: FileId, path: &RelativePath) -> Result<(), Failure> {
        let set = || -> io::Result<()> {
            let parent = self.0.open_parent(path)?;
            rustix::fs::renameat(&parent, path.name(), rustix::fs::CWD, self.0.aside(file))?;
            Ok(())
        };
        set().map_err(|e| self.0.failed("rename", path, e))
    }
}

const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

/// What a tree takes on the disk; what cannot be looked at counts nothing.
#[must_use]
pub fn allocated_bytes(path: &Path) -> u64 {
    let Ok(metadata) = path.symlink_metadata() else {
        return 0;
    };
    let below: u64 = match std::fs::read_dir(path) {
        Ok(entries) if metadata.is_dir() => {
            entries.flatten().map(|entry| allocated_bytes(&entry.path())).sum()
        }
        _ => 0,
    };
    below + metadata.blocks() * 512
}

/// Makes a directory that only this user may enter, and that hands no ACL or group down.
fn make_private_directory(path: &Path) -> io::Result<()> {
    rustix::fs::mkdir(path, Mode::RWXU)?;
    for name in ["system.posix_acl_default", "system.posix_acl_access"] {
        match rustix::fs::removexattr(path, name) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e.into()),
        }
    }
    rustix::fs::chmod(path, Mode::RWXU)?;
    Ok(())
}

/// Makes every directory below `directory` one that its owner may empty.
fn open_up(directory: &Path) -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let mut left = vec![directory.to_owned()];
    while let Some(directory) = left.pop() {
        rustix::fs::chmod(&directory, Mode::RWXU)?;
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                left.push(entry.path());
            }
        }
    }
    Ok(())
}

/// Whether a file has extended attributes or an ACL: here it may have none.
fn has_own_attributes(directory: &OwnedFd, name: &[u8]) -> io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = match rustix::fs::openat(directory, name, flags, Mode::empty()) {
        Ok(file) => file,
        // It has its final mode, which forbids reading: it is not worth more.
        Err(Errno::ACCESS) => return Ok(true),
        Err(e) => return Err(e.into()),
    };
    // Longer than any list of names (XATTR_LIST_MAX).
    let mut names = vec![0; 64 << 10];
    let length = match rustix::fs::flistxattr(&file, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => 0,
        Err(e) => return Err(e.into()),
    };
    Ok(names[..length]
        .split(|&b| b == 0)
        .any(|name| name.starts_with(b"user.") || name.starts_with(b"system.posix_acl")))
}

/// Puts what one staged tree has taken from an older one back there; neither is used meanwhile.
pub fn put_back_all(staged: &Path, older: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(staged)? {
        let entry = entry?;
        let to = older.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            if to.symlink_metadata().is_ok_and(|there| there.is_dir()) {
                put_back_all(&entry.path(), &to)?;
            }
        } else if kind.is_file() && to.symlink_metadata().is_err() {
            rustix::fs::rename(entry.path(), to)?;
        }
    }
    Ok(())
}

fn change_owner_at(directory: &OwnedFd, name: &[u8], uid: u32, gid: u32) -> io::Result<()> {
    let now = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if (now.st_uid, now.st_gid) != (uid, gid) {
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        rustix::fs::chownat(directory, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

fn timestamps(attributes: &Attributes) -> Timestamps {
    let (tv_sec, nanos) = attributes.modify_time;
    let time = Timespec { tv_sec, tv_nsec: nanos.into() };
    Timestamps { last_access: time, last_modification: time }
}
