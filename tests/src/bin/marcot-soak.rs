//! Clones a live server over and over under load and DDL, and checks each clone in every way.
//!
//! `make soak` runs it. Settings come by the environment: N (clones), BYTES (of rows), PAUSE
//! (seconds that the recipient rests while it copies files, and again before it reads what is left
//! after the point), DATABASE (mariadb or mysql), VERSION (of
//! MariaDB: 10.11 or 11.8). With FULL=1 less than 1 GiB, 10 s or 200 commits/s
//! fails.
//!
//! The last line of standard output is `consistent K/N`; a clone that ends in an error is not
//! consistent, and nothing is tried again. A run that the load did not keep up with fails.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a program of the tests")]

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::{Duration, Instant},
};

use futures::FutureExt as _;
use marcot_proto::recipient::v1::{
    Clone as CloneOf, CloneStatementRequest, GetCloneRequest, State,
};
use marcot_tests::{
    bench::{bytes_of_rows, number, pause, version},
    client::wait_for_end,
    live::{Live, WRITERS},
    load::{Load, LoadOptions, RATE_MIN, rate_min},
    recipient,
};

#[tokio::main]
async fn main() -> ExitCode {
    // Small for MySQL, which keeps what was not read yet: it is turned over many times.
    let log = match version().is_mysql() {
        true => "--innodb-redo-log-capacity=16M",
        false => "--innodb-log-file-size=96M",
    };
    let live = Live::start(version(), &[log], bytes_of_rows(64 << 20));
    soak(live).await
}

/// A run of full size counts only if the writers kept up.
fn options() -> LoadOptions {
    let rate_min = if number("BYTES", 0) >= 1 << 30 { RATE_MIN } else { rate_min() };
    LoadOptions {
        writers: WRITERS,
        ddl: true,
        xa: true,
        sysbench: true,
        // Its share; the rest is for the writers whose pace counts.
        sysbench_rate: 100,
        rate_min,
        ..Default::default()
    }
}

async fn soak(live: Live) -> ExitCode {
    let count = number("N", 2);
    let mut consistent = 0;
    println!("clone  source  seconds  commit gap ms  TPS before  TPS during  result");
    for round in 1..=count {
        // Two show both kinds.
        let is_local = round % 4 == 2;
        let clone = AssertUnwindSafe(one_clone(&live, round, is_local)).catch_unwind().await;
        // Where a load that stands still has ended it, it was at rest.
        live.recipient.0.thaw();
        match clone.unwrap_or_else(|panic| Err(text_of(&*panic))) {
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
    let daemon = if is_local { &live.recipient.0 } else { &live.donor.0 };
    let points = || daemon.log().matches("the point is fixed").count();
    let known = points();
    let (begun, commits) = (Instant::now(), load.commits());
    let request =
        CloneStatementRequest { statement: live.statement(&name, is_local), ..Default::default() };
    let started = client.clone_statement(request).await.map_err(|e| e.to_string())?;
    let clone = started.into_inner().clone.unwrap();
    // Pages and redo are of different moments: a copy made in one go passes with redo that is wrong.
    let mut client_of_clone = client.clone();
    let mut is_at = async |moment: &dyn Fn(&CloneOf) -> bool| loop {
        let request = GetCloneRequest { name: clone.name.clone() };
        let now = client_of_clone.get_clone(request).await.map_err(|e| e.to_string())?;
        let now = now.into_inner().clone.unwrap();
        if now.end_time.is_some() || moment(&now) {
            break Ok::<bool, String>(now.end_time.is_none());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let copies = |now: &CloneOf| now.stages.iter().any(|stage| stage.data_bytes > 0);
    if is_at(&copies).await? {
        rest(live, &load);
    }
    if is_at(&|_| points() > known).await? {
        rest(live, &load);
    }
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
    catch_unwind(AssertUnwindSafe(check)).map_err(|panic| text_of(&*panic))?;
    let source = if is_local { "local" } else { "donor" };
    Ok(format!(
        "{round:>5}  {source:<6}  {:>7.1}  {:>13.1}  {before_rate:>10.0}  {during_rate:>10.0}",
        took.as_secs_f64(),
        gap.as_secs_f64() * 1000.0,
    ))
}

/// Lets the recipient rest a while, and go on.
fn rest(live: &Live, load: &Load) {
    live.recipient.0.freeze();
    let end = Instant::now() + pause(1);
    while Instant::now() < end {
        tokio::task::block_in_place(|| load.wait_for_commits(20));
    }
    live.recipient.0.thaw();
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
    format!("inconsistent: {:.300}", text.unwrap_or_default().replace('\n', " "))
}
