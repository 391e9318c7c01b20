//! What the moment of the cut meets, and what there is to say of it.

use marcot_proto::recipient::v1::State;
use marcot_tests::{
    client::begin,
    clone_and_wait,
    invariants::check_copy,
    live::{Live, WRITERS, donor_with},
    load::{Load, LoadOptions},
    mariadb::{self, MariaDb, Version},
    recipient, wait_for,
};

use crate::matrix::{start, writers};

/// Guards what a cut finds of a table that is being made anew: the server's own recovery
/// (ddl_recovery.log) takes it back, and nothing of it is left. BACKUP STAGE waits for no ALTER that
/// copies rows, and lets none end: it runs at the point for certain.
async fn a_table_is_altered_at_the_point(algorithm: &str) {
    let mut live = start(Version::V10_11, &[]);
    let load = Load::start(&live.server, writers());
    load.wait_for_commits(100);
    let before = load.moment();
    let proxy = live.proxy_database();
    let socket = live.server.socket().to_owned();
    let sql = format!("ALTER TABLE mix.bulk FORCE, ALGORITHM={algorithm}");
    let (sender, altered) = std::sync::mpsc::channel();
    proxy.when_answered("BACKUP STAGE FLUSH", move || {
        let alters = socket.clone();
        std::thread::spawn(move || sender.send(mariadb::ask(&alters, &sql)));
        let states = "SELECT state FROM information_schema.processlist WHERE info LIKE 'ALTER%'";
        wait_for("rows to be copied", || {
            let state = mariadb::ask(&socket, states).ok()?;
            let copies = ["copy to tmp table", "altering table"];
            copies.iter().any(|copies| state.contains(copies)).then_some(())
        });
    });
    let mut client = recipient(&live.recipient).await;
    let clone = clone_and_wait(&mut client, &live.statement("clone", false)).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", live.donor.0.log());
    let ended = load.moment();
    let answer = altered.recv_timeout(marcot_tests::PATIENCE).expect("the ALTER ends");
    assert_eq!(answer, Ok(String::new()));
    load.wait_for_commits(50);
    let report = load.stop();
    let halves = || -> Vec<String> {
        let names = std::fs::read_dir(live.path("clone/mix")).expect("the schema");
        let names = names.map(|entry| entry.expect("a name").file_name());
        names.map(|n| n.to_string_lossy().into_owned()).filter(|n| n.contains("#sql")).collect()
    };
    assert_ne!(halves(), Vec::<String>::new(), "no ALTER was running at the point");
    live.check("clone", &clone, &before, &ended, &report);
    assert_eq!(halves(), Vec::<String>::new(), "left after the start");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_copied_at_the_point_is_as_it_was() {
    a_table_is_altered_at_the_point("COPY").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_rebuilt_at_the_point_is_as_it_was() {
    a_table_is_altered_at_the_point("INPLACE").await;
}

/// Guards the bound on what is read under the locks: more of it is copied without them first.
#[tokio::test(flavor = "multi_thread")]
async fn more_than_may_be_read_under_the_locks_is_copied_in_another_round() {
    // A log that is not turned over while the table is made, which takes seconds on a slow disk: a lost
    // log costs a page round, and the table comes with that.
    let log = "--innodb-log-file-size=256M";
    let mut live = Live::start(Version::V10_11, &[log], 1 << 20);
    let load = Load::start(&live.server, LoadOptions { rate: 200, ..writers() });
    load.wait_for_commits(100);
    let before = load.moment();
    let proxy = live.proxy_database();
    let socket = live.server.socket().to_owned();
    proxy.when_answered("BACKUP STAGE START", move || {
        // No redo tells of it.
        let sql = "CREATE TABLE mix.large (v TEXT) ENGINE=MyISAM AS SELECT REPEAT('x', 4000) v \
                   FROM mysql.seq_1_to_40000";
        assert_eq!(mariadb::ask(&socket, sql), Ok(String::new()));
    });
    let mut client = recipient(&live.recipient).await;
    let name = begin(&mut client, &live.statement("clone", false)).await;
    let _clone = live.check_end("clone", &name, before, load, &[]).await;
    let log = live.donor.0.log();
    assert!(log.contains("more has changed than may be read under the locks"), "{log}");
}

/// Guards further rounds of whole files once pages were sent again: without them a table that is made
/// during PAGE COPY ends the clone in SOURCE_CHANGED.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_made_during_page_copy_is_copied_in_another_round() {
    let mut live = Live::start(Version::V10_11, &["--innodb-log-file-size=8M"], 24 << 20);
    let quota = ["--spool-quota", "48MiB"];
    live.donor = donor_with(live.home.path(), &live.path("data"), &live.server, &quota);
    let load = Load::start(&live.server, LoadOptions { rate: 200, rate_min: 0, ..writers() });
    load.wait_for_commits(50);
    live.clone_with("clone", load, |_| {
        live.outgrow_the_log();
        live.go_on_to_page_copy();
        // More than may be read under the locks, and no redo tells of it.
        drop(live.server.query(
            "CREATE TABLE mix.large (v TEXT) ENGINE=MyISAM AS SELECT REPEAT('x', 4000) v FROM \
             mysql.seq_1_to_15000",
        ));
    })
    .await;
    let log = live.donor.0.log();
    assert!(
        log.contains("files changed, another round") && log.contains("PAGE COPY round 2"),
        "{log}"
    );
}

/// Guards CLONE LOCAL of a live server: the same engine without a network, under the same load.
async fn a_local_clone(version: Version) {
    let live = start(version, &[]);
    let load = Load::start(&live.server, LoadOptions { ddl: true, xa: true, ..writers() });
    load.wait_for_commits(200);
    let before = load.moment();
    let mut client = recipient(&live.recipient).await;
    let name = begin(&mut client, &live.statement("clone", true)).await;
    let _clone = live.check_end("clone", &name, before, load, &[]).await;
    assert!(!live.donor.0.log().contains("snapshot opened"), "the donor was asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_server_is_cloned_locally() {
    a_local_clone(Version::V10_11).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_server_is_cloned_locally_in_11_8() {
    a_local_clone(Version::V11_8).await;
}

/// Guards the file and the position of the coordinates, by which servers are attached that know no
/// GTIDs: what was committed after the point is applied, once. With the position that is asked for
/// after the locks (`make soak SABOTAGE=late-coordinates`) rows are missing.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_is_attached_by_file_and_position() {
    let live = Live::start(Version::V10_11, &[], 8 << 20);
    let load = Load::start(&live.server, LoadOptions { ddl: true, xa: true, ..writers() });
    load.wait_for_commits(200);
    let mut client = recipient(&live.recipient).await;
    let clone = clone_and_wait(&mut client, &live.statement("clone", false)).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", live.donor.0.log());
    load.wait_for_commits(200);
    drop(load.stop());
    let point = clone.coordinates.expect("coordinates");
    let file = String::from_utf8(point.binlog_file.to_vec()).expect("a name");
    let copy = live.start_clone("clone");
    copy.replicate_from_file(&live.server, &file, point.binlog_position);
    copy.assert_replicates(&live.server);
    copy.stop();
}

/// Guards coordinates without a binary log: the LSN alone, in the clone resource and in the clone.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_a_binary_log_is_cloned_to_its_lsn() {
    let live = Live::start(Version::V10_11, &["--skip-log-bin"], 8 << 20);
    let load = Load::start(&live.server, writers());
    load.wait_for_commits(200);
    let before = load.moment();
    let mut client = recipient(&live.recipient).await;
    let clone = clone_and_wait(&mut client, &live.statement("clone", false)).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", live.donor.0.log());
    let ended = load.moment();
    drop(load.stop());
    let point = clone.coordinates.expect("coordinates");
    assert!(point.lsn > 0 && point.binlog_file.is_empty(), "{point:?}");
    assert!(point.gtid_executed.is_empty() && point.sources.is_empty(), "{point:?}");
    let info = std::fs::read_to_string(live.path("clone/marcot_clone_info.json")).expect("there");
    for text in [format!("\"lsn\": {}", point.lsn), "\"binlog_file\": \"\"".to_owned()] {
        assert!(info.contains(&text), "{info}");
    }
    let copy = live.start_clone("clone");
    let held = check_copy(&copy, WRITERS);
    for (held, (least, most)) in held.iter().zip(before.acknowledged.iter().zip(ended.acknowledged))
    {
        assert!((*least..=most + 1).contains(held), "{least}..={most} + 1: {held}");
    }
    assert!(copy.log().contains(&format!("End of log at LSN={}", point.lsn)), "{}", copy.log());
    copy.stop();
}

/// Guards log tables, which change until commits are blocked: they arrive as of the point. A statement
/// is logged before its transaction commits: the log has at least those of all that the clone holds, and
/// has fewer where it is not read again once commits are blocked. A marker of before the clone is there
/// once; what came after its end is not. The server marks those that it writes as crashed until it closes
/// them, as after any crash.
#[tokio::test(flavor = "multi_thread")]
async fn log_tables_arrive_as_of_the_point() {
    let arguments =
        ["--log-output=TABLE", "--general-log=ON", "--slow-query-log=ON", "--long-query-time=0"];
    let live = Live::start(Version::V10_11, &arguments, 8 << 20);
    let load = Load::start(&live.server, writers());
    load.wait_for_commits(100);
    drop(live.server.query("SELECT 'marker of before'"));
    let mut client = recipient(&live.recipient).await;
    let clone = clone_and_wait(&mut client, &live.statement("clone", false)).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", live.donor.0.log());
    drop(live.server.query("SELECT 'marker of after'"));
    load.wait_for_commits(50);
    drop(load.stop());
    // The clone's own server writes to these as well: they are read before it starts.
    let mut logged = 0;
    let rows = ["general_log", "slow_log"].map(|table| {
        let path = format!("clone/mysql/{table}.CSV");
        let bytes = std::fs::read(live.path(&path)).expect("the log table");
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("SELECT 'marker of before'").count(), 1, "{table}");
        assert_eq!(text.matches("marker of after").count(), 0, "{table}");
        assert!(text.ends_with('\n'), "{table} ends within a row");
        if table == "general_log" {
            logged = text.matches("INSERT INTO bank.ledger VALUES").count();
        }
        let own = std::fs::read(live.path(&format!("data/mysql/{table}.CSV"))).expect("there");
        assert!(own.starts_with(&bytes), "{table} is not what the donor's began with");
        text.lines().count()
    });
    let quiet = ["--general-log=OFF", "--slow-query-log=OFF"];
    let options = live.options.for_clone().with(&quiet);
    let copy = MariaDb::start_with(live.home.path(), &live.path("clone"), &options);
    let held: usize =
        copy.query("SELECT COUNT(*) FROM bank.ledger").trim().parse().expect("a number");
    assert!(held > 100 && logged >= held, "{logged} statements are logged, {held} rows are held");
    let repaired = copy.query("REPAIR TABLE mysql.general_log, mysql.slow_log");
    assert_eq!(repaired.matches("\tOK").count(), 2, "{repaired}");
    for (table, rows) in ["general_log", "slow_log"].iter().zip(rows) {
        let count = copy.query(&format!("SELECT COUNT(*) FROM mysql.{table}"));
        assert_eq!(count.trim(), rows.to_string(), "{table}");
    }
    copy.stop();
}
