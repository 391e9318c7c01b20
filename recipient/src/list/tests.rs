//! Lists received and merged, against models.

use std::collections::BTreeMap;

use marcot_common::{entry::Attributes, position::Stage};
use proptest::prelude::*;

use super::*;

const LATER: Position = Position { stage: Stage::FileCopy, round: 2 };

fn path(text: &str) -> RelativePath {
    RelativePath::new(text.as_bytes()).unwrap()
}

fn entry(text: &str, file_id: u64, change: Change, kind: Option<Kind>) -> Entry {
    Entry {
        number: 0,
        file_id: FileId(file_id),
        change,
        path: path(text),
        kind,
        attributes: Attributes::default(),
        growing: false,
    }
}

fn file(text: &str, file_id: u64, change: Change) -> Entry {
    entry(text, file_id, change, Some(Kind::Regular { size: file_id, allocated: 0 }))
}

fn directory(text: &str, file_id: u64, change: Change) -> Entry {
    entry(text, file_id, change, Some(Kind::Directory))
}

fn receive(position: Position, mut entries: Vec<Entry>) -> Result<FileList, Failure> {
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    let mut receiver = ListReceiver::create(&std::env::temp_dir(), position, 1000)?;
    let mut totals = Totals::default();
    for (number, mut entry) in entries.into_iter().enumerate() {
        entry.number = number as u64;
        totals.add(&entry);
        receiver.push(&entry)?;
    }
    receiver.finish(totals)
}

/// What a merge did to the staged tree.
#[derive(Default)]
struct Noted {
    removed: Vec<String>,
    aside: Vec<String>,
}

impl TreeChange for Noted {
    fn remove(&mut self, path: &RelativePath) -> Result<(), Failure> {
        self.removed.push(String::from_utf8_lossy(path.as_bytes()).into_owned());
        Ok(())
    }

    fn set_aside(&mut self, _: FileId, path: &RelativePath) -> Result<(), Failure> {
        self.aside.push(String::from_utf8_lossy(path.as_bytes()).into_owned());
        Ok(())
    }
}

fn names(list: &FileList) -> Vec<String> {
    let entries = list.entries().unwrap().map(Result::unwrap);
    entries.map(|e| String::from_utf8_lossy(e.path.as_bytes()).into_owned()).collect()
}

fn whole() -> FileList {
    let add = Change::Add;
    let entries = vec![
        directory("a", 1, add),
        file("a/x", 2, add),
        file("a/y", 3, add),
        file("b", 4, add),
        file("c", 5, add),
    ];
    receive(Position::FIRST, entries).unwrap()
}

#[test]
fn a_round_adds_replaces_renames_cuts_and_removes() {
    let round = vec![
        directory("a", 1, Change::Replace),
        file("a/w", 9, Change::Add),
        entry("a/y", 3, Change::Remove, None),
        file("b", 5, Change::Rename),
        file("c", 4, Change::Rename),
        file("a/x", 2, Change::Truncate),
    ];
    let round = receive(LATER, round).unwrap();
    let mut noted = Noted::default();
    let merged = merge(&whole(), &round, &mut noted).unwrap();
    assert_eq!(names(&merged), ["a", "a/w", "a/x", "b", "c"]);
    // Two files that change places are both out of the way before either is put back.
    assert_eq!(noted.aside, ["b", "c"]);
    assert_eq!(noted.removed, ["a/y"]);
    let ids: Vec<_> = merged.entries().unwrap().map(|e| e.unwrap().file_id.0).collect();
    assert_eq!(ids, [1, 9, 2, 5, 4]);
}

#[test]
fn what_replaces_a_directory_takes_all_below_with_it() {
    for kind in [None, Some(Kind::Regular { size: 0, allocated: 0 })] {
        let change = if kind.is_none() { Change::Remove } else { Change::Replace };
        let round = receive(LATER, vec![entry("a", 7, change, kind.clone())]).unwrap();
        let mut noted = Noted::default();
        let merged = merge(&whole(), &round, &mut noted).unwrap();
        let expected: &[&str] = if kind.is_none() { &["b", "c"] } else { &["a", "b", "c"] };
        assert_eq!(names(&merged), expected);
        assert_eq!(noted.removed, ["a"]);
    }
}

/// Guards staged files that hard links share: one that is read anew is a new file.
#[test]
fn a_file_that_is_read_anew_is_removed_first() {
    let round = receive(LATER, vec![file("b", 4, Change::Replace)]).unwrap();
    let mut noted = Noted::default();
    merge(&whole(), &round, &mut noted).unwrap();
    assert_eq!(noted.removed, ["b"]);
}

#[test]
fn a_round_that_speaks_of_what_is_not_there_is_refused() {
    for wrong in [entry("nowhere", 7, Change::Remove, None), file("a", 7, Change::Truncate)] {
        let round = receive(LATER, vec![wrong]).unwrap();
        let failure = merge(&whole(), &round, &mut Noted::default()).unwrap_err();
        assert_eq!(failure.reason, "PEER_MISBEHAVED");
    }
}

#[test]
fn hard_links_are_found_by_the_file_that_they_name() {
    let link = entry("z", 6, Change::Add, Some(Kind::HardLink { file_id: FileId(4) }));
    let list = receive(Position::FIRST, vec![file("b", 4, Change::Add), link]).unwrap();
    let targets = list.link_targets().unwrap();
    assert_eq!(targets, HashMap::from([(FileId(4), path("b"))]));
    let backwards: Vec<_> = list.entries_backwards().map(|e| e.unwrap().file_id.0).collect();
    assert_eq!(backwards, [6, 4]);
}

/// A path of as many bytes as there can be.
fn long_path(number: u64) -> RelativePath {
    let names = std::iter::repeat_n("x".repeat(250), 15).chain([format!("{number:0150}")]);
    path(&names.collect::<Vec<_>>().join("/"))
}

/// Guards memory against hard links to files of long paths: the targets are held. Without the bound of
/// their bytes 256 Ki of them are a gigabyte.
#[test]
fn the_paths_of_hard_linked_files_are_bounded_in_bytes() {
    let mut writer = ListWriter::create(&std::env::temp_dir()).unwrap();
    for number in 0..4500 {
        let named = Entry { path: long_path(number), ..file("f", number + 1, Change::Add) };
        let kind = Some(Kind::HardLink { file_id: named.file_id });
        writer.append(&named).unwrap();
        writer.append(&entry("l", 1 << 40, Change::Add, kind)).unwrap();
    }
    let failure = writer.finish().unwrap().link_targets().unwrap_err();
    assert_eq!(failure.reason, "LIST_LIMIT");
    assert!(failure.message.contains("more than 16777216 bytes"), "{failure}");
}

/// Guards the disk against entries that are all attributes: a right list is a small part of the bound.
#[test]
fn a_list_is_bounded_in_bytes_by_its_entries() {
    let mut receiver = ListReceiver::create(&std::env::temp_dir(), Position::FIRST, 9000).unwrap();
    let value = vec![7; 60 << 10].into_boxed_slice();
    let extended = vec![(b"user.x".to_vec().into_boxed_slice(), value)];
    let failure = (0..9000).find_map(|number| {
        let attributes = Attributes { extended: extended.clone(), ..Attributes::default() };
        let named = file(&format!("{number:09}"), number + 1, Change::Add);
        receiver.push(&Entry { number, attributes, ..named }).err()
    });
    let failure = failure.unwrap();
    assert_eq!(failure.reason, "LIST_LIMIT");
    assert!(failure.message.contains("4096 for each"), "{failure}");
    assert!(receiver.next_number() > 1000, "{}", receiver.next_number());
}

proptest! {
    /// Rounds of files in one directory, against a map.
    #[test]
    fn merging_is_what_a_map_does(
        first in prop::collection::btree_map("[a-e]", 1u64..100, 0..5),
        rounds in prop::collection::vec(
            prop::collection::btree_map("[a-e]", prop::option::of(100u64..200), 0..5), 0..4),
    ) {
        let mut model = first.clone();
        let entries = first.iter().map(|(name, &id)| file(name, id, Change::Add)).collect();
        let mut list = receive(Position::FIRST, entries).unwrap();
        for changes in rounds {
            let mut entries = Vec::new();
            for (name, change) in changes {
                match (change, model.contains_key(&name)) {
                    (Some(id), there) => {
                        let change = if there { Change::Replace } else { Change::Add };
                        entries.push(file(&name, id, change));
                        model.insert(name, id);
                    }
                    (None, true) => {
                        entries.push(entry(&name, 1, Change::Remove, None));
                        model.remove(&name);
                    }
                    (None, false) => {}
                }
            }
            let round = receive(LATER, entries).unwrap();
            list = merge(&list, &round, &mut Noted::default()).unwrap();
        }
        let merged: BTreeMap<_, _> = list
            .entries()
            .unwrap()
            .map(Result::unwrap)
            .map(|e| (String::from_utf8_lossy(e.path.as_bytes()).into_owned(), e.file_id.0))
            .collect();
        prop_assert_eq!(merged, model);
        prop_assert_eq!(list.totals().entries, list.entries().unwrap().count() as u64);
    }
}
