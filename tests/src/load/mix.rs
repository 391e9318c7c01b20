//! Inserts, updates and deletes on tables with secondary indexes and long columns, and on tables
//! without transactions.

use mysql::{Conn, prelude::Queryable as _};

use super::{Random, Shared, errors::CHANGES};

pub(super) fn change_rows(shared: &Shared, conn: &mut Conn) {
    let mut random = Random(99);
    while !shared.stopped() {
        let k = random.below(1000);
        let sql = match random.below(8) {
            0..=2 => format!(
                "INSERT INTO mix.wide (k, t, b) VALUES ({k}, REPEAT(CHAR(65 + {k} % 26), {k} % 200), \
                 REPEAT(MD5({k}), {}))",
                random.below(900)
            ),
            3 => format!("UPDATE mix.wide SET k = k + 1, t = MD5(k) WHERE k = {k} LIMIT 5"),
            4 => format!("DELETE FROM mix.wide WHERE k = {k} LIMIT 3"),
            5 => format!(
                "UPDATE mix.bulk SET v = REPEAT(MD5(RAND()), 34) WHERE id = {}",
                random.below(50_000)
            ),
            6 => format!("REPLACE INTO mix.aria VALUES ({k}, MD5({k}))"),
            _ => format!("REPLACE INTO mix.isam VALUES ({k}, MD5({k}))"),
        };
        if let Err(error) = conn.query_drop(&sql)
            && !shared.may_meet("mix", CHANGES, &sql, &error)
        {
            return;
        }
    }
}
