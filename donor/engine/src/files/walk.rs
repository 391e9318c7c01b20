//! Walks the data directory depth first, in the order of `RelativePath`.
//!
//! Invariants:
//! * No symbolic link is followed: each step is relative to an open directory.
//! * A directory's attributes are taken before its names are read, so that a name that comes or
//!   goes meanwhile leaves the directory changed for the next walk.
//! * What vanishes or changes type between two looks is passed over: the next walk, compared with
//!   this one, tells.
//!
//! Other file systems mounted inside the tree are walked as ordinary directories. A store through
//! a memory map into a page that is already dirty changes no time until the kernel writes the page
//! back; servers that this engine is for write by system calls, and hold locks while they run.

use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use marcot_common::{
    entry::{Attributes, Kind},
    failure::Failure,
    path::{PATH_BYTES_MAX, RelativePath},
    wire::{self, MODE_MASK},
};
use rustix::{
    fs::{AtFlags, FileType, Mode, Stat},
    io::Errno,
};
use tonic::Code;

use super::{
    attributes::{self, AttributeReader, Extended},
    names::{self, NAMES_BYTES_MAX, Names},
    offences::{Offence, Offences},
    tree::{Identity, LOOK, LOOK_DIRECTORY, Tree, failure},
};

/// Most directories held open at one time; those further up are opened again when their turn
/// comes. Paths may be 2,000 directories deep, descriptors commonly end at 1,024.
const OPEN_DIRECTORIES_MAX: usize = 32;

/// Marcot's own staging and saved directories.
const OWN_PREFIX: &[u8] = b".marcot-";

/// Files in a data directory's root that speak of the clone that it is: which one, and what it held.
const CLONE_FILES: [&[u8]; 3] =
    [b".marcot-generation", b".marcot-certificate", b".marcot-discarded"];

/// Something that belongs in a list.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) path: RelativePath,
    pub(crate) identity: Identity,
    /// Never a hard link: which name of a file comes first is for the list to say.
    pub(crate) kind: Kind,
    pub(crate) attributes: Attributes,
    /// It grows while it is read; what was read of it stays as it is.
    pub(crate) growing: bool,
}

/// What a whole walk has to say.
#[derive(Debug)]
pub(crate) struct WalkEnd {
    /// Entries left out, by reason.
    pub(crate) left_out: BTreeMap<String, u64>,
    /// Newest ctime without a fraction of a second.
    pub(crate) newest_whole_second: i64,
}

/// What an engine makes of what is found.
pub(crate) trait Judge {
    /// Whether an entry stays out of lists, and for which reason; an empty one is not counted. A
    /// directory goes with all below.
    fn leaves_out(&mut self, path: &RelativePath, is_directory: bool) -> Option<&'static str>;

    /// Looks into a regular file, and may change what is listed of it. `None` leaves it out: it is
    /// not what it seemed to be, and the next walk tells.
    fn look(&mut self, found: Found, file: BorrowedFd<'_>) -> Result<Option<Found>, Failure>;
}

/// Takes what is there as it is.
pub(crate) struct TakeAll;

impl Judge for TakeAll {
    fn leaves_out(&mut self, _: &RelativePath, _: bool) -> Option<&'static str> {
        None
    }

    fn look(&mut self, found: Found, _: BorrowedFd<'_>) -> Result<Option<Found>, Failure> {
        Ok(Some(found))
    }
}

/// A walk under way.
pub(crate) struct Walker<'a> {
    tree: &'a Tree,
    judge: &'a mut dyn Judge,
    stack: Vec<Frame>,
    attributes: AttributeReader,
    names_bytes: usize,
    names_bytes_max: usize,
    offences: Offences,
    left_out: BTreeMap<String, u64>,
    newest_whole_second: i64,
}

#[derive(Debug)]
struct Frame {
    /// `None`: the root.
    path: Option<RelativePath>,
    /// `None`: to be opened again.
    directory: Option<OwnedFd>,
    identity: Identity,
    names: Names,
    next: usize,
}

impl<'a> Walker<'a> {
    /// Begins at the root.
    pub(crate) fn new(tree: &'a Tree, judge: &'a mut dyn Judge) -> Result<Self, Failure> {
        Self::with_names_bytes_max(tree, judge, NAMES_BYTES_MAX)
    }

    fn with_names_bytes_max(
        tree: &'a Tree,
        judge: &'a mut dyn Judge,
        names_bytes_max: usize,
    ) -> Result<Self, Failure> {
        let mut walker = Self {
            tree,
            judge,
            stack: Vec::new(),
            attributes: AttributeReader::new(),
            names_bytes: 0,
            names_bytes_max,
            offences: Offences::default(),
            left_out: BTreeMap::new(),
            newest_whole_second: 0,
        };
        let root = rustix::fs::openat(tree.root(), c".", LOOK_DIRECTORY, Mode::empty())
            .map_err(|e| failure("open data directory", tree.path(), e))?;
        walker.push(None, root, tree.identity())?;
        Ok(walker)
    }

    /// The next entry in order; `None` at the end, or when enough is found that cannot be cloned.
    pub(crate) fn next(&mut self) -> Result<Option<Found>, Failure> {
        while !self.offences.is_full() {
            let Some(frame) = self.stack.last_mut() else {
                break;
            };
            if frame.next == frame.names.len() {
                self.names_bytes -= frame.names.bytes();
                self.stack.pop();
                continue;
            }
            if frame.directory.is_none() && !self.reopen()? {
                continue;
            }
            if let Some(path) = self.next_path()
                && let Some(found) = self.look_at(path)?
            {
                let changed = found.identity.change_time;
                if changed.1 == 0 {
                    self.newest_whole_second = self.newest_whole_second.max(changed.0);
                }
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Ends the walk: what was found that cannot be cloned is one failure.
    pub(crate) fn finish(self) -> Result<WalkEnd, Failure> {
        match self.offences.into_failure() {
            Some(failure) => Err(failure),
            None => Ok(WalkEnd {
                left_out: self.left_out,
                newest_whole_second: self.newest_whole_second,
            }),
        }
    }

    fn push(
        &mut self,
        path: Option<RelativePath>,
        directory: OwnedFd,
        identity: Identity,
    ) -> Result<(), Failure> {
        let left = self.names_bytes_max - self.names_bytes;
        let shown = || self.tree.shown(path.as_ref());
        let names = match Names::read(directory.as_fd(), left) {
            Ok(names) => names,
            // Removed since it was opened: an empty one here, gone in the next walk.
            Err(names::Error::System(Errno::NOENT)) => Names::default(),
            Err(names::Error::TooMany) => return Err(directory_too_large(&shown())),
            Err(names::Error::System(error)) => {
                return Err(failure("read directory", &shown(), error));
            }
        };
        self.names_bytes += names.bytes();
        if self.stack.len() >= OPEN_DIRECTORIES_MAX
            && let Some(parent) = self.stack.last_mut()
        {
            parent.directory = None;
        }
        self.stack.push(Frame { path, directory: Some(directory), identity, names, next: 0 });
        Ok(())
    }

    /// Opens the top frame's directory again; false, and its names passed over, when it is gone.
    fn reopen(&mut self) -> Result<bool, Failure> {
        let Some((frame, path)) =
            self.stack.last_mut().and_then(|frame| frame.path.clone().map(|path| (frame, path)))
        else {
            return Ok(false);
        };
        let opened = self.tree.open_at(&path, LOOK_DIRECTORY).and_then(|fd| {
            let same = Identity::of(&rustix::fs::fstat(&fd)?).is_same_inode(&frame.identity);
            Ok(same.then_some(fd))
        });
        match opened {
            Ok(Some(fd)) => frame.directory = Some(fd),
            Ok(None) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
                frame.next = frame.names.len();
            }
            Err(error) => {
                return Err(failure("open directory", &self.tree.shown(Some(&path)), error));
            }
        }
        Ok(frame.directory.is_some())
    }

    fn next_path(&mut self) -> Option<RelativePath> {
        let frame = self.stack.last_mut()?;
        let name = frame.names.get(frame.next);
        frame.next += 1;
        let path = match &frame.path {
            None => RelativePath::new(name),
            Some(directory) => directory.join(name),
        };
        if path.is_err() {
            let directory = frame.path.as_ref().map_or(&b""[..], |p| p.as_bytes());
            self.offences.add(Offence::PathTooLong, directory);
        }
        path.ok()
    }

    fn look_at(&mut self, path: RelativePath) -> Result<Option<Found>, Failure> {
        let Some(directory) = self.stack.last().and_then(|f| f.directory.as_ref()) else {
            return Ok(None);
        };
        let stat = match rustix::fs::statat(directory, path.name(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(self.failed("read attributes of", &path, error)),
        };
        let name = path.name();
        let kind = FileType::from_raw_mode(stat.st_mode);
        let is_directory = kind == FileType::Directory;
        if (is_directory && name.starts_with(OWN_PREFIX)) || CLONE_FILES.contains(&path.as_bytes())
        {
            self.leave_out("marcot");
        } else if let Some(reason) = self.judge.leaves_out(&path, is_directory) {
            self.leave_out(reason);
        } else if !is_directory && name.ends_with(b".isl") {
            self.offences.add(Offence::IslFile, path.as_bytes());
        } else {
            match kind {
                FileType::Directory | FileType::RegularFile => return self.open(path, kind),
                FileType::Symlink => return self.read_link(path, &stat),
                FileType::Socket => self.leave_out("socket"),
                FileType::Fifo => self.offences.add(Offence::Fifo, path.as_bytes()),
                FileType::CharacterDevice | FileType::BlockDevice => {
                    self.offences.add(Offence::Device, path.as_bytes());
                }
                FileType::Unknown => self.offences.add(Offence::UnknownType, path.as_bytes()),
            }
        }
        Ok(None)
    }

    /// Opens a file or directory: its attributes are read through the descriptor, and one that
    /// cannot be read is told of before a byte has moved.
    fn open(&mut self, path: RelativePath, kind: FileType) -> Result<Option<Found>, Failure> {
        let is_directory = kind == FileType::Directory;
        if !is_directory && path.name().ends_with(b".pid") {
            self.leave_out("pid_file");
            return Ok(None);
        }
        let Some(parent) = self.stack.last().and_then(|f| f.directory.as_ref()) else {
            return Ok(None);
        };
        let flags = if is_directory { LOOK_DIRECTORY } else { LOOK };
        let fd = match rustix::fs::openat(parent, path.name(), flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO | Errno::NOTDIR) => return Ok(None),
            Err(Errno::ACCESS | Errno::PERM) => {
                self.offences.add_unreadable(&self.tree.shown(Some(&path)));
                return Ok(None);
            }
            Err(error) => return Err(self.failed("open", &path, error)),
        };
        let stat = rustix::fs::fstat(&fd)
            .map_err(|error| self.failed("read attributes of", &path, error))?;
        if FileType::from_raw_mode(stat.st_mode) != kind {
            return Ok(None);
        }
        let extended = match self.attributes.read(fd.as_fd()) {
            Ok(extended) => extended,
            Err(attributes::Error::TooLarge) => {
                let offence = Offence::ExtendedAttributesTooLarge;
                self.offences.add(offence, path.as_bytes());
                return Ok(None);
            }
            Err(attributes::Error::System(error)) => {
                return Err(self.failed("read extended attributes of", &path, error));
            }
        };
        let identity = Identity::of(&stat);
        let attributes = attributes_of(&stat, extended);
        if is_directory {
            self.push(Some(path.clone()), fd, identity)?;
            let kind = Kind::Directory;
            return Ok(Some(Found { path, identity, kind, attributes, growing: false }));
        }
        let allocated = u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
        let kind = Kind::Regular { size: identity.size, allocated };
        let found = Found { path, identity, kind, attributes, growing: false };
        self.judge.look(found, fd.as_fd())
    }

    fn read_link(&mut self, path: RelativePath, stat: &Stat) -> Result<Option<Found>, Failure> {
        let Some(directory) = self.stack.last().and_then(|f| f.directory.as_ref()) else {
            return Ok(None);
        };
        let buffer = Vec::with_capacity(PATH_BYTES_MAX + 1);
        let target = match rustix::fs::readlinkat(directory, path.name(), buffer) {
            Ok(target) => target,
            Err(Errno::NOENT | Errno::INVAL) => return Ok(None),
            Err(error) => return Err(self.failed("read symbolic link", &path, error)),
        };
        let target = target.as_bytes();
        match wire::check_link_target(&path, target) {
            Ok(()) => {}
            Err(wire::LinkError::LeavesTree(..)) => {
                self.offences.add(Offence::LinkLeavesTree, path.as_bytes());
                return Ok(None);
            }
            Err(wire::LinkError::Malformed(_)) => {
                self.offences.add(Offence::LinkMalformed, path.as_bytes());
                return Ok(None);
            }
        }
        Ok(Some(Found {
            path,
            identity: Identity::of(stat),
            kind: Kind::Symlink { target: target.into() },
            attributes: attributes_of(stat, Extended::new()),
            growing: false,
        }))
    }

    fn leave_out(&mut self, reason: &str) {
        if !reason.is_empty() {
            *self.left_out.entry(reason.to_owned()).or_default() += 1;
        }
    }

    fn failed(&self, action: &str, path: &RelativePath, error: Errno) -> Failure {
        failure(action, &self.tree.shown(Some(path)), error).with("path", path)
    }
}

/// Attributes of the data directory itself.
pub(crate) fn root_attributes(tree: &Tree) -> Result<Attributes, Failure> {
    let failed = |e| failure("look at data directory", tree.path(), e);
    let stat = rustix::fs::fstat(tree.root()).map_err(failed)?;
    let extended = AttributeReader::new().read(tree.root()).map_err(|e| match e {
        attributes::Error::System(e) => failed(e),
        attributes::Error::TooLarge => {
            let shown = tree.path().display();
            Failure::precondition("UNSUPPORTED_FILE", format!("{shown}: {e}"))
        }
    })?;
    Ok(attributes_of(&stat, extended))
}

/// Attributes of an open file.
pub(crate) fn attributes_of_file(file: &File, shown: &Path) -> Result<Attributes, Failure> {
    let stat = rustix::fs::fstat(file).map_err(|e| failure("read attributes of", shown, e))?;
    let extended = AttributeReader::new().read(file.as_fd()).map_err(|e| match e {
        attributes::Error::System(e) => failure("read extended attributes of", shown, e),
        attributes::Error::TooLarge => {
            Failure::precondition("UNSUPPORTED_FILE", format!("{}: {e}", shown.display()))
        }
    })?;
    Ok(attributes_of(&stat, extended))
}

fn attributes_of(stat: &Stat, extended: Extended) -> Attributes {
    let identity = Identity::of(stat);
    Attributes {
        mode: stat.st_mode & MODE_MASK,
        modify_time: identity.modify_time,
        uid: stat.st_uid,
        gid: stat.st_gid,
        extended,
    }
}

/// A directory whose names would take more memory than a walk may.
pub(crate) fn directory_too_large(path: &Path) -> Failure {
    Failure::new(
        Code::FailedPrecondition,
        "DIRECTORY_TOO_LARGE",
        format!(
            "the names in directory {} take more than {} MiB; move files out of it",
            path.display(),
            NAMES_BYTES_MAX >> 20
        ),
    )
    .with("path", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(tree: &Tree, names_bytes_max: usize) -> Result<Vec<RelativePath>, Failure> {
        let mut judge = TakeAll;
        let mut walker = Walker::with_names_bytes_max(tree, &mut judge, names_bytes_max)?;
        let mut paths = Vec::new();
        while let Some(found) = walker.next()? {
            paths.push(found.path);
        }
        walker.finish().map(|_| paths)
    }

    /// Guards the bound on memory: without the comparison in `push` the walk succeeds.
    #[test]
    fn a_directory_with_too_many_names_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("many")).unwrap();
        for i in 0..100 {
            std::fs::write(directory.path().join(format!("many/{i:03}")), b"").unwrap();
        }
        let tree = Tree::open(directory.path()).unwrap();
        let failure = walk(&tree, 500).unwrap_err();
        assert_eq!(failure.reason, "DIRECTORY_TOO_LARGE");
        assert!(failure.message.contains("many"), "{failure}");
        assert_eq!(walk(&tree, 1000).unwrap().len(), 101);
    }

    /// Guards the directories opened again: without that, names after a deep sibling are lost.
    #[test]
    fn directories_deeper_than_descriptors_are_held_are_walked_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let mut path = directory.path().to_owned();
        for _ in 0..100 {
            path.push("d");
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("c"), b"").unwrap();
            std::fs::write(path.join("e"), b"").unwrap();
        }
        let tree = Tree::open(directory.path()).unwrap();
        let paths = walk(&tree, NAMES_BYTES_MAX).unwrap();
        assert_eq!(paths.len(), 300);
        assert!(paths.is_sorted());
    }
}
