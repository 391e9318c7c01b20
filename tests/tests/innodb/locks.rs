//! A donor that is frozen or killed at the very moment at which the server has granted it a lock:
//! the server's writers go on within a bound.
//!
//! A proxy between donor and server strikes when the server has answered the statement, before the
//! donor has heard of it. So the lock is held for certain, however short a donor that lives holds it.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use marcot_proto::recipient::v1::{CloneStatementRequest, State};
use marcot_tests::{
    client::wait_for_end,
    killer::Blow,
    live::{Live, WRITERS},
    load::{Load, LoadOptions},
    mariadb::Version,
    recipient, wait_for,
};

/// Longest that writers may wait when the holder of BLOCK_COMMIT is frozen: the server drops it
/// after 2 s of silence, and looks at that timeout late when all cores are busy.
const COMMITS_BLOCKED_MAX: Duration = Duration::from_secs(6);

/// Longest that DDL may wait when the holder of BLOCK_DDL is frozen: 20 s, and as above.
const DDL_BLOCKED_MAX: Duration = Duration::from_secs(30);

/// Longest for a holder that was killed: its sockets close at once.
const KILLED_MAX: Duration = Duration::from_secs(3);

/// How long writers and DDL waited, and what became of the clone.
struct Outcome {
    commits: Duration,
    ddl: Duration,
    reason: Option<String>,
}

/// Clones; the donor is struck as soon as the server has granted `lock`.
async fn strike(live: &mut Live, lock: &'static str, blow: Blow) -> Outcome {
    let proxy = live.proxy_database();
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(200);
    let before = load.moment();
    let struck = Arc::new(Mutex::new(None));
    let pid = live.donor.0.pid();
    proxy.when_answered(lock, {
        let struck = Arc::clone(&struck);
        move || {
            blow.strike(pid);
            *struck.lock().expect("nobody panics with it") = Some(Instant::now());
        }
    });
    let mut client = recipient(&live.recipient).await;
    let request =
        CloneStatementRequest { statement: live.statement("clone", false), ..Default::default() };
    let started = client.clone_statement(request).await.expect("the clone is accepted");
    let name = started.into_inner().clone.expect("a clone").name;
    let at = wait_for("the blow", || *struck.lock().expect("nobody panics with it"));
    let sql = "SET lock_wait_timeout=50; CREATE TABLE ddl.later (id INT)";
    drop(live.server.query(sql));
    let ddl = at.elapsed();
    load.wait_for_commits(50);
    let commits = load.longest_silence(at, Instant::now());
    if blow == Blow::Freeze {
        live.donor.0.thaw();
    }
    let clone = wait_for_end(&mut client, &name).await;
    let ended = load.moment();
    if clone.state() == State::Completed {
        // A donor that goes on may make another cut: that clone is right.
        load.wait_for_commits(50);
        let report = load.stop();
        live.check("clone", &clone, &before, &ended, &report);
    } else {
        assert!(!live.path("clone").exists(), "a clone that failed left its directory");
        drop(load.stop());
    }
    Outcome { commits, ddl, reason: clone.error.map(|failure| failure.reason) }
}

/// Guards R2, the timeout of 2 s that the holder gives itself before it asks for BLOCK_COMMIT:
/// without it commits wait for 20 s. That they waited at all shows that the lock was held.
#[tokio::test(flavor = "multi_thread")]
async fn a_donor_frozen_while_commits_are_blocked_blocks_them_for_seconds() {
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    let outcome = strike(&mut live, "BACKUP STAGE BLOCK_COMMIT", Blow::Freeze).await;
    assert!(outcome.commits > Duration::from_secs(1), "no lock was held: {:?}", outcome.commits);
    assert!(outcome.commits < COMMITS_BLOCKED_MAX, "commits waited for {:?}", outcome.commits);
    assert!(outcome.reason.is_none_or(|reason| reason == "DATABASE_LOST"));
}

/// Guards R2, the timeout of 20 s of the holder's connection: without it DDL waits for hours.
#[tokio::test(flavor = "multi_thread")]
async fn a_donor_frozen_while_ddl_is_blocked_blocks_it_for_seconds_and_commits_not_at_all() {
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    let outcome = strike(&mut live, "BACKUP STAGE BLOCK_DDL", Blow::Freeze).await;
    assert!(outcome.ddl > Duration::from_secs(5), "no lock was held: {:?}", outcome.ddl);
    assert!(outcome.ddl < DDL_BLOCKED_MAX, "DDL waited for {:?}", outcome.ddl);
    assert!(outcome.commits < Duration::from_secs(2), "commits waited: {:?}", outcome.commits);
    // A small log may have come round while nobody followed it.
    let reasons = ["DATABASE_LOST", "REDO_OVERRUN"];
    let reason = outcome.reason.as_deref();
    assert!(reason.is_none_or(|reason| reasons.contains(&reason)), "{reason:?}");
}

/// Guards that nothing but the holder's own connection holds a lock.
#[tokio::test(flavor = "multi_thread")]
async fn a_donor_killed_while_commits_are_blocked_leaves_no_lock() {
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    let outcome = strike(&mut live, "BACKUP STAGE BLOCK_COMMIT", Blow::Kill).await;
    assert!(outcome.commits < KILLED_MAX, "commits waited for {:?}", outcome.commits);
    assert!(outcome.ddl < KILLED_MAX, "DDL waited for {:?}", outcome.ddl);
    let reason = outcome.reason.expect("a clone whose donor is gone fails");
    assert!(reason.contains("UNREACHABLE"), "{reason}");
    clone_again(live).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_donor_killed_while_ddl_is_blocked_leaves_no_lock() {
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    let outcome = strike(&mut live, "BACKUP STAGE BLOCK_DDL", Blow::Kill).await;
    assert!(outcome.commits < KILLED_MAX, "commits waited for {:?}", outcome.commits);
    assert!(outcome.ddl < KILLED_MAX, "DDL waited for {:?}", outcome.ddl);
    let reason = outcome.reason.expect("a clone whose donor is gone fails");
    assert!(reason.contains("UNREACHABLE"), "{reason}");
    clone_again(live).await;
}

/// With the donor started again, all is as if nothing had been.
async fn clone_again(mut live: Live) {
    live.restart_donor();
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(100);
    live.clone_and_check("clone", load).await;
}
