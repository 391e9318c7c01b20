//! A replica as donor: the common case. Its own coordinates and its source's are both right.

use marcot_tests::{
    clone_and_wait,
    invariants::check_copy,
    live::{GRANTS, Live, WRITERS, donor},
    load::{Load, LoadOptions},
    mariadb::{self, MariaDb, Options, Version},
    recipient,
};

/// Guards R4: the SQL threads rest for the cut, so no event group is half applied and none is
/// prepared; and they run again afterwards. The clone of the replica is attached to the primary.
async fn a_replica_is_cloned(arguments: &[&str]) {
    let live = Live::start(Version::V10_11, &[], 8 << 20);
    let data = live.path("replica");
    let options = Options::primary(Version::V10_11, arguments).with(&["--server-id=7"]);
    mariadb::install_with(&data, &options);
    let replica = MariaDb::start_with(live.home.path(), &data, &options);
    replica.replicate(&live.server, "");
    let load =
        Load::start(&live.server, LoadOptions { writers: WRITERS, xa: true, ..Default::default() });
    load.wait_for_commits(300);
    drop(replica.query("SET sql_log_bin=0; FLUSH PRIVILEGES"));
    let grants = GRANTS.replace("CREATE USER", "CREATE OR REPLACE USER");
    let more = "GRANT REPLICATION SLAVE ADMIN ON *.* TO marcot@localhost";
    drop(replica.query(&format!("SET sql_log_bin=0; {grants} {more}")));
    let donor = donor(live.home.path(), &data, &replica);
    let mut client = recipient(&live.recipient).await;
    let clone = clone_and_wait(&mut client, &donor.statement(&live.path("clone"), "")).await;
    assert_eq!(clone.state(), marcot_proto::recipient::v1::State::Completed, "{clone:?}");
    load.wait_for_commits(100);
    let running = replica.query("SHOW GLOBAL STATUS LIKE 'Slave_running'");
    assert!(running.contains("ON"), "the SQL thread was not started again: {running}");
    let report = load.stop();
    eprintln!("{report}");
    let point = clone.coordinates.expect("coordinates");
    let source = point.sources.first().expect("its source's coordinates");
    assert!(!source.gtid_executed.is_empty(), "{point:?}");
    let copy =
        MariaDb::start_with(live.home.path(), &live.path("clone"), &live.options.for_clone());
    let _held = check_copy(&copy, WRITERS);
    // At the point the copy stands where its donor stood: seeded from a replica, attached to the
    // primary.
    let own = copy.query("SELECT @@gtid_slave_pos");
    assert_eq!(own.trim(), source.gtid_executed, "the copy's own table and the coordinates");
    copy.replicate(&live.server, &source.gtid_executed);
    copy.catch_up(&live.server);
    replica.catch_up(&live.server);
    let without_accounts = |server: &MariaDb| {
        let all = server.replicated_checksums();
        let lines = all.lines().filter(|line| !line.starts_with("mysql."));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(without_accounts(&copy), without_accounts(&live.server));
    copy.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_serial_replica_without_a_log_of_its_own_is_cloned() {
    a_replica_is_cloned(&["--log-slave-updates=OFF"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parallel_replica_that_logs_is_cloned() {
    let arguments = [
        "--log-slave-updates=ON",
        "--slave-parallel-threads=4",
        "--slave-parallel-mode=optimistic",
    ];
    a_replica_is_cloned(&arguments).await;
}
