//! What it takes to go on after a kill -9 of the recipient, and of the donor's service, when nine
//! tenths of the bytes are verified, beside a full clone, at the speed of loopback, of 1 Gbit/s and
//! of 100 Mbit/s. `make bench BENCH=resume` runs it.
//!
//! Settings come by the environment: BYTES of rows (1 GiB), ROUNDS (3) of each cell, RATE of commits per
//! second of the writers that go on (200: at full speed they alone fill a slow link), VERSION (10.11 or
//! 11.8). The time of a resume is from the start of the killed program to the end of the clone; a cell
//! is the median, and the least and the most. Each clone is compared with its certificate.
//!
//! The last line is `resume: met K/6`; the exit code says whether all were met.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a program of the tests")]

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use marcot_proto::{
    common::v1::Stage,
    recipient::v1::{CloneStatementRequest, GetCloneRequest, State},
};
use marcot_tests::{
    PATIENCE, Proxy, Recipient,
    bench::{number, version},
    client::{assert_intact, wait_for_end},
    live::Live,
    load::{Load, LoadOptions},
    process, recipient,
};

/// A resume takes at most this part of a full clone's time.
const PART_MAX: f64 = 0.15;

/// The part of the bytes that is verified when the kill comes.
const KILL_AT: f64 = 0.9;

/// Rates of the link: bytes per second, and name.
const RATES: [(Option<u64>, &str); 3] =
    [(None, "loopback"), (Some(125_000_000), "1 Gbit/s"), (Some(12_500_000), "100 Mbit/s")];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Killed {
    Nobody,
    Recipient,
    Donor,
}

struct Bench {
    live: Live,
    proxy: Proxy,
}

/// What a clone took.
#[derive(Clone, Copy)]
struct Run {
    took: Duration,
    resent: u64,
    reused: u64,
}

/// How all recipients run: one that was started again is no other one.
const OPTIONS: [&str; 2] = ["--donor-timeout", "60s"];

#[tokio::main]
async fn main() -> ExitCode {
    let bytes = number("BYTES", 1 << 30);
    let (rounds, rate) = (number("ROUNDS", 3), number("RATE", 200));
    let mut live = Live::start(version(), &["--innodb-log-file-size=96M"], bytes);
    live.recipient.0.kill();
    live.recipient = Recipient::start(live.home.path(), &OPTIONS);
    let proxy = Proxy::start(live.donor.0.address);
    let mut bench = Bench { live, proxy };
    let options = LoadOptions { writers: 2, rate, ..LoadOptions::default() };
    let load = Load::start(&bench.live.server, options);
    load.wait_for_commits(100);
    let mut met = 0;
    for (rate, name) in RATES {
        bench.proxy.limit(rate);
        let mut full = Duration::ZERO;
        for (killed, what) in [
            (Killed::Nobody, "full clone"),
            (Killed::Recipient, "recipient killed"),
            (Killed::Donor, "donor killed"),
        ] {
            let mut runs = Vec::new();
            for _ in 0..rounds {
                runs.push(bench.clone(killed).await);
            }
            runs.sort_by_key(|run| run.took);
            let median = runs[runs.len() / 2].took;
            if killed == Killed::Nobody {
                full = median;
            }
            let part = median.as_secs_f64() / full.as_secs_f64();
            met += u32::from(killed != Killed::Nobody && part <= PART_MAX);
            let most = |of: fn(&Run) -> u64| runs.iter().map(of).max().unwrap_or(0) >> 20;
            println!(
                "{name:<11} {what:<17} {:>7.1} s ({:.1} to {:.1}) {:>6.1} %  {:>4} MiB sent again, \
                 {:>5} MiB reused",
                median.as_secs_f64(),
                runs[0].took.as_secs_f64(),
                runs[runs.len() - 1].took.as_secs_f64(),
                100.0 * part,
                most(|run| run.resent),
                most(|run| run.reused),
            );
        }
    }
    drop(load.stop());
    let log = bench.live.recipient.0.log();
    if let Some(line) = log.lines().rev().find(|line| line.contains("the copy's journal")) {
        println!("journal of the last clone: {}", line.trim());
    }
    println!("resume: met {met}/6 (at most {:.0} % of a full clone)", 100.0 * PART_MAX);
    if met == 6 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Bench {
    /// Clones; the time that it takes, from the new start on if somebody is killed.
    async fn clone(&mut self, killed: Killed) -> Run {
        drop(std::fs::remove_dir_all(self.live.path("copy")));
        let statement = process::statement(self.proxy.port(), &self.live.path("copy"), "");
        let request = CloneStatementRequest { statement, ..Default::default() };
        let lsn = self.live.lsn();
        let mut begun = Instant::now();
        let mut client = recipient(&self.live.recipient).await;
        let name = client.clone_statement(request).await.unwrap().into_inner().clone.unwrap().name;
        if killed != Killed::Nobody {
            self.wait_for_most(&name, lsn).await;
            begun = match killed {
                Killed::Recipient => {
                    self.live.recipient.0.kill();
                    let now = Instant::now();
                    self.live.recipient = Recipient::start(self.live.home.path(), &OPTIONS);
                    now
                }
                _ => {
                    self.live.donor.0.kill();
                    let now = Instant::now();
                    self.live.restart_donor();
                    self.proxy.set_target(self.live.donor.0.address);
                    now
                }
            };
            client = recipient(&self.live.recipient).await;
        }
        let end = wait_for_end(&mut client, &name).await;
        let took = begun.elapsed();
        assert_eq!(end.state(), State::Completed, "{end:?}");
        assert_intact(&mut client, &name).await;
        Run { took, resent: end.resent_bytes, reused: end.reused_bytes }
    }

    /// Waits until most bytes of the files are there; the redo that is followed beside them, at most
    /// what the server has written since `lsn`, is none of them.
    async fn wait_for_most(&self, name: &str, lsn: u64) {
        let mut client = recipient(&self.live.recipient).await;
        let begun = Instant::now();
        loop {
            let request = GetCloneRequest { name: name.to_owned() };
            let clone = client.get_clone(request).await.unwrap().into_inner().clone.unwrap();
            let row = clone.stages.iter().find(|row| row.stage() == Stage::FileCopy).unwrap();
            let wanted = (row.estimate_bytes as f64 * KILL_AT) as u64;
            let of_files = row.data_bytes.saturating_sub(self.live.lsn() - lsn);
            if row.estimate_bytes > 0 && of_files >= wanted {
                return;
            }
            assert_eq!(clone.state(), State::InProgress, "{clone:?}");
            assert!(begun.elapsed() < 20 * PATIENCE, "{clone:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
