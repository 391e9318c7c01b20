//! An entry of a (stage, round) list, checked.

use crate::path::RelativePath;

/// A file's id within one snapshot, from 1; it outlives the file's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u64);

/// How an entry changes what earlier rounds have built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The path was not there.
    Add,
    /// The path is read anew; its earlier type may differ.
    Replace,
    /// The file is now at this path.
    Rename,
    /// The file is cut to its size, or extended to it: what is new reads as zero.
    Truncate,
    /// The path is gone, with all that is in it.
    Remove,
    /// Parts of the file are read anew, the others stay.
    Patch,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    Regular {
        /// Bytes, holes included.
        size: u64,
        /// Bytes on the donor's disk.
        allocated: u64,
    },
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink {
        /// As stored: relative, and inside the tree.
        target: Box<[u8]>,
    },
    /// Another name of an earlier regular file.
    HardLink {
        /// That file.
        file_id: FileId,
    },
}

/// Attributes that an entry carries beside its content.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits, without setuid and setgid.
    pub mode: u32,
    /// Last modification: seconds and nanoseconds since 1970.
    pub modify_time: (i64, u32),
    /// Numeric owner on the donor.
    pub uid: u32,
    /// Numeric group on the donor.
    pub gid: u32,
    /// Extended attributes by ascending name.
    pub extended: Vec<(Box<[u8]>, Box<[u8]>)>,
}

/// An entry of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Position in its list, from 0.
    pub number: u64,
    /// The file's id.
    pub file_id: FileId,
    /// What it changes.
    pub change: Change,
    /// Where it is.
    pub path: RelativePath,
    /// What it is; `None` exactly for `Change::Remove`.
    pub kind: Option<Kind>,
    /// What else it carries.
    pub attributes: Attributes,
    /// Whether the file still grows.
    pub growing: bool,
}

impl Entry {
    /// Bytes of its path and attributes: about what it holds in memory.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        let extended = self.attributes.extended.iter();
        let extended: usize = extended.map(|(name, value)| name.len() + value.len() + 32).sum();
        self.path.as_bytes().len() + extended
    }

    /// Size of a regular file whose bytes this entry asks to be read; 0 for all else.
    #[must_use]
    pub fn content_bytes(&self) -> u64 {
        match (self.change, &self.kind) {
            (Change::Add | Change::Replace | Change::Patch, Some(Kind::Regular { size, .. })) => {
                *size
            }
            _ => 0,
        }
    }
}

/// Counts of a list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Entries of any kind.
    pub entries: u64,
    /// Regular files.
    pub files: u64,
    /// Bytes of regular files, holes included.
    pub size_bytes: u64,
    /// Bytes of regular files on the donor's disk.
    pub allocated_bytes: u64,
    /// Bytes of regular files that have to be read: holes, and the ends of last blocks, are not
    /// among them. Does not travel.
    pub data_bytes: u64,
    /// Size of the largest file that was ever counted; 0 when that is not known.
    pub largest_bytes: u64,
}

impl Totals {
    /// Counts one entry.
    pub fn add(&mut self, entry: &Entry) {
        self.entries += 1;
        if let Some(Kind::Regular { size, allocated }) = entry.kind {
            self.files += 1;
            self.size_bytes = self.size_bytes.saturating_add(size);
            self.allocated_bytes = self.allocated_bytes.saturating_add(allocated);
            self.data_bytes = self.data_bytes.saturating_add(size.min(allocated));
            self.largest_bytes = self.largest_bytes.max(size);
        }
    }

    /// Takes back what `add` has counted.
    pub fn remove(&mut self, entry: &Entry) {
        self.entries = self.entries.saturating_sub(1);
        if let Some(Kind::Regular { size, allocated }) = entry.kind {
            self.files = self.files.saturating_sub(1);
            self.size_bytes = self.size_bytes.saturating_sub(size);
            self.allocated_bytes = self.allocated_bytes.saturating_sub(allocated);
            self.data_bytes = self.data_bytes.saturating_sub(size.min(allocated));
        }
    }
}
