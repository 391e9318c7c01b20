//! The data directory as an open descriptor: nothing below it is reached by an absolute path.

use std::{
    fs::File,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use marcot_common::{failure::Failure, path::RelativePath};
use rustix::{
    fs::{Mode, OFlags, Stat},
    io::Errno,
};
use tonic::Code;

/// Descriptors for looking: never follow a link, never wait for a fifo's writer.
pub(crate) const LOOK: OFlags =
    OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

/// As `LOOK`, for directories.
pub(crate) const LOOK_DIRECTORY: OFlags = LOOK.union(OFlags::DIRECTORY);

/// An open data directory.
#[derive(Debug)]
pub(crate) struct Tree {
    root: OwnedFd,
    path: PathBuf,
    identity: Identity,
}

impl Tree {
    /// Opens the directory at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        let open = || -> rustix::io::Result<_> {
            let root = rustix::fs::open(path, LOOK_DIRECTORY, Mode::empty())?;
            let identity = Identity::of(&rustix::fs::fstat(&root)?);
            Ok((root, identity))
        };
        let (root, identity) = open().map_err(|e| failure("open data directory", path, e))?;
        Ok(Self { root, path: path.to_owned(), identity })
    }

    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The root's own device and inode, and times of when it was opened.
    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }

    /// The whole path, for messages only.
    pub(crate) fn shown(&self, path: Option<&RelativePath>) -> PathBuf {
        path.map_or_else(|| self.path.clone(), |p| self.path.join(p.as_path()))
    }

    /// Opens what is at `path`, component by component and through no link on the way.
    pub(crate) fn open_at(
        &self,
        path: &RelativePath,
        flags: OFlags,
    ) -> rustix::io::Result<OwnedFd> {
        let mut held: Option<OwnedFd> = None;
        let mut components = path.as_bytes().split(|&b| b == b'/').peekable();
        while let Some(name) = components.next() {
            let at = held.as_ref().map_or(self.root.as_fd(), |fd| fd.as_fd());
            let flags = match components.peek() {
                Some(_) => OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                None => flags,
            };
            held = Some(rustix::fs::openat(at, name, flags, Mode::empty())?);
        }
        held.ok_or(Errno::NOENT)
    }

    /// Opens a listed regular file, if it is still the very one that was listed.
    pub(crate) fn open_listed(
        &self,
        path: &RelativePath,
        listed: &Identity,
    ) -> Result<File, Failure> {
        let fd = self.open_at(path, LOOK).map_err(|error| match error {
            Errno::NOENT | Errno::NOTDIR => vanished(path),
            // A link or a device has taken its place.
            Errno::LOOP | Errno::NXIO => changed(path),
            other => failure("open", &self.shown(Some(path)), other),
        })?;
        let stat = rustix::fs::fstat(&fd)
            .map_err(|e| failure("read attributes of", &self.shown(Some(path)), e))?;
        if !listed.is_same_state(&Identity::of(&stat)) {
            return Err(changed(path));
        }
        Ok(File::from(fd))
    }
}

/// What tells one state of one file from any other.
///
/// Nobody can set ctime: it tells of a change even when size and mtime were put back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) size: u64,
    pub(crate) links: u64,
    pub(crate) modify_time: (i64, u32),
    pub(crate) change_time: (i64, u32),
    /// Not 0: a server writes the file while it is copied, and this number tells what it is. Size
    /// and ctime are 0 then, and mtime is the file's birth.
    pub(crate) live: u64,
}

impl Identity {
    /// Of nothing.
    pub(crate) const NONE: Self = Self {
        device: 0,
        inode: 0,
        size: 0,
        links: 0,
        modify_time: (0, 0),
        change_time: (0, 0),
        live: 0,
    };

    pub(crate) fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            links: wide(stat.st_nlink),
            modify_time: (stat.st_mtime, nanos(stat.st_mtime_nsec)),
            change_time: (stat.st_ctime, nanos(stat.st_ctime_nsec)),
            live: 0,
        }
    }

    /// Of a file that is written while it is copied: what changes with each write is left out. Its
    /// birth tells it from another file that has got the same inode since.
    pub(crate) fn live(self, what: u64, birth: (i64, u32)) -> Self {
        Self { size: 0, modify_time: birth, change_time: (0, 0), live: what, ..self }
    }

    /// Whether both are the same inode.
    pub(crate) fn is_same_inode(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// Whether nothing has changed between the two.
    pub(crate) fn is_same_state(&self, other: &Self) -> bool {
        self == other
    }
}

// The widths differ between architectures.
fn wide(n: impl Into<u64>) -> u64 {
    n.into()
}

fn nanos(n: impl TryInto<u32>) -> u32 {
    n.try_into().unwrap_or(0)
}

/// A failed system call on a path.
pub(crate) fn failure(action: &str, path: &Path, error: Errno) -> Failure {
    Failure::io(action, path, &error.into())
}

/// The listed file is not there any more.
pub(crate) fn vanished(path: &RelativePath) -> Failure {
    Failure::new(
        Code::NotFound,
        "FILE_VANISHED",
        format!("file {path} has vanished since it was listed"),
    )
    .with("path", path)
}

/// The listed file is another one now, or has other content.
pub(crate) fn changed(path: &RelativePath) -> Failure {
    Failure::new(
        Code::Aborted,
        "FILE_CHANGED",
        format!("file {path} has changed since it was listed"),
    )
    .with("path", path)
}
