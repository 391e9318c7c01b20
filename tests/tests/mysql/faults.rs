//! What becomes of the server when a donor is struck while it is the consumer of its redo log, and
//! holds LOCK INSTANCE FOR BACKUP; and of a clone whose server is struck.

use std::time::{Duration, Instant};

use ::mysql::prelude::Queryable as _;
use marcot_proto::recipient::v1::{Clone, CloneStatementRequest, State};
use marcot_tests::{
    client::wait_for_end,
    database::Version,
    live::{Live, WRITERS},
    load::{Load, LoadOptions},
    recipient, wait_for,
};

/// A small log, so that a consumer that reads nothing would soon stop who writes.
const LOG: &str = "--innodb-redo-log-capacity=8M";

/// What a struck donor may cost a writer at the most: the silence after which the server drops it,
/// and what a loaded machine adds.
const STALL_MAX: Duration = Duration::from_secs(30);

async fn begin_clone(live: &Live) -> Clone {
    let mut client = recipient(&live.recipient).await;
    let request =
        CloneStatementRequest { statement: live.statement("clone", false), ..Default::default() };
    let started = client.clone_statement(request).await.expect("the clone is accepted");
    wait_for("a snapshot", || live.donor.0.log().contains("snapshot opened").then_some(()));
    started.into_inner().clone.expect("a clone")
}

/// Waits until the log was turned over once more by writers.
fn turn_over(live: &Live) {
    let begun = live.lsn();
    wait_for("a turn of the log", || (live.lsn() > begun + (16 << 20)).then_some(()));
}

/// Guards that the registration ends with the connection: the server drops it, whatever has become
/// of the donor.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_donor_stalls_writers_for_seconds_at_most() {
    let live = Live::start(Version::MySql9_7, &[LOG], 8 << 20);
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(200);
    let _clone = begin_clone(&live).await;
    live.recipient.0.freeze();
    live.donor.0.freeze();
    let begun = Instant::now();
    turn_over(&live);
    turn_over(&live);
    let stall = load.longest_silence(begun, Instant::now());
    eprintln!("frozen donor: longest stall of all writers {stall:.1?}");
    assert!(stall < STALL_MAX, "{stall:?}");
    // DDL goes on too, once the server has dropped the holder of its lock.
    wait_for("the lock to go", || {
        live.server.try_query("SET lock_wait_timeout=1; CREATE TABLE ddl.free (id INT)").ok()
    });
    live.donor.0.thaw();
    live.recipient.0.thaw();
    drop(load.stop());
}

/// As above, for a donor that is killed: its connections end at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_donor_leaves_neither_consumer_nor_lock() {
    let mut live = Live::start(Version::MySql9_7, &[LOG], 8 << 20);
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(200);
    let _clone = begin_clone(&live).await;
    live.recipient.0.freeze();
    let begun = Instant::now();
    live.donor.0.kill();
    turn_over(&live);
    let stall = load.longest_silence(begun, Instant::now());
    eprintln!("killed donor: longest stall of all writers {stall:.1?}");
    assert!(stall < STALL_MAX, "{stall:?}");
    drop(live.server.query("SET lock_wait_timeout=5; CREATE TABLE ddl.free (id INT)"));
    live.recipient.0.thaw();
    live.restart_donor();
    drop(load.stop());
}

/// Guards R6 on MySQL: DDL is blocked by a connection, and its DDL writes no redo, so that a server that
/// was started again costs another snapshot, which compares what is staged. That is told at the next
/// file. Without the look at the lock all is copied first, and found at the cut; with the error of a
/// MariaDB's block the clone has failed then.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_started_again_costs_another_snapshot_at_once() {
    const BYTES: u64 = 40 << 20;
    let mut live = Live::start(Version::MySql9_7, &[], BYTES);
    let busy = |live: &Live| {
        let options = LoadOptions { writers: WRITERS, ..Default::default() };
        let load = Load::start(&live.server, options);
        load.wait_for_commits(200);
        load
    };
    let mut load = busy(&live);
    let before = load.moment();
    let (_client, name) = live.begin_frozen(live.donor.port()).await;
    drop(load.end());
    live.server.kill();
    live.server.start_again(live.home.path(), &live.options);
    let load = busy(&live);
    let lost = "the lock that blocks DDL was lost";
    wait_for("the donor to notice", || live.donor.0.log().contains(lost).then_some(()));
    live.recipient.0.thaw();
    live.check_end("clone", &name, before, load, &[]).await;
    let log = live.donor.0.log();
    assert_eq!(log.matches("snapshot opened").count(), 2, "{log}");
    let closed = log.lines().find(|line| line.contains("snapshot closed")).expect("the first one");
    let sent = closed.split("sent_bytes=").nth(1).expect("what was sent of it");
    let sent: u64 = sent.split_whitespace().next().and_then(|n| n.parse().ok()).expect("a number");
    assert!(sent < BYTES, "the first snapshot was read on: {closed}");
}

/// Guards the room in the log of a server whose consumer was another backup: its place is taken once it
/// is free. Without another try the log is followed without for all of a clone.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_another_backup_has_kept_out_is_registered_once_that_has_gone() {
    let mut live = Live::start(Version::MySql9_7, &[], 8 << 20);
    let register = "SELECT innodb_redo_log_consumer_register()";
    let mut other = live.server.connect();
    let taken: Option<u8> = other.query_first(register).expect("the function is there");
    assert_eq!(taken, Some(0));
    let (mut client, name) = live.begin_frozen(live.donor.port()).await;
    let log = |text: &str| live.donor.0.log().contains(text).then_some(());
    wait_for("the donor to say so", || log("has another consumer; it is followed without"));
    drop(other);
    wait_for("another try", || log("the redo log has this donor as its consumer now"));
    assert_eq!(live.server.query(register).trim(), "1", "its place is taken");
    live.recipient.0.thaw();
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", live.donor.0.log());
}
