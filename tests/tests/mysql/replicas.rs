//! A replica as donor: the common case.

use marcot_tests::{
    clone_and_wait,
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
    let clone = clone_and_wait(&mut client, &donor.statement(&live.path("clone"), "")).await;
    assert_eq!(clone.state(), marcot_proto::recipient::v1::State::Completed, "{clone:?}");
    load.wait_for_commits(100);
    eprintln!("{}", load.stop());
    let point = clone.coordinates.expect("coordinates");
    assert_eq!(point.sources.len(), 1, "its source's channel: {point:?}");
    let copy = Database::start_with(
        live.home.path(),
        &live.path("clone"),
        &options.for_clone().with(&["--server-id=8"]),
    );
    let own = copy.query("SELECT REPLACE(@@gtid_executed, '\n', '')");
    assert_eq!(own.trim(), point.gtid_executed, "what the copy has executed, and the coordinates");
    let _held = check_copy(&copy, WRITERS);
    copy.replicate(&live.server, "");
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
