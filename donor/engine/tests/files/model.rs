//! A tree built from lists alone, as a recipient builds one, and the real tree to compare with.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::Path,
};

use marcot_common::{
    entry::{Change, Entry, FileId, Kind},
    path::RelativePath,
};
use marcot_engine::Snapshot;

use crate::support::{list, read};

/// An entry in a form that copy and original share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Node {
    Directory { mode: u32, modify_time: (i64, u32) },
    Symlink { target: Vec<u8> },
    File { mode: u32, modify_time: (i64, u32), content: Vec<u8>, first_name: Vec<u8> },
}

/// What lists and reads have built.
#[derive(Debug, Default)]
pub(crate) struct Model {
    entries: BTreeMap<RelativePath, Entry>,
    contents: BTreeMap<FileId, Option<Vec<u8>>>,
    ids: BTreeSet<FileId>,
}

impl Model {
    /// Applies a round's list, reading each file that it lists; `meanwhile` runs before each.
    pub(crate) fn apply(
        &mut self,
        snapshot: &dyn Snapshot,
        round: u32,
        mut meanwhile: impl FnMut(),
    ) {
        for entry in list(snapshot, round) {
            meanwhile();
            let path = entry.path.clone();
            let old = self.entries.get(&path);
            let is_there = old.is_some();
            assert_eq!(is_there, entry.change != Change::Add, "{entry:?} on {old:?}");
            if self.ids.insert(entry.file_id) {
                assert_ne!(entry.change, Change::Remove);
            } else {
                let old = old.filter(|e| e.file_id == entry.file_id);
                let old = old.unwrap_or_else(|| panic!("{entry:?} has another path's id"));
                assert!(
                    entry.change == Change::Remove || type_of(old) == type_of(&entry),
                    "{entry:?} has the id of {old:?}"
                );
            }
            let keeps_content = entry.kind == Some(Kind::Directory)
                && old.is_some_and(|e| e.kind == Some(Kind::Directory));
            if !keeps_content {
                self.entries.retain(|p, _| *p != path && !p.is_below(&path));
            }
            if let Some(parent) = path.parent() {
                let parent = self.entries.get(&parent);
                assert!(
                    entry.change == Change::Remove
                        || parent.is_some_and(|p| p.kind == Some(Kind::Directory)),
                    "{entry:?} has no directory"
                );
            }
            match &entry.kind {
                None => {
                    assert_eq!(entry.change, Change::Remove);
                    continue;
                }
                Some(Kind::Regular { .. }) => {
                    let content = match read(snapshot, round, entry.file_id) {
                        Ok(content) => Some(content),
                        Err(failure) => {
                            let known = ["FILE_VANISHED", "FILE_CHANGED"];
                            assert!(known.contains(&&*failure.reason), "{failure:?}");
                            None
                        }
                    };
                    self.contents.insert(entry.file_id, content);
                }
                Some(Kind::HardLink { file_id }) => {
                    let mut before = self.entries.range(..&path);
                    assert!(
                        before.any(|(_, e)| e.file_id == *file_id
                            && matches!(e.kind, Some(Kind::Regular { .. }))),
                        "{entry:?} links to no earlier file"
                    );
                }
                Some(_) => {}
            }
            self.entries.insert(path, entry);
        }
    }

    /// The tree as built; panics when a file's content was never had.
    pub(crate) fn tree(&self) -> BTreeMap<RelativePath, Node> {
        let node = |entry: &Entry| {
            let (mode, modify_time) = (entry.attributes.mode, entry.attributes.modify_time);
            let file = |id: FileId| {
                let first = self.entries.values().find(|e| e.file_id == id).unwrap();
                Node::File {
                    mode,
                    modify_time,
                    content: self.contents[&id].clone().unwrap(),
                    first_name: first.path.as_bytes().to_vec(),
                }
            };
            match entry.kind.as_ref().unwrap() {
                Kind::Directory => Node::Directory { mode, modify_time },
                Kind::Symlink { target } => Node::Symlink { target: target.to_vec() },
                Kind::Regular { .. } => file(entry.file_id),
                Kind::HardLink { file_id } => file(*file_id),
            }
        };
        let entries = self.entries.iter();
        entries.map(|(path, entry)| (path.clone(), node(entry))).collect()
    }
}

/// The real tree, read without the engine.
pub(crate) fn real_tree(root: &Path) -> BTreeMap<RelativePath, Node> {
    let mut nodes = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let stat = path.symlink_metadata().unwrap();
            let relative = path.strip_prefix(root).unwrap().as_os_str().as_bytes();
            let relative = RelativePath::new(relative).unwrap();
            let mode = stat.mode() & 0o1777;
            let modify_time = (stat.mtime(), u32::try_from(stat.mtime_nsec()).unwrap());
            let node = if stat.is_dir() {
                left.push(path);
                Node::Directory { mode, modify_time }
            } else if stat.is_symlink() {
                Node::Symlink {
                    target: fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec(),
                }
            } else {
                Node::File {
                    mode,
                    modify_time,
                    content: fs::read(&path).unwrap(),
                    first_name: stat.ino().to_le_bytes().to_vec(),
                }
            };
            nodes.insert(relative, node);
        }
    }
    // From inode numbers to the first name of each.
    let mut first_names = BTreeMap::new();
    for (path, node) in &mut nodes {
        if let Node::File { first_name, .. } = node {
            let first = first_names.entry(first_name.clone());
            *first_name = first.or_insert_with(|| path.as_bytes().to_vec()).clone();
        }
    }
    nodes
}

fn type_of(entry: &Entry) -> Option<std::mem::Discriminant<Kind>> {
    entry.kind.as_ref().map(std::mem::discriminant)
}
