//! The harness itself: what judges a clone must find what is wrong.

use std::time::{Duration, Instant, SystemTime};

use marcot_proto::{
    common::v1::Stage,
    recipient::v1::{Clone, StageProgress},
};
use marcot_tests::{
    invariants::{check_copy, prepare},
    load::{Load, LoadOptions},
    mariadb::{MariaDb, Options, Version, install_with},
    new_directory, wait_for,
};
use mysql::prelude::Queryable as _;

const WRITERS: usize = 2;

struct Busy {
    server: MariaDb,
    _home: tempfile::TempDir,
}

impl Busy {
    fn start() -> Self {
        let home = new_directory();
        let data = home.path().join("data");
        let options = Options::primary(Version::V10_11, &[]);
        install_with(&data, &options);
        let server = MariaDb::start_with(home.path(), &data, &options);
        prepare(&server, 1 << 20);
        Self { server, _home: home }
    }
}

fn options() -> LoadOptions {
    LoadOptions { writers: WRITERS, ..LoadOptions::default() }
}

/// A clone whose file copy took from one moment to another.
fn clone_between(begun: SystemTime, ended: SystemTime) -> Clone {
    let stage = StageProgress {
        stage: Stage::FileCopy.into(),
        begin_time: Some(begun.into()),
        end_time: Some(ended.into()),
        ..Default::default()
    };
    Clone { stages: vec![stage], ..Default::default() }
}

/// Guards every row that asks for a load: a lock on the ledger for two seconds starves it.
#[test]
fn a_load_that_was_starved_for_a_while_did_not_keep_up() {
    let busy = Busy::start();
    let load = Load::start(&busy.server, LoadOptions { rate_min: 1, ..options() });
    load.wait_for_commits(200);
    let begun = SystemTime::now();
    wait_for("a while", || (begun.elapsed().ok()? > Duration::from_secs(2)).then_some(()));
    let fed = clone_between(begun, SystemTime::now());
    load.kept_up(&fed).expect("nothing held it up");
    let mut holder = busy.server.connect();
    holder.query_drop("LOCK TABLES bank.ledger WRITE").expect("a lock");
    let locked = Instant::now();
    wait_for("a while", || (locked.elapsed() > Duration::from_secs(3)).then_some(()));
    holder.query_drop("UNLOCK TABLES").expect("its own lock");
    load.wait_for_commits(50);
    let starved = clone_between(begun, SystemTime::now());
    let error = load.kept_up(&starved).expect_err("it was starved");
    assert!(error.contains("FILE_COPY") && error.contains("1 commits/s"), "{error}");
    drop(load.stop());
}

/// Guards the measure of blocked commits: a lock of 300 ms is seen, by every client, as long as it
/// was held and not much longer.
#[test]
fn a_lock_held_for_300_ms_is_seen_by_the_clients() {
    const HELD: Duration = Duration::from_millis(300);
    let busy = Busy::start();
    let load = Load::start(&busy.server, LoadOptions { rate: 100, ..options() });
    load.wait_for_commits(50);
    let mut holder = busy.server.connect();
    let begun = Instant::now();
    holder.query_drop("FLUSH TABLES WITH READ LOCK").expect("a lock");
    let locked = Instant::now();
    holder.query_drop("DO SLEEP(0.6)").expect("a rest");
    let rested = Instant::now();
    holder.query_drop("UNLOCK TABLES").expect("its own lock");
    load.wait_for_commits(100);
    let now = Instant::now();
    let (gap, silence) = (load.longest_gap(begun, now), load.longest_silence(begun, now));
    assert!(rested - locked >= HELD && silence >= HELD && gap >= silence, "{gap:?} {silence:?}");
    assert!(gap < now - begun, "{gap:?}: the clients have gone on");
    drop(load.stop());
}

/// Guards the tally of errors: one that no part may meet fails the run.
#[test]
fn an_error_that_no_part_may_meet_fails_the_run() {
    let busy = Busy::start();
    let mut load =
        Load::start(&busy.server, LoadOptions { ddl: true, sysbench: true, ..options() });
    load.wait_for_commits(50);
    drop(busy.server.query("DROP TABLE mix.isam"));
    let report = wait_for("the mix to meet it", || {
        let died =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| load.assert_no_problem()));
        died.is_err().then(|| load.end())
    });
    assert!(report.problems.iter().all(|problem| problem.starts_with("mix:")), "{report}");
    assert!(report.problems.iter().any(|problem| problem.contains("1146")), "{report}");
    assert!(report.sysbench.is_some_and(|done| done.reconnects == 0.0), "{report}");
}

/// Guards the end of sysbench: that it ends by itself is no success.
#[test]
fn sysbench_that_ends_by_itself_fails_the_run() {
    let busy = Busy::start();
    let mut load = Load::start(&busy.server, LoadOptions { sysbench: true, ..options() });
    load.wait_for_commits(50);
    drop(busy.server.query("DROP TABLE sbtest.sbtest1"));
    load.wait_for_commits(200);
    let report = load.end();
    let text = "sysbench ended by itself";
    assert!(report.problems.iter().any(|problem| problem.starts_with(text)), "{report}");
}

/// Guards the invariants: each change that a wrong copy could have is found.
#[test]
fn a_copy_that_was_tampered_with_is_found() {
    let busy = Busy::start();
    let load = Load::start(&busy.server, options());
    load.wait_for_commits(100);
    drop(load.stop());
    let held = check_copy(&busy.server, WRITERS);
    assert!(held.iter().sum::<u64>() >= 100);
    for (change, back) in [
        ("UPDATE bank.a SET v = v + 1 WHERE id = 7", "UPDATE bank.a SET v = v - 1 WHERE id = 7"),
        (
            "UPDATE bank.a SET v = v + 1 WHERE id = 7; UPDATE bank.b SET v = v - 1 WHERE id = 9",
            "UPDATE bank.a SET v = v - 1 WHERE id = 7; UPDATE bank.b SET v = v + 1 WHERE id = 9",
        ),
        (
            "UPDATE bank.ledger SET n = n + 100000 WHERE writer = 1 ORDER BY n DESC LIMIT 1",
            "UPDATE bank.ledger SET n = n - 100000 WHERE writer = 1 ORDER BY n DESC LIMIT 1",
        ),
        (
            "UPDATE bank.ledger SET amount = amount + 1 WHERE writer = 0 AND n = 3",
            "UPDATE bank.ledger SET amount = amount - 1 WHERE writer = 0 AND n = 3",
        ),
    ] {
        drop(busy.server.query(change));
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            check_copy(&busy.server, WRITERS)
        }));
        assert!(checked.is_err(), "{change}: not found");
        drop(busy.server.query(back));
    }
    let _held = check_copy(&busy.server, WRITERS);
    // A table whose rows and indexes disagree.
    let file = busy.server.data_directory().join("mix/isam.MYD");
    drop(busy.server.query("FLUSH TABLES"));
    std::fs::OpenOptions::new()
        .write(true)
        .open(file)
        .expect("its file")
        .set_len(100)
        .expect("cut");
    let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        check_copy(&busy.server, WRITERS)
    }));
    assert!(checked.is_err(), "a MyISAM table that was cut off is not found");
}
