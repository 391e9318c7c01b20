//! A donor that is frozen or killed at the very moment at which the server has granted it a lock:
//! the server's writers go on within a bound.
//!
//! A proxy between donor and server strikes when the server has answered the statement, before the
//! donor has heard of it. So the lock is held for certain, however short a donor that lives holds it.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use marcot_common::{failure::Failure, login::CloneKey};
use marcot_proto::{
    donor::v1::{
        ListSnapshotsRequest, OpenSnapshotRequest, RenewLeaseRequest,
        donor_service_client::DonorServiceClient,
    },
    recipient::v1::{
        CloneOptions, CloneStatementRequest, State,
        recipient_service_client::RecipientServiceClient,
    },
};
use marcot_tests::{
    client::{begin, wait_for_end},
    killer::Blow,
    live::{Live, WRITERS, donor_with},
    load::{Load, LoadOptions},
    mariadb::Version,
    recipient, wait_for,
};
use tonic::transport::Channel;

/// Longest that writers may wait when the holder of BLOCK_COMMIT is frozen: the server drops it
/// after 2 s of silence, and looks at that timeout late when all cores are busy.
const COMMITS_BLOCKED_MAX: Duration = Duration::from_secs(15);

/// Longest that DDL may wait when the holder of BLOCK_DDL is frozen: 20 s, and as above.
const DDL_BLOCKED_MAX: Duration = Duration::from_secs(45);

/// Longest for a holder that was killed: its sockets close at once.
const KILLED_MAX: Duration = Duration::from_secs(10);

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
    let name = begin(&mut client, &live.statement("clone", false)).await;
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
    assert!(outcome.commits < outcome.ddl / 2, "commits waited: {:?}", outcome.commits);
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

/// Guards R2 before BLOCK_DDL: the first stages hold neither commits nor DDL, so that a donor that is
/// frozen in one holds nobody up. (The bound on its silence is not what shows here: it passes without.)
async fn a_donor_is_frozen_at(stage: &'static str) {
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    let outcome = strike(&mut live, stage, Blow::Freeze).await;
    assert!(outcome.ddl < DDL_BLOCKED_MAX, "DDL waited for {:?}", outcome.ddl);
    assert!(outcome.commits < Duration::from_secs(10), "commits waited: {:?}", outcome.commits);
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
    let most = Duration::from_millis(1800) + load.longest_stall(at, Instant::now());
    assert!(commits < most, "commits waited for {commits:?}");
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
    let name = begin(&mut client, &live.statement("clone", false)).await;
    let clone = wait_for_end(&mut client, &name).await;
    let reason = clone.error.expect("a clone whose database is gone fails").reason;
    assert!(["DATABASE_LOST", "DATABASE_UNREACHABLE"].contains(&reason.as_str()), "{reason}");
    assert!(!live.path("clone").exists(), "a clone that failed left its directory");
    drop(load.end());
}

/// Guards the server's DDL against a recipient that is paused, or only renews the lease of a snapshot for
/// which DDL waits. Without the shorter time for it (`LeastTaken::window`) DDL waits until its own timeout,
/// a day by the default of the other one; a snapshot for which nothing waits is held on.
#[tokio::test(flavor = "multi_thread")]
async fn ddl_waits_no_longer_than_for_a_snapshot_of_which_something_is_read() {
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    let options = ["--ddl-block-idle-max", "8s"];
    live.donor = donor_with(live.home.path(), &live.path("data"), &live.server, &options);
    let url = format!("http://{}", live.donor.0.address);
    let mut client = DonorServiceClient::connect(url).await.expect("it listens");
    let mut opened = Vec::new();
    let begun = Instant::now();
    for block_ddl in [false, true] {
        let key = CloneKey::generate().expect("random bytes");
        let public_key = key.public_key().to_vec().into();
        let request = OpenSnapshotRequest { public_key, block_ddl, ..Default::default() };
        opened.push(client.open_snapshot(request).await.expect("opened").into_inner().snapshot);
    }
    let list = client.list_snapshots(ListSnapshotsRequest::default()).await.expect("listed");
    let blocks: Vec<_> = list.into_inner().snapshots.iter().map(|held| held.blocks_ddl).collect();
    assert_eq!(blocks, [false, true]);
    let renewals = tokio::spawn(async move {
        let mut ended = None;
        while ended.is_none() {
            for snapshot in &opened {
                let renew = RenewLeaseRequest { snapshot: snapshot.clone(), ..Default::default() };
                if let Err(status) = client.renew_lease(renew).await {
                    ended = Some((snapshot == &opened[1], Failure::from_status(&status)));
                }
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        ended.expect("the loop has ended")
    });
    let sql = "SET lock_wait_timeout=60; CREATE TABLE ddl.later (id INT)";
    tokio::task::block_in_place(|| drop(live.server.query(sql)));
    let waited = begun.elapsed();
    let (of_ddl, ended) = renewals.await.expect("no panic");
    assert!(of_ddl, "{ended}");
    assert!(waited > Duration::from_secs(5), "nothing was blocked: {waited:?}");
    assert!(waited < DDL_BLOCKED_MAX, "DDL waited for {waited:?}");
    assert_eq!(ended.reason, "UNKNOWN_SNAPSHOT");
    let idle = ["nothing was read of it for --ddl-block-idle-max: ", " s, at most 8 s are allowed"];
    for told in [&idle[..], &["DDL waits"]].concat() {
        assert!(ended.message.contains(told), "{ended}");
    }
}

/// With the donor started again, all is as if nothing had been.
async fn clone_again(mut live: Live) {
    live.restart_donor();
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(100);
    live.clone_and_check("clone", load).await;
}
