//! Delta of a database of which one page in a hundred was changed by SQL, in all of its files, beside a
//! full clone and beside rsync, at the speed of loopback, of 1 Gbit/s and of 100 Mbit/s. `make bench BENCH=delta`
//! runs it.
//!
//! Settings come by the environment: BYTES of rows (4 GiB), VERSION (10.11 or 11.8). rsync copies a
//! server that is stopped, and syncs nothing; Marcot copies the one that runs, and syncs all. Caches
//! are warm. Changed bytes are blocks of 16 KiB that differ between the older copy and the newer. The
//! last delta is onto a copy of which a page in a hundred has other bytes under the same size and time.
//! Each clone is compared with its certificate.
//!
//! The last line is `delta: ...`; the exit code says whether both bounds were met.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a program of the tests")]

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use marcot_proto::recipient::v1::{
    CloneOptions, CloneStatementRequest, State, recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{
    Proxy,
    bench::{number, version},
    client::{assert_intact, wait_for_end},
    live::Live,
    mariadb::free_port,
    process, recipient, wait_for,
};
use tonic::transport::Channel;

/// Bytes on the wire, beside those changed, and of all data in 1/1000.
const WIRE_FACTOR: f64 = 1.3;
const WIRE_PART: f64 = 0.002;

/// A full clone takes so many times as long, at the lowest rate.
const FASTER_MIN: f64 = 10.0;

/// Rates of the link: bytes per second, and name.
const RATES: [(Option<u64>, &str); 3] =
    [(None, "loopback"), (Some(125_000_000), "1 Gbit/s"), (Some(12_500_000), "100 Mbit/s")];

/// Tables that the rows are in, each a file.
const TABLES: u64 = 16;

/// Of the older copy, one page in so many gets another byte.
const FLIP_EVERY: u64 = 100;

/// One row in so many is changed: some 14 rows are in a page.
const CHANGE_EVERY: u64 = 1400;

/// Bytes of a block that is compared.
const BLOCK: usize = 16 << 10;

/// How long something took, and what passed meanwhile.
#[derive(Clone, Copy)]
struct Run {
    took: Duration,
    bytes: u64,
}

struct Bench {
    live: Live,
    proxy: Proxy,
    client: RecipientServiceClient<Channel>,
}

/// Bytes per second of one core that a block's digest takes.
fn digest_speed(block: usize) -> f64 {
    let bytes = vec![7; 64 << 20];
    let begun = Instant::now();
    for block in bytes.chunks(block) {
        std::hint::black_box(blake3::hash(block));
    }
    bytes.len() as f64 / begun.elapsed().as_secs_f64()
}

#[tokio::main]
async fn main() -> ExitCode {
    let bytes = number("BYTES", 4 << 30);
    let live = Live::start(version(), &["--innodb-log-file-size=96M"], 1 << 20);
    for table in tables() {
        let rows = bytes / 1200 / TABLES;
        drop(live.server.query(&format!(
            "CREATE TABLE {table} (id INT PRIMARY KEY, v TEXT) ENGINE=InnoDB; \
             INSERT INTO {table} SELECT seq, REPEAT(MD5(seq), 34) FROM mysql.seq_1_to_{rows}"
        )));
    }
    let proxy = Proxy::start(live.donor.0.address);
    let client = recipient(&live.recipient).await;
    let mut bench = Bench { live, proxy, client };
    bench.clone("older", None).await;
    for table in tables() {
        let changes = format!("UPDATE {table} SET v = REVERSE(v) WHERE id % {CHANGE_EVERY} = 7");
        drop(bench.live.server.query(&changes));
    }
    bench.flush();
    let mut rows = Vec::new();
    for (rate, name) in RATES {
        bench.proxy.limit(rate);
        let full = bench.clone("full", None).await;
        let delta = bench.clone("delta", Some("older")).await;
        rows.push((name, full, delta));
    }
    let gib = f64::from(1 << 30);
    println!(
        "BLAKE3 on one core: {:.2} GiB/s of blocks of 16 KiB, {:.2} GiB/s of 1 MiB",
        digest_speed(BLOCK) / gib,
        digest_speed(1 << 20) / gib
    );
    let (older, delta) = (bench.live.path("older"), bench.live.path("delta"));
    let (changed, data) = differing(&older, &delta);
    bench.proxy.limit(None);
    let spoilt = bench.live.path("spoilt");
    run(Command::new("cp").arg("-a").arg(&older).arg(&spoilt));
    flip_pages(&spoilt);
    let onto_spoilt = bench.clone("delta", Some("spoilt")).await;
    let (spoilt_changed, _) = differing(&spoilt, &delta);
    let Bench { live, proxy, .. } = bench;
    let copies = rsync_all(live, &proxy);
    println!("{:<11} {:>22} {:>22} {:>22}", "link", "full clone", "delta", "rsync -a --inplace");
    for ((name, full, delta), rsync) in rows.iter().zip(&copies) {
        println!("{name:<11} {} {} {}", shown(full), shown(delta), shown(rsync));
    }
    let spoilt_most = most(spoilt_changed, data);
    println!(
        "delta onto a copy with other bytes under the same size and time: {} for {:.1} MiB that differ \
         (at most {:.1})",
        shown(&onto_spoilt),
        mib(spoilt_changed),
        mib(spoilt_most)
    );
    let worst = rows.iter().map(|(_, _, delta)| delta.bytes).max().unwrap();
    let bound = most(changed, data);
    let (_, full, delta) = rows.last().unwrap();
    let faster = full.took.as_secs_f64() / delta.took.as_secs_f64();
    println!(
        "delta: {:.1} MiB on the wire for {:.1} MiB changed of {:.1} MiB (at most {:.1}); {faster:.1} \
         times as fast as a full clone at 100 Mbit/s (at least {FASTER_MIN})",
        mib(worst),
        mib(changed),
        mib(data),
        mib(bound)
    );
    let is_met = worst <= bound && onto_spoilt.bytes <= spoilt_most && faster >= FASTER_MIN;
    if is_met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The tables that are changed.
fn tables() -> impl Iterator<Item = String> {
    (0..TABLES).map(|n| format!("mix.t{n}"))
}

/// Most bytes on the wire.
fn most(changed: u64, data: u64) -> u64 {
    (changed as f64 * WIRE_FACTOR + data as f64 * WIRE_PART) as u64
}

/// Changes a byte in some pages of each large file, and no file's size or time.
fn flip_pages(directory: &Path) {
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let (path, metadata) = (entry.path(), entry.metadata().unwrap());
        if metadata.is_dir() {
            flip_pages(&path);
        } else if metadata.len() > 1 << 20 {
            let file = File::options().read(true).write(true).open(path).unwrap();
            for page in (3..metadata.len() / BLOCK as u64).step_by(FLIP_EVERY as usize) {
                let (at, mut byte) = (page * BLOCK as u64 + 5000, [0]);
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[!byte[0]], at).unwrap();
            }
            file.set_modified(metadata.modified().unwrap()).unwrap();
        }
    }
}

impl Bench {
    async fn clone(&mut self, name: &str, older: Option<&str>) -> Run {
        drop(std::fs::remove_dir_all(self.live.path(name)));
        let statement = process::statement(self.proxy.port(), &self.live.path(name), "");
        let reuse_directory = older
            .map(|older| self.live.path(older).display().to_string().into_bytes().into())
            .unwrap_or_default();
        let options = Some(CloneOptions { reuse_directory, ..Default::default() });
        let request = CloneStatementRequest { statement, options, ..Default::default() };
        let (before, begun) = (passed(&self.proxy), Instant::now());
        let started = self.client.clone_statement(request).await.unwrap().into_inner();
        let end = wait_for_end(&mut self.client, &started.clone.unwrap().name).await;
        let took = begun.elapsed();
        assert_eq!(end.state(), State::Completed, "{end:?}");
        let passed = passed(&self.proxy) - before;
        assert_intact(&mut self.client, &end.name).await;
        Run { took, bytes: passed }
    }

    /// Has the server write all its pages: what is in its memory alone is redo, for any copy.
    fn flush(&self) {
        drop(self.live.server.query("SET GLOBAL innodb_max_dirty_pages_pct = 0"));
        wait_for("pages to be written", || {
            let row =
                self.live.server.query("SHOW GLOBAL STATUS LIKE 'Innodb_buffer_pool_pages_dirty'");
            let left: u64 = row.split_whitespace().last()?.parse().ok()?;
            (left < 10).then_some(())
        });
    }
}

fn passed(proxy: &Proxy) -> u64 {
    let counts = proxy.counts();
    counts.down_bytes + counts.up_bytes
}

/// Bytes in blocks of the newer tree that the older one has not got there, and bytes of all.
fn differing(older: &Path, newer: &Path) -> (u64, u64) {
    let (mut changed, mut all) = (0, 0);
    for entry in std::fs::read_dir(newer).unwrap() {
        let entry = entry.unwrap();
        let other = older.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            let (more, of) = differing(&other, &entry.path());
            (changed, all) = (changed + more, all + of);
            continue;
        }
        let file = File::open(entry.path()).unwrap();
        let other = File::open(other).ok();
        let (mut now, mut before) = (vec![0; BLOCK], vec![0; BLOCK]);
        let mut at = 0;
        loop {
            let read = file.read_at(&mut now, at).unwrap();
            if read == 0 {
                break;
            }
            let known = other.as_ref().map_or(0, |other| other.read_at(&mut before, at).unwrap());
            if known < read || now[..read] != before[..read] {
                changed += read as u64;
            }
            (at, all) = (at + read as u64, all + read as u64);
        }
    }
    (changed, all)
}

/// rsync of the stopped server's directory onto the older copy, at each rate.
fn rsync_all(live: Live, proxy: &Proxy) -> Vec<Run> {
    let Live { server, donor, recipient, home, .. } = live;
    drop((donor, recipient));
    server.stop();
    let (data, older) = (home.path().join("data"), home.path().join("older"));
    let port = free_port();
    let configuration = home.path().join("rsyncd.conf");
    std::fs::write(
        &configuration,
        format!(
            "port = {port}\naddress = 127.0.0.1\nuse chroot = no\nuid = 0\ngid = 0\n\
             [data]\npath = {}\nread only = yes\n",
            data.display()
        ),
    )
    .unwrap();
    let daemon = Daemon::start(&configuration);
    proxy.set_target(([127, 0, 0, 1], port).into());
    wait_for("rsync's daemon", || std::net::TcpStream::connect(("127.0.0.1", port)).ok());
    let runs = RATES.map(|(rate, _)| {
        let copy = home.path().join("rsynced");
        drop(std::fs::remove_dir_all(&copy));
        run(Command::new("cp").arg("-a").arg(&older).arg(&copy));
        proxy.limit(rate);
        let (before, begun) = (passed(proxy), Instant::now());
        let source = format!("rsync://127.0.0.1:{}/data/", proxy.port());
        run(Command::new("rsync").args(["-a", "--inplace", "--delete", &source]).arg(&copy));
        Run { took: begun.elapsed(), bytes: passed(proxy) - before }
    });
    drop(daemon);
    runs.to_vec()
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(status.success(), "{command:?}: {status}");
}

/// rsync as a daemon, until it is dropped.
struct Daemon(Child);

impl Daemon {
    fn start(configuration: &Path) -> Self {
        let mut command = Command::new("rsync");
        command.args(["--daemon", "--no-detach", "--config"]).arg(configuration);
        Self(
            command.stdin(Stdio::null()).spawn().expect("rsync is there: `make bench` asks for it"),
        )
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn shown(run: &Run) -> String {
    format!("{:>8.1} s {:>8.1} MiB", run.took.as_secs_f64(), mib(run.bytes))
}
