//! Rounds: lists applied one after another make the very tree that is there.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
};

use marcot_common::{
    entry::{Change, Kind},
    position::Stage,
};
use marcot_proto::common::v1::ConsistencyLevel;

use crate::{
    model::{Model, real_tree},
    support::{Fixture, advance, at, id_of, list, paths, put_mtime_back, read, rename},
};

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % n as u64).unwrap()
    }
}

/// Names whose order by bytes of the whole path differs from that by components, and odd ones.
const NAMES: [&[u8]; 6] = [b"a", b"a-b", b"a.b", b"b", b"new\nline", b"\xff\xfe"];

fn any_path(fixture: &Fixture, random: &mut Random) -> PathBuf {
    let depth = [1, 1, 1, 2, 2, 3][random.below(6)];
    let names: Vec<_> = (0..depth).map(|_| NAMES[random.below(NAMES.len())]).collect();
    fixture.path(names.join(&b'/'))
}

/// Does one random thing to the tree; what the tree does not allow is passed over.
fn mutate(fixture: &Fixture, random: &mut Random) {
    let path = any_path(fixture, random);
    let other = any_path(fixture, random);
    let content = vec![b'0' + u8::try_from(random.below(10)).unwrap(); random.below(5000)];
    let before = fs::symlink_metadata(&path).ok();
    let is_file = before.as_ref().is_some_and(fs::Metadata::is_file);
    let is_link = before.as_ref().is_some_and(fs::Metadata::is_symlink);
    match random.below(14) {
        0..=2 if !is_link => drop(fs::write(&path, content)),
        3 | 4 => drop(fs::create_dir(&path)),
        5 => drop(fs::remove_file(&path)),
        6 => drop(fs::remove_dir_all(&path)),
        7 | 8 => drop(rename(&path, &other)),
        9 | 10 => drop(fs::hard_link(&path, &other)),
        11 => drop(symlink("a", &path)),
        12 if before.is_some() && !is_link => {
            let mode = [0o755, 0o700, 0o1777][random.below(3)];
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        13 if is_file => {
            // Same size, same mtime.
            let before = before.unwrap();
            let length = usize::try_from(before.len()).unwrap();
            fs::write(&path, vec![b'A' + u8::try_from(random.below(26)).unwrap(); length]).unwrap();
            put_mtime_back(&path, &before);
        }
        _ => {}
    }
}

/// Goal: whatever happens to a tree in whatever round, the copy at DONE is the tree.
/// Method: random trees and changes, also between a list and the reads of it; a model that knows
/// lists alone. Guards the comparison; seen failing without ctime in `Identity`, without either
/// place that sets or asks `gone`, without the removals at the end of the walk, and with ids that
/// stay though the type changes.
#[test]
fn lists_applied_round_by_round_make_the_real_tree() {
    let seeds = match std::env::var("MARCOT_TEST_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..200).collect::<Vec<u64>>(),
    };
    for seed in seeds {
        eprintln!("MARCOT_TEST_SEED={seed}");
        let mut random = Random(seed);
        let fixture = Fixture::new();
        for _ in 0..60 {
            mutate(&fixture, &mut random);
        }
        let snapshot = fixture.open().unwrap();
        let mut model = Model::default();
        let mut round = 1;
        loop {
            let is_calm = round >= 4;
            model.apply(&*snapshot, round, || {
                if !is_calm && random.below(10) == 0 {
                    mutate(&fixture, &mut random);
                }
            });
            for _ in 0..random.below(16) {
                if !is_calm {
                    mutate(&fixture, &mut random);
                }
            }
            let advanced = advance(&*snapshot, round).unwrap();
            let again = advance(&*snapshot, round).unwrap();
            assert_eq!(again.position, advanced.position);
            assert_eq!(again.totals, advanced.totals);
            if advanced.position.stage == Stage::Done {
                assert_eq!(advanced.totals.entries, model.tree().len() as u64);
                break;
            }
            round += 1;
            assert_eq!(advanced.position, at(round));
            let length = list(&*snapshot, round).len() as u64;
            assert!(length > 0);
            assert_eq!(advanced.totals.entries, length);
        }
        assert_eq!(model.tree(), real_tree(&fixture.data()), "seed {seed}");
    }
}

#[test]
fn an_untouched_tree_is_done_after_one_round() {
    let fixture = Fixture::new();
    fixture.write("db/t", "content");
    let snapshot = fixture.open().unwrap();
    assert_eq!(snapshot.position(), at(1));
    let done = advance(&*snapshot, 1).unwrap();
    assert_eq!(done.position.stage, Stage::Done);
    assert_eq!(done.consistency_level, ConsistencyLevel::QuiescentFiles);
    assert_eq!((done.totals.entries, done.totals.files, done.totals.size_bytes), (2, 1, 7));
    assert_eq!(snapshot.position(), done.position);
    assert_eq!(snapshot.totals(done.position).unwrap(), done.totals);
    assert_eq!(advance(&*snapshot, 1).unwrap().position, done.position);
    for wrong in [at(2), done.position] {
        let failure = snapshot.advance(wrong, &mut |_| Ok(())).unwrap_err();
        assert_eq!(failure.reason, "STAGE_NOT_REACHED");
    }
}

/// Guards ctime in `Identity`: with it taken out of the comparison the clone ends after round 1.
#[test]
fn a_file_already_copied_counts_as_changed_with_its_mtime_put_back() {
    let fixture = Fixture::new();
    let path = fixture.write("t", "before");
    let snapshot = fixture.open().unwrap();
    let id = id_of(&*snapshot, 1, "t");
    assert_eq!(read(&*snapshot, 1, id).unwrap(), b"before");
    let stat = fs::metadata(&path).unwrap();
    fs::write(&path, "behind").unwrap();
    put_mtime_back(&path, &stat);
    assert_eq!(advance(&*snapshot, 1).unwrap().position, at(2));
    let entries = list(&*snapshot, 2);
    assert_eq!((entries.len(), entries[0].change), (1, Change::Replace));
    assert_eq!(entries[0].file_id, id, "the id stays");
    assert_eq!(read(&*snapshot, 2, id).unwrap(), b"behind");
    assert_eq!(advance(&*snapshot, 2).unwrap().position.stage, Stage::Done);
}

/// Guards ROUNDS_MAX: without it this test never ends.
#[test]
fn a_writer_that_does_not_stop_fails_the_clone_by_name() {
    let fixture = Fixture::new();
    let path = fixture.write("db/log", "0");
    let snapshot = fixture.open().unwrap();
    let mut round = 1;
    let failure = loop {
        fs::write(&path, round.to_string()).unwrap();
        match advance(&*snapshot, round) {
            Ok(advanced) => round = advanced.position.round,
            Err(failure) => break failure,
        }
    };
    assert_eq!((round, &*failure.reason), (5, "SOURCE_CHANGED"));
    assert!(failure.message.contains("db/log"), "{failure}");
    assert!(failure.message.contains("stop what writes"), "{failure}");
}

/// Guards that a removed directory is one entry: without `gone` its content is listed too.
#[test]
fn a_removed_directory_is_one_entry_and_a_changed_type_replaces() {
    let fixture = Fixture::new();
    fixture.write("gone/x/y", "");
    fixture.write("gone-too", "");
    fixture.write("turns/x", "");
    fixture.write("wakes", "");
    let snapshot = fixture.open().unwrap();
    fs::remove_dir_all(fixture.path("gone")).unwrap();
    fs::remove_file(fixture.path("gone-too")).unwrap();
    fs::remove_dir_all(fixture.path("turns")).unwrap();
    fixture.write("turns", "file");
    fs::remove_file(fixture.path("wakes")).unwrap();
    fixture.write("wakes/child", "");
    advance(&*snapshot, 1).unwrap();
    let entries = list(&*snapshot, 2);
    assert_eq!(paths(&entries), ["gone", "gone-too", "turns", "wakes", "wakes/child"]);
    let changes: Vec<_> = entries.iter().map(|e| e.change).collect();
    use Change::{Add, Remove, Replace};
    assert_eq!(changes, [Remove, Remove, Replace, Replace, Add]);
}

/// Guards the comparison of link targets by id: a renamed directory leaves the other names' own
/// times alone, and without that comparison they are not listed.
#[test]
fn names_of_a_file_whose_first_name_vanished_are_listed_again() {
    let fixture = Fixture::new();
    let first = fixture.write("a/f", "shared");
    for name in ["m", "n"] {
        fs::hard_link(&first, fixture.path(name)).unwrap();
    }
    let snapshot = fixture.open().unwrap();
    let id = id_of(&*snapshot, 1, "a/f");
    let link = Some(Kind::HardLink { file_id: id });
    assert_eq!(list(&*snapshot, 1)[3].kind, link);
    rename(fixture.path("a"), fixture.path("z")).unwrap();
    advance(&*snapshot, 1).unwrap();
    let entries = list(&*snapshot, 2);
    assert_eq!(paths(&entries), ["a", "m", "n", "z", "z/f"]);
    assert!(matches!(entries[1].kind, Some(Kind::Regular { .. })));
    assert_eq!(entries[1].change, Change::Replace);
    let link = Some(Kind::HardLink { file_id: entries[1].file_id });
    assert_eq!([&entries[2].kind, &entries[4].kind], [&link, &link]);
    assert_eq!(read(&*snapshot, 2, entries[1].file_id).unwrap(), b"shared");
}

/// Guards `check_same_directory`: without it the clone ends well with the old directory.
#[test]
fn another_directory_under_the_same_name_fails_the_clone() {
    let fixture = Fixture::new();
    fixture.write("t", "");
    let snapshot = fixture.open().unwrap();
    rename(fixture.data(), fixture.spool().join("moved")).unwrap();
    fs::create_dir(fixture.data()).unwrap();
    assert_eq!(advance(&*snapshot, 1).unwrap_err().reason, "SOURCE_CHANGED");
}

#[test]
fn an_error_from_progress_stops_the_walk_and_it_can_be_asked_again() {
    let fixture = Fixture::new();
    fixture.write("t", "");
    let snapshot = fixture.open().unwrap();
    let stop = marcot_common::failure::Failure::bug("stop");
    let failure = snapshot.advance(at(1), &mut |_| Err(stop.clone())).unwrap_err();
    assert_eq!(failure.message, "stop");
    assert_eq!(advance(&*snapshot, 1).unwrap().position.stage, Stage::Done);
}

struct Stopper<'a>(&'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Goal: a change in the middle of a walk is never lost. Method: a thread that changes the tree
/// without a pause during the first two walks and reads, and a model that knows lists alone.
/// Guards that what comes or goes under a walk neither fails it nor is lost; seen failing without
/// passing over ENOENT of `statat`, and of `getdents` in a directory removed while open.
#[test]
fn changes_during_a_walk_are_in_a_later_round() {
    // A thread that got no time changed nothing before the end, and all it liked after it.
    let mut compared = 0;
    for seed in 0..60 {
        eprintln!("seed {seed}");
        let mut random = Random(seed);
        let fixture = Fixture::new();
        for _ in 0..100 {
            mutate(&fixture, &mut random);
        }
        let stop = AtomicBool::new(false);
        let mut model = Model::default();
        let before = compared;
        std::thread::scope(|scope| {
            let changes = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    mutate(&fixture, &mut random);
                }
            });
            // A failed assertion must end the thread too, or the test would hang.
            let stopper = Stopper(&stop);
            let snapshot = fixture.open().unwrap();
            model.apply(&*snapshot, 1, || {});
            let mut position = advance(&*snapshot, 1).unwrap().position;
            drop(stopper);
            changes.join().unwrap();
            if position.stage == Stage::Done {
                return;
            }
            compared += 1;
            while position.stage != Stage::Done {
                model.apply(&*snapshot, position.round, || {});
                position = advance(&*snapshot, position.round).unwrap().position;
            }
        });
        // Not by assert_eq: a tree holds all contents.
        let is_same = compared == before || model.tree() == real_tree(&fixture.data());
        assert!(is_same, "seed {seed}");
    }
    assert!(compared >= 30, "the thread got time in {compared} of 60 trees");
}
