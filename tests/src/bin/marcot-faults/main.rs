//! Clones a live server under load over and over, and breaks something in each clone: the network,
//! a daemon, the database, a disk. What must complete completes and is right, and what must fail
//! fails as it is written in `kind`.
//!
//! `make faults` runs it. Settings come by the environment: N (faults, 8), BYTES (of rows, 1 GiB), SEED,
//! KINDS (names, comma-separated; all unless given). Kinds come in an order that the seed decides, each
//! once before any comes twice; those that take a minute only from N=40 on, or when they are named. A
//! fault that came after the clone's end, or never struck, is none, and is not counted.
//!
//! The last lines of standard output are `consistent C of N` and `right K/N`; from N=40 on every stage
//! must have been struck, and C be four fifths of N.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a program of the tests")]

mod kind;
mod outcome;

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use futures::FutureExt as _;
use marcot_proto::{
    common::v1::Stage,
    recipient::v1::{
        CancelCloneRequest, Clone, CloneOptions, CloneStatementRequest, GetCloneRequest,
        PauseCloneRequest, ResumeCloneRequest, StageProgress, State, Verification,
        recipient_service_client::RecipientServiceClient,
    },
};
use marcot_tests::{
    Proxy, Recipient,
    bench::{number, version},
    client::{assert_intact, clone_and_wait, wait_for_end},
    disk::Disk,
    killer::seed,
    live::{Live, WRITERS},
    load::{Load, LoadOptions, Report},
    process,
    random::Random,
    recipient,
    volume::Mounted,
};
use tonic::transport::Channel;

use self::{
    kind::Kind,
    outcome::{Outcome, Outcomes},
};

/// Redo that a burst writes, so that pages are sent again: more than a clone may start with.
const BURST_ROWS: u64 = 90_000;

/// A stall that keepalive notices: 40 s, and some.
const LONG_STALL: Duration = Duration::from_secs(45);

/// Bytes on the wire beside those that it carries: frames, lists, calls.
const WIRE_PER_MILLE: u64 = 3;
const WIRE_BYTES: u64 = 512 << 10;

/// Longest that a clone may take, whatever is done to it: it hangs.
fn patience(bytes: u64) -> Duration {
    Duration::from_secs(300 + bytes / (2 << 20))
}

#[tokio::main]
async fn main() -> ExitCode {
    let (count, bytes) = (number("N", 8), number("BYTES", 1 << 30));
    let seed = seed();
    println!("SEED={seed}");
    let mut random = Random(seed);
    let mut live = Live::start(version(), &["--innodb-log-file-size=24M"], bytes);
    drop(
        live.server.query(
            "CREATE DATABASE burst; CREATE TABLE burst.rows (id INT PRIMARY KEY, filler TEXT)",
        ),
    );
    let proxy = Proxy::start(live.donor.0.address);
    let mut outcomes = Outcomes::default();
    let wished = std::env::var("KINDS").unwrap_or_default();
    let is_wished = |kind: &Kind| {
        let is_named = wished.split(',').any(|name| name == format!("{kind:?}"));
        is_named || wished.is_empty() && (count >= 40 || !kind.is_long())
    };
    let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(is_wished).collect();
    assert!(!kinds.is_empty(), "KINDS={wished} names none of {:?}", Kind::ALL);
    let mut left = Vec::new();
    println!("clone  fault            stage      seconds  re-sent MiB  result");
    let mut attempt = 0;
    while outcomes.all < count && attempt < 3 * count + 20 {
        if left.is_empty() {
            left.clone_from(&kinds);
        }
        let kind = left.swap_remove(random.below(left.len()));
        let stage = match random.below(10) {
            0 => Stage::PageCopy,
            1 | 2 => Stage::RedoCopy,
            3 => Stage::FileSync,
            _ => Stage::FileCopy,
        };
        let stage = if kind.strikes_in(stage) { stage } else { Stage::FileCopy };
        let stage = outcomes.missing_stage(count, kind).unwrap_or(stage);
        attempt += 1;
        let mut fault = Fault {
            live: &mut live,
            proxy: &proxy,
            kind,
            stage,
            random: &mut random,
            bytes,
            load: None,
            volume: Volume::None,
            begun: Instant::now(),
        };
        // What breaks off is wrong, and the next one is not to suffer from it.
        match AssertUnwindSafe(fault.run(attempt)).catch_unwind().await {
            Ok(None) => left.push(kind),
            Ok(Some(outcome)) => outcomes.take(attempt, kind, &outcome, bytes),
            Err(panic) => {
                let outcome = Outcome {
                    stage: stage.as_str_name(),
                    took: fault.begun.elapsed(),
                    clone: None,
                    resent: 0,
                    wrong: Some(format!("the run broke off: {}", text_of(panic.as_ref()))),
                };
                fault.mend();
                outcomes.take(attempt, kind, &outcome, bytes);
            }
        }
    }
    outcomes.print(count)
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
    format!("{:.300}", text.unwrap_or_default().replace('\n', " "))
}

/// One clone, and what is done to it.
struct Fault<'a> {
    live: &'a mut Live,
    proxy: &'a Proxy,
    kind: Kind,
    stage: Stage,
    random: &'a mut Random,
    bytes: u64,
    load: Option<Load>,
    volume: Volume,
    begun: Instant,
}

/// A file system of the fault's own, where it has one.
enum Volume {
    None,
    Disk(Disk),
    Small(Mounted),
}

/// Bytes that a clone without a fault takes, of which at most `redo` are of the log that it follows
/// while files are copied. Frames, lists and calls are some hundredths of what they carry.
fn needed_bytes(clone: &Clone, redo: u64) -> u64 {
    let bytes = clone.stages.iter().map(|row| match row.stage() {
        // After a lost snapshot the row also has what the older staging has given.
        Stage::FileCopy => {
            row.data_bytes.clamp(row.estimate_bytes, row.estimate_bytes.saturating_add(redo))
        }
        _ => row.data_bytes,
    });
    let bytes: u64 = bytes.sum();
    bytes + bytes / 1000 * WIRE_PER_MILLE + WIRE_BYTES
}

impl Fault<'_> {
    /// Runs it; `None` when the clone had ended before it struck, or it never struck.
    async fn run(&mut self, number: u64) -> Option<Outcome> {
        self.volume = self.new_volume().await;
        let name = match &self.volume {
            Volume::None => format!("clone-{number}"),
            _ => format!("volume/clone-{number}"),
        };
        self.start_recipient(matches!(self.volume, Volume::Disk(_)));
        self.proxy.pass();
        self.start_load();
        let before = self.load.as_ref().unwrap().moment();
        self.begun = Instant::now();
        let down_before = self.proxy.counts().down_bytes;
        let lsn_before = self.live.lsn();
        let clone = self.begin(&name).await;
        let Some(stage) = self.wait_for_stage(&clone).await else {
            self.end_load();
            self.clean(&name, &clone).await;
            return None;
        };
        let lsn_struck = self.live.lsn();
        let struck = self.strike(&name, &clone).await;
        let clone = self.end(&clone).await;
        let took = self.begun.elapsed();
        if !struck || self.proxy.is_waiting() {
            self.end_load();
            self.clean(&name, &clone.name).await;
            return None;
        }
        let load = self.load.as_ref().unwrap();
        let ended = load.moment();
        load.wait_for_commits(50);
        let report = self.end_load();
        let wrong = self.judge(&name, &clone, &before, &ended, &report).await;
        let passed = self.proxy.counts().down_bytes - down_before;
        // The log of a snapshot that was lost is not sent again: the next one begins with another.
        let loses = matches!(self.kind, Kind::KillDonor | Kind::StopDonor | Kind::FlipJournal);
        let of_lost = if loses { lsn_struck - lsn_before } else { 0 };
        let redo = self.live.lsn() - lsn_before;
        let resent = passed.saturating_sub(needed_bytes(&clone, redo) + of_lost);
        self.clean(&name, &clone.name).await;
        Some(Outcome { stage, took, clone: Some(clone), resent, wrong })
    }

    /// Why the clone is wrong.
    async fn judge(
        &self,
        name: &str,
        clone: &Clone,
        before: &marcot_tests::load::Moment,
        ended: &marcot_tests::load::Moment,
        report: &Report,
    ) -> Option<String> {
        let (expected, _) = self.kind.expectation();
        let reason = clone.error.as_ref().map(|error| error.reason.as_str());
        if !report.problems.is_empty() {
            return Some(format!("the load had errors: {:?}", report.problems));
        }
        if let Some(wrong) = expected.judge(clone.state(), reason) {
            return Some(wrong);
        }
        if clone.state() != State::Completed {
            let is_there = self.live.path(name).exists();
            return is_there.then(|| "it did not complete, and left a directory".to_owned());
        }
        let check = async {
            let mut client = recipient(&self.live.recipient).await;
            assert_intact(&mut client, &clone.name).await;
            self.live.check(name, clone, before, ended, report);
        };
        let panic = AssertUnwindSafe(check).catch_unwind().await.err()?;
        Some(format!("INCONSISTENT: {}", text_of(panic.as_ref())))
    }

    /// All runs again, whatever a run that broke off has left.
    fn mend(&mut self) {
        self.proxy.pass();
        self.load = None;
        self.live.recipient.0.kill();
        self.volume = Volume::None;
        if self.live.server.try_query("SELECT 1").is_err() {
            self.live.server.kill();
            self.live.restart_server();
        }
        self.live.donor.0.kill();
        self.live.restart_donor();
        self.proxy.set_target(self.live.donor.0.address);
    }

    fn start_load(&mut self) {
        let options = LoadOptions { writers: WRITERS, ddl: true, ..LoadOptions::default() };
        let load = Load::start(&self.live.server, options);
        load.wait_for_commits(100);
        self.load = Some(load);
    }

    fn end_load(&mut self) -> Report {
        self.load.take().unwrap().end()
    }

    async fn new_volume(&mut self) -> Volume {
        match self.kind {
            Kind::PowerCut => Volume::Disk(self.disk()),
            Kind::FullDisk => {
                let size = format!("{}M", self.room_mib());
                let mount_point = self.live.path("volume");
                Volume::Small(Mounted::image(&mount_point, &size, &["mkfs.ext4", "-q", "-F"]))
            }
            Kind::FlipOldCopy if !self.live.path("older").exists() => {
                self.start_recipient(false);
                let mut client = recipient(&self.live.recipient).await;
                let statement = self.live.statement("older", false);
                let older = clone_and_wait(&mut client, &statement).await;
                assert_eq!(older.state(), State::Completed, "{older:?}");
                Volume::None
            }
            _ => Volume::None,
        }
    }

    /// Room for a clone, and for what it grows by.
    fn room_mib(&self) -> u64 {
        (self.bytes * 2 + (600 << 20)) >> 20
    }

    fn disk(&self) -> Disk {
        let room = self.room_mib();
        let disk =
            Disk::new(self.live.home.path(), &format!("{room}M"), &format!("{}M", 2 * room + 900));
        disk.format();
        disk.mount(&disk.image);
        disk
    }

    fn start_recipient(&mut self, on_disk: bool) {
        let home = self.live.home.path();
        let place = if on_disk { home.join("volume") } else { home.to_owned() };
        let patience = if self.kind == Kind::DonorAway { "2s" } else { "60s" };
        self.live.recipient.0.kill();
        self.live.recipient = Recipient::start(&place, &["--donor-timeout", patience]);
    }

    async fn begin(&self, name: &str) -> String {
        let statement = process::statement(self.proxy.port(), &self.live.path(name), "");
        let mut options = CloneOptions::default();
        match self.kind {
            Kind::FlipStaged => options.verification = Verification::Full.into(),
            Kind::FlipOldCopy => {
                let older = self.live.path("older").display().to_string();
                options.reuse_directory = older.into_bytes().into();
            }
            _ => {}
        }
        let options = Some(options);
        let request = CloneStatementRequest { statement, options, ..Default::default() };
        let mut client = recipient(&self.live.recipient).await;
        let started = client.clone_statement(request).await.unwrap();
        started.into_inner().clone.unwrap().name
    }

    /// Waits until the wished stage runs, and some of it is over; tells which runs then.
    async fn wait_for_stage(&mut self, clone: &str) -> Option<&'static str> {
        let part = self.random.fraction();
        let mut client = recipient(&self.live.recipient).await;
        if self.stage == Stage::PageCopy {
            let deadline = self.deadline();
            running(&mut client, clone, deadline, |row| row.stage() == Stage::FileCopy).await?;
            self.live.recipient.0.freeze();
            self.burst();
            self.live.recipient.0.thaw();
        }
        let (stage, deadline) = (self.stage, self.deadline());
        running(&mut client, clone, deadline, |row| {
            let is_far = (row.data_bytes as f64) >= part * 0.9 * row.estimate_bytes as f64;
            row.stage() == stage && (stage != Stage::FileCopy || is_far)
        })
        .await
    }

    fn deadline(&self) -> Instant {
        self.begun + patience(self.bytes)
    }

    /// Writes more redo than a clone may start with.
    fn burst(&self) {
        drop(self.live.server.query(&format!(
            "TRUNCATE burst.rows; INSERT INTO burst.rows SELECT seq, REPEAT('x', 900) FROM \
             burst.seq_1_to_{BURST_ROWS}"
        )));
    }

    /// Strikes; whether there was something to strike.
    async fn strike(&mut self, name: &str, clone: &str) -> bool {
        let rest = Duration::from_secs(1) + Duration::from_secs(2).mul_f64(self.random.fraction());
        match self.kind {
            Kind::Cut => self.proxy.cut(),
            Kind::CutAtByte => self.proxy.cut_after(self.random.number() % (1 << 20)),
            Kind::Stall => {
                self.proxy.stall();
                tokio::time::sleep(rest).await;
                self.proxy.pass();
            }
            Kind::Slow => {
                self.proxy.limit(Some(4 << 20));
                tokio::time::sleep(rest).await;
                self.proxy.limit(None);
            }
            Kind::LongStall => {
                self.proxy.stall();
                tokio::time::sleep(LONG_STALL).await;
                self.proxy.pass();
            }
            Kind::Flip => self.proxy.flip_after(self.random.number() % (1 << 20)),
            Kind::KillRecipient => {
                self.live.recipient.0.kill();
                self.start_recipient(false);
            }
            Kind::StopRecipient => {
                self.live.recipient.0.terminate();
                self.start_recipient(false);
            }
            Kind::FreezeRecipient => {
                self.live.recipient.0.freeze();
                tokio::time::sleep(rest).await;
                self.live.recipient.0.thaw();
            }
            Kind::PowerCut => {
                let Volume::Disk(disk) = &self.volume else { return false };
                disk.cut();
                self.live.recipient.0.kill();
                disk.unmount();
                disk.mount(&disk.after);
                self.start_recipient(true);
            }
            Kind::KillDonor => {
                self.live.donor.0.kill();
                self.live.restart_donor();
                self.proxy.set_target(self.live.donor.0.address);
            }
            Kind::FreezeDonor => {
                self.live.donor.0.freeze();
                tokio::time::sleep(rest).await;
                self.live.donor.0.thaw();
            }
            Kind::StopDonor => {
                self.live.donor.0.terminate();
                self.live.restart_donor();
                self.proxy.set_target(self.live.donor.0.address);
            }
            Kind::FlipJournal | Kind::FlipStaged => {
                self.live.recipient.0.kill();
                let staging = self.staging(name, clone);
                let is_flipped = match self.kind {
                    Kind::FlipJournal => self.flip_journal(&staging.join("copy-journal")),
                    _ => self.flip_file(&staging.join("tree/mix/bulk.ibd"), true),
                };
                self.start_recipient(false);
                return is_flipped;
            }
            Kind::FlipOldCopy => {
                let older = self.live.path("older/mix/bulk.ibd");
                return (0..20).all(|_| self.flip_file(&older, false));
            }
            Kind::FullDisk => {
                let Volume::Small(volume) = &self.volume else { return false };
                fill(&volume.mount_point);
            }
            Kind::KillDatabase | Kind::StopDatabase => {
                let report = self.end_load();
                assert_eq!(report.problems, Vec::<String>::new());
                match self.kind {
                    Kind::KillDatabase => self.live.server.kill(),
                    _ => self.live.server.shut_down(),
                }
                tokio::time::sleep(rest).await;
                self.live.restart_server();
                self.start_load();
            }
            Kind::Pause => {
                let mut client = recipient(&self.live.recipient).await;
                let request = PauseCloneRequest { name: clone.to_owned() };
                if client.pause_clone(request).await.is_err() {
                    return false;
                }
                tokio::time::sleep(rest).await;
                let request = ResumeCloneRequest { name: clone.to_owned(), ..Default::default() };
                drop(client.resume_clone(request).await);
            }
            Kind::DonorAway => self.proxy.take_down(),
            Kind::Cancel => {
                let request = CancelCloneRequest { name: clone.to_owned() };
                let mut client = recipient(&self.live.recipient).await;
                // It may have ended a moment ago.
                drop(client.cancel_clone(request).await);
            }
        }
        true
    }

    /// Where a clone's bytes are staged.
    fn staging(&self, name: &str, clone: &str) -> PathBuf {
        let id = clone.trim_start_matches("clones/");
        let target = self.live.path(name);
        target.parent().unwrap().join(format!(".marcot-{id}"))
    }

    /// Flips a bit of a file, of bytes that are there if `of_data`; whether there are any.
    fn flip_file(&mut self, path: &Path, of_data: bool) -> bool {
        let Ok(file) = File::options().read(true).write(true).open(path) else { return false };
        let pages = file.metadata().unwrap().len() >> 14;
        // A page whose number is in its head has come; holes read as zero.
        for _ in 0..100 {
            let page = self.random.number() % pages.max(1);
            let mut bytes = [0; 8];
            if file.read_exact_at(&mut bytes, page << 14).is_err() {
                return false;
            }
            if !of_data || bytes != [0; 8] {
                let at = (page << 14) + 38 + self.random.number() % 16_000;
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 4], at).unwrap();
                return true;
            }
        }
        false
    }

    /// Flips a bit of a journal behind its first two records, which say whose copy this is.
    fn flip_journal(&mut self, path: &Path) -> bool {
        let Ok(mut bytes) = std::fs::read(path) else { return false };
        let mut head = 8;
        for _ in 0..2 {
            let Some(length) = bytes.get(head..head + 4) else { return false };
            head += 9 + u32::from_le_bytes(length.try_into().unwrap()) as usize;
        }
        if head >= bytes.len() {
            return false;
        }
        let at = head + self.random.below(bytes.len() - head);
        bytes[at] ^= 4;
        std::fs::write(path, bytes).unwrap();
        true
    }

    async fn until_end(&self, name: &str) -> Clone {
        let mut client = recipient(&self.live.recipient).await;
        let end = wait_for_end(&mut client, name);
        let limit = self.deadline().saturating_duration_since(Instant::now());
        let ended = tokio::time::timeout(limit, end).await;
        ended.unwrap_or_else(|_| panic!("{name} hangs"))
    }

    /// Waits for the clone's end; one whose donor was away is resumed.
    async fn end(&mut self, name: &str) -> Clone {
        let clone = self.until_end(name).await;
        if self.kind != Kind::DonorAway || clone.state() != State::Failed {
            return clone;
        }
        self.proxy.pass();
        let mut client = recipient(&self.live.recipient).await;
        let request = ResumeCloneRequest { name: name.to_owned(), ..Default::default() };
        match client.resume_clone(request).await {
            Ok(_) => self.until_end(name).await,
            Err(status) => {
                println!("resume: {status}");
                clone
            }
        }
    }

    /// Makes room for the next one.
    async fn clean(&mut self, name: &str, clone: &str) {
        self.proxy.pass();
        let mut client = recipient(&self.live.recipient).await;
        let request = CancelCloneRequest { name: clone.to_owned() };
        drop(client.cancel_clone(request).await);
        drop(self.until_end(clone).await);
        drop(std::fs::remove_dir_all(self.live.path(name)));
        if matches!(self.kind, Kind::PowerCut | Kind::FullDisk) {
            // It may have a file open there.
            self.live.recipient.0.kill();
        }
        self.volume = Volume::None;
    }
}

/// Leaves no room on a file system.
fn fill(mount_point: &Path) {
    let file = File::create(mount_point.join("filler")).unwrap();
    let mut length = 1 << 30;
    let mut at = 0;
    while length >= 4096 {
        let flags = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(&file, flags, at, length) {
            Ok(()) => at += length,
            Err(_) => length /= 2,
        }
    }
}

/// Looks at a clone until a running stage is as `condition` wants it; `None` when it has ended.
async fn running(
    client: &mut RecipientServiceClient<Channel>,
    clone: &str,
    deadline: Instant,
    condition: impl Fn(&StageProgress) -> bool,
) -> Option<&'static str> {
    loop {
        let request = GetCloneRequest { name: clone.to_owned() };
        let now = client.get_clone(request).await.unwrap().into_inner().clone.unwrap();
        if now.state() != State::InProgress {
            return None;
        }
        let row = now.stages.iter().find(|row| row.state() == State::InProgress);
        if let Some(row) = row.filter(|row| condition(row)) {
            return Some(row.stage().as_str_name());
        }
        assert!(Instant::now() < deadline, "{clone} hangs: {now:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
