//! What is listed, left out and refused.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _, symlink},
        net::UnixListener,
    },
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use marcot_common::entry::{Change, Entry, Kind};
use marcot_engine::{EngineConfig, open_engine};
use rustix::{
    fs::{CWD, FileType, Mode, XattrFlags},
    time::{ClockId, clock_gettime},
};

use crate::support::{Fixture, advance, list, paths};

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}

#[test]
fn every_kind_of_entry_is_listed_in_order_with_its_attributes() {
    let fixture = Fixture::new();
    let file = fixture.write("a/file", "12345");
    fixture.write("a-b", "");
    fixture.write(b"odd \n\xff", "x");
    fs::create_dir_all(fixture.path("empty")).unwrap();
    fs::hard_link(&file, fixture.path("linked")).unwrap();
    symlink("../a-b", fixture.path("a/link")).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o6751)).unwrap();
    fs::set_permissions(fixture.path("empty"), fs::Permissions::from_mode(0o1777)).unwrap();
    let time = UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    File::open(&file).unwrap().set_modified(time).unwrap();
    for (name, value) in [("user.z", "last"), ("user.a", ""), ("trusted.t", "never")] {
        rustix::fs::setxattr(&file, name, value.as_bytes(), XattrFlags::CREATE).unwrap();
    }
    run("setfacl", &["-m", "u:12345:r", fixture.path("a-b").to_str().unwrap()]);
    run("setfacl", &["-d", "-m", "u:12345:r", fixture.path("empty").to_str().unwrap()]);

    let snapshot = fixture.open().unwrap();
    let entries = list(&*snapshot, 1);
    let expected = ["a", "a/file", "a/link", "a-b", "empty", "linked", r"odd \n\xff"];
    assert_eq!(paths(&entries), expected);
    assert!(entries.iter().all(|e| e.change == Change::Add && !e.growing));
    assert!(entries.iter().zip(1..).all(|(e, id)| e.file_id.0 == id));
    let file = &entries[1];
    assert!(matches!(file.kind, Some(Kind::Regular { size: 5, allocated: 1.. })));
    assert_eq!(file.attributes.mode, 0o751, "setuid and setgid never travel");
    assert_eq!(file.attributes.modify_time, (1_000_000_000, 123_456_789));
    assert_eq!(attributes(file), ["user.a", "user.z"]);
    assert_eq!(&*file.attributes.extended[1].1, b"last");
    let target = Some(Kind::Symlink { target: b"../a-b"[..].into() });
    assert_eq!(entries[2].kind, target);
    assert!(matches!(entries[3].kind, Some(Kind::Regular { size: 0, .. })));
    assert_eq!(attributes(&entries[3]), ["system.posix_acl_access"]);
    assert_eq!(entries[4].attributes.mode, 0o1777);
    assert_eq!(attributes(&entries[4]), ["system.posix_acl_default"]);
    assert_eq!(entries[5].kind, Some(Kind::HardLink { file_id: file.file_id }));
}

fn attributes(entry: &Entry) -> Vec<String> {
    let names = entry.attributes.extended.iter().map(|(name, _)| name);
    names.map(|n| n.escape_ascii().to_string()).collect()
}

/// Guards the sum over all attributes: a bound on each alone would let these pass.
#[test]
fn extended_attributes_over_64_kib_together_are_refused_by_name() {
    // Of the common file systems only tmpfs holds as much.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = directory.path().join("t");
    File::create(&file).unwrap();
    for name in ["user.a", "user.b"] {
        let value = [1; 40_000];
        if let Err(error) = rustix::fs::setxattr(&file, name, &value, XattrFlags::CREATE) {
            eprintln!("not run: /dev/shm takes no such attribute: {error}");
            return;
        }
    }
    let config = EngineConfig {
        engine: "files".to_owned(),
        data_directory: directory.path().to_owned(),
        spool_directory: std::env::temp_dir(),
        spool_quota: 1 << 30,
        checkpoint_timeout: Duration::from_secs(120),
        database: marcot_engine::DatabaseConfig::default(),
        observer: marcot_engine::Observer::default(),
    };
    let engine = open_engine(&config).unwrap();
    let failure = engine.open(&Default::default()).unwrap_err();
    assert_eq!(failure.reason, "UNSUPPORTED_FILE");
    assert!(failure.message.contains("`t` has over 64 KiB"), "{failure}");
    rustix::fs::removexattr(&file, "user.b").unwrap();
    engine.open(&Default::default()).unwrap();
}

/// A file that has another name outside the tree is a file like any other.
#[test]
fn a_file_with_a_name_outside_is_a_regular_file() {
    let fixture = Fixture::new();
    let file = fixture.write("t", "x");
    fs::hard_link(file, fixture.spool().join("outside")).unwrap();
    let snapshot = fixture.open().unwrap();
    assert!(matches!(list(&*snapshot, 1)[0].kind, Some(Kind::Regular { .. })));
}

#[test]
fn sockets_pid_files_and_marcots_own_are_left_out_and_counted() {
    let fixture = Fixture::new();
    let sockets = ["mysql.sock", "x"].map(|n| UnixListener::bind(fixture.path(n)).unwrap());
    fixture.write("db/host.pid", "1");
    fixture.write(".marcot-staging-1/x", "");
    fixture.write("db.pid/t", "a directory stays");
    fixture.write("db/.marcot-file", "a file stays");
    fixture.write(".marcot-generation", "of this directory and no other");
    let snapshot = fixture.open().unwrap();
    let expected = ["db", "db/.marcot-file", "db.pid", "db.pid/t"];
    assert_eq!(paths(&list(&*snapshot, 1)), expected);
    let left_out: Vec<_> = snapshot.left_out().into_iter().collect();
    let expected = [("marcot", 2), ("pid_file", 1), ("socket", 2)];
    assert_eq!(left_out, expected.map(|(k, n)| (k.to_owned(), n)));
    drop(sockets);
}

/// Guards the refusals: each arm of `look_at` taken out makes one of these go missing.
#[test]
fn what_cannot_be_cloned_is_refused_all_together_and_by_name() {
    let fixture = Fixture::new();
    let fifo = fixture.path("fifo");
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
    if rustix::process::geteuid().is_root() {
        let device = fixture.path("device");
        rustix::fs::mknodat(CWD, &device, FileType::CharacterDevice, Mode::RUSR, 0x103).unwrap();
    } else {
        rustix::fs::mknodat(CWD, fixture.path("device"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    }
    fixture.write("db/t.isl", "/elsewhere/t.ibd");
    symlink("/etc/passwd", fixture.path("db/absolute")).unwrap();
    symlink("../../x", fixture.path("db/climbs")).unwrap();
    symlink("../db/t", fixture.path("db/stays")).unwrap();
    let failure = fixture.open().unwrap_err();
    assert_eq!(failure.reason, "LINK_LEAVES_TREE", "of the first in order");
    assert_eq!(failure.mysql_error, Some(1086));
    assert_eq!(failure.metadata["offenders"], "5");
    let violations = failure.violations.iter();
    let told: Vec<_> = violations.map(|v| (&*v.check, &*v.subject)).collect();
    let expected = [
        ("LINK_LEAVES_TREE", "db/absolute"),
        ("LINK_LEAVES_TREE", "db/climbs"),
        ("UNSUPPORTED_FILE", "db/t.isl"),
        ("UNSUPPORTED_FILE", "device"),
        ("UNSUPPORTED_FILE", "fifo"),
    ];
    assert_eq!(told, expected);
    assert!(failure.violations[2].description.contains("tablespace outside"));

    for name in ["db/absolute", "db/climbs", "device", "fifo"] {
        fs::remove_file(fixture.path(name)).unwrap();
    }
    let failure = fixture.open().unwrap_err();
    assert_eq!((&*failure.reason, failure.mysql_error), ("UNSUPPORTED_FILE", Some(1086)));
    fs::remove_file(fixture.path("db/t.isl")).unwrap();
    let snapshot = fixture.open().unwrap();
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
    assert_eq!(advance(&*snapshot, 1).unwrap_err().reason, "UNSUPPORTED_FILE");
}

/// Guards the bound on the error: trailers that are too large reach nobody.
#[test]
fn a_thousand_offenders_make_one_error_of_bearable_size() {
    let fixture = Fixture::new();
    for i in 0..1000 {
        symlink("/x", fixture.path(format!("{i:04}{}", "n".repeat(200)))).unwrap();
    }
    let failure = fixture.open().unwrap_err();
    assert!(failure.message.contains("99 or more others"), "{failure}");
    assert!(failure.to_status().details().len() < 10_000);
}

/// A child that holds a lock until it is killed.
struct Holder(Child);

impl Holder {
    fn start(call: &str, path: &std::path::Path) -> Self {
        let script = format!(
            "import fcntl, struct, sys, time\nf = open(sys.argv[1], 'r+b')\n{call}\n\
             print('held', flush=True)\ntime.sleep(600)"
        );
        let mut child = Command::new("python3")
            .args(["-c", &script, path.to_str().unwrap()])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "held\n");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const POSIX_LOCK: &str = "fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)";

/// Guards the look for locks at open and at advance: without either call one half fails.
#[test]
fn a_running_servers_directory_is_refused_with_file_and_process() {
    for name in ["ibdata1", "aria_log_control", "ib_logfile0", "undo001", "mysql.ibd"] {
        let fixture = Fixture::new();
        let path = fixture.write(name, "x");
        let snapshot = fixture.open().unwrap();
        let holder = Holder::start(POSIX_LOCK, &path);
        let pid = holder.0.id().to_string();
        for failure in [fixture.open().unwrap_err(), advance(&*snapshot, 1).unwrap_err()] {
            assert_eq!(failure.reason, "SERVER_RUNNING", "{name}");
            for part in [name, &pid, "--engine innodb"] {
                assert!(failure.message.contains(part), "{failure}");
            }
        }
        drop(holder);
        advance(&*snapshot, 1).unwrap();
    }
}

/// Guards the own fcntl call: rustix's fails on a holder without a process number.
#[test]
fn an_open_file_description_lock_counts_too() {
    let fixture = Fixture::new();
    let path = fixture.write("ibdata1", "x");
    let call = "fcntl.fcntl(f, 37, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 0, 0))";
    let _holder = Holder::start(call, &path);
    let failure = fixture.open().unwrap_err();
    assert_eq!(failure.reason, "SERVER_RUNNING");
    assert!(failure.message.contains("cannot be seen from here"), "{failure}");
}

/// Guards `clock::settle` in `relist`: without it the clock still stands in the file's tick.
#[test]
fn nothing_can_be_read_within_the_tick_in_which_it_was_listed() {
    let fixture = Fixture::new();
    let file = fixture.write("t", "x");
    let _snapshot = fixture.open().unwrap();
    let now = clock_gettime(ClockId::RealtimeCoarse);
    let stat = fs::metadata(file).unwrap();
    // Every later write carries this time or a later one, on kernels with finer times as well.
    let passed = (now.tv_sec - stat.ctime()) * 1_000_000_000 + now.tv_nsec - stat.ctime_nsec();
    assert!(passed > 0, "{passed} ns");
}

/// Guards that reading is tried before a byte moves: without the open in the walk it succeeds.
#[test]
fn a_file_or_directory_that_cannot_be_read_is_named() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: needs root to become somebody else");
        return;
    }
    for name in ["file", "directory"] {
        let fixture = Fixture::new();
        fixture.write("db/file", "");
        fixture.write("db/other", "");
        fs::create_dir(fixture.path("db/directory")).unwrap();
        fs::set_permissions(fixture.path("db/other"), fs::Permissions::from_mode(0o600)).unwrap();
        let secret = fixture.path(format!("db/{name}"));
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o000)).unwrap();
        let top = fixture.data().parent().unwrap().to_owned();
        fs::set_permissions(top, fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(fixture.spool(), fs::Permissions::from_mode(0o777)).unwrap();
        let engine = fixture.engine();
        // Identity is a thread's own in the kernel; this thread ends with it.
        let opened = std::thread::spawn(move || {
            let nobody = rustix::process::Uid::from_raw(65534);
            rustix::thread::set_thread_uid(nobody).unwrap();
            engine.open(&Default::default()).map(drop)
        });
        let failure = opened.join().unwrap().unwrap_err();
        assert_eq!(failure.reason, "FILE_ACCESS_DENIED");
        for part in [
            secret.to_str().unwrap(),
            "belongs to root(0):root(0) and has mode 0000",
            "this process is",
            "(65534)",
            "without CAP_DAC_READ_SEARCH",
        ] {
            assert!(failure.message.contains(part), "{part}: {failure}");
        }
        // The other one of them: both are named at once.
        let subjects: Vec<_> = failure.violations.iter().map(|v| v.subject.as_str()).collect();
        let shown = |name: &str| fixture.path(format!("db/{name}")).display().to_string();
        assert_eq!(subjects, [shown(name), shown("other")]);
    }
}

#[test]
fn an_unknown_engine_and_a_bad_directory_are_typed_errors() {
    let fixture = Fixture::new();
    let mut config = EngineConfig {
        engine: "oracle".to_owned(),
        data_directory: fixture.data(),
        spool_directory: fixture.spool(),
        spool_quota: 1 << 30,
        checkpoint_timeout: Duration::from_secs(120),
        database: marcot_engine::DatabaseConfig::default(),
        observer: marcot_engine::Observer::default(),
    };
    let failure = open_engine(&config).unwrap_err();
    assert_eq!(failure.reason, "UNKNOWN_ENGINE");
    assert!(failure.message.contains("engines: files"), "{failure}");
    config.engine = "files".to_owned();
    config.data_directory = fixture.write("file", "");
    assert_eq!(open_engine(&config).unwrap_err().reason, "NOT_A_DIRECTORY");
    config.data_directory = fixture.path("nothing");
    assert!(open_engine(&config).is_err());
}

/// Guards memory that does not grow with the number of files. Run alone, for VmHWM is the
/// process's: `cargo test -p marcot-engine -- --ignored --exact rules::...`.
#[test]
#[ignore = "makes 200,000 files"]
fn two_hundred_thousand_files_stay_below_40_mib() {
    let fixture = Fixture::new();
    for d in 0..20 {
        fs::create_dir(fixture.path(format!("d{d}"))).unwrap();
        for i in 0..10_000 {
            File::create(fixture.path(format!("d{d}/some_table_name_{i}.ibd"))).unwrap();
        }
    }
    let begun = SystemTime::now();
    let snapshot = fixture.open().unwrap();
    eprintln!("open: {:?}", begun.elapsed());
    File::create(fixture.path("d5/new")).unwrap();
    advance(&*snapshot, 1).unwrap();
    assert_eq!(snapshot.list(crate::support::at(1), 0).unwrap().count(), 200_020);
    eprintln!("all: {:?}", begun.elapsed());
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
    eprintln!("{peak}");
    let kib: u64 = peak.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 40 << 10, "{peak}");
}
