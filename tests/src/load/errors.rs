//! Errors of the server that a part of the load may meet: each has a name and a reason, and is
//! counted. Whatever is not named here fails the run.

use super::{Shared, lock};

/// An error that may be met.
pub(super) struct Expected {
    code: u16,
    name: &'static str,
}

/// Two transactions that want the same rows: the server ends one of them, its client tries again.
pub(super) const CONFLICTS: &[Expected] = &[
    Expected { code: 1205, name: "ER_LOCK_WAIT_TIMEOUT" },
    Expected { code: 1213, name: "ER_LOCK_DEADLOCK" },
    // innodb_snapshot_isolation, on by default in 11.8.
    Expected { code: 1020, name: "ER_CHECKREAD" },
];

/// As `CONFLICTS`; and a table that was changed by DDL between a transaction's begin and its first
/// look at it.
pub(super) const CHANGES: &[Expected] = &[
    Expected { code: 1205, name: "ER_LOCK_WAIT_TIMEOUT" },
    Expected { code: 1213, name: "ER_LOCK_DEADLOCK" },
    Expected { code: 1020, name: "ER_CHECKREAD" },
    Expected { code: 1412, name: "ER_TABLE_DEF_CHANGED" },
];

/// Of a resize of the redo log: the one before it is not through.
pub(super) const RESIZES: &[Expected] = &[Expected { code: 1235, name: "ER_NOT_SUPPORTED_YET" }];

/// What only knows its own tables and takes no lock for long may meet nothing.
pub(super) const NONE: &[Expected] = &[];

impl Shared {
    /// Counts an error that is expected of this part; any other one is a problem. Whether the part
    /// may go on.
    pub(super) fn may_meet(
        &self,
        part: &str,
        expected: &[Expected],
        sql: &str,
        error: &mysql::Error,
    ) -> bool {
        if let mysql::Error::MySqlError(e) = error
            && let Some(known) = expected.iter().find(|known| known.code == e.code)
        {
            *lock(&self.met).entry(format!("{part}: {}", known.name)).or_default() += 1;
            return true;
        }
        self.problem(format!("{part}: {sql:.200}: {error}"));
        false
    }
}
