//! A replica as donor: the common case. Its own coordinates and its source's are both right.

use std::time::{Duration, Instant};

use marcot_common::replication;
use marcot_proto::recipient::v1::{CancelCloneRequest, CloneStatementRequest, State};
use marcot_tests::{
    Donor, Proxy,
    client::{begin, wait_for_end},
    clone_and_wait,
    invariants::check_copy,
    killer::Blow,
    live::{GRANTS, Live, WRITERS, donor, donor_by_port},
    load::{Load, LoadOptions},
    mariadb::{self, MariaDb, Options, Version},
    recipient, wait_for,
};

/// A replica that applies what its primary's load writes.
struct Replicated {
    live: Live,
    replica: MariaDb,
    load: Load,
}

impl Replicated {
    fn start(version: Version, arguments: &[&str]) -> Self {
        let live = Live::start(version, &[], 8 << 20);
        let data = live.path("replica");
        let options = Options::primary(version, arguments).with(&["--server-id=7"]);
        mariadb::install_with(&data, &options);
        let replica = MariaDb::start_with(live.home.path(), &data, &options);
        replica.replicate(&live.server, "");
        replica.catch_up(&live.server);
        // What a serial replica can keep up with.
        let options = LoadOptions { writers: WRITERS, xa: true, rate: 200, ..Default::default() };
        let load = Load::start(&live.server, options);
        load.wait_for_commits(300);
        drop(replica.query("SET sql_log_bin=0; FLUSH PRIVILEGES"));
        let grants = GRANTS.replace("CREATE USER", "CREATE OR REPLACE USER");
        let more = "GRANT REPLICATION SLAVE ADMIN ON *.* TO marcot@localhost";
        drop(replica.query(&format!("SET sql_log_bin=0; {grants} {more}")));
        Self { live, replica, load }
    }

    fn applies(&self) -> bool {
        let running = self.replica.query("SHOW GLOBAL STATUS LIKE 'Slave_running'");
        running.contains("ON")
    }
}

/// Guards R4: the SQL threads rest for the cut, so no event group is half applied and none is
/// prepared; and they run again afterwards. The clone of the replica is attached to the primary, or
/// to the replica that it was made of.
async fn a_replica_is_cloned(version: Version, arguments: &[&str], logs: bool) {
    let log = if logs { "--log-slave-updates=ON" } else { "--log-slave-updates=OFF" };
    let all = Replicated::start(version, &[arguments, &[log]].concat());
    let Replicated { live, replica, load } = &all;
    let donor = donor(live.home.path(), replica.data_directory(), replica);
    let mut client = recipient(&live.recipient).await;
    let clone = clone_and_wait(&mut client, &donor.statement(&live.path("clone"), "")).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    load.wait_for_commits(100);
    assert!(all.applies(), "the SQL thread was not started again");
    let Replicated { live, replica, load } = all;
    let report = load.stop();
    eprintln!("{report}");
    let point = clone.coordinates.expect("coordinates");
    let source = point.sources.first().expect("its source's coordinates");
    assert!(!source.gtid_executed.is_empty(), "{point:?}");
    // A log that has only what is written on the replica itself is none to replicate from.
    let printed = replication::statements(&point, "replica").join("\n");
    assert_eq!(printed.contains("MASTER_HOST = 'replica'"), logs, "{printed}");
    assert_eq!(point.binlog_lacks_replicated, !logs, "{point:?}");
    let of_source = format!("SET GLOBAL gtid_slave_pos = '{}';", source.gtid_executed);
    assert!(printed.contains(&of_source), "{printed}");
    if !logs {
        assert!(printed.contains("log_slave_updates"), "{printed}");
        assert_eq!(printed.matches("SET GLOBAL").count(), 1, "{printed}");
    }
    let copy =
        MariaDb::start_with(live.home.path(), &live.path("clone"), &live.options.for_clone());
    let _held = check_copy(&copy, WRITERS);
    // At the point the copy stands where its donor stood.
    let own = copy.query("SELECT @@gtid_slave_pos");
    assert_eq!(own.trim(), source.gtid_executed, "the copy's own table and the coordinates");
    if logs {
        copy.replicate_as_known(&replica, &point.gtid_executed);
        replica.catch_up(&live.server);
        copy.catch_up(&replica);
    } else {
        copy.replicate(&live.server, &source.gtid_executed);
        copy.catch_up(&live.server);
        replica.catch_up(&live.server);
    }
    let without_accounts = |server: &MariaDb| {
        let all = server.replicated_checksums();
        let lines = all.lines().filter(|line| !line.starts_with("mysql."));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(without_accounts(&copy), without_accounts(&live.server));
    copy.stop();
}

const PARALLEL: [&str; 2] = ["--slave-parallel-threads=4", "--slave-parallel-mode=optimistic"];

#[tokio::test(flavor = "multi_thread")]
async fn a_serial_replica_without_a_log_of_its_own_is_cloned() {
    a_replica_is_cloned(Version::V10_11, &[], false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_serial_replica_that_logs_is_cloned() {
    a_replica_is_cloned(Version::V10_11, &[], true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parallel_replica_without_a_log_of_its_own_is_cloned() {
    a_replica_is_cloned(Version::V10_11, &PARALLEL, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parallel_replica_that_logs_is_cloned() {
    a_replica_is_cloned(Version::V10_11, &PARALLEL, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_serial_replica_without_a_log_of_its_own_is_cloned_in_11_8() {
    a_replica_is_cloned(Version::V11_8, &[], false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parallel_replica_that_logs_is_cloned_in_11_8() {
    a_replica_is_cloned(Version::V11_8, &PARALLEL, true).await;
}

/// Guards that the server itself starts the SQL threads again: with START SLAVE sent by the donor,
/// as an earlier form had it, they rest until somebody looks. A frozen donor's named lock goes with
/// its connection, after 60 s of silence. With no rest at all the threads are seen to run at the cut.
async fn a_donor_is_struck_while_the_replica_rests(blow: Blow) {
    let all = Replicated::start(Version::V10_11, &["--log-slave-updates=ON"]);
    let Replicated { live, replica, load } = &all;
    let proxy = Proxy::start(([127, 0, 0, 1], replica.port.expect("it has one")).into());
    let mut donor = donor_by_port(live.home.path(), replica.data_directory(), proxy.port(), &[]);
    let pid = donor.0.pid();
    let (at, struck) = std::sync::mpsc::channel();
    let socket = replica.socket().to_owned();
    proxy.when_answered("BACKUP STAGE BLOCK_COMMIT", move || {
        let running = mariadb::ask(&socket, "SHOW GLOBAL STATUS LIKE 'Slave_running'");
        blow.strike(pid);
        at.send(running).expect("the test waits");
    });
    let mut client = recipient(&live.recipient).await;
    let statement = donor.statement(&live.path("clone"), "");
    let request = CloneStatementRequest { statement, ..Default::default() };
    let started = client.clone_statement(request).await.expect("the clone is accepted");
    let name = started.into_inner().clone.expect("a clone").name;
    let running = tokio::task::block_in_place(|| struck.recv_timeout(marcot_tests::PATIENCE));
    let running = running.expect("the blow").expect("the replica answers");
    assert!(running.contains("OFF"), "the SQL threads did not rest: {running}");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(180);
    while !all.applies() {
        assert!(std::time::Instant::now() < deadline, "the SQL threads rest still");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let applied = || replica.query("SELECT @@gtid_slave_pos");
    let then = applied();
    load.wait_for_commits(50);
    wait_for("the replica to apply more", || (applied() != then).then_some(()));
    match blow {
        Blow::Freeze => donor.0.thaw(),
        _ => donor.0.kill(),
    }
    let clone = wait_for_end(&mut client, &name).await;
    // A donor that goes on may make another cut.
    assert!(clone.state() == State::Failed || blow == Blow::Freeze, "{clone:?}");
    wait_for("the SQL threads to run", || all.applies().then_some(()));
    drop(all.load.stop());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_whose_clones_donor_was_killed_applies_again() {
    a_donor_is_struck_while_the_replica_rests(Blow::Kill).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_whose_clones_donor_is_frozen_applies_again() {
    a_donor_is_struck_while_the_replica_rests(Blow::Freeze).await;
}

/// A replica whose SQL thread waits for a table that another session has locked, and a clone of it
/// that waits for the thread to stop; with it the connection that holds the lock, and when the donor
/// has asked for the stop.
async fn a_replica_that_does_not_stop() -> (Replicated, Donor, mysql::Conn, String, Instant) {
    use mysql::prelude::Queryable as _;
    let all = Replicated::start(Version::V10_11, &["--log-slave-updates=ON"]);
    let mut locked = all.replica.connect();
    locked.query_drop("LOCK TABLES bank.a WRITE").expect("locked");
    wait_for("the SQL thread to wait for the table", || {
        let waits = "SELECT COUNT(*) FROM information_schema.processlist WHERE state LIKE 'Waiting \
                     for table metadata lock'";
        (all.replica.query(waits).trim() != "0").then_some(())
    });
    let donor = donor(all.live.home.path(), all.replica.data_directory(), &all.replica);
    let mut client = recipient(&all.live.recipient).await;
    let name = begin(&mut client, &donor.statement(&all.live.path("clone"), "")).await;
    wait_for("the stop", || {
        let stops = "SELECT COUNT(*) FROM information_schema.processlist WHERE info LIKE '%STOP \
                     SLAVE%' AND user = 'marcot'";
        (all.replica.query(stops).trim() == "1").then_some(())
    });
    (all, donor, locked, name, Instant::now())
}

/// The replica goes on as soon as it can, whatever became of the clone.
fn goes_on(all: Replicated, locked: mysql::Conn) {
    drop(locked);
    let applied = || all.replica.query("SELECT @@gtid_slave_pos");
    let then = applied();
    wait_for("the replica to apply more", || (applied() != then).then_some(()));
    wait_for("the SQL thread to run", || all.applies().then_some(()));
    drop(all.load.stop());
}

/// Guards the bound on the wait for a replica's SQL threads to stop. With the statement that stops them
/// waited for to its end the clone ends in STALLED, after minutes; with it tried five times it takes
/// three of them. No other clone of the server can be cut meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_does_not_stop_fails_its_clone_in_time() {
    let (all, _donor, locked, name, since) = a_replica_that_does_not_stop().await;
    let mut client = recipient(&all.live.recipient).await;
    let clone = wait_for_end(&mut client, &name).await;
    let failure = clone.error.expect("it has failed");
    assert_eq!(failure.reason, "REPLICA_NOT_STOPPED", "{failure:?}");
    assert!(failure.message.contains("have not stopped in 30 s"), "{failure:?}");
    let took = since.elapsed();
    assert!(took < Duration::from_secs(90), "{took:?}");
    goes_on(all, locked);
}

/// Guards the look at a cancel in that wait: without it a clone is cancelled when the wait has ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_is_heard_while_a_replica_does_not_stop() {
    let (all, _donor, locked, name, _) = a_replica_that_does_not_stop().await;
    let mut client = recipient(&all.live.recipient).await;
    let since = Instant::now();
    client.cancel_clone(CancelCloneRequest { name: name.clone() }).await.expect("it runs");
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!(clone.state(), State::Cancelled, "{clone:?}");
    // But for the one that stops the threads, which the server runs to its end.
    wait_for("the donor's connections to go", || {
        let connections =
            "SELECT COUNT(*) FROM information_schema.processlist WHERE user = 'marcot'";
        (all.replica.query(connections).trim() == "1").then_some(())
    });
    let took = since.elapsed();
    assert!(took < Duration::from_secs(28), "{took:?}");
    goes_on(all, locked);
}
