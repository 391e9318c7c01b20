//! What a server does to its own files while it runs: undo tablespaces that are truncated (the
//! server must have been started so), and a redo log that is resized.

use std::time::Duration;

use mysql::{Conn, prelude::Queryable as _};

use super::{
    Shared,
    errors::{CONFLICTS, RESIZES},
};

/// Rows whose change makes some 10 MiB of undo log, the least that is worth truncating.
const UNDO_ROWS: u64 = 10_000;

/// Rest between two of the same.
const REST: Duration = Duration::from_millis(1500);

pub(super) fn fill_undo(shared: &Shared, conn: &mut Conn) {
    let make = format!(
        "CREATE TABLE mix.undo (id INT PRIMARY KEY, v VARCHAR(1200)) ENGINE=InnoDB AS \
         SELECT seq id, REPEAT(MD5(CONCAT(seq)), 34) v FROM {}",
        shared.sequence(UNDO_ROWS)
    );
    if let Err(error) = conn.query_drop("DROP TABLE IF EXISTS mix.undo") {
        return shared.problem(format!("undo: {error}"));
    }
    let statements = [make, "UPDATE mix.undo SET v = REVERSE(v)".to_owned()];
    let mut turn = 0;
    while !shared.stopped() {
        let sql = &statements[turn.min(1)];
        turn += 1;
        match conn.query_drop(sql) {
            Ok(()) => shared.done("undo"),
            Err(error) => {
                if !shared.may_meet("undo", CONFLICTS, sql, &error) {
                    return;
                }
            }
        }
        shared.rest(REST);
    }
}

pub(super) fn resize_log(shared: &Shared, conn: &mut Conn) {
    let variable = match shared.version.is_mysql() {
        true => "innodb_redo_log_capacity",
        false => "innodb_log_file_size",
    };
    let size: Option<u64> = match conn.query_first(format!("SELECT @@{variable}")) {
        Ok(size) => size,
        Err(error) => return shared.problem(format!("resize: {error}")),
    };
    let size = size.unwrap_or(0);
    let mut turn = 0;
    while !shared.stopped() {
        shared.rest(REST);
        turn += 1;
        let sql = format!("SET GLOBAL {variable} = {}", size + size * (turn % 2));
        match conn.query_drop(&sql) {
            Ok(()) => shared.done("resize"),
            Err(error) => {
                if !shared.may_meet("resize", RESIZES, &sql, &error) {
                    return;
                }
            }
        }
    }
}
