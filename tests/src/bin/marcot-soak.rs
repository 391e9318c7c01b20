//! Clones a live server over and over under load and DDL, and checks each clone in every way.
//!
//! `make soak` runs it. Settings come by the environment: N (clones), BYTES (of rows), PAUSE
//! (seconds that the recipient rests between stages), VERSION (10.11 or 11.8), CUTS (more than 0:
//! only that many cuts, and how long commits were blocked).
//!
//! The last line of standard output is `consistent K/N`; a clone that ends in an error is not
//! consistent, and nothing is tried again. A run that the load did not keep up with fails.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a program of the tests")]

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::{Duration, Instant},
};

use marcot_proto::{
    donor::v1::{
        AdvanceStageRequest, CloseSnapshotRequest, OpenSnapshotRequest, Outcome,
        advance_stage_response::Step, donor_service_client::DonorServiceClient,
    },
    recipient::v1::{CloneStatementRequest, GetCloneRequest, State},
};
use marcot_tests::{
    client::wait_for_end,
    live::{Live, WRITERS},
    load::{Load, LoadOptions, RATE_MIN},
    mariadb::Version,
    recipient,
};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[tokio::main]
async fn main() -> ExitCode {
    let version = match std::env::var("VERSION").as_deref() {
        Ok("11.8") => Version::V11_8,
        _ => Version::V10_11,
    };
    let live = Live::start(version, &["--innodb-log-file-size=96M"], number("BYTES", 64 << 20));
    match number("CUTS", 0) {
        0 => soak(live).await,
        cuts => measure_cuts(live, cuts).await,
    }
}

fn options() -> LoadOptions {
    LoadOptions { writers: WRITERS, ddl: true, xa: true, rate_min: RATE_MIN, ..Default::default() }
}

async fn soak(live: Live) -> ExitCode {
    let count = number("N", 2);
    let mut consistent = 0;
    println!("clone  source  seconds  commit gap ms  TPS before  TPS during  result");
    for round in 1..=count {
        let is_local = round % 4 == 0;
        match one_clone(&live, round, is_local).await {
            Ok(line) => {
                consistent += 1;
                println!("{line}  consistent");
            }
            Err(why) => println!("{round:>5}  {why}"),
        }
        drop(std::fs::remove_dir_all(live.path(&format!("clone-{round}"))));
    }
    println!("consistent {consistent}/{count}");
    if consistent == count { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn one_clone(live: &Live, round: u64, is_local: bool) -> Result<String, String> {
    let name = format!("clone-{round}");
    let mut load = Load::start(&live.server, options());
    load.wait_for_commits(500);
    let before_rate = load.rate();
    let before = load.moment();
    let mut client = recipient(&live.recipient).await;
    let (begun, commits) = (Instant::now(), load.commits());
    let request =
        CloneStatementRequest { statement: live.statement(&name, is_local), ..Default::default() };
    let started = client.clone_statement(request).await.map_err(|e| e.to_string())?;
    let clone = started.into_inner().clone.unwrap();
    loop {
        let request = GetCloneRequest { name: clone.name.clone() };
        let now = client.get_clone(request).await.map_err(|e| e.to_string())?.into_inner();
        let now = now.clone.unwrap();
        if now.end_time.is_some() || now.stages.iter().any(|stage| stage.data_bytes > 0) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    rest(live, &load);
    let clone = wait_for_end(&mut client, &clone.name).await;
    let took = begun.elapsed();
    let during_rate = (load.commits() - commits) as f64 / took.as_secs_f64();
    let gap = load.longest_gap(begun, Instant::now());
    let ended = load.moment();
    load.wait_for_commits(50);
    let kept_up = load.kept_up(&clone);
    let report = load.end();
    eprintln!("{report}");
    if clone.state() != State::Completed {
        return Err(format!("{} failed: {:?}", clone.name, clone.error));
    }
    if !report.problems.is_empty() {
        return Err(format!("the load had errors: {:?}", report.problems));
    }
    for pace in kept_up? {
        eprintln!("{pace}");
    }
    let check = || live.check(&name, &clone, &before, &ended, &report);
    catch_unwind(AssertUnwindSafe(check)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        format!("inconsistent: {:.300}", text.unwrap_or_default().replace('\n', " "))
    })?;
    let source = if is_local { "local" } else { "donor" };
    Ok(format!(
        "{round:>5}  {source:<6}  {:>7.1}  {:>13.1}  {before_rate:>10.0}  {during_rate:>10.0}",
        took.as_secs_f64(),
        gap.as_secs_f64() * 1000.0,
    ))
}

/// Freezes the recipient, which has begun to copy, for a while, so that pages and redo are of different moments: a copy made
/// in one go passes with redo that is wrong.
fn rest(live: &Live, load: &Load) {
    let pause = Duration::from_secs(number("PAUSE", 1));
    live.recipient.0.freeze();
    let end = Instant::now() + pause;
    while Instant::now() < end {
        tokio::task::block_in_place(|| load.wait_for_commits(20));
    }
    live.recipient.0.thaw();
}

/// Cuts alone, without a copy: how long commits were blocked, as the load's own clients saw it.
async fn measure_cuts(live: Live, count: u64) -> ExitCode {
    let aria = number("ARIA_TABLES", 0);
    for n in 0..aria {
        drop(live.server.query(&format!(
            "CREATE TABLE mix.aria{n} (id INT PRIMARY KEY, v TEXT) ENGINE=Aria; \
             INSERT INTO mix.aria{n} VALUES (1, 'x')"
        )));
    }
    let mut long = live.server.connect();
    if number("LONG_TRANSACTION", 1) == 1 {
        use mysql::prelude::Queryable as _;
        long.query_drop("START TRANSACTION").unwrap();
        long.query_drop("UPDATE mix.bulk SET v = 'open' WHERE id < 100").unwrap();
    }
    let load = Load::start(&live.server, LoadOptions { ddl: false, xa: false, ..options() });
    load.wait_for_commits(500);
    let mut client =
        DonorServiceClient::connect(format!("http://{}", live.donor.0.address)).await.unwrap();
    let (mut gaps, mut cuts) = (Vec::new(), Vec::new());
    for n in 0..count {
        if number("COLD", 0) == 1 {
            // Needs root: what the cut reads comes from the disk.
            std::fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
        }
        let open = OpenSnapshotRequest {
            public_key: vec![7; 32].into(),
            request_id: format!("cut-{n}"),
            ..Default::default()
        };
        let opened = client.open_snapshot(open).await.unwrap().into_inner();
        let (mut stage, mut round) = (opened.stage, opened.round);
        let begun = Instant::now();
        loop {
            let advance = AdvanceStageRequest { snapshot: opened.snapshot.clone(), stage, round };
            let mut steps = client.advance_stage(advance).await.unwrap().into_inner();
            let mut advanced = None;
            while let Some(message) = steps.message().await.unwrap() {
                if let Some(Step::Advanced(step)) = message.step {
                    advanced = Some(step);
                }
            }
            let advanced = advanced.unwrap();
            (stage, round) = (advanced.stage, advanced.round);
            if stage == i32::from(marcot_proto::common::v1::Stage::RedoCopy) {
                break;
            }
        }
        cuts.push(begun.elapsed());
        load.wait_for_commits(20);
        gaps.push(load.longest_gap(begun, Instant::now()));
        let close =
            CloseSnapshotRequest { snapshot: opened.snapshot, outcome: Outcome::Completed.into() };
        client.close_snapshot(close).await.unwrap();
    }
    let blocked = logged_milliseconds(&live.donor.0.log(), "commit_blocked_ms=");
    let waited = logged_milliseconds(&live.donor.0.log(), "commit_wait_ms=");
    println!("{count} cuts, {aria} more Aria tables, milliseconds   p50    p99    max");
    for (what, values) in [
        ("longest gap between commits of the 1 ms probe", gaps),
        ("waited for BLOCK_COMMIT", waited),
        ("BLOCK_COMMIT granted to END", blocked),
        ("whole advance", cuts),
    ] {
        println!("{what:<46} {}", quantiles(values));
    }
    drop(long);
    drop(load.stop());
    println!("cuts {count}/{count}");
    ExitCode::SUCCESS
}

fn logged_milliseconds(log: &str, key: &str) -> Vec<Duration> {
    let values = log.lines().filter_map(|line| line.split_once(key));
    let numbers = values.filter_map(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
    numbers.map(Duration::from_millis).collect()
}

fn quantiles(mut values: Vec<Duration>) -> String {
    values.sort();
    let at = |share: f64| {
        let index = ((values.len() - 1) as f64 * share).round() as usize;
        values.get(index).map_or(0.0, |value| value.as_secs_f64() * 1000.0)
    };
    format!("{:>6.1} {:>6.1} {:>6.1}", at(0.5), at(0.99), at(1.0))
}
