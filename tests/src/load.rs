//! A write load on a MariaDB or MySQL server.
//!
//! * `bank`: money moves between two tables, each transfer has its row in the ledger.
//! * `probe`: clients that commit every millisecond and note when.
//! * `mix`: inserts, updates and deletes on tables with secondary indexes and long columns.
//! * `xa`: user transactions, prepared for a while.
//! * `storm`: tables and schemas that come, go, change their names, engines and columns.
//! * `imports`: tablespaces that are exchanged beneath the server.
//! * `upkeep`: undo tablespaces that are truncated, a redo log that is resized.
//! * `sysbench`: its oltp_write_only.
//!
//! An error of the server that a part may meet is named there and counted; every other one fails
//! the run. `invariants` tells what must hold on any copy.

mod bank;
mod errors;
mod imports;
mod mix;
mod pace;
mod probe;
mod storm;
mod sysbench;
mod upkeep;
mod xa;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use marcot_proto::recipient::v1::Clone as CloneOf;
use mysql::Conn;

pub use bank::{ACCOUNTS, HOLDS};
pub use imports::{Exchange, IMPORTED_ROWS, IMPORTED_TABLES};
pub use pace::StagePace;
pub use storm::KINDS as STORM_KINDS;
pub use sysbench::Sysbench;
pub use xa::{Prepared, check_prepared};

use crate::{
    bench,
    database::{Database, Version, sequence},
    wait_for,
};

/// What runs.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Writers of bank and ledger.
    pub writers: usize,
    /// Whether tables are changed while rows are.
    pub ddl: bool,
    /// Whether user XA transactions run.
    pub xa: bool,
    /// Whether sysbench's oltp_write_only runs beside.
    pub sysbench: bool,
    /// Whether tablespaces are exchanged beneath the server.
    pub imports: bool,
    /// Whether undo tablespaces are truncated and the redo log is resized.
    pub upkeep: bool,
    /// Most transactions per second of sysbench; 0: as many as the server takes.
    pub sysbench_rate: u64,
    /// Most commits per second of all writers; 0: as many as the server takes.
    pub rate: u64,
    /// Least commits per second of all writers in each second of each stage of a clone: a run that
    /// fell below does not count. 0: the row is not about load.
    pub rate_min: u64,
}

/// What a clone of a busy server is measured under: with less, little changes while files are
/// copied, and a copy made in a quiet moment may be right by luck.
pub const RATE_MIN: u64 = 200;

/// What rows that are about load ask for: `MARCOT_RATE_MIN`, or nothing; in a run of full size
/// `RATE_MIN` at the least. A machine that does other work meanwhile, as CI may, makes no copy wrong.
#[must_use]
pub fn rate_min() -> u64 {
    bench::sized("MARCOT_RATE_MIN", 0, RATE_MIN)
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            writers: 4,
            ddl: false,
            xa: false,
            sysbench: false,
            imports: false,
            upkeep: false,
            sysbench_rate: 0,
            rate: 0,
            rate_min: 0,
        }
    }
}

/// What all parts of a load write to.
#[derive(Debug, Default)]
struct Shared {
    version: Version,
    stop: AtomicBool,
    /// Tables are not changed any more.
    ddl_rests: AtomicBool,
    /// Transfers acknowledged, by writer.
    acknowledged: Vec<AtomicU64>,
    commits: AtomicU64,
    ddl: AtomicU64,
    /// Statements of storm, imports and upkeep that were done, by kind.
    kinds: Mutex<BTreeMap<&'static str, u64>>,
    /// Errors that parts of the load may meet, by part and name.
    met: Mutex<BTreeMap<String, u64>>,
    problems: Mutex<Vec<String>>,
    pace: pace::Pace,
    probes: probe::Probes,
    prepared: Mutex<Vec<Prepared>>,
}

/// A writer that panics is a problem of its own; what it has written so far is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Most problems that a report shows: after the first, the rest follow from it.
const PROBLEMS_MAX: usize = 20;

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Rows 1 to `count` of a column `seq`.
    fn sequence(&self, count: u64) -> String {
        sequence(self.version, count)
    }

    fn problem(&self, what: impl std::fmt::Display) {
        let mut problems = lock(&self.problems);
        if problems.len() < PROBLEMS_MAX {
            problems.push(what.to_string());
        }
    }

    fn done(&self, kind: &'static str) {
        self.ddl.fetch_add(1, Ordering::Relaxed);
        *lock(&self.kinds).entry(kind).or_default() += 1;
    }

    /// Rests for `duration`, or until the load is stopped.
    fn rest(&self, duration: Duration) {
        let end = Instant::now() + duration;
        while !self.stopped() && Instant::now() < end {
            std::thread::park_timeout(
                (end - Instant::now().min(end)).min(Duration::from_millis(50)),
            );
        }
    }
}

/// A load that runs until it is stopped or dropped.
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    sysbench: Option<sysbench::Running>,
    options: LoadOptions,
    begun: Instant,
}

/// What the load's clients knew at one moment.
#[derive(Debug, Clone)]
pub struct Moment {
    /// When.
    pub at: Instant,
    /// Transfers acknowledged, by writer.
    pub acknowledged: Vec<u64>,
}

/// What a load has done.
#[derive(Debug, Clone)]
pub struct Report {
    /// Transactions of bank and ledger.
    pub commits: u64,
    /// DDL statements and the like.
    pub ddl: u64,
    /// The same, by kind.
    pub kinds: BTreeMap<&'static str, u64>,
    /// Errors met that were to be expected, by part and name.
    pub met: BTreeMap<String, u64>,
    /// User XA transactions, each with its moments.
    pub prepared: Vec<Prepared>,
    /// What sysbench did.
    pub sysbench: Option<Sysbench>,
    /// Errors that were not to be expected.
    pub problems: Vec<String>,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { commits, ddl, kinds, met, prepared, sysbench, problems } = self;
        let xa = prepared.len();
        write!(f, "{commits} commits, {ddl} DDL {kinds:?}, {xa} XA, {sysbench:?}, met {met:?}")?;
        if !problems.is_empty() {
            write!(f, ", PROBLEMS {problems:?}")?;
        }
        Ok(())
    }
}

type Work = Box<dyn FnOnce(&Shared, &mut Conn) + Send>;

impl Load {
    /// Starts.
    #[must_use]
    pub fn start(server: &Database, options: LoadOptions) -> Self {
        let shared = Arc::new(Shared {
            version: server.version(),
            acknowledged: (0..options.writers).map(|_| AtomicU64::new(0)).collect(),
            ..Shared::default()
        });
        // Before the first thread: these ask the server, and panic where they cannot.
        let sysbench =
            options.sysbench.then(|| sysbench::Running::start(server, options.sysbench_rate));
        let mut threads = vec![pace::sample(&shared)];
        let mut run = |name: String, work: Work| {
            let (shared, mut conn) = (Arc::clone(&shared), server.connect());
            let thread = std::thread::Builder::new().name(name);
            let spawned = thread.spawn(move || work(&shared, &mut conn));
            threads.push(spawned.expect("a thread"));
        };
        let pause = match options.rate {
            0 => Duration::ZERO,
            rate => Duration::from_micros(1_000_000 * options.writers as u64 / rate),
        };
        for writer in 0..options.writers {
            let work =
                move |shared: &Shared, conn: &mut Conn| bank::transfer(shared, conn, writer, pause);
            run(format!("writer-{writer}"), Box::new(work));
        }
        for number in 0..probe::PROBES {
            let work = move |shared: &Shared, conn: &mut Conn| probe::commit(shared, conn, number);
            run(format!("probe-{number}"), Box::new(work));
        }
        let work = move |shared: &Shared, conn: &mut Conn| mix::change_rows(shared, conn, pause);
        run("mix".to_owned(), Box::new(work));
        if options.ddl {
            run("storm".to_owned(), Box::new(storm::change_tables));
        }
        if options.xa {
            for kind in [xa::SHORT, xa::LONG] {
                let work = move |shared: &Shared, conn: &mut Conn| xa::run(shared, conn, kind);
                run(format!("xa-{}", kind.name), Box::new(work));
            }
        }
        if options.imports {
            let (directory, own) = (server.data_directory().to_owned(), server.connect());
            let work =
                move |shared: &Shared, _: &mut Conn| imports::exchange(shared, own, &directory);
            run("imports".to_owned(), Box::new(work));
        }
        if options.upkeep {
            run("undo".to_owned(), Box::new(upkeep::fill_undo));
            run("resize".to_owned(), Box::new(upkeep::resize_log));
        }
        Self { shared, threads, sysbench, options, begun: Instant::now() }
    }

    /// Transfers acknowledged so far, by writer.
    #[must_use]
    pub fn acknowledged(&self) -> Vec<u64> {
        self.shared.acknowledged.iter().map(|n| n.load(Ordering::SeqCst)).collect()
    }

    /// What the clients know now.
    #[must_use]
    pub fn moment(&self) -> Moment {
        Moment { at: Instant::now(), acknowledged: self.acknowledged() }
    }

    /// Transactions committed so far.
    #[must_use]
    pub fn commits(&self) -> u64 {
        self.shared.commits.load(Ordering::Relaxed)
    }

    /// DDL statements so far.
    #[must_use]
    pub fn ddl(&self) -> u64 {
        self.shared.ddl.load(Ordering::Relaxed)
    }

    /// Statements of one kind of DDL so far.
    #[must_use]
    pub fn done(&self, kind: &str) -> u64 {
        lock(&self.shared.kinds).get(kind).copied().unwrap_or_default()
    }

    /// Fails when the load has met an error that it may not meet.
    pub fn assert_no_problem(&self) {
        let problems = lock(&self.shared.problems).clone();
        assert!(problems.is_empty(), "{problems:?}");
    }

    /// Lets tables be as they are from now on.
    pub fn rest_ddl(&self) {
        self.shared.ddl_rests.store(true, Ordering::Relaxed);
    }

    /// Waits until `count` more transactions are committed.
    pub fn wait_for_commits(&self, count: u64) {
        let goal = self.commits() + count;
        wait_for("the load to commit", || {
            self.assert_no_problem();
            (self.commits() >= goal).then_some(())
        });
    }

    /// Longest time that any one of the 1 ms clients waited for a commit, of the commits that were
    /// acknowledged between two moments. A client without a commit waited all that time.
    #[must_use]
    pub fn longest_gap(&self, from: Instant, to: Instant) -> Duration {
        self.shared.probes.longest_gap(from, to)
    }

    /// Longest time without a commit of any of the 1 ms clients: what blocks all of them.
    #[must_use]
    pub fn longest_silence(&self, from: Instant, to: Instant) -> Duration {
        self.shared.probes.longest_silence(from, to)
    }

    /// Longest time between them in which this process had no turn.
    #[must_use]
    pub fn longest_stall(&self, from: Instant, to: Instant) -> Duration {
        self.shared.pace.longest_stall(from, to)
    }

    /// Transactions per second since the start.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.commits() as f64 / self.begun.elapsed().as_secs_f64()
    }

    /// How the writers went on through each stage of a clone that has ended.
    #[must_use]
    pub fn paces(&self, clone: &CloneOf) -> Vec<StagePace> {
        self.shared.pace.of_stages(clone)
    }

    /// Which stages of a clone had a second with fewer commits than the options ask for.
    pub fn kept_up(&self, clone: &CloneOf) -> Result<Vec<StagePace>, String> {
        let paces = self.paces(clone);
        let slow: Vec<String> = paces
            .iter()
            .filter(|pace| pace.rate_least < self.options.rate_min as f64)
            .map(ToString::to_string)
            .collect();
        if slow.is_empty() {
            return Ok(paces);
        }
        Err(format!(
            "the load did not keep up: {}; {} commits/s are needed",
            slow.join(", "),
            self.options.rate_min
        ))
    }

    /// Fails a run whose load fell below what its options ask for.
    pub fn assert_kept_up(&self, clone: &CloneOf) {
        if let Err(text) = self.kept_up(clone) {
            panic!("{text}");
        }
    }

    /// Ends the load; whatever went wrong in it is a panic here.
    #[must_use]
    pub fn stop(mut self) -> Report {
        let report = self.end();
        assert_eq!(report.problems, Vec::<String>::new(), "the load had errors");
        report
    }

    /// Ends a load whose server may have gone.
    #[must_use]
    pub fn end(&mut self) -> Report {
        self.shared.stop.store(true, Ordering::Relaxed);
        let sysbench = self.sysbench.take().map(|sysbench| match sysbench.end() {
            Ok(done) => done,
            Err(problem) => {
                self.shared.problem(problem);
                Sysbench::default()
            }
        });
        for thread in self.threads.drain(..) {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if thread.join().is_err() {
                self.shared.problem(format!("{name} panicked"));
            }
        }
        Report {
            commits: self.commits(),
            ddl: self.ddl(),
            kinds: lock(&self.shared.kinds).clone(),
            met: lock(&self.shared.met).clone(),
            prepared: lock(&self.shared.prepared).clone(),
            sysbench,
            problems: lock(&self.shared.problems).clone(),
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        drop(self.end());
    }
}

/// A small generator: the load needs variety, not quality.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}
