//! Inserts, updates and deletes on tables with secondary indexes and long columns, and on tables
//! without transactions. Of the latter, rows with numbers of their own and counters show a copy of a
//! wrong moment: a replica that applies a statement twice has a row or a count too many.

use std::time::Duration;

use mysql::{Conn, prelude::Queryable as _};

use super::{Random, Shared, errors::CHANGES};

/// Rests for `pause` after each statement.
pub(super) fn change_rows(shared: &Shared, conn: &mut Conn, pause: Duration) {
    let mut random = Random(99);
    while !shared.stopped() {
        let k = random.below(1000);
        let sql = match random.below(13) {
            0..=2 => format!(
                "INSERT INTO mix.wide (k, t, b) VALUES ({k}, REPEAT(CHAR(65 + {k} % 26), {k} % 200), \
                 REPEAT(MD5(CONCAT({k})), {}))",
                random.below(900)
            ),
            3 => format!("UPDATE mix.wide SET k = k + 1, t = MD5(CONCAT(k)) WHERE k = {k} LIMIT 5"),
            4 => format!("DELETE FROM mix.wide WHERE k = {k} LIMIT 3"),
            5 => format!(
                "UPDATE mix.bulk SET v = REPEAT(MD5(CONCAT(RAND())), 34) WHERE id = {}",
                random.below(50_000)
            ),
            6 => format!("REPLACE INTO mix.aria VALUES ({k}, MD5(CONCAT({k})))"),
            7 => format!("REPLACE INTO mix.isam VALUES ({k}, MD5(CONCAT({k})))"),
            8 => format!("INSERT INTO mix.aria_rows (v) VALUES (MD5(CONCAT({k})))"),
            9 => format!("INSERT INTO mix.isam_rows (v) VALUES (MD5(CONCAT({k})))"),
            10 => format!("INSERT INTO mix.csv VALUES ({k}, MD5(CONCAT({k})))"),
            11 => "UPDATE mix.aria_count SET n = n + 1".to_owned(),
            _ => "UPDATE mix.isam_count SET n = n + 1".to_owned(),
        };
        if let Err(error) = conn.query_drop(&sql)
            && !shared.may_meet("mix", CHANGES, &sql, &error)
        {
            return;
        }
        if !pause.is_zero() {
            std::thread::park_timeout(pause);
        }
    }
}
