//! The tables of a load, and what must hold on any copy of them.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    load::{ACCOUNTS, HOLDS, IMPORTED_ROWS},
    mariadb::{MariaDb, Version},
};

/// Makes the tables, with about `bytes` of rows in them.
pub fn prepare(server: &MariaDb, bytes: u64) {
    let rows = bytes / 1200;
    drop(server.query(&format!(
        "CREATE DATABASE bank; CREATE DATABASE mix; CREATE DATABASE ddl; \
         CREATE TABLE bank.a (id INT PRIMARY KEY, v BIGINT NOT NULL) ENGINE=InnoDB; \
         CREATE TABLE bank.b LIKE bank.a; \
         CREATE TABLE bank.ledger (writer INT, n BIGINT, amount INT, pad VARCHAR(60), \
           PRIMARY KEY (writer, n)) ENGINE=InnoDB; \
         CREATE TABLE bank.probe (id INT PRIMARY KEY, n BIGINT) ENGINE=InnoDB; \
         CREATE TABLE bank.xa (id INT PRIMARY KEY, n BIGINT) ENGINE=InnoDB; \
         INSERT INTO bank.xa SELECT seq, 0 FROM mysql.seq_1_to_20; \
         INSERT INTO bank.probe SELECT seq, 0 FROM mysql.seq_1_to_10; \
         INSERT INTO bank.a SELECT seq, {HOLDS} FROM mysql.seq_1_to_{ACCOUNTS}; \
         INSERT INTO bank.b SELECT seq, {HOLDS} FROM mysql.seq_1_to_{ACCOUNTS}; \
         CREATE TABLE mix.wide (id INT AUTO_INCREMENT PRIMARY KEY, k INT, t VARCHAR(200), \
           b MEDIUMTEXT, KEY (k), KEY (t(40))) ENGINE=InnoDB; \
         CREATE TABLE mix.bulk (id INT PRIMARY KEY, v TEXT) ENGINE=InnoDB; \
         INSERT INTO mix.bulk SELECT seq, REPEAT(MD5(seq), 34) FROM mysql.seq_1_to_{rows}; \
         CREATE TABLE mix.aria (id INT PRIMARY KEY, v TEXT) ENGINE=Aria; \
         CREATE TABLE mix.isam (id INT PRIMARY KEY, v TEXT) ENGINE=MyISAM; \
         CREATE TABLE mix.csv (id INT NOT NULL, v VARCHAR(50) NOT NULL) ENGINE=CSV; \
         CREATE VIEW mix.v AS SELECT * FROM bank.a; \
         CREATE TRIGGER bank.t AFTER INSERT ON bank.probe FOR EACH ROW SET @x = 1; \
         INSERT INTO mix.aria SELECT seq, MD5(seq) FROM mysql.seq_1_to_500; \
         INSERT INTO mix.isam SELECT seq, MD5(seq) FROM mysql.seq_1_to_500; \
         INSERT INTO mix.csv SELECT seq, MD5(seq) FROM mysql.seq_1_to_50;"
    )));
}

/// Ledger rows of each writer in the binary logs of `data_directory` up to a position.
#[must_use]
pub fn ledger_in_binlog(data_directory: &Path, file: &str, position: u64) -> u64 {
    let mut files: Vec<PathBuf> = std::fs::read_dir(data_directory)
        .expect("the data directory can be read")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            name.starts_with("bin.0") && name.as_str() <= file
        })
        .collect();
    files.sort();
    let output = Command::new(Version::binlog_program())
        .args(["--no-defaults", "--base64-output=decode-rows", "--verbose"])
        .arg(format!("--stop-position={position}"))
        .args(&files)
        .output()
        .expect("mariadb-binlog is there: `make test` installs it");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let rows = text.matches("### INSERT INTO `bank`.`ledger`").count();
    let statements = text.matches("INSERT INTO bank.ledger").count();
    (rows + statements) as u64
}

/// Checks all that must hold on a server that was started on a copy; returns the transfers that it
/// holds, by writer.
#[must_use]
pub fn check_copy(server: &MariaDb, writers: usize) -> Vec<u64> {
    assert_eq!(server.errors(), Vec::<String>::new());
    let sum = server.query("SELECT (SELECT SUM(v) FROM bank.a) + (SELECT SUM(v) FROM bank.b)");
    assert_eq!(sum.trim(), (2 * ACCOUNTS * HOLDS).to_string(), "money was made or lost");
    let moved = server.query(&format!(
        "SELECT {} - SUM(v) - (SELECT COALESCE(SUM(amount), 0) FROM bank.ledger) FROM bank.a",
        ACCOUNTS * HOLDS
    ));
    assert_eq!(moved.trim(), "0", "bank and ledger are of two moments");
    let mut transfers = vec![0; writers];
    let ledger = server.query("SELECT writer, COUNT(*), MAX(n) FROM bank.ledger GROUP BY writer");
    for line in ledger.lines() {
        let mut fields = line.split('\t').map(|field| field.parse::<u64>().expect("a number"));
        let mut field = || fields.next().expect("three columns");
        let (writer, count, max) = (field(), field(), field());
        assert_eq!(count, max, "the ledger of writer {writer} has a gap");
        transfers[usize::try_from(writer).expect("a writer")] = count;
    }
    let is_discarded = !check_imported(server);
    let tables: Vec<String> = server
        .tables()
        .into_iter()
        .filter(|table| !(is_discarded && table == "`unlogged`.`u`"))
        .collect();
    let checked = server.query(&format!("CHECK TABLE {}", tables.join(", ")));
    let wrong: Vec<_> = checked
        .lines()
        .filter(|line| !line.ends_with("\tOK") && !line.contains("doesn't support check"))
        .collect();
    assert_eq!(wrong, Vec::<&str>::new());
    transfers
}

/// Checks the tables of a load with imports: all rows of one generation. Whether the one that is
/// exchanged has its tablespace; at the point it may have been discarded.
fn check_imported(server: &MariaDb) -> bool {
    let mut has_tablespace = true;
    for table in ["t", "u"] {
        let name = format!("'unlogged/{table}'");
        let known = "SELECT COUNT(*) FROM information_schema.innodb_sys_tables WHERE name =";
        if server.query(&format!("{known} {name}")).trim() == "0" {
            continue;
        }
        let sql = format!(
            "SELECT COUNT(*), COUNT(DISTINCT g), SUM(BINARY v <> BINARY REPEAT(MD5(id), 10)) FROM unlogged.{table}"
        );
        match server.try_query(&sql) {
            Ok(row) => {
                let row = row.trim();
                // Made by the load, and not filled yet.
                let is_right = row == format!("{IMPORTED_ROWS}\t1\t0") || row == "0\t0\tNULL";
                assert!(is_right, "unlogged.{table}: {row}");
            }
            Err(error) if table == "u" && error.contains("ERROR 1814") => has_tablespace = false,
            Err(error) => panic!("unlogged.{table}: {error}"),
        }
    }
    has_tablespace
}
