//! What becomes of the server when a donor is struck while it is the consumer of its redo log, and
//! holds LOCK INSTANCE FOR BACKUP.

use std::time::{Duration, Instant};

use marcot_proto::recipient::v1::{Clone, CloneStatementRequest};
use marcot_tests::{
    database::Version,
    live::{Live, WRITERS},
    load::{Load, LoadOptions},
    recipient, wait_for,
};

/// A small log, so that a consumer that reads nothing would soon stop who writes.
const LOG: &str = "--innodb-redo-log-capacity=8M";

/// What a struck donor may cost a writer at the most: the silence after which the server drops it,
/// and what a loaded machine adds.
const STALL_MAX: Duration = Duration::from_secs(10);

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
