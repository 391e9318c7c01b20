use marcot_common::{
    entry::{Attributes, Change, Entry, FileId, Kind},
    path::RelativePath,
    position::Stage,
};

use super::*;
use crate::{list::ListReceiver, plan::Part};

fn entry(number: u64, path: &str) -> Entry {
    Entry {
        number,
        file_id: FileId(number + 1),
        change: Change::Add,
        path: RelativePath::new(path.as_bytes()).unwrap(),
        kind: Some(Kind::Regular { size: 100, allocated: 100 }),
        attributes: Attributes::default(),
        growing: false,
    }
}

fn list(directory: &Path) -> FileList {
    let mut receiver = ListReceiver::create(directory, Position::FIRST, 9).unwrap();
    let mut totals = marcot_common::entry::Totals::default();
    for (number, path) in ["a", "b", "c"].iter().enumerate() {
        let entry = entry(number as u64, path);
        totals.add(&entry);
        receiver.push(&entry).unwrap();
    }
    receiver.finish(totals).unwrap()
}

fn unit(first: u64, last: u64) -> Unit {
    let part = |number: u64| Part {
        file_id: FileId(number + 1),
        path: RelativePath::new(b"a").unwrap(),
        size: 100,
        offset: 0,
        length: 100,
        whole: None,
        patches: false,
    };
    Unit { parts: (first..=last).map(part).collect(), first, last }
}

const SECOND: Position = Position { stage: Stage::PageCopy, round: 1 };

fn begun(home: &Path) -> CopyJournal {
    let begun = Begun { request: b"request".to_vec(), ..Begun::default() };
    let snapshot = SnapshotOpened { snapshot: "snapshots/x".to_owned(), ..Default::default() };
    CopyJournal::create(home, &begun, &snapshot).unwrap()
}

fn begin_round(journal: &CopyJournal, home: &Path, position: Position) {
    let (list, progress) = (list(home), Progress::default());
    let growing = GrowingFile {
        file_id: FileId(7),
        path: RelativePath::new(b"log").unwrap(),
        durable: 10,
        is_whole: false,
    };
    journal.round_begun(position, &list, &list, &[growing], &progress).unwrap();
}

/// Guards what a restart goes on from: the units that were recorded, and no other.
#[test]
fn units_that_were_recorded_are_known_after_a_restart() {
    let home = tempfile::tempdir().unwrap();
    let journal = begun(home.path());
    begin_round(&journal, home.path(), Position::FIRST);
    let done = UnitDone { data_bytes: 200, files: 2, ..unit_record(&unit(0, 1)) };
    journal.unit_done(&done).unwrap();
    let grown = CopyFound::look(home.path()).unwrap().round.unwrap().growing.remove(0);
    journal.grown(&GrowingFile { durable: 55, ..grown }, Vec::new()).unwrap();
    drop(journal);
    let (_journal, found) = CopyJournal::open(home.path()).unwrap();
    assert_eq!(found.begun.request, b"request");
    assert_eq!(found.snapshot.snapshot, "snapshots/x");
    let round = found.round.unwrap();
    assert_eq!((round.position, round.done.data_bytes), (Position::FIRST, 200));
    assert_eq!(round.growing[0].durable, 55);
    assert!(round.finished.contains(&unit(0, 1)));
    assert!(!round.finished.contains(&unit(0, 2)), "another unit begins there");
    assert!(!round.finished.contains(&unit(2, 2)));
    let (list, _) = open_lists(home.path(), &round).unwrap();
    assert_eq!(list.entry(2).unwrap().path.as_bytes(), b"c");
}

/// Guards a later round: units of the one before are not taken for its own, and a tree whose shape
/// was being changed is not gone on with.
#[test]
fn a_later_round_knows_only_its_own_units_and_a_cut_shape_is_unknown() {
    let home = tempfile::tempdir().unwrap();
    let journal = begun(home.path());
    begin_round(&journal, home.path(), Position::FIRST);
    journal.unit_done(&unit_record(&unit(0, 1))).unwrap();
    journal.shaping(SECOND).unwrap();
    assert!(CopyFound::look(home.path()).unwrap().round.is_none());
    begin_round(&journal, home.path(), SECOND);
    let round = CopyFound::look(home.path()).unwrap().round.unwrap();
    assert_eq!((round.position, round.finished.len()), (SECOND, 0));
    let mut names: Vec<_> = std::fs::read_dir(home.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names.len(), 3, "lists of the first round are gone: {names:?}");
}

/// Guards what is staged while a donor is away for long: runs that end by themselves are not counted.
#[test]
fn runs_that_ended_by_themselves_are_no_starts_that_were_cut_short() {
    let home = tempfile::tempdir().unwrap();
    drop(begun(home.path()));
    for _ in 0..2 * STARTS_MAX {
        let (journal, _) = CopyJournal::open(home.path()).unwrap();
        journal.ended().unwrap();
    }
    CopyFound::look(home.path()).unwrap();
}

/// Guards the copy of an earlier snapshot against a stop while the next one's journal is begun.
#[test]
fn a_journal_that_was_only_begun_tells_of_no_snapshot() {
    let home = tempfile::tempdir().unwrap();
    assert!(!tells_of_a_snapshot(home.path()), "there is none");
    let journal = Journal::create(&home.path().join(FILE_NAME)).unwrap();
    assert!(!tells_of_a_snapshot(home.path()), "it is empty");
    let journal = CopyJournal::new(journal, home.path());
    journal.append(RecordKind::Begun, &Begun::default()).unwrap();
    assert!(!tells_of_a_snapshot(home.path()), "one record");
    journal.append(RecordKind::SnapshotOpened, &SnapshotOpened::default()).unwrap();
    assert!(tells_of_a_snapshot(home.path()));
    begin_round(&journal, home.path(), Position::FIRST);
    assert!(tells_of_a_snapshot(home.path()));
}

/// Guards the end: what stops a recipient again and again is not gone on with for ever.
#[test]
fn starts_without_a_unit_between_them_are_counted() {
    let home = tempfile::tempdir().unwrap();
    let journal = begun(home.path());
    begin_round(&journal, home.path(), Position::FIRST);
    drop(journal);
    for _ in 0..STARTS_MAX - 1 {
        CopyJournal::open(home.path()).unwrap();
    }
    let (journal, _) = CopyJournal::open(home.path()).unwrap();
    let failure = CopyFound::look(home.path()).unwrap_err();
    assert!(failure.message.contains("5 times in a row"), "{failure}");
    journal.unit_done(&unit_record(&unit(0, 1))).unwrap();
    CopyFound::look(home.path()).unwrap();
}

/// Guards a list that was damaged on this disk.
#[test]
fn a_list_with_a_flipped_bit_is_an_error() {
    let home = tempfile::tempdir().unwrap();
    let journal = begun(home.path());
    begin_round(&journal, home.path(), Position::FIRST);
    let round = CopyFound::look(home.path()).unwrap().round.unwrap();
    let path = home.path().join(&round.list.file);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&path, bytes).unwrap();
    open_lists(home.path(), &round).unwrap_err();
}

/// Guards a journal that the disk has damaged: whose copy it is stays known, and nothing behind the
/// damage counts as progress.
#[test]
fn a_damaged_journal_tells_whose_copy_it_is_and_no_progress() {
    let home = tempfile::tempdir().unwrap();
    let journal = begun(home.path());
    begin_round(&journal, home.path(), Position::FIRST);
    for number in 0..3 {
        journal.unit_done(&unit_record(&unit(number, number))).unwrap();
    }
    drop(journal);
    let path = home.path().join(FILE_NAME);
    let right = std::fs::read(&path).unwrap();
    let mut bytes = right.clone();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(CopyJournal::open(home.path()).unwrap_err().reason, "JOURNAL_CORRUPT");
    let found = CopyFound::look(home.path()).unwrap();
    assert_eq!(found.begun.request, b"request");
    assert_eq!(found.damage.unwrap().reason, "JOURNAL_CORRUPT");
    assert!(found.round.is_none());
    // In the first record.
    let mut bytes = right;
    bytes[20] ^= 4;
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(CopyFound::look(home.path()).unwrap_err().reason, "JOURNAL_CORRUPT");
}

/// Guards records of a later version: they are passed over, and what is around them counts.
#[test]
fn records_of_unknown_kinds_are_passed_over() {
    let home = tempfile::tempdir().unwrap();
    let journal = begun(home.path());
    begin_round(&journal, home.path(), Position::FIRST);
    journal.unit_done(&unit_record(&unit(0, 0))).unwrap();
    drop(journal);
    let mut raw = Journal::open_with(&home.path().join(FILE_NAME), &mut |_| Ok(())).unwrap();
    raw.append(200, b"of a later version").unwrap();
    drop(raw);
    let (journal, _) = CopyJournal::open(home.path()).unwrap();
    journal.unit_done(&unit_record(&unit(1, 2))).unwrap();
    let round = CopyFound::look(home.path()).unwrap().round.unwrap();
    assert!(round.finished.contains(&unit(0, 0)) && round.finished.contains(&unit(1, 2)));
}
