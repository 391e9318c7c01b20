//! A tablespace that is exchanged beneath the server: DISCARD, another file in its place, IMPORT. No
//! redo tells of the pages that come so.
//!
//! All of it is kept out of the binary log: a replica has no files to import. `unlogged.t` is a
//! table as any other, the one that is exported; `unlogged.u` is the one whose file is exchanged
//! over and over, `unlogged.w` one that is made for a single exchange. In each, all rows are of one
//! generation, and `unlogged.m` has the same generation by the same transaction: rows of an import
//! whose update is lost are of an older one.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use mysql::{Conn, prelude::Queryable as _};

use super::{Shared, errors::NONE};

/// Rows of each table: some 2 MiB.
pub const IMPORTED_ROWS: u64 = 4000;

/// Its tables, each with its row in `unlogged.m`.
pub const IMPORTED_TABLES: [(&str, u32); 3] = [("t", 1), ("u", 2), ("w", 3)];

/// Rest between two exchanges: each asks a clone for a checkpoint after it, and a clone that meets
/// another one at each of its cuts gives up.
const REST: Duration = Duration::from_millis(2500);

/// A statement that failed, and why.
type Failed = (String, mysql::Error);

/// One who exchanges.
pub struct Exchange {
    conn: Conn,
    data_directory: PathBuf,
}

impl Exchange {
    /// Makes the tables.
    pub fn new(conn: Conn, data_directory: &Path) -> Result<Self, Failed> {
        let mut exchange = Self { conn, data_directory: data_directory.to_owned() };
        exchange.run(&[
            "SET sql_log_bin = 0",
            "DROP DATABASE IF EXISTS unlogged",
            "CREATE DATABASE unlogged",
            "CREATE TABLE unlogged.m (id INT PRIMARY KEY, g INT) ENGINE=InnoDB",
            "INSERT INTO unlogged.m VALUES (1, 0), (2, 1)",
            "CREATE TABLE unlogged.t (id INT PRIMARY KEY, g INT, v VARCHAR(400)) ENGINE=InnoDB",
            "CREATE TABLE unlogged.u LIKE unlogged.t",
            &format!(
                "INSERT INTO unlogged.t SELECT seq, 0, REPEAT(MD5(seq), 10) FROM \
                 mysql.seq_1_to_{IMPORTED_ROWS}"
            ),
            "INSERT INTO unlogged.u SELECT id, 1, v FROM unlogged.t",
        ])?;
        Ok(exchange)
    }

    fn run(&mut self, statements: &[&str]) -> Result<(), Failed> {
        statements.iter().try_for_each(|sql| {
            self.conn.query_drop(sql).map_err(|error| ((*sql).to_owned(), error))
        })
    }

    /// Changes all rows of a table, and its row in `m`, in one transaction.
    fn update(&mut self, table: &str, marker: u32) -> Result<(), Failed> {
        self.run(&[
            "BEGIN",
            &format!("UPDATE unlogged.{table} SET g = g + 1"),
            &format!("REPLACE INTO unlogged.m SELECT {marker}, MAX(g) FROM unlogged.{table}"),
            "COMMIT",
        ])
    }

    /// Keeps `t`'s file, as of another generation.
    pub fn export(&mut self) -> Result<(), Failed> {
        self.update("t", 1)?;
        self.run(&["FLUSH TABLES unlogged.t FOR EXPORT"])?;
        self.copy("t", "kept")?;
        self.run(&["UNLOCK TABLES"])
    }

    /// Takes `u`'s file away.
    pub fn discard(&mut self) -> Result<(), Failed> {
        self.run(&["ALTER TABLE unlogged.u DISCARD TABLESPACE"])
    }

    /// Puts what is kept in its place, and changes all its rows.
    pub fn import(&mut self) -> Result<(), Failed> {
        self.copy("kept", "u")?;
        self.run(&["ALTER TABLE unlogged.u IMPORT TABLESPACE"])?;
        self.update("u", 2)
    }

    /// All of that to a table that was not there before.
    pub fn import_new(&mut self) -> Result<(), Failed> {
        self.run(&[
            "DROP TABLE IF EXISTS unlogged.w",
            "CREATE TABLE unlogged.w LIKE unlogged.t",
            "REPLACE INTO unlogged.m SELECT 3, g FROM unlogged.m WHERE id = 1",
            "ALTER TABLE unlogged.w DISCARD TABLESPACE",
        ])?;
        self.copy("kept", "w")?;
        self.run(&["ALTER TABLE unlogged.w IMPORT TABLESPACE"])?;
        self.update("w", 3)
    }

    /// Copies both files of a table. What is kept lies beside the data directory.
    fn copy(&self, from: &str, to: &str) -> Result<(), Failed> {
        let kept = self.data_directory.parent().expect("a data directory is in a directory");
        for end in ["ibd", "cfg"] {
            let path = |name: &str| match name {
                "kept" => kept.join(format!("unlogged-kept.{end}")),
                name => self.data_directory.join("unlogged").join(format!("{name}.{end}")),
            };
            let copied = std::fs::copy(path(from), path(to));
            copied.map_err(|e| (format!("copy {from}.{end} to {to}.{end}"), e.into()))?;
        }
        Ok(())
    }
}

pub(super) fn exchange(shared: &Shared, conn: Conn, data_directory: &Path) {
    let mut exchange = match Exchange::new(conn, data_directory) {
        Ok(exchange) => exchange,
        Err((sql, error)) => {
            shared.may_meet("imports", NONE, &sql, &error);
            return;
        }
    };
    while !shared.stopped() {
        let mut once = || {
            exchange.export()?;
            exchange.discard()?;
            shared.done("discard");
            exchange.import()?;
            shared.done("import");
            Ok::<(), Failed>(())
        };
        if let Err((sql, error)) = once() {
            shared.may_meet("imports", NONE, &sql, &error);
            return;
        }
        shared.rest(REST);
    }
}
