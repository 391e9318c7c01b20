//! The tables of a load, and what must hold on any copy of them.

use std::path::{Path, PathBuf};

use crate::{
    database::{Database, Version},
    load::{ACCOUNTS, HOLDS, IMPORTED_ROWS, IMPORTED_TABLES},
};

/// Makes the tables, with about `bytes` of rows in them.
pub fn prepare(server: &Database, bytes: u64) {
    let rows = bytes / 1200;
    let seq = |count| server.sequence(count);
    // The clone of a MySQL server that has tables in other engines is refused.
    let [aria, isam, csv] = match server.version().is_mysql() {
        true => ["InnoDB"; 3],
        false => ["Aria", "MyISAM", "CSV"],
    };
    drop(server.query("CREATE DATABASE bank; CREATE DATABASE mix; CREATE DATABASE ddl"));
    if server.version().is_mysql() {
        // MD5 is in a component since 9.6.
        let count = rows.max(10_000);
        drop(server.query(&format!(
            "INSTALL COMPONENT 'file://component_classic_hashing'; \
             SET SESSION cte_max_recursion_depth = {count}; \
             CREATE TABLE mix.numbers (seq BIGINT PRIMARY KEY); \
             INSERT INTO mix.numbers WITH RECURSIVE n(seq) AS \
               (SELECT 1 UNION ALL SELECT seq + 1 FROM n WHERE seq < {count}) SELECT seq FROM n"
        )));
    }
    drop(server.query(&format!(
        "CREATE TABLE bank.a (id INT PRIMARY KEY, v BIGINT NOT NULL) ENGINE=InnoDB; \
         CREATE TABLE bank.b LIKE bank.a; \
         CREATE TABLE bank.ledger (writer INT, n BIGINT, amount INT, pad VARCHAR(60), \
           PRIMARY KEY (writer, n)) ENGINE=InnoDB; \
         CREATE TABLE bank.probe (id INT PRIMARY KEY, n BIGINT) ENGINE=InnoDB; \
         CREATE TABLE bank.xa (id INT PRIMARY KEY, n BIGINT) ENGINE=InnoDB; \
         INSERT INTO bank.xa SELECT seq, 0 FROM {}; \
         INSERT INTO bank.probe SELECT seq, 0 FROM {}; \
         INSERT INTO bank.a SELECT seq, {HOLDS} FROM {accounts}; \
         INSERT INTO bank.b SELECT seq, {HOLDS} FROM {accounts}; \
         CREATE TABLE mix.wide (id INT AUTO_INCREMENT PRIMARY KEY, k INT, t VARCHAR(200), \
           b MEDIUMTEXT, KEY (k), KEY (t(40))) ENGINE=InnoDB; \
         CREATE TABLE mix.bulk (id INT PRIMARY KEY, v TEXT) ENGINE=InnoDB; \
         INSERT INTO mix.bulk SELECT seq, REPEAT(MD5(CONCAT(seq)), 34) FROM {}; \
         CREATE TABLE mix.aria (id INT PRIMARY KEY, v TEXT) ENGINE={aria}; \
         CREATE TABLE mix.isam (id INT PRIMARY KEY, v TEXT) ENGINE={isam}; \
         CREATE TABLE mix.csv (id INT NOT NULL, v VARCHAR(50) NOT NULL) ENGINE={csv}; \
         CREATE TABLE mix.aria_rows (id INT AUTO_INCREMENT PRIMARY KEY, v TEXT) ENGINE={aria}; \
         CREATE TABLE mix.isam_rows (id INT AUTO_INCREMENT PRIMARY KEY, v TEXT) ENGINE={isam}; \
         CREATE TABLE mix.aria_count (id INT PRIMARY KEY, n BIGINT) ENGINE={aria}; \
         CREATE TABLE mix.isam_count (id INT PRIMARY KEY, n BIGINT) ENGINE={isam}; \
         INSERT INTO mix.aria_count VALUES (1, 0); INSERT INTO mix.isam_count VALUES (1, 0); \
         CREATE VIEW mix.v AS SELECT * FROM bank.a; \
         CREATE TRIGGER bank.t AFTER INSERT ON bank.probe FOR EACH ROW SET @x = 1; \
         INSERT INTO mix.aria SELECT seq, MD5(CONCAT(seq)) FROM {some}; \
         INSERT INTO mix.isam SELECT seq, MD5(CONCAT(seq)) FROM {some}; \
         INSERT INTO mix.csv SELECT seq, MD5(CONCAT(seq)) FROM {}; {analyze}",
        seq(20),
        seq(10),
        seq(rows),
        seq(50),
        accounts = seq(ACCOUNTS),
        some = seq(500),
        analyze = match server.version().is_mysql() {
            true => "",
            false => "ANALYZE TABLE mix.aria, bank.a PERSISTENT FOR ALL;",
        },
    )));
}

/// Ledger rows of each writer in the binary logs of `data_directory` up to a position.
#[must_use]
pub fn ledger_in_binlog(version: Version, data_directory: &Path, file: &str, position: u64) -> u64 {
    let mut files: Vec<PathBuf> = std::fs::read_dir(data_directory)
        .expect("the data directory can be read")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            // Each may have an index of its GTIDs beside it, `bin.000001.idx`.
            name.starts_with("bin.0") && !name.ends_with(".idx") && name.as_str() <= file
        })
        .collect();
    files.sort();
    let output = version
        .binlog_command()
        .args(["--no-defaults", "--base64-output=decode-rows", "--verbose"])
        .arg(format!("--stop-position={position}"))
        .args(&files)
        .output()
        .expect("the program is there: `make test` installs it");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let rows = text.matches("### INSERT INTO `bank`.`ledger`").count();
    let statements = text.matches("INSERT INTO bank.ledger").count();
    (rows + statements) as u64
}

/// Checks all that must hold on a server that was started on a copy; returns the transfers that it
/// holds, by writer.
#[must_use]
pub fn check_copy(server: &Database, writers: usize) -> Vec<u64> {
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
    let discarded = check_imported(server);
    let tables: Vec<String> =
        server.tables().into_iter().filter(|table| !discarded.contains(table)).collect();
    let checked = server.query(&format!("CHECK TABLE {}", tables.join(", ")));
    let wrong: Vec<_> = checked
        .lines()
        .filter(|line| !line.ends_with("\tOK") && !line.contains("doesn't support check"))
        .collect();
    assert_eq!(wrong, Vec::<&str>::new());
    transfers
}

/// Checks the tables of a load with imports: all rows of one generation, which is that of the row
/// that the same transaction has written elsewhere. Returns those without a tablespace, which at the
/// point may have been discarded.
fn check_imported(server: &Database) -> Vec<String> {
    let mut discarded = Vec::new();
    if server.version().is_mysql() {
        // IMPORT waits while a clone runs: no load has it.
        return discarded;
    }
    for (table, marker) in IMPORTED_TABLES {
        let name = format!("'unlogged/{table}'");
        let known = "SELECT COUNT(*) FROM information_schema.innodb_sys_tables WHERE name =";
        if server.query(&format!("{known} {name}")).trim() == "0" {
            continue;
        }
        let sql = format!(
            "SELECT COUNT(*), SUM(g <> (SELECT g FROM unlogged.m WHERE id = {marker})), \
             SUM(BINARY v <> BINARY REPEAT(MD5(id), 10)) FROM unlogged.{table}"
        );
        match server.try_query(&sql) {
            Ok(row) => {
                let row = row.trim();
                // Made by the load, and not filled yet.
                let is_right = row == format!("{IMPORTED_ROWS}\t0\t0") || row == "0\tNULL\tNULL";
                assert!(is_right, "unlogged.{table}: rows, of another generation, wrong: {row}");
            }
            Err(error) if table != "t" && error.contains("ERROR 1814") => {
                discarded.push(format!("`unlogged`.`{table}`"));
            }
            Err(error) => panic!("unlogged.{table}: {error}"),
        }
    }
    discarded
}
