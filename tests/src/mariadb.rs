//! MariaDB servers: how their data directories are made.

use std::{io::Write as _, path::Path, process::Stdio};

use crate::database::command;
pub use crate::database::{
    Database as MariaDb, Options, VERSIONS, Version, ask, command_line, free_port, new_socket,
};

/// Small ones: two cores, and many servers at a time.
pub(crate) const SIZES: &[&str] =
    &["--innodb-log-file-size=16M", "--aria-pagecache-buffer-size=8M"];

/// Makes an empty data directory, as mariadb-install-db does.
pub fn install(data_directory: &Path) {
    install_with(data_directory, &Options::default());
}

/// As `install`, for a server that will run with `options`.
pub fn install_with(data_directory: &Path, options: &Options) {
    std::fs::create_dir_all(data_directory.join("mysql")).expect("writable");
    let share = options.version.share();
    let mut sql = b"use mysql;\n".to_vec();
    for file in [
        "mariadb_system_tables.sql",
        "mysql_system_tables.sql",
        "mariadb_system_tables_data.sql",
        "mysql_system_tables_data.sql",
        "mariadb_performance_tables.sql",
    ] {
        if let Ok(script) = std::fs::read(share.join(file)) {
            sql.extend(script);
        }
    }
    bootstrap(data_directory, options, &sql);
}

/// Runs statements in a server that takes no connections, and shuts it down.
pub fn bootstrap(data_directory: &Path, options: &Options, sql: &[u8]) {
    let mut child = command(data_directory, options)
        .args(["--bootstrap", "--silent-startup", "--skip-log-bin"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("mariadbd is there: `make test` installs it");
    // A server that ends early says why; the pipe's error does not.
    let written = child.stdin.take().expect("a pipe").write_all(sql);
    let output = child.wait_with_output().expect("our own child");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && written.is_ok(), "bootstrap: {log}");
    assert!(!log.contains("ERROR"), "bootstrap: {log}");
}
