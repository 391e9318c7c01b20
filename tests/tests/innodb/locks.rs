//! A donor that is frozen or killed at the very moment at which the server has granted it a lock:
//! the server's writers go on within a bound.
//!
//! A proxy between donor and server strikes when the server has answered the statement, before the
//! donor has heard of it. So the lock is held for certain, however short a donor that lives holds it.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use marcot_proto::recipient::v1::{
    CloneOptions, CloneStatementRequest, State, recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{
    client::wait_for_end,
    killer::Blow,
    live::{Live, WRITERS},
    load::{Load, LoadOptions},
    mariadb::Version,
    recipient, wait_for,
};
use tonic::transport::Channel;

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

/// Guards R2 from the first statement on: whatever a stage of BACKUP STAGE holds, the server lets it
/// go when its holder has been silent for 20 s.
async fn a_donor_is_frozen_at(stage: &'static str) {
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    let outcome = strike(&mut live, stage, Blow::Freeze).await;
    assert!(outcome.ddl < DDL_BLOCKED_MAX, "DDL waited for {:?}", outcome.ddl);
    assert!(outcome.commits < Duration::from_secs(2), "commits waited: {:?}", outcome.commits);
    let reasons = ["DATABASE_LOST", "REDO_OVERRUN"];
    let reason = outcome.reason.as_deref();
    assert!(reason.is_none_or(|reason| reasons.contains(&reason)), "{reason:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_donor_frozen_as_it_begins_a_backup_stage_holds_nobody_up_for_long() {
    a_donor_is_frozen_at("BACKUP STAGE START").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_donor_frozen_while_tables_are_flushed_holds_nobody_up_for_long() {
    a_donor_is_frozen_at("BACKUP STAGE FLUSH").await;
}

/// A clone for which DDL is blocked, behind a proxy of the database.
async fn begin_with_ddl_blocked(live: &Live) -> (RecipientServiceClient<Channel>, String) {
    let mut client = recipient(&live.recipient).await;
    let options = Some(CloneOptions { block_ddl: true, ..Default::default() });
    let statement = live.statement("clone", false);
    let request = CloneStatementRequest { statement, options, ..Default::default() };
    let started = client.clone_statement(request).await.expect("the clone is accepted");
    (client, started.into_inner().clone.expect("a clone").name)
}

/// Guards the end of a connection that has asked for BLOCK_COMMIT: kept for another try, as one that
/// only blocks DDL is, it is lost and so is the clone.
#[tokio::test(flavor = "multi_thread")]
async fn connections_cut_while_commits_are_blocked_cost_one_try_of_the_cut() {
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(200);
    let before = load.moment();
    let proxy = Arc::new(live.proxy_database());
    let (struck, cuts) = (Arc::new(Mutex::new(None)), Arc::clone(&proxy));
    let when = Arc::clone(&struck);
    proxy.when_answered("BACKUP STAGE BLOCK_COMMIT", move || {
        cuts.cut();
        *when.lock().expect("nobody panics with it") = Some(Instant::now());
    });
    let (_client, name) = begin_with_ddl_blocked(&live).await;
    let at = wait_for("the cut", || *struck.lock().expect("nobody panics with it"));
    load.wait_for_commits(50);
    let commits = load.longest_silence(at, Instant::now());
    assert!(commits < KILLED_MAX, "commits waited for {commits:?}");
    let _clone = live.check_end("clone", &name, before, load, &[]).await;
    assert!(live.donor.0.log().contains("the cut failed, trying again"));
}

/// Guards R2 after a cut that has failed once commits were blocked: whatever the recipient does,
/// they go on, and so does DDL. With the connection kept for the clone, its keeper and the server's
/// 2 s of patience race.
#[tokio::test(flavor = "multi_thread")]
async fn a_cut_that_fails_while_commits_are_blocked_lets_them_go_on_at_once() {
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(200);
    let proxy = live.proxy_database_with(&["--spool-quota", "64MiB"]);
    let struck = Arc::new(Mutex::new(None));
    let (when, pid) = (Arc::clone(&struck), live.recipient.0.pid());
    let table = live.path("data/mysql/general_log.CSV");
    // The server does not write it: log_output is FILE.
    let grown = table.clone();
    proxy.when_answered("BACKUP STAGE BLOCK_COMMIT", move || {
        Blow::Freeze.strike(pid);
        let file = std::fs::File::options().write(true).open(&grown).expect("the log table");
        file.set_len(80 << 20).expect("a sparse file");
        *when.lock().expect("nobody panics with it") = Some(Instant::now());
    });
    let (mut client, name) = begin_with_ddl_blocked(&live).await;
    let at = wait_for("the cut", || *struck.lock().expect("nobody panics with it"));
    drop(live.server.query("SET lock_wait_timeout=50; CREATE TABLE ddl.later (id INT)"));
    let ddl = at.elapsed();
    load.wait_for_commits(200);
    let commits = load.longest_silence(at, Instant::now());
    live.recipient.0.thaw();
    let clone = wait_for_end(&mut client, &name).await;
    let failure = clone.error.expect("the log table does not fit");
    assert_eq!(failure.reason, "LOCKED_SET_TOO_LARGE", "{failure:?}");
    // Less than the server's own patience with a silent holder.
    assert!(commits < Duration::from_millis(1800), "commits waited for {commits:?}");
    assert!(ddl < KILLED_MAX, "DDL waited for {ddl:?}");
    let file = std::fs::File::options().write(true).open(&table).expect("the log table");
    file.set_len(0).expect("it was empty");
    drop(load.stop());
}

/// Guards the end of it all when the database goes under the locks: an error, and within a bound.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_killed_at_the_cut_is_a_typed_error() {
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    let mut load =
        Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(100);
    let proxy = live.proxy_database();
    let pid = live.server.pid();
    proxy.when_answered("BACKUP STAGE BLOCK_COMMIT", move || Blow::Kill.strike(pid));
    let mut client = recipient(&live.recipient).await;
    let request =
        CloneStatementRequest { statement: live.statement("clone", false), ..Default::default() };
    let started = client.clone_statement(request).await.expect("the clone is accepted");
    let name = started.into_inner().clone.expect("a clone").name;
    let clone = wait_for_end(&mut client, &name).await;
    let reason = clone.error.expect("a clone whose database is gone fails").reason;
    assert!(["DATABASE_LOST", "DATABASE_UNREACHABLE"].contains(&reason.as_str()), "{reason}");
    assert!(!live.path("clone").exists(), "a clone that failed left its directory");
    drop(load.end());
}

/// With the donor started again, all is as if nothing had been.
async fn clone_again(mut live: Live) {
    live.restart_donor();
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(100);
    live.clone_and_check("clone", load).await;
}
