//! Journals, of a copy and of an install: no panic; what a torn tail leaves is what was written, it
//! goes on from there, and what it says is within what it may say.
//!
//! Input: options, then records, each as kind, length in two bytes, payload; with `options & 1` the
//! bytes are the journal itself.

use std::{fs, path::Path};

use marcot_common::{
    entry::{Attributes, Change, Entry, FileId, Kind, Totals},
    path::RelativePath,
    position::Position,
};
use marcot_recipient::{
    certificate::{digests::DigestRun, table::DigestTable},
    copy_journal::{
        CopyFound, CopyJournal, FILE_NAME, open_lists, read_digests,
        record::{
            At, Begun, Grown, ListKept, RecordKind, RoundBegun, SnapshotOpened, UnitDone, Unread,
        },
    },
    install::{
        place::{Form, Place},
        recorded::all_recorded,
        step::Step,
    },
    journal::{Journal, PAYLOAD_BYTES_MAX, Record},
    list::{FileList, ListReceiver},
    progress::Progress,
};
use prost::Message as _;

use crate::scratch;

/// The parser's files.
pub const FILES: &[&str] = &[
    "recipient/src/journal.rs",
    "recipient/src/copy_journal/record.rs",
    "recipient/src/install/recorded.rs",
    "recipient/src/certificate/table.rs",
];

const MAGIC: &[u8] = b"marcotj1";

/// A clone's id, as install journals lie in a directory of its name.
const CLONE: &str = "0190b6f0-0000-7000-8000-000000000001";

/// Runs one input.
pub fn run(data: &[u8]) {
    let [options, rest @ ..] = data else { return };
    let directory = scratch::directory().join("copy");
    fs::create_dir_all(&directory).expect("room for a directory");
    let (bytes, written) = match options & 1 {
        0 => {
            let records = records(rest);
            let mut bytes = [MAGIC.to_vec(), records.iter().flat_map(framed).collect()].concat();
            // What a crash leaves of the last append.
            let last = records.last().map(framed).unwrap_or_default();
            let torn = usize::from(options >> 4).min(last.len().saturating_sub(1));
            bytes.truncate(bytes.len() - torn);
            let whole = records.len() - usize::from(torn > 0);
            // Of a record in another one's payload a reader cannot tell that it is none.
            let is_told = torn == 0 || !holds_a_record(&last[..last.len() - torn]);
            (bytes, is_told.then(|| records[..whole].to_vec()))
        }
        _ => (rest.to_vec(), None),
    };
    let path = scratch::file("copy/copy-journal", &bytes);
    let Some(records) = read(&path, &bytes, written.as_deref()) else { return };
    copy(&directory, &bytes);
    install(&records);
}

/// Records as an input has them.
fn records(mut bytes: &[u8]) -> Vec<Record> {
    let mut records = Vec::new();
    while let [kind, high, low, rest @ ..] = bytes {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
        records.push(Record { kind: *kind, payload: rest[..length].to_vec() });
        bytes = &rest[length..];
    }
    records
}

/// A record as a journal has it, by another way than the product's.
fn framed(record: &Record) -> Vec<u8> {
    let length = u32::try_from(record.payload.len()).expect("it is short").to_le_bytes();
    let sum = crc32c::crc32c(&[&length[..], &[record.kind], &record.payload].concat());
    [&length[..], &sum.to_le_bytes(), &[record.kind], &record.payload].concat()
}

/// Whether a record begins somewhere behind the first byte, and is whole.
fn holds_a_record(bytes: &[u8]) -> bool {
    (1..bytes.len()).any(|at| {
        let [a, b, c, d, _, _, _, _, kind, rest @ ..] = &bytes[at..] else { return false };
        let length = u32::from_le_bytes([*a, *b, *c, *d]);
        let payload = usize::try_from(length).ok().and_then(|length| rest.get(..length));
        payload.is_some_and(|payload| {
            let record = framed(&Record { kind: *kind, payload: payload.to_vec() });
            bytes[at..].starts_with(&record)
        })
    })
}

/// Reads a journal in all ways; `None` when it is refused.
fn read(path: &Path, bytes: &[u8], written: Option<&[Record]>) -> Option<Vec<Record>> {
    let read = Journal::read(path);
    let opened = Journal::open(path);
    let (Ok(read), Ok((mut journal, records))) = (&read, opened) else {
        let failure = read.expect_err("what can be opened can be read");
        assert!(failure.reason.starts_with("JOURNAL_"), "{failure}");
        assert!(written.is_none(), "{failure}");
        return None;
    };
    assert_eq!(*read, records);
    assert!(written.is_none_or(|written| written == records));
    let whole = [MAGIC.to_vec(), records.iter().flat_map(framed).collect()].concat();
    assert!(bytes.starts_with(&whole), "a record that was not written");
    assert_eq!(fs::read(path).expect("it is there"), whole, "a torn tail is left");
    journal.reserve(1 << 16);
    journal.append(77, b"more").expect("room for a record");
    assert!(journal.append(77, &vec![0; PAYLOAD_BYTES_MAX + 1]).is_err());
    let more = Record { kind: 77, payload: b"more".to_vec() };
    let again = Journal::read(path).expect("it was right");
    assert!(again.split_last() == Some((&more, &records[..])));
    fs::write(path, bytes).expect("room for a journal");
    Some(records)
}

/// What the journal of a copy says.
fn copy(directory: &Path, bytes: &[u8]) {
    let list = small_list();
    let table = DigestTable::create(directory, &list).expect("room for a table");
    let is_read = read_digests(directory, &table).is_ok();
    for (file, blocks) in [(1, 3), (2, 1)] {
        for block in 0..blocks {
            table.get(FileId(file), block).expect("a block of the file");
        }
        assert!(table.get(FileId(file), blocks).is_err());
    }
    let Ok(found) = CopyFound::look(directory) else { return };
    let _ = found.snapshot.owners();
    if let Some(round) = &found.round {
        // Nobody has kept such a list, or one of these counts.
        assert!(open_lists(directory, round).is_err() || round.list.entries == 0);
        assert!(round.finished.len() <= bytes.len());
        for file in &round.growing {
            let record = Grown::from(file);
            assert_eq!(record.file().map(|again| again.path), Some(file.path.clone()));
        }
        for file in &round.unfinished {
            let again = Unread::from(file).file().expect("a path is a path");
            assert_eq!(again.failure.message, file.failure.message);
        }
    }
    let Ok((journal, again)) = CopyJournal::open(directory) else { return };
    assert!(found.damage.is_none());
    assert_eq!(again.round.is_some(), found.round.is_some());
    let unit = UnitDone { first: 1, last: 2, data_bytes: 7, ..UnitDone::default() };
    journal.unit_done(&unit).expect("room for a record");
    journal.resized(FileId(1), 5, 9).expect("room for a record");
    if let Some(growing) = again.round.iter().flat_map(|round| &round.growing).next() {
        journal.grown(growing, Vec::new()).expect("room for a record");
    }
    drop(journal);
    assert_eq!(read_digests(directory, &table).is_ok(), is_read);
    let went_on = CopyFound::look(directory).expect("a unit was done");
    let data = |found: &CopyFound| found.round.as_ref().map(|round| round.done.data_bytes);
    assert_eq!(data(&went_on), data(&found).map(|data| data.saturating_add(7)));
    begin_again(&went_on, &list);
}

/// Another journal of the same copy, in its first round.
fn begin_again(found: &CopyFound, list: &FileList) {
    let directory = scratch::directory().join("again");
    fs::create_dir_all(&directory).expect("room for a directory");
    drop(fs::remove_file(directory.join(FILE_NAME)));
    let mut snapshot = found.snapshot.clone();
    snapshot.set_owners(found.snapshot.owners());
    assert_eq!(snapshot, found.snapshot);
    let journal = CopyJournal::create(&directory, &found.begun, &snapshot).expect("room");
    let position = Position::FIRST;
    journal.shaping(position).expect("room for a record");
    let growing = found.round.as_ref().map_or(&[][..], |round| &round.growing);
    let progress = Progress::default();
    journal.round_begun(position, list, list, growing, &progress).expect("room for a record");
    journal.log_cost();
    drop(journal);
    let again = CopyFound::look(&directory).expect("it was begun");
    assert_eq!((&again.begun, &again.snapshot), (&found.begun, &found.snapshot));
    let round = again.round.expect("a round has begun, unless thousands of files grow");
    assert_eq!(round.position, position);
    assert!(round.growing.iter().map(|file| &file.path).eq(growing.iter().map(|file| &file.path)));
    let (first, whole) = open_lists(&directory, &round).expect("they were kept");
    // A journal does not keep it.
    let expected = Totals { largest_bytes: 0, ..list.totals() };
    assert_eq!((first.totals(), whole.totals()), (expected, expected));
}

/// Two files: of three blocks, and of one.
fn small_list() -> FileList {
    let receiver = ListReceiver::create(&scratch::directory(), Position::FIRST, 9);
    let mut receiver = receiver.expect("room for a list");
    let mut totals = Totals::default();
    for (number, (path, size)) in (0..).zip([("a", 3 << 20), ("b", 5)]) {
        let entry = Entry {
            number,
            file_id: FileId(number + 1),
            change: Change::Add,
            path: RelativePath::new(path.as_bytes()).expect("a name"),
            kind: Some(Kind::Regular { size, allocated: size }),
            attributes: Attributes::default(),
            growing: false,
        };
        totals.add(&entry);
        receiver.push(&entry).expect("it is right");
    }
    receiver.finish(totals).expect("it is right")
}

/// The same records as those of an install, beside a data directory.
fn install(records: &[Record]) {
    let data_directory = scratch::directory().join("installs/data");
    fs::create_dir_all(&data_directory).expect("room for a directory");
    let place = Place::new(Form::Exchange, &data_directory, CLONE);
    fs::create_dir_all(&place.staging).expect("room for a directory");
    let bytes = [MAGIC.to_vec(), records.iter().flat_map(framed).collect()].concat();
    fs::write(place.journal(), bytes).expect("room for a journal");
    for recorded in all_recorded(&data_directory).unwrap_or_default() {
        assert!(recorded.plan.form == Form::Move || recorded.plan.name == b"data");
        assert!(!recorded.is_pending() || recorded.step != Step::Accepted);
    }
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let record = |kind: u8, payload: &[u8]| {
        let length = u16::try_from(payload.len()).expect("it is short").to_be_bytes();
        [&[kind][..], &length, payload].concat()
    };
    let at = At { stage: 1, round: 1 };
    let kept =
        |file: &str| Some(ListKept { file: file.to_owned(), entries: 2, ..ListKept::default() });
    let grown = Grown { file_id: 2, path: b"b".to_vec(), durable: 5, ..Grown::default() };
    let unread = Unread { file_id: 1, path: b"a".to_vec(), why: "gone".to_owned() };
    let run = |digests: Vec<u8>, zero_blocks, unknown_blocks| DigestRun {
        file_id: 1,
        first: 1,
        digests,
        zero_blocks,
        unknown_blocks,
    };
    let digests = vec![run(vec![7; 64], 0, 0), run(Vec::new(), 2, 0), run(Vec::new(), 0, 1)];
    let begun = record(RecordKind::Begun as u8, &Begun::default().encode_to_vec());
    let opened =
        SnapshotOpened { snapshot: "snapshots/1".to_owned(), uid: 5, ..Default::default() };
    let opened = record(RecordKind::SnapshotOpened as u8, &opened.encode_to_vec());
    let round = RoundBegun {
        at: Some(at.clone()),
        list: kept("list-1-1"),
        whole: kept("whole-1-1"),
        growing: vec![grown.clone()],
        unfinished: vec![unread.clone()],
    };
    let round = record(RecordKind::RoundBegun as u8, &round.encode_to_vec());
    let unit = UnitDone {
        last: 1,
        length: 5,
        data_bytes: 5,
        digests: digests.clone(),
        unfinished: vec![unread],
        ..UnitDone::default()
    };
    let unit = record(RecordKind::UnitDone as u8, &unit.encode_to_vec());
    let grown = Grown { digests: digests.clone(), durable: 9, ..grown };
    let grown = record(RecordKind::Grown as u8, &grown.encode_to_vec());
    let shaping = record(RecordKind::Shaping as u8, &at.encode_to_vec());
    let changed = record(RecordKind::Changed as u8, &digests[2].encode_to_vec());
    let bad_run = record(RecordKind::Changed as u8, &run(vec![1], 1, 0).encode_to_vec());
    let went_on = record(RecordKind::WentOn as u8, &[]);
    let later = record(200, b"of a later version");
    let plan = |form: &str| {
        let plan = format!(
            "{{\"clone\":\"{CLONE}\",\"form\":\"{form}\",\"name\":[100,97,116,97],\"old_inode\":1,\
             \"new_inode\":2,\"waits\":true,\"keep_old_seconds\":null}}"
        );
        record(1, plan.as_bytes())
    };
    let step = |step: u8| record(step, b"{\"unix_seconds\":1}");
    let input = |options: u8, records: &[&[u8]]| [vec![options], records.concat()].concat();
    let head: &[u8] = &[begun.clone(), opened.clone()].concat();
    let copied: &[u8] = &[head, &round, &unit, &grown, &changed].concat();
    let raw = |options: u8, bytes: &[u8]| [&[options][..], bytes].concat();
    let one = framed(&Record { kind: 1, payload: b"x".to_vec() });
    let mut damaged = one.clone();
    damaged[9] ^= 1;
    vec![
        input(0, &[copied]),
        input(0x30, &[copied, &later]),
        input(0, &[copied, &shaping, &round, &went_on, &went_on]),
        input(0, &[head, &went_on, &went_on, &went_on, &went_on, &went_on]),
        input(0, &[head, &bad_run]),
        input(0, &[&begun]),
        input(
            0,
            &[&plan("exchange"), &step(2), &step(3), &step(6), &step(9), &step(64), &step(10)],
        ),
        input(0, &[&plan("exchange"), &step(2), &step(9), &step(14)]),
        input(0, &[&plan("move")]),
        input(0, &[&plan("move"), &step(99), &step(1)]),
        // Torn, and with a whole record in its payload.
        input(0x20, &[&record(200, &[&one[..], b"rest"].concat())]),
        raw(1, b""),
        raw(1, b"marcotj2"),
        raw(1, b"marcotj"),
        raw(1, &[MAGIC, &one, &damaged].concat()),
        raw(1, &[MAGIC, &damaged, &one].concat()),
        raw(1, &[MAGIC, &one, &[0xff; 12]].concat()),
    ]
}
