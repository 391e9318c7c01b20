//! The point, asked of the engine itself: it is fixed once, and no page is read after it.

use marcot_common::position::{Position, Stage};
use marcot_engine::{
    Advanced, DatabaseConfig, EngineConfig, Snapshot, SnapshotOptions, open_engine,
};
use marcot_tests::{
    live::{Live, WRITERS},
    load::{Load, LoadOptions},
    mariadb::Version,
};

fn open(live: &Live) -> Box<dyn Snapshot> {
    let database = DatabaseConfig {
        socket: Some(live.server.socket().to_owned()),
        user: Some("marcot".to_owned()),
        password: Some("secret".to_owned()),
        ..DatabaseConfig::default()
    };
    let config = EngineConfig {
        engine: "innodb".to_owned(),
        data_directory: live.server.data_directory().to_owned(),
        spool_directory: live.home.path().to_owned(),
        spool_quota: 1 << 30,
        database,
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
    let snapshot = open(&live);
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
