//! A tablespace that is exchanged beneath the server, over and over: DISCARD, another file in its
//! place, IMPORT. No redo tells of the pages that come so.
//!
//! All of it is kept out of the binary log: a replica has no files to import. `unlogged.t` is a
//! table as any other; `unlogged.u` is the one whose file is exchanged. In each, all rows are of
//! one generation, and there are always as many.

use std::{path::Path, time::Duration};

use mysql::{Conn, prelude::Queryable as _};

use super::{Shared, errors::NONE};

/// Rows of each of the two tables: some 2 MiB.
pub const IMPORTED_ROWS: u64 = 4000;

/// Rest between two exchanges: each asks a clone for a checkpoint after it, and a clone that meets
/// another one at each of its cuts gives up.
const REST: Duration = Duration::from_millis(2500);

pub(super) fn exchange(shared: &Shared, conn: &mut Conn, data_directory: &Path) {
    let mut execute = |kind: &'static str, sql: &str| match conn.query_drop(sql) {
        Ok(()) => {
            if !kind.is_empty() {
                shared.done(kind);
            }
            true
        }
        Err(error) => shared.may_meet("imports", NONE, sql, &error),
    };
    let made = [
        "SET sql_log_bin = 0",
        "DROP DATABASE IF EXISTS unlogged",
        "CREATE DATABASE unlogged",
        "CREATE TABLE unlogged.t (id INT PRIMARY KEY, g INT, v VARCHAR(400)) ENGINE=InnoDB",
        "CREATE TABLE unlogged.u LIKE unlogged.t",
        &format!(
            "INSERT INTO unlogged.t SELECT seq, 0, REPEAT(MD5(seq), 10) FROM \
             mysql.seq_1_to_{IMPORTED_ROWS}"
        ),
        "INSERT INTO unlogged.u SELECT * FROM unlogged.t",
    ];
    if !made.iter().all(|sql| execute("", sql)) {
        return;
    }
    while !shared.stopped() {
        let exported = execute("", "UPDATE unlogged.t SET g = g + 1")
            && execute("", "FLUSH TABLES unlogged.t FOR EXPORT")
            && copy(shared, data_directory, "t", "kept")
            && execute("", "UNLOCK TABLES");
        let imported = exported
            && execute("discard", "ALTER TABLE unlogged.u DISCARD TABLESPACE")
            && copy(shared, data_directory, "kept", "u")
            && execute("import", "ALTER TABLE unlogged.u IMPORT TABLESPACE")
            && execute("", "UPDATE unlogged.u SET g = g + 1");
        if !imported {
            return;
        }
        shared.rest(REST);
    }
}

/// Copies both files of a table. What is kept lies beside the data directory.
fn copy(shared: &Shared, data_directory: &Path, from: &str, to: &str) -> bool {
    let kept = data_directory.parent().expect("a data directory is in a directory");
    ["ibd", "cfg"].iter().all(|end| {
        let path = |name: &str| match name {
            "kept" => kept.join(format!("unlogged-kept.{end}")),
            name => data_directory.join("unlogged").join(format!("{name}.{end}")),
        };
        let copied = std::fs::copy(path(from), path(to));
        if let Err(error) = &copied {
            shared.problem(format!("imports: copy {from}.{end} to {to}.{end}: {error}"));
        }
        copied.is_ok()
    })
}
