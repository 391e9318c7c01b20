//! Money that moves between rows of two tables; the sum stays. Each transfer has its own row in the
//! ledger, in the same transaction, numbered by its writer without a gap: a copy holds exactly the
//! first n of each writer, and no fewer than were acknowledged before it began.

use std::{sync::atomic::Ordering, time::Duration};

use mysql::{Conn, prelude::Queryable as _};

use super::{Random, Shared, errors::CONFLICTS};

/// Accounts in each of the two tables.
pub const ACCOUNTS: u64 = 1000;

/// What each holds at first.
pub const HOLDS: u64 = 1000;

pub(super) fn transfer(shared: &Shared, conn: &mut Conn, writer: usize, pause: Duration) {
    let mut random = Random(writer as u64 + 1);
    let last: Option<u64> =
        match conn.query_first(format!("SELECT MAX(n) FROM bank.ledger WHERE writer={writer}")) {
            Ok(row) => row.flatten(),
            Err(error) => return shared.problem(format!("transfer: {error}")),
        };
    let mut n = last.unwrap_or(0);
    shared.acknowledged[writer].store(n, Ordering::SeqCst);
    while !shared.stopped() {
        let (from, to) = (1 + random.below(ACCOUNTS), 1 + random.below(ACCOUNTS));
        let amount = random.below(10);
        let statements = [
            "BEGIN".to_owned(),
            format!("UPDATE bank.a SET v = v - {amount} WHERE id = {from}"),
            format!("UPDATE bank.b SET v = v + {amount} WHERE id = {to}"),
            format!(
                "INSERT INTO bank.ledger VALUES ({writer}, {}, {amount}, REPEAT('x', {}))",
                n + 1,
                random.below(60)
            ),
            "COMMIT".to_owned(),
        ];
        let done = statements.iter().try_for_each(|sql| conn.query_drop(sql).map_err(|e| (sql, e)));
        match done {
            Ok(()) => {
                n += 1;
                shared.acknowledged[writer].store(n, Ordering::SeqCst);
                shared.commits.fetch_add(1, Ordering::Relaxed);
            }
            Err((sql, error)) => {
                if !shared.may_meet("transfer", CONFLICTS, sql, &error) {
                    return;
                }
                if let Err(error) = conn.query_drop("ROLLBACK") {
                    return shared.problem(format!("transfer: ROLLBACK: {error}"));
                }
            }
        }
        if !pause.is_zero() {
            std::thread::park_timeout(pause);
        }
    }
}
