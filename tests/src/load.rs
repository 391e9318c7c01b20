//! A write load on a MariaDB server, and what must hold on any copy of it.
//!
//! * bank: money moves between rows of two tables; the sum stays.
//! * ledger: each transfer's own row, numbered by its writer without a gap, in the same
//!   transaction. A copy holds exactly the first n of each writer, and no fewer than were
//!   acknowledged before it began.
//! * mix: inserts, updates and deletes on tables with secondary indexes and long columns.
//! * XA: user transactions, prepared for a while.
//! * DDL: tables and schemas that come, go, change their names, engines and columns.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use mysql::{Conn, prelude::Queryable as _};

use crate::{
    mariadb::{MariaDb, Version},
    wait_for,
};

/// Accounts in each of the two tables, and what each holds at first.
const ACCOUNTS: u64 = 1000;
const HOLDS: u64 = 1000;

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
    /// Most commits per second of all writers; 0: as many as the server takes.
    pub rate: u64,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { writers: 4, ddl: false, xa: false, sysbench: false, rate: 0 }
    }
}

/// Makes the tables, with about `bytes` of rows in them.
pub fn prepare(server: &MariaDb, bytes: u64) {
    let rows = bytes / 1200;
    drop(server.query(&format!(
        "CREATE DATABASE bank; CREATE DATABASE mix; CREATE DATABASE ddl; \
         CREATE TABLE bank.a (id INT PRIMARY KEY, v BIGINT NOT NULL) ENGINE=InnoDB; \
         CREATE TABLE bank.b LIKE bank.a; \
         CREATE TABLE bank.ledger (writer INT, n BIGINT, amount INT, pad VARCHAR(60), \
           PRIMARY KEY (writer, n)) ENGINE=InnoDB; \
         CREATE TABLE bank.probe (id INT PRIMARY KEY, n BIGINT) ENGINE=InnoDB; \
         CREATE TABLE bank.xa (id INT PRIMARY KEY, n BIGINT) ENGINE=InnoDB; \
         INSERT INTO bank.xa SELECT seq, 0 FROM mysql.seq_1_to_10; \
         INSERT INTO bank.probe VALUES (1, 0); \
         INSERT INTO bank.a SELECT seq, {HOLDS} FROM mysql.seq_1_to_{ACCOUNTS}; \
         INSERT INTO bank.b SELECT seq, {HOLDS} FROM mysql.seq_1_to_{ACCOUNTS}; \
         CREATE TABLE mix.wide (id INT AUTO_INCREMENT PRIMARY KEY, k INT, t VARCHAR(200), \
           b MEDIUMTEXT, KEY (k), KEY (t(40))) ENGINE=InnoDB; \
         CREATE TABLE mix.bulk (id INT PRIMARY KEY, v TEXT) ENGINE=InnoDB; \
         INSERT INTO mix.bulk SELECT seq, REPEAT(MD5(seq), 34) FROM mysql.seq_1_to_{rows}; \
         CREATE TABLE mix.aria (id INT PRIMARY KEY, v TEXT) ENGINE=Aria; \
         CREATE TABLE mix.isam (id INT PRIMARY KEY, v TEXT) ENGINE=MyISAM; \
         CREATE TABLE mix.csv (id INT NOT NULL, v VARCHAR(50) NOT NULL) ENGINE=CSV; \
         CREATE VIEW mix.v AS SELECT * FROM bank.a; \
         CREATE TRIGGER bank.t AFTER INSERT ON bank.probe FOR EACH ROW SET @x = 1; \
         INSERT INTO mix.aria SELECT seq, MD5(seq) FROM mysql.seq_1_to_500; \
         INSERT INTO mix.isam SELECT seq, MD5(seq) FROM mysql.seq_1_to_500; \
         INSERT INTO mix.csv SELECT seq, MD5(seq) FROM mysql.seq_1_to_50;"
    )));
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// Transfers acknowledged, by writer.
    acknowledged: Vec<AtomicU64>,
    commits: AtomicU64,
    retries: AtomicU64,
    ddl: AtomicU64,
    xa: AtomicU64,
    problems: Mutex<Vec<String>>,
    /// When each commit of the probe was acknowledged.
    probe: Mutex<Vec<Instant>>,
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn problem(&self, what: impl std::fmt::Display) {
        let mut problems = self.problems.lock().expect("no writer panics with it");
        if problems.len() < 20 {
            problems.push(what.to_string());
        }
    }
}

/// A load that runs until it is stopped or dropped.
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    sysbench: Option<Child>,
    begun: Instant,
}

/// What a load has done.
#[derive(Debug, Clone)]
pub struct Report {
    /// Transactions of bank and ledger.
    pub commits: u64,
    /// Transactions that were tried again after a deadlock.
    pub retries: u64,
    /// DDL statements.
    pub ddl: u64,
    /// XA transactions.
    pub xa: u64,
    /// Errors that were not to be expected.
    pub problems: Vec<String>,
}

impl Load {
    /// Starts.
    #[must_use]
    pub fn start(server: &MariaDb, options: LoadOptions) -> Self {
        let shared = Arc::new(Shared {
            acknowledged: (0..options.writers).map(|_| AtomicU64::new(0)).collect(),
            ..Shared::default()
        });
        let mut threads = Vec::new();
        let mut run = |name: String, work: Box<dyn FnOnce(&Shared, &mut Conn) + Send>| {
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
                move |shared: &Shared, conn: &mut Conn| transfer(shared, conn, writer, pause);
            run(format!("writer-{writer}"), Box::new(work));
        }
        run("mix".to_owned(), Box::new(mix));
        run("probe".to_owned(), Box::new(probe));
        if options.ddl {
            run("ddl".to_owned(), Box::new(change_tables));
        }
        if options.xa {
            run("xa".to_owned(), Box::new(user_xa));
        }
        let sysbench = options.sysbench.then(|| sysbench(server));
        Self { shared, threads, sysbench, begun: Instant::now() }
    }

    /// Transfers acknowledged so far, by writer.
    #[must_use]
    pub fn acknowledged(&self) -> Vec<u64> {
        self.shared.acknowledged.iter().map(|n| n.load(Ordering::SeqCst)).collect()
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

    /// Waits until `count` more transactions are committed.
    pub fn wait_for_commits(&self, count: u64) {
        let goal = self.commits() + count;
        wait_for("the load to commit", || {
            let problems = self.shared.problems.lock().expect("no writer panics with it");
            assert!(problems.is_empty(), "{problems:?}");
            (self.commits() >= goal).then_some(())
        });
    }

    /// Longest time between two commits of the 1 ms probe, of which one is after `from`.
    #[must_use]
    pub fn longest_gap(&self, from: Instant) -> Duration {
        let probe = self.shared.probe.lock().expect("the probe does not panic");
        let gaps = probe.windows(2).filter(|pair| pair[1] >= from).map(|pair| pair[1] - pair[0]);
        gaps.max().unwrap_or(from.elapsed())
    }

    /// Transactions per second since the start.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.commits() as f64 / self.begun.elapsed().as_secs_f64()
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
        if let Some(mut sysbench) = self.sysbench.take() {
            drop(sysbench.kill());
            drop(sysbench.wait());
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                self.shared.problem("a writer panicked");
            }
        }
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        Report {
            commits: get(&self.shared.commits),
            retries: get(&self.shared.retries),
            ddl: get(&self.shared.ddl),
            xa: get(&self.shared.xa),
            problems: self.shared.problems.lock().expect("all writers have ended").clone(),
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

/// Lock waits, deadlocks and changed tables: the statement is tried again.
fn is_passing(error: &mysql::Error) -> bool {
    matches!(error, mysql::Error::MySqlError(e) if matches!(e.code, 1205 | 1213 | 1020 | 1412))
}

fn transfer(shared: &Shared, conn: &mut Conn, writer: usize, pause: Duration) {
    let mut random = Random(writer as u64 + 1);
    let last: Option<u64> =
        match conn.query_first(format!("SELECT MAX(n) FROM bank.ledger WHERE writer={writer}")) {
            Ok(row) => row.flatten(),
            Err(error) => return shared.problem(error),
        };
    let mut n = last.unwrap_or(0);
    shared.acknowledged[writer].store(n, Ordering::SeqCst);
    while !shared.stopped() {
        let (from, to) = (1 + random.below(ACCOUNTS), 1 + random.below(ACCOUNTS));
        let amount = random.below(10);
        let statements = [
            "BEGIN".to_owned(),
            format!("UPDATE bank.a SET v = v - {amount} WHERE id = {from}"),
            format!("UPDATE bank.b SET v = v + {amount} WHERE id = {to}"),
            format!(
                "INSERT INTO bank.ledger VALUES ({writer}, {}, {amount}, REPEAT('x', {}))",
                n + 1,
                random.below(60)
            ),
            "COMMIT".to_owned(),
        ];
        let done = statements.iter().try_for_each(|sql| conn.query_drop(sql));
        match done {
            Ok(()) => {
                n += 1;
                shared.acknowledged[writer].store(n, Ordering::SeqCst);
                shared.commits.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) if is_passing(&error) => {
                shared.retries.fetch_add(1, Ordering::Relaxed);
                if let Err(error) = conn.query_drop("ROLLBACK") {
                    return shared.problem(error);
                }
            }
            Err(error) => return shared.problem(format!("transfer: {error}")),
        }
        if !pause.is_zero() {
            std::thread::park_timeout(pause);
        }
    }
}

fn mix(shared: &Shared, conn: &mut Conn) {
    let mut random = Random(99);
    while !shared.stopped() {
        let k = random.below(1000);
        let sql = match random.below(8) {
            0..=2 => format!(
                "INSERT INTO mix.wide (k, t, b) VALUES ({k}, REPEAT(CHAR(65 + {k} % 26), {k} % 200), \
                 REPEAT(MD5({k}), {}))",
                random.below(900)
            ),
            3 => format!("UPDATE mix.wide SET k = k + 1, t = MD5(k) WHERE k = {k} LIMIT 5"),
            4 => format!("DELETE FROM mix.wide WHERE k = {k} LIMIT 3"),
            5 => format!(
                "UPDATE mix.bulk SET v = REPEAT(MD5(RAND()), 34) WHERE id = {}",
                random.below(50_000)
            ),
            6 => format!("REPLACE INTO mix.aria VALUES ({k}, MD5({k}))"),
            _ => format!("REPLACE INTO mix.isam VALUES ({k}, MD5({k}))"),
        };
        match conn.query_drop(&sql) {
            Ok(()) => {}
            Err(error) if is_passing(&error) => {}
            Err(error) => return shared.problem(format!("{sql}: {error}")),
        }
    }
}

/// Commits every millisecond, and notes when.
fn probe(shared: &Shared, conn: &mut Conn) {
    while !shared.stopped() {
        match conn.query_drop("UPDATE bank.probe SET n = n + 1 WHERE id = 1") {
            Ok(()) => {
                shared.probe.lock().expect("no reader panics with it").push(Instant::now());
            }
            Err(error) if is_passing(&error) => {}
            Err(error) => return shared.problem(format!("probe: {error}")),
        }
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

fn user_xa(shared: &Shared, conn: &mut Conn) {
    let mut random = Random(7);
    let mut n = 0;
    while !shared.stopped() {
        n += 1;
        let xid = format!("'load-{n}'");
        let id = 1 + random.below(10);
        let begin = [
            format!("XA START {xid}"),
            format!("UPDATE bank.xa SET n = n + 1 WHERE id = {id}"),
            format!("XA END {xid}"),
            format!("XA PREPARE {xid}"),
        ];
        if let Err(error) = begin.iter().try_for_each(|sql| conn.query_drop(sql)) {
            return shared.problem(format!("XA: {error}"));
        }
        std::thread::park_timeout(Duration::from_millis(random.below(200)));
        let end = if random.below(4) == 0 { "ROLLBACK" } else { "COMMIT" };
        if let Err(error) = conn.query_drop(format!("XA {end} {xid}")) {
            return shared.problem(format!("XA {end}: {error}"));
        }
        shared.xa.fetch_add(1, Ordering::Relaxed);
    }
}

/// Tables that come and go. What fails since an earlier statement failed is tried no more.
fn change_tables(shared: &Shared, conn: &mut Conn) {
    let mut random = Random(5);
    let mut n = 0;
    while !shared.stopped() {
        n += 1;
        let t = format!("ddl.t{}", n % 40);
        let statements: Vec<String> = match random.below(10) {
            0..=2 => vec![
                format!("DROP TABLE IF EXISTS {t}"),
                format!(
                    "CREATE TABLE {t} (id INT PRIMARY KEY, v VARCHAR(100), w INT, KEY (v)) \
                     ENGINE=InnoDB AS SELECT seq id, MD5(seq) v, seq w FROM mysql.seq_1_to_{}",
                    1 + random.below(3000)
                ),
            ],
            3 => vec![
                format!("DROP TABLE IF EXISTS {t}x"),
                format!("RENAME TABLE IF EXISTS {t} TO {t}x"),
                format!(
                    "INSERT IGNORE INTO {t}x (id, v, w) SELECT seq + 100000, 'r', 1 FROM mysql.seq_1_to_20"
                ),
            ],
            4 => vec![format!("TRUNCATE TABLE {t}"), format!("INSERT INTO {t} (id) VALUES (1)")],
            5 => vec![format!("ALTER TABLE {t} ADD COLUMN c{} INT DEFAULT 5", n % 1000)],
            6 => vec![format!("ALTER TABLE {t} FORCE, ALGORITHM=COPY")],
            7 => vec![format!("ALTER TABLE {t} ADD INDEX i{} (w), ALGORITHM=INPLACE", n % 1000)],
            8 => vec![
                format!("ALTER TABLE {t} ENGINE={}", ["Aria", "InnoDB", "MyISAM"][n % 3]),
                format!("UPDATE {t} SET w = w + 1 LIMIT 100"),
            ],
            _ => vec![
                format!("CREATE DATABASE IF NOT EXISTS ddl{}", n % 3),
                format!("CREATE TABLE IF NOT EXISTS ddl{}.x (id INT) ENGINE=InnoDB", n % 3),
                format!("DROP DATABASE ddl{}", n % 3),
            ],
        };
        for sql in statements {
            match conn.query_drop(&sql) {
                Ok(()) => {
                    shared.ddl.fetch_add(1, Ordering::Relaxed);
                }
                // No such table, duplicate names, a row that is there: what a storm brings.
                Err(mysql::Error::MySqlError(e))
                    if matches!(
                        e.code,
                        1146 | 1050
                            | 1060
                            | 1061
                            | 1054
                            | 1062
                            | 1205
                            | 1213
                            | 1069
                            | 1118
                            | 1845
                            | 1846
                    ) => {}
                Err(error) => return shared.problem(format!("{sql}: {error}")),
            }
        }
    }
}

fn sysbench(server: &MariaDb) -> Child {
    let command = |verb: &str| {
        let mut command = Command::new("sysbench");
        command
            .args([
                "oltp_write_only",
                "--tables=4",
                "--table-size=10000",
                "--threads=2",
                "--time=0",
            ])
            .args(["--db-driver=mysql", "--mysql-user=root", "--mysql-db=sbtest"])
            .arg(format!("--mysql-socket={}", server.socket().display()))
            .arg("--mysql-ignore-errors=all")
            .arg(verb)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    };
    if server.query("SHOW DATABASES LIKE 'sbtest'").is_empty() {
        drop(server.query("CREATE DATABASE sbtest"));
        let status = command("prepare").status().expect("sysbench: `make test` installs it");
        assert!(status.success(), "sysbench prepare: {status}");
    }
    command("run").spawn().expect("sysbench: `make test` installs it")
}

/// Ledger rows of each writer in the binary logs of `data_directory` up to a position.
#[must_use]
pub fn ledger_in_binlog(data_directory: &Path, file: &str, position: u64) -> u64 {
    let mut files: Vec<PathBuf> = std::fs::read_dir(data_directory)
        .expect("the data directory can be read")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            name.starts_with("bin.0") && name.as_str() <= file
        })
        .collect();
    files.sort();
    let output = Command::new(Version::binlog_program())
        .args(["--no-defaults", "--base64-output=decode-rows", "--verbose"])
        .arg(format!("--stop-position={position}"))
        .args(&files)
        .output()
        .expect("mariadb-binlog is there: `make test` installs it");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let rows = text.matches("### INSERT INTO `bank`.`ledger`").count();
    let statements = text.matches("INSERT INTO bank.ledger").count();
    (rows + statements) as u64
}

/// Checks all that must hold on a server that was started on a copy; returns the transfers that it
/// holds, by writer.
#[must_use]
pub fn check_copy(server: &MariaDb, writers: usize) -> Vec<u64> {
    assert_eq!(server.errors(), Vec::<String>::new());
    let sum = server.query("SELECT (SELECT SUM(v) FROM bank.a) + (SELECT SUM(v) FROM bank.b)");
    assert_eq!(sum.trim(), (2 * ACCOUNTS * HOLDS).to_string(), "money was made or lost");
    let moved = server.query(&format!(
        "SELECT {} - SUM(v) - (SELECT COALESCE(SUM(amount), 0) FROM bank.ledger) FROM bank.a",
        ACCOUNTS * HOLDS
    ));
    assert_eq!(moved.trim(), "0", "bank and ledger are of two moments");
    let mut transfers = vec![0; writers];
    let ledger = server.query("SELECT writer, COUNT(*), MAX(n) FROM bank.ledger GROUP BY writer");
    for line in ledger.lines() {
        let mut fields = line.split('\t').map(|field| field.parse::<u64>().expect("a number"));
        let mut field = || fields.next().expect("three columns");
        let (writer, count, max) = (field(), field(), field());
        assert_eq!(count, max, "the ledger of writer {writer} has a gap");
        transfers[usize::try_from(writer).expect("a writer")] = count;
    }
    let tables = server.tables();
    let checked = server.query(&format!("CHECK TABLE {}", tables.join(", ")));
    let wrong: Vec<_> = checked
        .lines()
        .filter(|line| !line.ends_with("\tOK") && !line.contains("doesn't support check"))
        .collect();
    assert_eq!(wrong, Vec::<&str>::new());
    transfers
}
