//! A donor's list: no panic, an entry survives the wire, no path or link leaves the tree, paths
//! ascend, and a later round's list is merged into one that is right itself.
//!
//! Input: options, then a ListFilesResponse, or (`options & 2`) entries in a form that is easier to
//! change: change, type, file id, size, then path, link's target and an attribute's name, each up to a
//! NUL. Up to the first entry that is not added they are of a first round, from there on of a second
//! one; with `options & 1` numbers and order are put right.

use std::collections::{BTreeMap, BTreeSet};

use marcot_common::{
    checksum,
    entry::{Change, Entry, FileId, Kind, Totals},
    failure::Failure,
    fields,
    path::{NAME_BYTES_MAX, PATH_BYTES_MAX, RelativePath},
    position::{Position, Stage},
    wire,
};
use marcot_proto::donor::v1 as pb;
use marcot_recipient::list::{FileList, ListReceiver, TreeChange, merge};
use prost::Message as _;

use crate::scratch;

/// The parser's files.
pub const FILES: &[&str] = &[
    "common/src/entry.rs",
    "common/src/fields.rs",
    "common/src/path.rs",
    "common/src/wire.rs",
    "recipient/src/list.rs",
];

/// Entries of one input.
const ENTRIES_MAX: usize = 200;

/// Runs one input.
pub fn run(data: &[u8]) {
    let [options, message @ ..] = data else { return };
    let decoded = match options & 2 {
        0 => {
            let counted = fields::count(message, 1);
            let Ok(decoded) = pb::ListFilesResponse::decode(message) else { return };
            // Groups, which nothing writes, are skipped when decoding and not counted.
            assert!(counted.is_none_or(|counted| counted == decoded.entries.len()));
            decoded
        }
        _ => pb::ListFilesResponse { entries: easy(message), ..Default::default() },
    };
    let entries = decoded.entries.into_iter().take(ENTRIES_MAX);
    let entries: Vec<Entry> = entries.filter_map(entry).collect();
    let end = decoded.end.unwrap_or_default();
    let told = wire::totals(end.totals);
    assert_eq!(wire::totals(Some(wire::totals_to_wire(told))), told);
    drop(wire::position(i32::from(*options), u32::from(*options >> 4)));
    let (first, second) = split(&entries);
    if options & 1 == 0 {
        drop(receive(first, Position::FIRST, told));
        return;
    }
    let (first, second) = (put_right(first, true), put_right(second, false));
    let Some(whole) = receive(&first, Position::FIRST, totals(&first)) else {
        return;
    };
    read_back(&whole, &first);
    let position = Position { stage: Stage::PageCopy, round: 2 };
    let round = receive(&second, position, totals(&second)).expect("a later round may be anything");
    merged(&whole, &round);
}

/// Entries of the easier form.
fn easy(mut bytes: &[u8]) -> Vec<pb::FileEntry> {
    let mut entries = Vec::new();
    while let [change, kind, file, size, rest @ ..] = bytes {
        let mut texts = rest.splitn(4, |&byte| byte == 0);
        let mut text = || bytes::Bytes::copy_from_slice(texts.next().unwrap_or_default());
        let mut entry = pb::FileEntry {
            number: entries.len() as u64,
            change: i32::from(change % 8),
            r#type: i32::from(kind % 8),
            file_id: u64::from(*file),
            link_file_id: u64::from(*size),
            size_bytes: u64::from(*size) << (size % 64),
            allocated_bytes: u64::from(*size),
            mode: u32::from(*size) << 4,
            growing: kind & 8 != 0,
            path: text(),
            link_target: text(),
            ..Default::default()
        };
        let name = text();
        if !name.is_empty() {
            let value = bytes::Bytes::from_static(b"v");
            entry.extended_attributes.push(pb::ExtendedAttribute { name, value });
        }
        entries.push(entry);
        bytes = texts.next().unwrap_or_default();
    }
    entries
}

/// One entry, and what must hold of it.
fn entry(message: pb::FileEntry) -> Option<Entry> {
    let entry = wire::entry(message).ok()?;
    let path = entry.path.as_bytes();
    stays_inside(path, 0);
    assert!(
        path.split(|&byte| byte == b'/').all(|name| (1..=NAME_BYTES_MAX).contains(&name.len()))
    );
    if let Some(Kind::Symlink { target }) = &entry.kind {
        let depth = entry.path.as_bytes().iter().filter(|&&byte| byte == b'/').count();
        assert!(!target.is_empty() && target.len() <= PATH_BYTES_MAX);
        stays_inside(target, depth);
    }
    assert_eq!(entry.kind.is_none(), entry.change == Change::Remove);
    assert!(entry.file_id.0 > 0 && entry.attributes.mode & !wire::MODE_MASK == 0);
    assert!(entry.content_bytes() <= i64::MAX as u64 && entry.held_bytes() < 1 << 20);
    let mut again = wire::entry_to_wire(&entry);
    if entry.kind.is_none() {
        // Of what is gone no time is told.
        again.modify_time = Some(prost_types::Timestamp {
            seconds: entry.attributes.modify_time.0,
            nanos: i32::try_from(entry.attributes.modify_time.1).expect("less than a second"),
        });
    }
    assert_eq!(wire::entry(again).as_ref().ok(), Some(&entry));
    assert_eq!(
        checksum::of_entries(std::slice::from_ref(&entry)),
        checksum::of_entries(std::slice::from_ref(&entry))
    );
    if let Some(parent) = entry.path.parent() {
        assert!(entry.path.is_below(&parent) && parent < entry.path);
        assert_eq!(parent.join(entry.path.name()).as_ref(), Ok(&entry.path));
    }
    Some(entry)
}

/// By components, as the kernel would go along it, from a directory `depth` below the root.
fn stays_inside(path: &[u8], mut depth: usize) {
    assert!(path.first() != Some(&b'/') && !path.contains(&0));
    for component in path.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => depth = depth.checked_sub(1).expect("it has left the tree"),
            _ => depth += 1,
        }
    }
}

/// The second round begins at the first entry that only it can have.
fn split(entries: &[Entry]) -> (&[Entry], &[Entry]) {
    let at = entries.iter().position(|entry| entry.change != Change::Add);
    entries.split_at(at.unwrap_or(entries.len()))
}

/// In order, each path once, numbered; of a first round each in a directory that is listed.
fn put_right(entries: &[Entry], is_first: bool) -> Vec<Entry> {
    let mut sorted: BTreeMap<RelativePath, Entry> = BTreeMap::new();
    for entry in entries {
        let parent = entry.path.parent();
        let is_listed = parent.is_none_or(|parent| {
            sorted.get(&parent).is_some_and(|entry| entry.kind == Some(Kind::Directory))
        });
        if is_listed || !is_first {
            sorted.entry(entry.path.clone()).or_insert_with(|| entry.clone());
        }
    }
    (0..).zip(sorted.into_values()).map(|(number, entry)| Entry { number, ..entry }).collect()
}

fn totals(entries: &[Entry]) -> Totals {
    let mut totals = Totals::default();
    entries.iter().for_each(|entry| totals.add(entry));
    let mut none = totals;
    entries.iter().for_each(|entry| none.remove(entry));
    assert!(none.entries == 0 && none.files == 0);
    totals
}

fn receive(entries: &[Entry], position: Position, totals: Totals) -> Option<FileList> {
    let most = ENTRIES_MAX as u64;
    let mut receiver =
        ListReceiver::create(&scratch::directory(), position, most).expect("room for a list");
    let mut last: Option<&RelativePath> = None;
    for (number, entry) in (0..).zip(entries) {
        assert_eq!(receiver.next_number(), number);
        receiver.push(entry).ok()?;
        assert!(entry.number == number && last.is_none_or(|last| *last < entry.path));
        assert!(position != Position::FIRST || entry.change == Change::Add);
        last = Some(&entry.path);
    }
    assert_eq!(receiver.totals().entries, entries.len() as u64);
    receiver.finish(totals).ok()
}

/// What was received is what is read, forwards, backwards, and from a file of a name.
fn read_back(list: &FileList, entries: &[Entry]) {
    let read: Result<Vec<Entry>, Failure> = list.entries().expect("it was written").collect();
    assert_eq!(read.expect("it was written"), entries);
    let backwards: Result<Vec<Entry>, Failure> = list.entries_backwards().collect();
    assert!(backwards.expect("it was written").iter().rev().eq(entries));
    let targets = list.link_targets().expect("there are few");
    for (file, path) in targets {
        assert!(entries.iter().any(|entry| entry.file_id == file && entry.path == path));
    }
    let path = scratch::directory().join("list");
    list.keep_as(&path).expect("room for a list");
    let kept = FileList::open(&scratch::directory(), "list", list.totals());
    assert_eq!(kept.expect("it was kept").totals(), list.totals());
    let mut wrong = list.totals();
    wrong.size_bytes ^= 1;
    assert!(FileList::open(&scratch::directory(), "list", wrong).is_err());
}

/// What is done to a tree, told by paths alone.
#[derive(Default)]
struct Done {
    removed: BTreeSet<RelativePath>,
    set_aside: BTreeSet<FileId>,
}

impl TreeChange for Done {
    fn remove(&mut self, path: &RelativePath) -> Result<(), Failure> {
        assert!(self.removed.insert(path.clone()), "{path} is removed twice");
        Ok(())
    }

    fn set_aside(&mut self, file: FileId, _: &RelativePath) -> Result<(), Failure> {
        self.set_aside.insert(file);
        Ok(())
    }
}

fn merged(whole: &FileList, round: &FileList) {
    let all = |list: &FileList| -> Vec<Entry> {
        let entries: Result<_, Failure> = list.entries().expect("it was written").collect();
        entries.expect("it was written")
    };
    let mut done = Done::default();
    let Ok(merged) = merge(whole, round, &mut done) else { return };
    let (old, new, merged) = (all(whole), all(round), all(&merged));
    for (number, entry) in (0..).zip(&merged) {
        assert_eq!((entry.number, entry.change), (number, Change::Add));
        assert!(entry.kind.is_some());
    }
    assert!(merged.windows(2).all(|pair| pair[0].path < pair[1].path));
    let has = |path: &RelativePath| merged.iter().any(|entry| entry.path == *path);
    for entry in &new {
        assert_eq!(has(&entry.path), entry.change != Change::Remove, "{}", entry.path);
    }
    let was = |path: &RelativePath| old.iter().any(|entry| entry.path == *path);
    assert!(done.removed.iter().all(was));
    assert!(done.set_aside.iter().all(|file| old.iter().any(|entry| entry.file_id == *file)));
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let entry = |number: u64, path: &str, change: pb::EntryChange, kind: pb::FileType| {
        let path = bytes::Bytes::copy_from_slice(path.as_bytes());
        let mut entry = pb::FileEntry { number, file_id: number + 1, path, ..Default::default() };
        (entry.change, entry.r#type) = (change.into(), kind.into());
        match kind {
            pb::FileType::Regular => (entry.size_bytes, entry.allocated_bytes) = (70_000, 4096),
            pb::FileType::Symlink => entry.link_target = "../a".into(),
            pb::FileType::HardLink => entry.link_file_id = 3,
            _ => {}
        }
        entry.mode = 0o640;
        entry.modify_time = Some(prost_types::Timestamp { seconds: 5, nanos: 6 });
        entry
    };
    use pb::{
        EntryChange::{Add, Patch, Remove, Rename, Replace, Truncate},
        FileType::{Directory, HardLink, Regular, Symlink, Unspecified},
    };
    let mut first = vec![
        entry(0, "a", Add, Directory),
        entry(1, "a/b", Add, Directory),
        entry(2, "a/b/f", Add, Regular),
        entry(3, "a/b/h", Add, HardLink),
        entry(4, "a/l", Add, Symlink),
        entry(5, "a/z", Add, Regular),
        entry(6, "b", Add, Regular),
    ];
    first[2].growing = true;
    let attribute =
        |name: &'static str| pb::ExtendedAttribute { name: name.into(), value: "v".into() };
    first[0].extended_attributes = vec![attribute("system.posix_acl_default"), attribute("user.x")];
    let mut second = vec![
        entry(0, "a/b", Remove, Unspecified),
        entry(1, "a/l", Replace, Directory),
        entry(2, "a/z", Truncate, Regular),
        entry(3, "b", Patch, Regular),
        entry(4, "c", Rename, Regular),
        entry(5, "d", Add, Regular),
    ];
    second[4].file_id = 6;
    let totals = pb::Totals {
        entries: 7,
        files: 3,
        size_bytes: 210_000,
        allocated_bytes: 3 * 4096,
        ..Default::default()
    };
    let message = |options: u8, entries: Vec<pb::FileEntry>| {
        let end = Some(pb::ListEnd { totals: Some(totals), ..Default::default() });
        let message = pb::ListFilesResponse { entries, end, ..Default::default() };
        [vec![options], message.encode_to_vec()].concat()
    };
    let both = [first.clone(), second].concat();
    let mut replaced = first.clone();
    replaced.push(entry(0, "a", Replace, Regular));
    let mut bad = Vec::new();
    let spoilt: [fn(&mut pb::FileEntry); 8] = [
        |entry| entry.path = "../x".into(),
        |entry| entry.path = "/x".into(),
        |entry| entry.path = "a\0".into(),
        |entry| entry.path = "x".repeat(256).into(),
        |entry| entry.file_id = 0,
        |entry| entry.size_bytes = 1 << 63,
        |entry| entry.modify_time = Some(prost_types::Timestamp { seconds: 0, nanos: -1 }),
        |entry| {
            let name = "security.x".into();
            entry.extended_attributes.push(pb::ExtendedAttribute { name, value: "".into() });
        },
    ];
    for spoil in spoilt {
        let mut entry = entry(0, "a", Add, Regular);
        spoil(&mut entry);
        bad.push(entry);
    }
    let mut linked = entry(0, "l", Add, Symlink);
    linked.link_target = "a/../../b".into();
    bad.push(linked);
    // Change, type, file and size of each, then its texts.
    let easy = |entries: &[([u8; 4], &str)]| {
        let entries = entries.iter().map(|(head, texts)| [&head[..], texts.as_bytes()].concat());
        [vec![3], entries.collect::<Vec<_>>().concat()].concat()
    };
    vec![
        easy(&[
            ([1, 2, 1, 0], "a\0\0system.posix_acl_access\0"),
            ([1, 1, 2, 9], "a/f\0\0user.x\0"),
            ([1, 3, 3, 0], "a/l\0../a/f\0\0"),
            ([1, 4, 4, 2], "a/m\0\0\0"),
            ([2, 1, 2, 8], "a/f\0\0\0"),
            ([5, 0, 3, 0], "a/l\0\0\0"),
            ([3, 1, 4, 0], "b\0\0\0"),
        ]),
        easy(&[([1, 1, 1, 9], "f\0\0\0"), ([4, 1, 1, 2], "f\0\0\0"), ([6, 9, 2, 2], "g\0\0\0")]),
        easy(&[([1, 2, 1, 0], "d\0\0\0"), ([1, 1, 2, 1], "d/f\0\0\0"), ([2, 1, 3, 1], "d\0\0\0")]),
        message(0, first.clone()),
        message(1, first),
        message(1, both),
        message(1, replaced),
        message(1, vec![entry(0, "a", Patch, Regular)]),
        message(1, vec![entry(0, "a", Remove, Unspecified)]),
        message(0, bad),
        message(0, vec![entry(1, "a", Add, Regular)]),
        message(0, vec![entry(0, "a/b", Add, Regular)]),
        vec![0, 10, 5, 1],
    ]
}
