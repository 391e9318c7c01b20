//! The point, asked of the engine itself: it is fixed once, and no page is read after it.

use std::{
    os::unix::fs::MetadataExt as _,
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use marcot_common::position::{Position, Stage};
use marcot_engine::{
    Advanced, Blocked, DatabaseConfig, EngineConfig, Observer, Snapshot, SnapshotOptions,
    open_engine,
};
use marcot_tests::{
    PATIENCE,
    live::{Live, WRITERS},
    load::{Load, LoadOptions},
    mariadb::Version,
    proxy::Proxy,
    wait_for,
};

/// What was blocked, and for how long.
type Told = Arc<Mutex<Vec<(Blocked, Duration)>>>;

fn open(live: &Live, told: &Told, spool_quota: u64) -> Box<dyn Snapshot> {
    let socket = Some(live.server.socket().to_owned());
    open_by(live, DatabaseConfig { socket, ..DatabaseConfig::default() }, told, spool_quota)
}

fn open_by(
    live: &Live,
    reached: DatabaseConfig,
    told: &Told,
    spool_quota: u64,
) -> Box<dyn Snapshot> {
    let database = DatabaseConfig {
        user: Some("marcot".to_owned()),
        password: Some("secret".to_owned()),
        ..reached
    };
    let config = EngineConfig {
        engine: "innodb".to_owned(),
        data_directory: live.server.data_directory().to_owned(),
        spool_directory: live.home.path().to_owned(),
        spool_quota,
        checkpoint_timeout: Duration::from_secs(120),
        database,
        observer: Observer::new({
            let told = Arc::clone(told);
            move |what, how_long| told.lock().expect("a list").push((what, how_long))
        }),
    };
    let engine = open_engine(&config).expect("the directories are there");
    engine.open(&SnapshotOptions::default()).expect("the server runs")
}

fn advance(snapshot: &dyn Snapshot, from: Position) -> Advanced {
    snapshot.advance(from, &mut |_| Ok(())).expect("the next stage")
}

/// A listed file's content.
fn read(snapshot: &dyn Snapshot, at: Position, path: &[u8]) -> Vec<u8> {
    let mut entries = snapshot.list(at, 0).expect("a list").map(|entry| entry.expect("an entry"));
    let entry = entries.find(|entry| entry.path.as_bytes() == path).expect("it is listed");
    let mut reader = snapshot.open_file(at, entry.file_id).expect("it can be read");
    let mut bytes = vec![0; usize::try_from(reader.size()).expect("it is small")];
    reader.read_exact_at(&mut bytes, 0).expect("it can be read");
    bytes
}

/// Guards R1. With the answer made anew for a repeated call, T would lie after what the recipient
/// has of the log; with the look at the point taken out of `open_file`, a page of later than T would
/// be in the clone. And what the file in the clone says is what the clone resource says.
#[test]
fn the_point_is_fixed_once_and_no_page_is_read_after_it() {
    let live = Live::start(Version::V10_11, &[], 1 << 20);
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(100);
    let told = Told::default();
    let snapshot = open(&live, &told, 1 << 30);
    let first = snapshot.position();
    let table = snapshot.list(first, 0).expect("a list").find_map(|entry| {
        let entry = entry.expect("an entry");
        (entry.path.as_bytes() == b"bank/a.ibd").then_some(entry.file_id)
    });
    let table = table.expect("the table's file");
    assert!(snapshot.open_file(first, table).is_ok());
    let (mut last, mut advanced) = (first, advance(&*snapshot, first));
    while advanced.position.stage != Stage::RedoCopy {
        load.wait_for_commits(50);
        last = advanced.position;
        advanced = advance(&*snapshot, last);
    }
    let redo = advanced.position;
    // Both are told by the time that it ends: the locks of a point that stands are gone.
    let blocked = told.lock().expect("a list").clone();
    let [.., (Blocked::Commits, commits), (Blocked::Ddl, ddl)] = blocked[..] else {
        panic!("{blocked:?}");
    };
    assert!(Duration::ZERO < commits && commits <= ddl, "{blocked:?}");
    for at in [first, last] {
        let failure = snapshot.open_file(at, table).expect_err("a page after the point");
        assert_eq!(failure.reason, "STAGE_PASSED", "{failure}");
    }
    let (info, log) = (&b"marcot_clone_info.json"[..], &b"ib_logfile0"[..]);
    let then = (read(&*snapshot, redo, info), read(&*snapshot, redo, log));
    load.wait_for_commits(100);
    let again = advance(&*snapshot, last);
    assert_eq!((again.position, again.totals), (redo, advanced.totals));
    assert!(then == (read(&*snapshot, redo, info), read(&*snapshot, redo, log)), "another point");

    let done = advance(&*snapshot, redo);
    let point = done.coordinates.expect("coordinates");
    load.wait_for_commits(50);
    let again = advance(&*snapshot, redo);
    assert_eq!(again.coordinates.as_ref(), Some(&point));
    let expected = format!(
        "{{\n  \"binlog_file\": \"{}\",\n  \"binlog_position\": {},\n  \"format\": 1,\n  \
         \"gtid_binlog_pos\": \"{}\",\n  \"lsn\": {},\n  \"server_id\": 1,\n  \
         \"server_uid\": \"{}\",\n  \"server_version\": \"{}\",\n  \"sources\": []\n}}\n",
        String::from_utf8_lossy(&point.binlog_file),
        point.binlog_position,
        point.gtid_executed,
        point.lsn,
        live.server.query("SELECT @@server_uid").trim(),
        live.server.query("SELECT @@version").trim(),
    );
    assert_eq!(String::from_utf8_lossy(&then.0), expected);
    assert!(point.binlog_position > 0 && !point.gtid_executed.is_empty(), "{point:?}");
    drop(load.stop());
}

/// Guards R1 against a recipient that was killed as it asked for the point and reads on when it runs
/// again, while that call still fixes the point: from before commits are blocked no page is read, nor
/// more of the log. Without the gate its pages are of after the point, and redo that lies beyond the
/// log's end stays in the clone: it has transactions that its coordinates have not.
#[test]
fn nothing_is_read_while_the_point_is_being_fixed() {
    let live = Live::start(Version::V10_11, &[], 1 << 20);
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(100);
    let proxy = Proxy::start(([127, 0, 0, 1], live.server.port.expect("a port")).into());
    let url = Some(format!("mysql://127.0.0.1:{}", proxy.port()));
    let reached = DatabaseConfig { url, ..DatabaseConfig::default() };
    let snapshot: Arc<dyn Snapshot> = open_by(&live, reached, &Told::default(), 1 << 30).into();
    let first = snapshot.position();
    let id = |name: &[u8]| {
        let mut entries = snapshot.list(first, 0).expect("a list").map(|e| e.expect("an entry"));
        entries.find(|e| e.path.as_bytes() == name).expect("it is listed").file_id
    };
    let (table, log) = (id(b"bank/a.ibd"), id(b"ib_logfile0"));
    let mut page = vec![0; 16 << 10];
    let mut opened_before = snapshot.open_file(first, table).expect("it can be read");
    opened_before.read_exact_at(&mut page, 0).expect("it can be read");
    // The locks are gone, and what ends the cut has not heard of it.
    let (fixed, is_fixed) = mpsc::channel();
    let (go_on, goes_on) = mpsc::channel::<()>();
    proxy.when_answered("BACKUP STAGE END", move || {
        fixed.send(()).expect("the story waits");
        goes_on.recv_timeout(PATIENCE).expect("the story goes on");
    });
    let advancing = std::thread::spawn({
        let snapshot = Arc::clone(&snapshot);
        move || {
            let mut position = first;
            while position.stage != Stage::RedoCopy {
                position = advance(&*snapshot, position).position;
            }
            position
        }
    });
    is_fixed.recv_timeout(PATIENCE).expect("the locks are let go");
    load.wait_for_commits(100);
    let last = snapshot.position();
    let read = opened_before.read_exact_at(&mut page, 0);
    let refused = [
        read.expect_err("a page of after the point"),
        opened_before.span(0, page.len() as u64).expect_err("pages of after the point"),
        snapshot.open_file(last, table).expect_err("a table of after the point"),
        snapshot.open_file(last, log).expect_err("redo of after the point"),
    ];
    assert!(refused.iter().all(|failure| failure.reason == "STAGE_ADVANCING"), "{refused:?}");
    go_on.send(()).expect("the proxy waits");
    let redo = advancing.join().expect("the point is fixed");
    let failure = snapshot.open_file(last, table).expect_err("a page after the point");
    assert_eq!(failure.reason, "STAGE_PASSED", "{failure}");
    assert!(opened_before.read_exact_at(&mut page, 0).is_err(), "a page after the point");
    assert!(snapshot.open_file(redo, log).is_ok());
    drop(load.stop());
}

/// Bytes that this process holds on the disk in files without names.
fn spooled_bytes(live: &Live) -> u64 {
    let open = std::fs::read_dir("/proc/self/fd").expect("our own");
    let in_home = open.filter_map(|entry| {
        let path = entry.ok()?.path();
        let is_ours = std::fs::read_link(&path).ok()?.starts_with(live.home.path());
        is_ours.then(|| path.metadata().map_or(0, |metadata| metadata.blocks() * 512))
    });
    in_home.sum()
}

/// Guards the redo of a clone whose recipient rests in REDO COPY. With what the server writes after
/// the point counted against the quota, the log was freed and read as zeros up to DONE; with it
/// followed still, it fills the spool for nobody.
#[test]
fn what_is_written_after_the_point_takes_nothing_from_a_clone() {
    const QUOTA: u64 = 16 << 20;
    let live = Live::start(Version::V10_11, &[], 1 << 20);
    let snapshot = open(&live, &Told::default(), QUOTA);
    let mut at = snapshot.position();
    while at.stage != Stage::RedoCopy {
        at = advance(&*snapshot, at).position;
    }
    let log = || read(&*snapshot, at, b"ib_logfile0");
    let then = log();
    let begun = live.lsn();
    wait_for("redo far beyond the quota", || {
        drop(live.server.query("UPDATE mix.bulk SET v = REVERSE(v)"));
        (live.lsn() > begun + 3 * QUOTA).then_some(())
    });
    assert!(then == log(), "the log has changed");
    let spooled = spooled_bytes(&live);
    assert!(spooled < QUOTA, "{spooled} bytes are in the spool");
    let done = advance(&*snapshot, at);
    assert_eq!(done.position.stage, Stage::Done);
    // And it is the last of what was held.
    drop(snapshot);
    assert_eq!(spooled_bytes(&live), 0);
}
