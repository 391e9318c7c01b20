//! MySQL servers: how their data directories are made, and how they replicate.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use ::mysql::prelude::Queryable as _;

use crate::database::{Database, Options, Version, assert_caught_up, command};

/// Small ones, as for MariaDB.
pub(crate) const SIZES: &[&str] = &["--innodb-redo-log-capacity=16M"];

/// The privileges that docs/operations.md lists.
pub const GRANTS: &str = "CREATE USER marcot@localhost IDENTIFIED BY 'secret'; \
    GRANT BACKUP_ADMIN, RELOAD, PROCESS, REPLICATION CLIENT ON *.* TO marcot@localhost; \
    GRANT SELECT ON performance_schema.log_status TO marcot@localhost;";

/// What a server that runs from a tree of its own is told.
pub(crate) fn complete(version: Version, command: &mut Command) {
    command
        .arg(format!("--basedir={}", version.tree().join("usr").display()))
        .arg(format!("--character-sets-dir={}", version.share().join("charsets").display()))
        .args(["--secure-file-priv=", "--mysqlx=OFF", "--log-error-verbosity=3"]);
}

/// Makes an empty data directory, with root and no password.
pub(crate) fn install(data_directory: &Path, options: &Options) {
    let output = command(data_directory, options)
        .args(["--initialize-insecure", "--skip-log-bin"])
        .stdin(Stdio::null())
        .output()
        .expect("mysqld is there: `make test-mysql` installs it");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !log.contains("[ERROR]"), "initialize: {log}");
}

/// Makes `replica` one of `primary`'s. What it has is in its own GTID set.
pub(crate) fn replicate(replica: &Database, primary: &Database) {
    let port = primary.port.expect("the primary has a port");
    drop(primary.query(
        "CREATE USER IF NOT EXISTS repl@'127.0.0.1' IDENTIFIED BY 'repl'; \
         GRANT REPLICATION SLAVE ON *.* TO repl@'127.0.0.1'",
    ));
    drop(replica.query(&format!(
        "STOP REPLICA; RESET REPLICA ALL; CHANGE REPLICATION SOURCE TO SOURCE_HOST='127.0.0.1', \
         SOURCE_PORT={port}, SOURCE_USER='repl', SOURCE_PASSWORD='repl', SOURCE_AUTO_POSITION=1, \
         GET_SOURCE_PUBLIC_KEY=1; START REPLICA"
    )));
}

/// Waits until `replica` has applied all that `primary` has now.
pub(crate) fn catch_up(replica: &Database, primary: &Database) {
    let target = primary.query("SELECT REPLACE(@@gtid_executed, '\n', '')");
    let mut conn = replica.connect();
    let wait = format!("SELECT WAIT_FOR_EXECUTED_GTID_SET('{}', 300)", target.trim());
    let waited: Option<i64> = conn.query_first(wait).expect("the replica answers");
    assert_caught_up(&mut conn, "SHOW REPLICA STATUS", waited, &target);
}
