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
    Proxy, Recipient,
    client::{slowly, wait_for_end},
    clone_and_wait,
    killer::Blow,
    live::{Live, WRITERS, donor_with},
    load::{Load, LoadOptions},
    mariadb::Version,
    process, recipient,
    volume::Mounted,
    wait_for,
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
            options: Some(CloneOptions { block_ddl, ..slowly() }),
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

/// Guards that a lost database ends a clone, and soon: nothing waits for an answer without a bound.
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
    let text = "clone_donor_timeout_after_network_failure";
    assert!(failure.message.contains(text), "{failure:?}");
}

/// Guards R2: the server drops the holder of its locks when that is frozen. Without wait_timeout on
/// the holder's connection, DDL waits until the donor goes on.
async fn a_donor_frozen_under_the_lock(version: Version) {
    let live = Live::start(version, &[], 1 << 20);
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
    assert_eq!(failure.reason, "DDL_BLOCK_LOST", "{failure:?}");
    drop(load.stop());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_donor_frozen_under_the_lock_holds_the_server_up_for_a_bounded_time() {
    a_donor_frozen_under_the_lock(Version::V10_11).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_donor_frozen_under_the_lock_holds_the_server_up_for_a_bounded_time_in_11_8() {
    a_donor_frozen_under_the_lock(Version::V11_8).await;
}

/// Guards that the locks are their connection's: a killed donor's go with it.
async fn a_donor_killed_under_the_lock(version: Version) {
    let mut live = Live::start(version, &[], 1 << 20);
    let load = busy(&live);
    let frozen = Frozen::start(&live, true).await;
    live.donor.0.kill();
    let took = time_of(&live, "SET lock_wait_timeout=50; CREATE TABLE ddl.later (id INT)");
    assert!(took < Duration::from_secs(15), "DDL waited for {took:?}");
    let failure = frozen.fail(&live).await;
    let text = "clone_donor_timeout_after_network_failure";
    assert!(failure.message.contains(text), "{failure:?}");
    drop(load.stop());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_donor_killed_under_the_lock_leaves_no_lock() {
    a_donor_killed_under_the_lock(Version::V10_11).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_donor_killed_under_the_lock_leaves_no_lock_in_11_8() {
    a_donor_killed_under_the_lock(Version::V11_8).await;
}

/// Guards BACKUP STAGE END on the holder's own connection: one that was lost has no point.
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
    assert_eq!(failure.reason, "DDL_BLOCK_LOST", "{failure:?}");
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
    assert!(took < Duration::from_secs(15), "DDL waited for {took:?}");
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

/// Guards R5: a clone that needs more redo than the quota of the spool costs another one nothing, and the
/// first one's gap is closed by pages. That the quota is kept (`keep_quota`), and that nobody reads what
/// was freed (`dropped_to`), unit tests of the follower show: this passes without either.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_over_its_quota_costs_another_one_nothing() {
    let mut live = Live::start(Version::V10_11, &["--innodb-log-file-size=8M"], BYTES);
    let quota = ["--spool-quota", "24MiB"];
    live.donor = donor_with(live.home.path(), &live.path("data"), &live.server, &quota);
    let other_home = marcot_tests::new_directory();
    let other = Recipient::start(other_home.path(), &["--allow-directory", "/"]);
    // Few rows: what outgrows the quota is written while the first recipient is frozen.
    let options = LoadOptions { writers: WRITERS, rate: 100, ..Default::default() };
    let load = Load::start(&live.server, options);
    load.wait_for_commits(100);
    let before = load.moment();
    let mut frozen = Frozen::start(&live, false).await;
    let begun = live.lsn();
    wait_for("redo beyond the quota", || {
        drop(live.server.query("UPDATE mix.bulk SET v = REVERSE(v) WHERE id % 4 = 0"));
        (live.lsn() > begun + (32 << 20)).then_some(())
    });
    let mut client = recipient(&other).await;
    let second = clone_and_wait(&mut client, &live.statement("second", false)).await;
    assert_eq!(second.state(), State::Completed, "{second:?}\n{}", live.donor.0.log());
    let ended = load.moment();
    live.recipient.0.thaw();
    let first = wait_for_end(&mut frozen.client, &frozen.name).await;
    assert_eq!(first.state(), State::Completed, "{first:?}\n{}", live.donor.0.log());
    assert!(live.donor.0.log().contains("PAGE COPY round 1"), "{}", live.donor.0.log());
    let last = load.moment();
    load.wait_for_commits(50);
    let report = load.stop();
    live.check("second", &second, &before, &ended, &report);
    live.check("clone", &first, &before, &last, &report);
}

/// Guards the follower's write: redo that it cannot keep is lost, never passed over. The clone says
/// why; the server and the next clone feel nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_spool_on_a_full_disk_fails_the_clone_alone() {
    let mut live = Live::start(Version::V10_11, &["--innodb-log-file-size=8M"], 8 << 20);
    let volume = Mounted::image(&live.path("spool"), "24M", &["mkfs.ext4", "-q", "-F"]);
    let spool = volume.mount_point.display().to_string();
    let options = ["--spool-directory", &spool];
    live.donor = donor_with(live.home.path(), &live.path("data"), &live.server, &options);
    let load = busy(&live);
    let frozen = Frozen::start(&live, false).await;
    let begun = live.lsn();
    wait_for("redo beyond the disk", || {
        drop(live.server.query("UPDATE mix.bulk SET v = REVERSE(v)"));
        (live.lsn() > begun + (32 << 20)).then_some(())
    });
    wait_for("the full disk", || {
        live.donor.0.log().contains("the redo log was lost").then_some(())
    });
    // Others have what is left of it.
    let mut rest = std::fs::File::create(volume.mount_point.join("rest")).expect("an entry");
    let filled = std::io::copy(&mut std::io::repeat(1), &mut rest);
    assert!(filled.is_err(), "it is full");
    drop(rest);
    let failure = frozen.fail(&live).await;
    assert_eq!(failure.reason, "DISK_FULL", "{failure:?}");
    std::fs::remove_file(volume.mount_point.join("rest")).expect("it is there");
    drop(load.stop());
    let options = LoadOptions { writers: WRITERS, rate: 100, ..Default::default() };
    let load = Load::start(&live.server, options);
    load.wait_for_commits(50);
    live.clone_and_check("clone", load).await;
    live.donor.0.kill();
    drop(volume);
}

/// Guards R6, the bound on rounds of PAGE COPY: a clone that is always slower than the server's
/// writers ends in an error that says so.
#[tokio::test(flavor = "multi_thread")]
async fn redo_that_outgrows_every_round_is_a_typed_error() {
    let mut live = Live::start(Version::V10_11, &["--innodb-log-file-size=8M"], BYTES);
    let quota = ["--spool-quota", "12MiB"];
    live.donor = donor_with(live.home.path(), &live.path("data"), &live.server, &quota);
    let load = busy(&live);
    let mut frozen = Frozen::start(&live, false).await;
    for round in 1..=4 {
        let begun = live.lsn();
        wait_for("redo beyond the bound", || {
            drop(live.server.query("UPDATE mix.bulk SET v = REVERSE(v) WHERE id % 16 = 0"));
            (live.lsn() > begun + (8 << 20)).then_some(())
        });
        let line = format!("PAGE COPY round {round}");
        let pid = live.recipient.0.pid();
        let killer = live.donor.0.strike_at_line(&line, pid, Blow::Freeze);
        live.recipient.0.thaw();
        let _at = tokio::task::block_in_place(|| killer.struck());
    }
    let begun = live.lsn();
    wait_for("redo beyond the bound", || (live.lsn() > begun + (8 << 20)).then_some(()));
    live.recipient.0.thaw();
    let clone = wait_for_end(&mut frozen.client, &frozen.name).await;
    let failure = clone.error.expect("a failed clone says why");
    let reasons = ["REDO_NOT_CONVERGING", "REDO_SPOOL_FULL", "REDO_OVERRUN"];
    assert!(reasons.contains(&failure.reason.as_str()), "{failure:?}");
    drop(load.stop());
}

/// Kills the database when the donor logs a line; the clone fails within a bound and says why.
async fn a_database_is_killed_at(line: &str) {
    let mut live = Live::start(Version::V10_11, &["--innodb-log-file-size=8M"], BYTES);
    let quota = ["--spool-quota", "24MiB"];
    live.donor = donor_with(live.home.path(), &live.path("data"), &live.server, &quota);
    let mut load = busy(&live);
    let frozen = Frozen::start(&live, false).await;
    let begun = live.lsn();
    wait_for("redo beyond the bound", || {
        drop(live.server.query("UPDATE mix.bulk SET v = REVERSE(v) WHERE id % 4 = 0"));
        (live.lsn() > begun + (16 << 20)).then_some(())
    });
    let killer = live.donor.0.strike_at_line(line, live.server.pid(), Blow::Kill);
    let failure = frozen.fail(&live).await;
    let _at = killer.struck();
    drop(load.end());
    assert!(
        ["DATABASE_LOST", "DATABASE_UNREACHABLE"].contains(&failure.reason.as_str()),
        "{failure:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_killed_in_page_copy_is_a_typed_error() {
    a_database_is_killed_at("pages changed").await;
}

/// Guards the look at a cancel in every wait, and the end of a snapshot: it is felt while files are copied and while the locks are awaited; the snapshot goes.
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
    let mut live = Live::start(Version::V10_11, &["--innodb-log-file-size=16M"], BYTES);
    // Each try of the point takes a second or two, and may be cut.
    live.recipient.0.kill();
    live.restart_recipient();
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
    let ended = Arc::new(AtomicBool::new(false));
    let cutter = tokio::task::spawn_blocking({
        let ended = Arc::clone(&ended);
        move || {
            let mut cuts = 0;
            // Ever longer: on a slow machine, too, a log-in fits between two of them in the end.
            let mut pause = Duration::from_millis(400);
            while !ended.load(Ordering::Relaxed) {
                std::thread::sleep(pause);
                proxy.cut();
                cuts += 1;
                pause = pause.mul_f64(1.1).min(Duration::from_secs(20));
            }
            cuts
        }
    });
    let clone = wait_for_end(&mut client, &name).await;
    ended.store(true, Ordering::Relaxed);
    let cuts = cutter.await.expect("no panic");
    assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", live.donor.0.log());
    assert!(cuts >= 3 && clone.retries >= 3, "{cuts} cuts, {} retries", clone.retries);
    let acknowledged = load.moment();
    load.wait_for_commits(50);
    let report = load.stop();
    live.check("clone", &clone, &before, &acknowledged, &report);
}
