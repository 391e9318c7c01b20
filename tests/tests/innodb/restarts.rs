//! A donor's database that is started again while it is cloned: the clone goes on with the same
//! snapshot, by the pages that have changed since its redo was lost (R6).

use std::{path::PathBuf, time::Duration};

use marcot_proto::recipient::v1::{
    Clone, GetCloneRequest, State, VerifyCloneRequest,
    recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{
    Proxy,
    client::{clone_and_wait, wait_for_end},
    invariants::check_copy,
    live::{Live, WRITERS},
    load::{Load, LoadOptions},
    mariadb::{VERSIONS, Version},
    recipient, site, wait_for,
};
use tonic::transport::Channel;

const BYTES: u64 = 40 << 20;

fn busy(live: &Live) -> Load {
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(200);
    load
}

async fn get(client: &mut RecipientServiceClient<Channel>, name: &str) -> Clone {
    let request = GetCloneRequest { name: name.to_owned() };
    client.get_clone(request).await.expect("it is known").into_inner().clone.expect("a clone")
}

/// Waits until the clone waits for the database.
async fn until_it_waits(client: &mut RecipientServiceClient<Channel>, name: &str) {
    let deadline = std::time::Instant::now() + marcot_tests::PATIENCE;
    loop {
        let clone = get(client, name).await;
        if clone.last_retry_cause.contains("the database") {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "it does not wait: {clone:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A clone whose database goes and comes back is right, and of one snapshot.
async fn goes_on(version: Version, is_killed: bool, waits: bool) {
    let mut live = Live::start(version, &[], BYTES);
    let mut load = busy(&live);
    let before = load.moment();
    let (mut client, name) = live.begin_frozen(live.donor.port()).await;
    drop(load.end());
    if is_killed {
        live.server.kill();
    } else {
        live.server.shut_down();
    }
    if waits {
        live.recipient.0.thaw();
        until_it_waits(&mut client, &name).await;
    }
    live.restart_server();
    let load = busy(&live);
    if !waits {
        live.recipient.0.thaw();
    }
    let clone = live.check_end("clone", &name, before, load, &[]).await;
    assert_eq!(live.donor.0.log().matches("snapshot opened").count(), 1);
    assert!(clone.resent_bytes < BYTES, "{clone:?}");
}

/// Guards R6. Without a follower that begins anew, and pages that close the gap, redo is missing;
/// without the wait, the clone fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_waits_for_a_database_that_was_killed_and_goes_on() {
    for version in VERSIONS {
        goes_on(version, true, true).await;
    }
}

/// Guards the redo log across a restart that nobody has noticed while it was: what was followed
/// before it goes on, or is begun anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_goes_on_when_its_database_was_killed_and_is_back() {
    goes_on(Version::V10_11, true, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_goes_on_when_its_database_was_shut_down_and_is_back() {
    goes_on(Version::V10_11, false, true).await;
}

/// Guards what is staged when a host comes back and its donor is up before the database: another
/// snapshot is refused for a while, and the clone waits. Without the wait it fails, and loses all.
#[tokio::test(flavor = "multi_thread")]
async fn a_donor_that_is_up_before_its_database_is_waited_for() {
    let mut live = Live::start(Version::V10_11, &[], BYTES);
    let mut load = busy(&live);
    let before = load.moment();
    let proxy = Proxy::start(live.donor.0.address);
    let (mut client, name) = live.begin_frozen(proxy.port()).await;
    drop(load.end());
    live.server.kill();
    live.donor.0.kill();
    live.restart_donor();
    proxy.set_target(live.donor.0.address);
    live.recipient.0.thaw();
    until_it_waits(&mut client, &name).await;
    live.restart_server();
    let load = busy(&live);
    live.check_end("clone", &name, before, load, &[]).await;
    assert_eq!(live.donor.0.log().matches("snapshot opened").count(), 1);
}

/// Guards the connections of a snapshot: none of them is idle for as long as files are copied, or
/// the server drops it and the clone fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_longer_than_the_servers_wait_timeout_completes() {
    let mut live = Live::start(Version::V10_11, &["--wait-timeout=1"], 1 << 20);
    let load = busy(&live);
    let before = load.moment();
    let (_, name) = live.begin_frozen(live.donor.port()).await;
    let idle = "SELECT COUNT(*) FROM information_schema.processlist \
                WHERE user = 'marcot' AND command = 'Sleep' AND time_ms > 900";
    // Whatever was idle by then has been dropped after this.
    let dropped = |live: &Live| live.server.query("SHOW GLOBAL STATUS LIKE 'Uptime'");
    let begun: u64 = number(&dropped(&live));
    wait_for("longer than the timeout", || (number(&dropped(&live)) >= begun + 4).then_some(()));
    wait_for("nothing to be idle", || (number(&live.server.query(idle)) == 0).then_some(()));
    live.recipient.0.thaw();
    live.check_end("clone", &name, before, load, &[]).await;
}

fn number(row: &str) -> u64 {
    row.split_whitespace().last().and_then(|text| text.parse().ok()).expect("a number")
}

/// A log sequence number that the server tells.
fn lsn(live: &Live, name: &str) -> u64 {
    number(&live.server.query(&format!("SHOW GLOBAL STATUS LIKE '{name}'")))
}

/// Bytes of redo that the donor has spooled: the largest of its files without names.
fn spooled(live: &Live) -> u64 {
    let open = format!("/proc/{}/fd", live.donor.0.pid());
    let open = std::fs::read_dir(open).expect("it runs").flatten().map(|entry| entry.path());
    let is_unnamed = |path: &PathBuf| {
        let target = std::fs::read_link(path).unwrap_or_default();
        target.to_string_lossy().ends_with(" (deleted)")
    };
    let sizes = open.filter(is_unnamed).filter_map(|path| Some(path.metadata().ok()?.len()));
    sizes.max().unwrap_or(0)
}

/// Guards the lineage: a database that was set back to an earlier state under the clone needs another
/// snapshot. Without the comparison of what it had flushed, as it has said or as its log was followed,
/// the first one goes on, whenever the older state has the same last checkpoint: pages of one history,
/// redo of another. It flushes late: what it had said as the snapshot was opened tells nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_was_set_back_costs_another_snapshot() {
    let mut live = Live::start(Version::V10_11, &["--innodb-log-file-size=96M"], 1 << 20);
    let (data, backup) = (live.path("data"), live.path("backup"));
    live.server.shut_down();
    site::copy_tree(&data, &backup);
    live.restart_server();
    // It flushes its log when it is told to, and not each second; pages as well.
    let lazily = "SET GLOBAL innodb_flush_log_at_timeout=2700, GLOBAL innodb_adaptive_flushing=OFF";
    drop(live.server.query(lazily));
    let mut load = busy(&live);
    let (mut client, name) = live.begin_frozen(live.donor.port()).await;
    load.wait_for_commits(200);
    drop(load.end());
    // With any other value FLUSH only writes it.
    let flush = "SET GLOBAL innodb_flush_log_at_trx_commit=1; FLUSH ENGINE LOGS";
    drop(live.server.query(flush));
    let checkpoint = lsn(&live, "Innodb_lsn_last_checkpoint");
    let redo = lsn(&live, "Innodb_lsn_flushed") - checkpoint;
    assert!(redo > 1 << 16, "{redo} bytes were flushed since the checkpoint");
    wait_for("the redo log is followed", || (spooled(&live) >= redo).then_some(()));
    live.server.kill();
    for entry in std::fs::read_dir(&data).expect("it is there").flatten() {
        let path = entry.path();
        let removed = if path.is_dir() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
        removed.expect("our own");
    }
    site::copy_tree(&backup.join("."), &data);
    live.restart_server();
    // What its older state ends with lies behind the first one's checkpoint: that tells nothing either.
    drop(live.server.query("SET GLOBAL innodb_max_dirty_pages_pct=0"));
    wait_for("a checkpoint", || {
        (lsn(&live, "Innodb_lsn_last_checkpoint") >= checkpoint).then_some(())
    });
    live.recipient.0.thaw();
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(live.donor.0.log().matches("snapshot opened").count(), 2);
    let copy = live.start_clone("clone");
    let _held = check_copy(&copy, WRITERS);
    copy.stop();
}

/// Guards that a server's own writes are not called damage: a real one has started on the clone.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_a_server_has_started_on_is_modified_and_not_damaged() {
    let live = Live::start(Version::V10_11, &[], 1 << 20);
    let mut client = recipient(&live.recipient).await;
    let clone = clone_and_wait(&mut client, &live.statement("clone", false)).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    let verify = || VerifyCloneRequest { name: clone.name.clone() };
    let before = client.verify_clone(verify()).await.expect("a certificate").into_inner();
    assert!(before.intact && !before.modified_by_server, "{before:?}");
    let server = live.start_clone("clone");
    let running = client.verify_clone(verify()).await.expect("a certificate").into_inner();
    assert!(running.modified_by_server && !running.intact, "{running:?}");
    server.stop();
    let after = client.verify_clone(verify()).await.expect("a certificate").into_inner();
    assert!(after.modified_by_server && !after.intact, "{after:?}");
    assert!(!after.server_evidence.is_empty() && !after.differences.is_empty(), "{after:?}");
}
