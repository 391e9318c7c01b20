//! A replica as donor: the common case.

use marcot_tests::{
    clone_and_wait, clone_error,
    database::{Database, Options, Version, install_with},
    invariants::check_copy,
    live::{Live, WRITERS, donor},
    load::{Load, LoadOptions},
    mysql::GRANTS,
    recipient,
};

/// Guards R4 on a replica with parallel appliers: what they have prepared at the point is decided
/// by the end of its own binary log. The clone is attached to the primary.
#[tokio::test(flavor = "multi_thread")]
async fn a_parallel_replica_is_cloned() {
    let live = Live::start(Version::MySql9_7, &[], 8 << 20);
    let data = live.path("replica");
    let arguments = ["--replica-parallel-workers=4", "--relay-log-recovery=ON"];
    let options = Options::primary(Version::MySql9_7, &arguments).with(&["--server-id=7"]);
    install_with(&data, &options);
    let replica = Database::start_with(live.home.path(), &data, &options);
    replica.replicate(&live.server, "");
    replica.catch_up(&live.server);
    let load =
        Load::start(&live.server, LoadOptions { writers: WRITERS, xa: true, ..Default::default() });
    load.wait_for_commits(300);
    assert!(GRANTS.contains("marcot@localhost"), "the account has come with the primary's");
    let donor = donor(live.home.path(), &data, &replica);
    let mut client = recipient(&live.recipient).await;
    // A replica is asked how far it is.
    drop(
        replica.query("SET sql_log_bin=0; REVOKE REPLICATION CLIENT ON *.* FROM marcot@localhost"),
    );
    let refused = clone_error(&mut client, &donor.statement(&live.path("clone"), "")).await;
    assert_eq!(refused.reason, "DATABASE_PRIVILEGE_MISSING", "{refused:?}");
    assert!(refused.message.contains("REPLICATION CLIENT"), "{refused:?}");
    drop(replica.query("SET sql_log_bin=0; GRANT REPLICATION CLIENT ON *.* TO marcot@localhost"));
    let clone = clone_and_wait(&mut client, &donor.statement(&live.path("clone"), "")).await;
    assert_eq!(clone.state(), marcot_proto::recipient::v1::State::Completed, "{clone:?}");
    load.wait_for_commits(100);
    eprintln!("{}", load.stop());
    let point = clone.coordinates.expect("coordinates");
    let [source] = &point.sources[..] else { panic!("its source's channel: {point:?}") };
    let file = String::from_utf8_lossy(&source.binlog_file).into_owned();
    assert!(file.starts_with("bin.0") && source.binlog_position > 4, "{point:?}");
    let copy = Database::start_with(
        live.home.path(),
        &live.path("clone"),
        &options.for_clone().with(&["--server-id=8"]),
    );
    let own = copy.query("SELECT REPLACE(@@gtid_executed, '\n', '')");
    assert_eq!(own.trim(), point.gtid_executed, "what the copy has executed, and the coordinates");
    let _held = check_copy(&copy, WRITERS);
    // From the source's place, which may be a little too early: what it has is passed over by GTID.
    copy.replicate(&live.server, "");
    drop(copy.query(&format!(
        "STOP REPLICA; CHANGE REPLICATION SOURCE TO SOURCE_AUTO_POSITION=0, SOURCE_LOG_FILE='{file}', \
         SOURCE_LOG_POS={}; START REPLICA",
        source.binlog_position
    )));
    copy.catch_up(&live.server);
    // Each server has made its own system tables.
    let users = |server: &Database| {
        let all = server.replicated_checksums();
        let lines = all.lines().filter(|line| !line.starts_with("mysql."));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(users(&copy), users(&live.server));
    copy.stop();
}
