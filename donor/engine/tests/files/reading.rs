//! Reading listed files: only what was listed is read.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::{FileExt as _, symlink},
};

use marcot_common::entry::FileId;
use marcot_engine::{Content, Span};

use crate::support::{Fixture, at, id_of, put_mtime_back, read, rename};

/// Guards the comparison in `open_listed`: without it each of these is read.
#[test]
fn a_file_that_is_not_what_was_listed_is_not_opened() {
    type Spoil = fn(&Fixture);
    let cases: [(&str, &str, Spoil); 8] = [
        ("removed", "FILE_VANISHED", |f| fs::remove_file(f.path("d/t")).unwrap()),
        ("directory removed", "FILE_VANISHED", |f| {
            fs::remove_dir_all(f.path("d")).unwrap();
        }),
        ("directory turned file", "FILE_VANISHED", |f| {
            fs::remove_dir_all(f.path("d")).unwrap();
            f.write("d", "");
        }),
        ("grown", "FILE_CHANGED", |f| {
            let mut file = File::options().append(true).open(f.path("d/t")).unwrap();
            file.write_all(b"more").unwrap();
        }),
        ("written, mtime put back", "FILE_CHANGED", |f| {
            let stat = fs::metadata(f.path("d/t")).unwrap();
            fs::write(f.path("d/t"), "CONTENT").unwrap();
            put_mtime_back(&f.path("d/t"), &stat);
        }),
        ("another file renamed onto it", "FILE_CHANGED", |f| {
            let other = f.write("other", "content");
            rename(other, f.path("d/t")).unwrap();
        }),
        ("turned into a link", "FILE_CHANGED", |f| {
            rename(f.path("d/t"), f.path("d/u")).unwrap();
            symlink("u", f.path("d/t")).unwrap();
        }),
        ("a link on the way", "FILE_VANISHED", |f| {
            rename(f.path("d"), f.path("e")).unwrap();
            symlink("e", f.path("d")).unwrap();
        }),
    ];
    for (name, reason, spoil) in cases {
        let fixture = Fixture::new();
        fixture.write("d/t", "content");
        let snapshot = fixture.open().unwrap();
        let id = id_of(&*snapshot, 1, "d/t");
        assert_eq!(read(&*snapshot, 1, id).unwrap(), b"content");
        spoil(&fixture);
        let failure = snapshot.open_file(at(1), id).expect_err(name);
        assert_eq!(failure.reason, reason, "{name}");
        assert_eq!(failure.metadata["path"], "`d/t`", "{name}");
    }
}

/// Guards `check_unchanged`: made to say yes always, it lets the mixture of two states pass.
#[test]
fn a_change_while_a_file_is_read_shows_after_the_last_read() {
    let fixture = Fixture::new();
    let path = fixture.write("t", vec![b'a'; 100]);
    let snapshot = fixture.open().unwrap();
    let id = id_of(&*snapshot, 1, "t");
    let mut reader = snapshot.open_file(at(1), id).unwrap();
    let mut half = [0; 50];
    reader.read_exact_at(&mut half, 0).unwrap();
    reader.check_unchanged().unwrap();
    let stat = fs::metadata(&path).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[b'b'; 100], 0).unwrap();
    put_mtime_back(&path, &stat);
    reader.read_exact_at(&mut half, 50).unwrap();
    assert_eq!(half, [b'b'; 50]);
    assert_eq!(reader.check_unchanged().unwrap_err().reason, "FILE_CHANGED");
}

/// Guards short reads: without the check for 0 bytes `read_exact_at` never returns.
#[test]
fn a_file_cut_while_it_is_read_is_told_at_once() {
    let fixture = Fixture::new();
    let path = fixture.write("t", vec![b'a'; 100]);
    let snapshot = fixture.open().unwrap();
    let id = id_of(&*snapshot, 1, "t");
    let mut reader = snapshot.open_file(at(1), id).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(10).unwrap();
    let failure = reader.read_exact_at(&mut [0; 100], 0).unwrap_err();
    assert_eq!(failure.reason, "FILE_CHANGED");
    assert!(reader.span(50, 100).is_ok(), "a hole or data, but no panic");
    assert!(reader.check_unchanged().is_err());
}

#[test]
fn holes_are_found_in_front_between_and_at_the_end() {
    const MIB: u64 = 1 << 20;
    let fixture = Fixture::new();
    let path = fixture.path("sparse");
    let file = File::create(&path).unwrap();
    file.set_len(10 * MIB).unwrap();
    file.write_all_at(&[1; 1 << 20], 2 * MIB).unwrap();
    file.write_all_at(&[2; 1 << 20], 5 * MIB).unwrap();
    fixture.write("dense", vec![3; 1 << 20]);
    let snapshot = fixture.open().unwrap();
    let id = id_of(&*snapshot, 1, "sparse");
    let mut reader = snapshot.open_file(at(1), id).unwrap();
    assert_eq!(reader.size(), 10 * MIB);
    assert!(reader.file().is_some(), "CLONE LOCAL copies by the file system");
    let mut spans = Vec::new();
    let mut offset = 0;
    while offset < 10 * MIB {
        let span = reader.span(offset, 10 * MIB).unwrap();
        spans.push((offset / MIB, span.end / MIB, span.content == Content::Hole));
        offset = span.end;
    }
    let expected = [(0, 2, true), (2, 3, false), (3, 5, true), (5, 6, false), (6, 10, true)];
    assert_eq!(spans, expected);
    let cut = Span { end: 2 * MIB + 10, content: Content::Data };
    assert_eq!(reader.span(2 * MIB, 2 * MIB + 10).unwrap(), cut);
    let id = id_of(&*snapshot, 1, "dense");
    let mut reader = snapshot.open_file(at(1), id).unwrap();
    let all = Span { end: MIB, content: Content::Data };
    assert_eq!(reader.span(0, MIB).unwrap(), all, "the end of the file is no hole to give");
    assert_eq!(read(&*snapshot, 1, id).unwrap(), vec![3; 1 << 20]);
}

#[test]
fn ids_and_lists_that_are_not_there_are_typed_errors() {
    let fixture = Fixture::new();
    let path = fixture.write("d/t", "");
    fs::hard_link(path, fixture.path("d/u")).unwrap();
    let snapshot = fixture.open().unwrap();
    for id in [0, 1, 3, 4, u64::MAX, u64::MAX / 8] {
        // 1 is a directory, 3 a hard link.
        let failure = snapshot.open_file(at(1), FileId(id)).unwrap_err();
        assert_eq!(failure.reason, "UNKNOWN_FILE", "{id}");
    }
    let failure = snapshot.open_file(at(2), FileId(2)).unwrap_err();
    assert_eq!(failure.reason, "STAGE_NOT_REACHED");
    assert_eq!(snapshot.list(at(1), 3).unwrap().count(), 0);
    assert_eq!(snapshot.list(at(1), 2).unwrap().count(), 1);
    assert!(snapshot.list(at(1), 4).is_err());
    assert!(snapshot.list(at(0), 0).is_err());
}
