//! Digests of what a unit and a growing file have written: made on arrival, whatever the bytes came
//! from, so that a bit that flips on this disk afterwards is no part of them.

use std::{os::unix::fs::FileExt as _, path::Path};

use marcot_common::{
    entry::{Attributes, Change, Entry, FileId, Kind, Totals},
    path::RelativePath,
    position::Position,
};

use super::*;
use crate::{
    certificate::{
        digests::{BLOCK_BYTES, Digest, blocks_of, zero_digest},
        table::DigestTable,
    },
    copy_journal::{
        CopyJournal, read_digests,
        record::{Begun, SnapshotOpened},
    },
    growing::{GrowingFiles, GrowingWriter},
    list::ListReceiver,
    staging::Owners,
};

const BLOCK: usize = 1 << 20;

struct Copy {
    home: tempfile::TempDir,
    staging: Staging,
    journal: CopyJournal,
    progress: Progress,
}

fn name() -> RelativePath {
    RelativePath::new(b"f").unwrap()
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n / 3 % 251) as u8 | 1).collect()
}

impl Copy {
    fn begin() -> Self {
        let home = tempfile::tempdir().unwrap();
        let staging = Staging::create(home.path(), "x", Owners::Preserved).unwrap();
        let (begun, snapshot) = (Begun::default(), SnapshotOpened::default());
        let journal = CopyJournal::create(staging.directory(), &begun, &snapshot).unwrap();
        Self { home, staging, journal, progress: Progress::default() }
    }

    fn part(&self, size: usize, offset: usize, patches: bool) -> Unit {
        let part = Part {
            file_id: FileId(1),
            path: name(),
            size: size as u64,
            offset: offset as u64,
            length: (size - offset) as u64,
            whole: None,
            patches,
        };
        Unit { parts: vec![part], first: 0, last: 0 }
    }

    /// Flips a bit of the staged file.
    fn flip(&self, at: u64) {
        let path = self.staging.tree().join("f");
        let file = File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }

    /// What the journal says of the blocks of the file.
    fn digests(&self, size: usize) -> Vec<Option<Digest>> {
        let size = size as u64;
        let entry = Entry {
            number: 0,
            file_id: FileId(1),
            change: Change::Add,
            path: name(),
            kind: Some(Kind::Regular { size, allocated: size }),
            attributes: Attributes::default(),
            growing: false,
        };
        let directory = self.staging.directory();
        let mut receiver = ListReceiver::create(directory, Position::FIRST, 1).unwrap();
        receiver.push(&entry).unwrap();
        let mut totals = Totals::default();
        totals.add(&entry);
        let table = DigestTable::create(directory, &receiver.finish(totals).unwrap()).unwrap();
        read_digests(directory, &table).unwrap();
        (0..blocks_of(size)).map(|block| table.get(FileId(1), block).unwrap()).collect()
    }

    fn older(&self, content: &[u8]) -> Reuse {
        let path = self.home.path().join("older");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("f"), content).unwrap();
        Reuse::open(Path::new(&path)).unwrap()
    }
}

fn digests_of(content: &[u8]) -> Vec<Option<Digest>> {
    content.chunks(BLOCK).map(|block| Some(*blake3::hash(block).as_bytes())).collect()
}

/// Guards R8 for an older copy: its blocks have the digests that were compared, those that are new in
/// part are hashed while they are in memory. Hashed at the end, a flipped bit would be certified.
#[test]
fn reused_blocks_are_hashed_when_they_are_compared() {
    let copy = Copy::begin();
    let older = bytes(3 * BLOCK + 77);
    let mut content = older.clone();
    let page = 16 << 10;
    content[BLOCK + 5 * page..BLOCK + 6 * page].fill(0xfe);
    let unit = copy.part(content.len(), 0, false);
    let known = known_of(&copy.staging, &unit, &copy.older(&older)).unwrap();
    let writer = UnitWriter::new(&copy.staging, &copy.progress, &unit);
    let mut writer = writer.with_digests(true).with_known(known);
    assert!(!writer.known(0, 0).is_empty());
    // As it comes: in pieces that end anywhere.
    let changed = BLOCK + 5 * page;
    writer.keep(1, 0, page as u64).unwrap();
    writer.keep(1, page as u64, (changed - page) as u64).unwrap();
    let piece = Bytes::copy_from_slice(&content[changed..changed + page]);
    writer.write(1, changed as u64, page as u64, &[piece]).unwrap();
    let rest = changed + page;
    writer.keep(1, rest as u64, (content.len() - rest) as u64).unwrap();
    let (done, _) = writer.finish().unwrap();
    copy.journal.unit_done(&done).unwrap();
    for block in 0..4 {
        copy.flip(block * BLOCK_BYTES + 50);
    }
    assert_eq!(copy.digests(content.len()), digests_of(&content));
}

/// Guards what is written on another thread: it is in the file when the unit ends, its attributes come
/// after it, and its digests are right. Without the wait the last buffer is missing.
#[test]
fn a_unit_that_is_written_past_the_page_cache_is_whole_when_it_ends() {
    let copy = Copy::begin();
    let content = bytes(5 * BLOCK + 12_345);
    let unit = copy.part(content.len(), 0, false);
    let mut disk = DirectWriter::start().unwrap();
    let writer = UnitWriter::new(&copy.staging, &copy.progress, &unit);
    let mut writer = writer.with_digests(true).with_disk(Some(&mut disk));
    let hole = 2 * BLOCK..3 * BLOCK;
    let mut at = 0;
    while at < content.len() {
        if at == hole.start {
            writer.skip_hole(1, at as u64, BLOCK as u64).unwrap();
            at = hole.end;
        }
        let end = (at + 300_000).min(content.len());
        let end = if at < hole.start { end.min(hole.start) } else { end };
        let piece = Bytes::copy_from_slice(&content[at..end]);
        writer.write(1, at as u64, (end - at) as u64, &[piece]).unwrap();
        at = end;
    }
    let (done, unfinished) = writer.finish().unwrap();
    assert!(unfinished.is_empty());
    copy.journal.unit_done(&done).unwrap();
    let mut expected = content;
    expected[hole].fill(0);
    assert!(std::fs::read(copy.staging.tree().join("f")).unwrap() == expected);
    let mut digests = digests_of(&expected);
    digests[2] = Some(zero_digest());
    assert_eq!(copy.digests(expected.len()), digests);
}

/// Guards R8 for redo: what grows is hashed as it comes, over calls that end anywhere, and what is left
/// of it at the end goes on from there.
#[test]
fn a_growing_file_is_hashed_as_it_comes() {
    let copy = Copy::begin();
    let content = bytes(4 * BLOCK + 12_345);
    let files = GrowingFiles::default();
    let entry = Entry {
        number: 0,
        file_id: FileId(1),
        change: Change::Add,
        path: name(),
        kind: Some(Kind::Regular { size: 0, allocated: 0 }),
        attributes: Attributes::default(),
        growing: true,
    };
    files.listed(&entry).unwrap();
    let mut at = 0;
    for length in [700_000, 5, BLOCK, 700_000, 1_000_000] {
        let growing = files.growing().remove(0);
        let (staging, progress) = (&copy.staging, &copy.progress);
        let mut writer =
            GrowingWriter::open(staging, progress, &files, growing, length as u64).unwrap();
        let piece = Bytes::copy_from_slice(&content[at..at + length]);
        writer.write(1, at as u64, length as u64, &[piece]).unwrap();
        writer.finish(&files, Some(&copy.journal)).unwrap();
        at += length;
    }
    let whole = at / BLOCK;
    assert!(whole >= 3, "{whole} blocks are whole");
    for block in 0..whole as u64 {
        copy.flip(block * BLOCK_BYTES + 50);
    }
    let unit = copy.part(content.len(), at, true);
    let mut writer = UnitWriter::new(&copy.staging, &copy.progress, &unit).with_digests(true);
    let piece = Bytes::copy_from_slice(&content[at..]);
    writer.write(1, at as u64, (content.len() - at) as u64, &[piece]).unwrap();
    let (done, _) = writer.finish().unwrap();
    copy.journal.unit_done(&done).unwrap();
    copy.flip(whole as u64 * BLOCK_BYTES + 50);
    assert_eq!(copy.digests(content.len()), digests_of(&content));
}
