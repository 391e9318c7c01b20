//! What goes wrong while a live server is cloned ends in a typed error, within a bound, and never
//! harms the server.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use marcot_proto::{
    common::v1::Failure,
    recipient::v1::{
        CancelCloneRequest, CloneInstanceRequest, CloneOptions, CloneStatementRequest, State,
        recipient_service_client::RecipientServiceClient,
    },
};
use marcot_tests::{
    Proxy,
    client::wait_for_end,
    live::{Live, WRITERS},
    load::{Load, LoadOptions},
    mariadb::Version,
    process, recipient, wait_for,
};
use tonic::transport::Channel;

const BYTES: u64 = 40 << 20;

fn busy(live: &Live) -> Load {
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(200);
    load
}

/// A clone that is under way, its recipient frozen.
struct Frozen {
    client: RecipientServiceClient<Channel>,
    name: String,
}

impl Frozen {
    async fn start(live: &Live, block_ddl: bool) -> Self {
        let mut client = recipient(&live.recipient).await;
        let request = CloneInstanceRequest {
            host: "127.0.0.1".to_owned(),
            port: live.donor.port().into(),
            user: "clone".to_owned(),
            data_directory: live.path("clone").display().to_string().into_bytes().into(),
            options: Some(CloneOptions { block_ddl, ..Default::default() }),
            ..Default::default()
        };
        let started = client.clone_instance(request).await.expect("the clone is accepted");
        let name = started.into_inner().clone.expect("a clone").name;
        wait_for("a snapshot", || live.donor.0.log().contains("snapshot opened").then_some(()));
        live.recipient.0.freeze();
        Self { client, name }
    }

    /// Lets the recipient go on, and returns the error that the clone must end with.
    async fn fail(mut self, live: &Live) -> Failure {
        live.recipient.0.thaw();
        let clone = wait_for_end(&mut self.client, &self.name).await;
        assert_eq!(clone.state(), State::Failed, "{clone:?}");
        assert!(!live.path("clone").exists(), "a clone that failed left its directory");
        clone.error.expect("a failed clone says why")
    }
}

/// Longest that a statement takes which needs what the backup locks block.
fn time_of(live: &Live, sql: &str) -> Duration {
    let begun = Instant::now();
    drop(live.server.query(sql));
    begun.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_killed_while_it_is_cloned_is_a_typed_error() {
    let mut live = Live::start(Version::V10_11, &[], BYTES);
    let mut load = busy(&live);
    let frozen = Frozen::start(&live, false).await;
    live.server.kill();
    drop(load.end());
    let failure = frozen.fail(&live).await;
    assert!(
        ["DATABASE_LOST", "DATABASE_UNREACHABLE"].contains(&failure.reason.as_str()),
        "{failure:?}"
    );
}

/// Guards the generation of the redo log: a server that came back has recovered, its log goes on,
/// and the clone is right or says why not; it is never wrong.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_restarted_while_it_is_cloned_never_gives_a_wrong_clone() {
    let mut live = Live::start(Version::V10_11, &[], BYTES);
    let mut load = busy(&live);
    let frozen = Frozen::start(&live, false).await;
    live.server.kill();
    drop(load.end());
    let data = live.path("data");
    let again = marcot_tests::mariadb::MariaDb::start_with(live.home.path(), &data, &live.options);
    let failure = frozen.fail(&live).await;
    // Its socket has another name now: the donor does not find the server again.
    assert!(
        ["DATABASE_LOST", "DATABASE_UNREACHABLE"].contains(&failure.reason.as_str()),
        "{failure:?}"
    );
    assert!(again.errors().is_empty());
}

/// Guards R2: the server drops the holder of its locks when that is frozen. Without wait_timeout on
/// the holder's connection, DDL waits until the donor goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_donor_frozen_under_the_lock_holds_the_server_up_for_a_bounded_time() {
    let live = Live::start(Version::V10_11, &[], 1 << 20);
    let load = busy(&live);
    let frozen = Frozen::start(&live, true).await;
    let blocked = live.server.try_query("SET lock_wait_timeout=1; CREATE TABLE ddl.now (id INT)");
    assert!(blocked.is_err(), "DDL is blocked for the whole clone");
    live.donor.0.freeze();
    let took = time_of(&live, "SET lock_wait_timeout=50; CREATE TABLE ddl.later (id INT)");
    assert!(took < Duration::from_secs(40), "DDL waited for {took:?}");
    load.wait_for_commits(200);
    live.donor.0.thaw();
    let failure = frozen.fail(&live).await;
    assert_eq!(failure.reason, "DATABASE_LOST", "{failure:?}");
    drop(load.stop());
}

/// A killed donor's locks go with its connection; so do those of a connection that an operator
/// kills.
#[tokio::test(flavor = "multi_thread")]
async fn a_donor_killed_under_the_lock_leaves_no_lock() {
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    let load = busy(&live);
    let frozen = Frozen::start(&live, true).await;
    live.donor.0.kill();
    let took = time_of(&live, "SET lock_wait_timeout=50; CREATE TABLE ddl.later (id INT)");
    assert!(took < Duration::from_secs(5), "DDL waited for {took:?}");
    let failure = frozen.fail(&live).await;
    assert!(failure.reason.contains("UNREACHABLE"), "{failure:?}");
    drop(load.stop());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_connection_that_an_operator_kills_fails_the_clone() {
    let live = Live::start(Version::V10_11, &[], 1 << 20);
    let load = busy(&live);
    let frozen = Frozen::start(&live, true).await;
    let kill = "SELECT GROUP_CONCAT('KILL ', id SEPARATOR ';') FROM information_schema.processlist \
                WHERE user = 'marcot'";
    let kill = live.server.query(kill);
    for statement in kill.trim().split(';') {
        drop(live.server.try_query(statement));
    }
    let failure = frozen.fail(&live).await;
    assert_eq!(failure.reason, "DATABASE_LOST", "{failure:?}");
    drop(load.stop());
}

/// Guards clone_block_ddl: DDL waits while the clone runs, and goes on when it has ended.
#[tokio::test(flavor = "multi_thread")]
async fn ddl_that_is_blocked_for_the_whole_clone_goes_on_after_it() {
    let live = Live::start(Version::V10_11, &[], BYTES);
    let load = busy(&live);
    let mut frozen = Frozen::start(&live, true).await;
    let blocked = live.server.try_query("SET lock_wait_timeout=1; CREATE TABLE ddl.now (id INT)");
    assert!(blocked.is_err(), "DDL is blocked for the whole clone");
    let before = load.commits();
    load.wait_for_commits(200);
    assert!(load.commits() > before, "transactions go on");
    live.recipient.0.thaw();
    let clone = wait_for_end(&mut frozen.client, &frozen.name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    let took = time_of(&live, "SET lock_wait_timeout=50; CREATE TABLE ddl.later (id INT)");
    assert!(took < Duration::from_secs(5), "DDL waited for {took:?}");
    drop(load.stop());
}

/// Guards the bound on waiting for locks, and the back-off: who waits for them stops who comes
/// after, so they are let go between tries.
#[tokio::test(flavor = "multi_thread")]
async fn locks_that_cannot_be_had_end_in_an_error_that_names_them() {
    let live = Live::start(Version::V10_11, &[], 1 << 20);
    let load = busy(&live);
    let mut holder = live.server.connect();
    mysql::prelude::Queryable::query_drop(&mut holder, "LOCK TABLES mix.csv WRITE").expect("ok");
    let mut client = recipient(&live.recipient).await;
    let request = CloneInstanceRequest {
        host: "127.0.0.1".to_owned(),
        port: live.donor.port().into(),
        user: "clone".to_owned(),
        data_directory: live.path("clone").display().to_string().into_bytes().into(),
        options: Some(CloneOptions {
            ddl_timeout: Some(prost_types::Duration { seconds: 7, nanos: 0 }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let started = client.clone_instance(request).await.expect("the clone is accepted");
    let name = started.into_inner().clone.expect("a clone").name;
    let clone = wait_for_end(&mut client, &name).await;
    let failure = clone.error.expect("the locks cannot be had");
    assert_eq!(failure.reason, "BACKUP_LOCK_TIMEOUT", "{failure:?}");
    drop(holder);
    live.clone_and_check("clone", load).await;
}

/// Guards the quota of the spool: one clone fails, the server and the next clone do not.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_spool_fails_the_clone_alone() {
    let mut live = Live::start(Version::V10_11, &["--innodb-log-file-size=8M"], BYTES);
    live.donor = marcot_tests::live::donor_with(
        live.home.path(),
        &live.path("data"),
        &live.server,
        &["--spool-quota", "4MiB"],
    );
    let load = busy(&live);
    let frozen = Frozen::start(&live, false).await;
    let begun = live.lsn();
    wait_for("redo beyond the quota", || (live.lsn() > begun + (16 << 20)).then_some(()));
    let failure = frozen.fail(&live).await;
    let reasons = ["REDO_SPOOL_FULL", "LOCKED_SET_TOO_LARGE"];
    assert!(reasons.contains(&failure.reason.as_str()), "{failure:?}");
    drop(load.stop());
}

/// A cancel is felt while files are copied and while the locks are awaited; the snapshot goes.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_ends_a_live_clone_and_frees_its_snapshot() {
    let live = Live::start(Version::V10_11, &[], BYTES);
    let load = busy(&live);
    let mut frozen = Frozen::start(&live, false).await;
    live.recipient.0.thaw();
    let cancel = CancelCloneRequest { name: frozen.name.clone() };
    frozen.client.cancel_clone(cancel).await.expect("a running clone can be cancelled");
    let clone = wait_for_end(&mut frozen.client, &frozen.name).await;
    assert_eq!(clone.state(), State::Cancelled, "{clone:?}");
    assert!(!live.path("clone").exists());
    wait_for("the snapshot to go", || live.donor.0.log().contains("snapshot closed").then_some(()));
    live.clone_and_check("clone", load).await;
}

/// Guards resume of a live clone: connections are cut while files, redo and what was read under the
/// locks are copied, and while the point is made. Whatever a cut call has written stays, T is
/// answered again, and the copy is right.
#[tokio::test(flavor = "multi_thread")]
async fn a_live_clone_whose_connections_are_cut_over_and_over_is_right() {
    let live = Live::start(Version::V10_11, &["--innodb-log-file-size=16M"], BYTES);
    let proxy = Proxy::start(live.donor.0.address);
    proxy.limit(Some(40 << 20));
    let load = Load::start(
        &live.server,
        LoadOptions { ddl: true, writers: WRITERS, ..Default::default() },
    );
    load.wait_for_commits(200);
    let before = load.moment();
    let mut client = recipient(&live.recipient).await;
    let statement = process::statement(proxy.port(), &live.path("clone"), "");
    let request = CloneStatementRequest { statement, ..Default::default() };
    let started = client.clone_statement(request).await.expect("the clone is accepted");
    let name = started.into_inner().clone.expect("a clone").name;
    wait_for("a snapshot", || live.donor.0.log().contains("snapshot opened").then_some(()));
    let is_over = Arc::new(AtomicBool::new(false));
    let cutter = tokio::task::spawn_blocking({
        let is_over = Arc::clone(&is_over);
        move || {
            let mut cuts = 0_u64;
            // Each pause is longer than the last, so that the cut of the server can be made in one of
            // them, however slow the machine is.
            while !is_over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(300 + 100 * cuts));
                proxy.cut();
                cuts += 1;
            }
            cuts
        }
    });
    let clone = wait_for_end(&mut client, &name).await;
    is_over.store(true, Ordering::Relaxed);
    let cuts = cutter.await.expect("no panic");
    assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", live.donor.0.log());
    assert!(cuts >= 3 && clone.retries >= 3, "{cuts} cuts, {} retries", clone.retries);
    let ended = load.moment();
    load.wait_for_commits(50);
    let report = load.stop();
    live.check("clone", &clone, &before, &ended, &report);
}
