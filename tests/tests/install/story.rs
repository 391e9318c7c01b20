//! The whole story, with two live servers: a replica whose data are no good any more is replaced by
//! a clone of the primary, in place, while the primary is written to.

use std::path::Path;

use marcot_proto::recipient::v1::{
    AcceptCloneRequest, AttachReplica, CloneInstanceRequest, CloneOptions, State,
};
use marcot_tests::{
    Recipient,
    client::wait_for_end,
    killer::Blow,
    live::{Live, WRITERS},
    load::{Load, LoadOptions},
    mariadb::{self, MariaDb, Options, Version},
    recipient,
    site::server_pid,
    wait_for,
};

/// Guards the end to end: the clone is a replica that has caught up, and the data from before it are
/// there until a person accepts.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_rebuilt_in_place_from_a_live_primary_and_follows_it() {
    let live = Live::start(Version::V10_11, &[], 24 << 20);
    let (home, own) = (live.home.path(), live.path("own"));
    let options = Options::primary(Version::V10_11, &["--server-id=2"]);
    mariadb::install_with(&own, &options);
    let server = MariaDb::start_with(home, &own, &options);
    drop(
        server
            .query("CREATE DATABASE lost; CREATE TABLE lost.t (id INT); INSERT lost.t VALUES (1)"),
    );
    server.stop();
    let socket = mariadb::new_socket();
    let command = mariadb::command_line(&own, &options, &socket);
    let (data, at, state) =
        (own.display().to_string(), socket.display().to_string(), live.path("state-2"));
    let state = state.display().to_string();
    let hold = live.path("hold");
    std::fs::write(&hold, "").expect("writable");
    let supervised = Recipient::supervise(
        home,
        &[
            "--data-directory",
            &data,
            "--state-directory",
            &state,
            "--database-socket",
            &at,
            "--database-user",
            "root",
            "--keep-old-data",
            "until-accepted",
            "--donor-timeout",
            "60s",
        ],
        &command,
        &[("MARCOT_TEST_HOLD_AT", &format!("staged:{}", hold.display()))],
    );
    let ask = |sql: &str| mariadb::ask(&socket, sql);
    wait_for("the server to answer", || ask("SELECT id FROM lost.t").ok());

    drop(live.server.query(
        "CREATE USER repl@'127.0.0.1' IDENTIFIED BY 'repl secret'; \
         GRANT REPLICATION SLAVE ON *.* TO repl@'127.0.0.1'",
    ));
    let load = Load::start(
        &live.server,
        LoadOptions { writers: WRITERS, ddl: true, ..Default::default() },
    );
    load.wait_for_commits(300);
    let mut client = recipient(&supervised).await;
    let request = CloneInstanceRequest {
        host: "127.0.0.1".to_owned(),
        port: live.donor.port().into(),
        user: "clone".to_owned(),
        options: Some(CloneOptions {
            attach_replica: Some(AttachReplica {
                port: live.server.port.expect("it has one").into(),
                user: "repl".to_owned(),
                password: "repl secret".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let started = client.clone_instance(request).await.expect("the clone is accepted");
    let name = started.into_inner().clone.expect("a clone").name;
    // After the point, and before the replica is attached: a change that takes a replica its time.
    wait_for("the copy", || supervised.0.log().contains("at=\"staged\"").then_some(()));
    drop(live.server.query(
        "CREATE DATABASE slow; CREATE TABLE slow.t (n INT); INSERT slow.t VALUES (0); \
         SET SESSION binlog_format=STATEMENT; UPDATE slow.t SET n=1+SLEEP(1)",
    ));
    std::fs::remove_file(&hold).expect("our own file");
    // A primary that never rests is no obstacle: the replica has what there was when it was attached.
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!(ask("SELECT n FROM slow.t").as_deref(), Ok("1\n"), "it has caught up");
    load.wait_for_commits(300);
    let report = load.stop();
    assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", supervised.0.log());
    assert!(!supervised.0.log().contains("repl secret"), "the password is in the log");
    assert!(report.commits > 0);
    assert!(ask("SELECT 1 FROM lost.t").is_err(), "the clone's data stand");
    let target = live.server.query("SELECT @@gtid_binlog_pos");
    let waited =
        ask(&format!("SELECT MASTER_GTID_WAIT('{}', 150)", target.trim())).expect("an answer");
    assert_eq!(waited.trim(), "0", "{}", ask("SHOW SLAVE STATUS").unwrap_or_default());
    for table in
        live.server.tables().iter().filter(|t| !t.contains("`mysql`") && !t.contains("unlogged"))
    {
        let sql = format!("CHECKSUM TABLE {table}");
        assert_eq!(ask(&sql).expect("a checksum"), live.server.query(&sql), "{table}");
    }
    // It replicates after a crash as well: that was asked for.
    let pid = server_pid(&own).expect("a server");
    Blow::Kill.strike(pid);
    wait_for("another server", || server_pid(&own).filter(|&other| other != pid));
    wait_for("the replica to run again", || {
        let status = ask("SHOW SLAVE STATUS").ok()?;
        status.contains("\tYes\tYes\t").then_some(())
    });
    let install = clone.install.expect("an install");
    assert!(install.keep_until.is_none());
    let old = String::from_utf8(install.old_directory.to_vec()).expect("a path");
    assert!(Path::new(&old).join("lost").is_dir(), "the old data are kept");
    client.accept_clone(AcceptCloneRequest { name }).await.expect("it is accepted");
    assert!(!Path::new(&old).exists());
    drop(supervised);
    wait_for("the server to end with its supervisor", || ask("SELECT 1").is_err().then_some(()));
}
