//! Cuts alone, on a live server under a load, without a copy: how long commits are blocked, as the
//! writers' own clients see it. `make bench BENCH=cuts` runs it.
//!
//! Each cut is a snapshot that is opened, advanced to its point and closed, by a client that reads
//! no byte; the donor does all that it does for a clone. Settings come by the environment:
//!
//!   CUTS (200), VERSION (10.11 or 11.8), BYTES of rows (64 MiB)
//!   COLD=1               caches are dropped before each cut; needs root
//!   LONG_TRANSACTION=1   one is open all the time, with changed rows
//!   ARIA_TABLES=1000     so many more tables without transactions
//!   RATE (500)           commits per second that the writers are held to: a machine whose cores are
//!                        all busy shows its scheduler, not the lock
//!
//! A run whose load fell below 200 commits/s fails. Beside each cut stands an interval as long
//! without one: what this machine does to the clients by itself.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a program of the tests")]

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use marcot_proto::{
    common::v1::Stage,
    donor::v1::{
        AdvanceStageRequest, CloseSnapshotRequest, OpenSnapshotRequest, Outcome,
        advance_stage_response::Step, donor_service_client::DonorServiceClient,
    },
};
use marcot_tests::{
    bench::{logged_milliseconds, number, quantiles, version},
    live::{Live, WRITERS},
    load::{Load, LoadOptions, RATE_MIN},
};
use mysql::prelude::Queryable as _;
use tonic::transport::Channel;

/// Most rounds before a cut: as the engine bounds them, and a few more.
const ROUNDS_MAX: u32 = 100;

/// Commits between two cuts: the server is at rest again.
const COMMITS_BETWEEN: u64 = 40;

#[tokio::main]
async fn main() -> ExitCode {
    let count = number("CUTS", 200).max(1);
    let live = Live::start(version(), &["--innodb-log-file-size=96M"], number("BYTES", 64 << 20));
    let tables = number("ARIA_TABLES", 0);
    for n in 0..tables {
        drop(live.server.query(&format!(
            "CREATE TABLE mix.aria{n} (id INT PRIMARY KEY, v TEXT) ENGINE=Aria; \
             INSERT INTO mix.aria{n} VALUES (1, 'x')"
        )));
    }
    let mut long = live.server.connect();
    let is_open = number("LONG_TRANSACTION", 0) == 1;
    if is_open {
        long.query_drop("START TRANSACTION").unwrap();
        long.query_drop("UPDATE mix.bulk SET v = 'open' WHERE id < 100").unwrap();
    }
    let options =
        LoadOptions { writers: WRITERS, rate: number("RATE", 500), ..LoadOptions::default() };
    let load = Load::start(&live.server, options);
    load.wait_for_commits(500);
    let address = format!("http://{}", live.donor.0.address);
    let mut donor = DonorServiceClient::connect(address).await.unwrap();

    let (mut gaps, mut silences, mut quiet, mut wholes) = (vec![], vec![], vec![], vec![]);
    let (first, commits) = (Instant::now(), load.commits());
    for number in 0..count {
        let rested = Instant::now();
        tokio::task::block_in_place(|| load.wait_for_commits(COMMITS_BETWEEN));
        if is_cold() {
            std::fs::write("/proc/sys/vm/drop_caches", "1").expect("root may drop caches");
        }
        let begun = Instant::now();
        cut(&mut donor, number).await;
        let ended = Instant::now();
        // A commit that was blocked until the end is acknowledged after it.
        tokio::task::block_in_place(|| load.wait_for_commits(4));
        gaps.push(load.longest_gap(begun, ended));
        silences.push(load.longest_silence(begun, ended));
        quiet.push(load.longest_gap(begun - (ended - begun).min(begun - rested), begun));
        wholes.push(ended - begun);
    }
    let rate = (load.commits() - commits) as f64 / first.elapsed().as_secs_f64();
    drop(long);
    drop(load.stop());

    let log = live.donor.0.log();
    let logged = |key: &str| logged_milliseconds(&log, key);
    let (waited, blocked) = (logged("commit_wait_ms="), logged("commit_blocked_ms="));
    assert_eq!(blocked.len() as u64, count, "each cut logs its point once");
    let requested: Vec<Duration> = waited.iter().zip(&blocked).map(|(a, b)| *a + *b).collect();
    println!(
        "{count} cuts, {}, long transaction {}, {tables} more Aria tables, {rate:.0} commits/s",
        if is_cold() { "cold" } else { "warm" },
        if is_open { "open" } else { "none" },
    );
    println!("{:<58} {:>7} {:>7} {:>7}", "milliseconds", "p50", "p99", "max");
    for (what, values) in [
        ("longest gap of any 1 ms client, no cut", &quiet),
        ("longest gap of any 1 ms client, around the cut", &gaps),
        ("no commit of any 1 ms client, around the cut", &silences),
        ("BLOCK_COMMIT requested until END", &requested),
        ("BLOCK_DDL granted until END", &logged("ddl_blocked_ms=")),
        ("request to END: snapshot opened, advanced to its point", &wholes),
    ] {
        let [p50, p99, max] = quantiles(values);
        println!("{what:<58} {p50:>7.1} {p99:>7.1} {max:>7.1}");
    }
    if rate < RATE_MIN as f64 {
        println!("the load fell to {rate:.0} commits/s, {RATE_MIN} are needed");
        return ExitCode::FAILURE;
    }
    let [p50, p99, max] = quantiles(&gaps);
    println!("commit block p50 {p50:.1} ms p99 {p99:.1} ms max {max:.1} ms over {count} cuts");
    ExitCode::SUCCESS
}

fn is_cold() -> bool {
    number("COLD", 0) == 1
}

/// Opens a snapshot, has the donor fix its point, and closes it; no file is read.
async fn cut(donor: &mut DonorServiceClient<Channel>, number: u64) {
    let open = OpenSnapshotRequest {
        public_key: vec![7; 32].into(),
        request_id: format!("cut-{number}"),
        ..Default::default()
    };
    let opened = donor.open_snapshot(open).await.unwrap().into_inner();
    let (mut stage, mut round) = (opened.stage, opened.round);
    for _ in 0..ROUNDS_MAX {
        if stage == i32::from(Stage::RedoCopy) {
            break;
        }
        let advance = AdvanceStageRequest { snapshot: opened.snapshot.clone(), stage, round };
        let mut steps = donor.advance_stage(advance).await.unwrap().into_inner();
        while let Some(message) = steps.message().await.unwrap() {
            if let Some(Step::Advanced(step)) = message.step {
                (stage, round) = (step.stage, step.round);
            }
        }
    }
    assert_eq!(stage, i32::from(Stage::RedoCopy), "no point after {ROUNDS_MAX} rounds");
    let close =
        CloseSnapshotRequest { snapshot: opened.snapshot, outcome: Outcome::Completed.into() };
    donor.close_snapshot(close).await.unwrap();
}
