//! What a MySQL server must be, and must let the account do, before a clone of it begins.

use marcot_common::failure::{Failure, Violation};
use tonic::Code;

use super::{log_files::disabled, log_status};
use crate::innodb::server::{Facts, Session};

/// Most files outside the data directory that one error names.
const OUTSIDE_MAX: usize = 20;

/// Settings that this engine cannot follow.
pub(in crate::innodb) fn problems(facts: &Facts) -> Vec<Failure> {
    let mut problems = Vec::new();
    let is_on = |name| facts.variable(name).eq_ignore_ascii_case("ON");
    if is_on("innodb_redo_log_encrypt") {
        problems.push(Failure::precondition(
            "REDO_LOG_ENCRYPTED",
            "the redo log is encrypted (innodb_redo_log_encrypt=ON): it cannot be cut at a point \
             without the server's key; switch it off, and clone again",
        ));
    }
    if is_on("binlog_encryption") {
        problems.push(Failure::precondition(
            "BINLOG_ENCRYPTED",
            "the binary log is encrypted (binlog_encryption=ON): its end decides prepared \
             transactions, and cannot be read; switch encryption off, and clone again",
        ));
    }
    problems
}

/// Fails unless the account may do all that a clone needs.
pub(in crate::innodb) fn check_privileges(session: &mut Session) -> Result<(), Failure> {
    for (sql, action) in [
        (
            "SELECT COUNT(*) FROM performance_schema.log_status",
            "read the consistent point (needs BACKUP_ADMIN, and SELECT on \
             performance_schema.log_status)",
        ),
        (
            "SELECT SPACE FROM information_schema.INNODB_TABLESPACES LIMIT 1",
            "list tablespaces (needs PROCESS)",
        ),
        ("FLUSH NO_WRITE_TO_BINLOG ENGINE LOGS", "flush the redo log (needs RELOAD)"),
    ] {
        session.rows(sql).map_err(|error| error.failure(action))?;
    }
    log_status::check_channels(session)
}

/// Fails for a server whose redo is off, or which has files elsewhere.
pub(in crate::innodb) fn check_state(session: &mut Session) -> Result<(), Failure> {
    let enabled = session
        .row("SHOW GLOBAL STATUS LIKE 'Innodb_redo_log_enabled'")
        .map_err(|e| e.failure("ask whether redo is written"))?;
    if enabled.is_some_and(|row| row.text(1) == "OFF") {
        return Err(disabled());
    }
    // Files inside are named from the data directory on.
    let rows = session
        .rows(
            "SELECT FILE_NAME, TABLESPACE_NAME FROM information_schema.FILES WHERE ENGINE = 'InnoDB' \
             AND FILE_TYPE <> 'TEMPORARY' AND FILE_NAME NOT LIKE './%'",
        )
        .map_err(|e| e.failure("list the files of tablespaces"))?;
    let outside: Vec<Violation> = rows
        .iter()
        .take(OUTSIDE_MAX)
        .map(|row| Violation {
            check: "PATH_OUTSIDE_DATA_DIRECTORY".to_owned(),
            subject: row.text(1),
            description: format!("tablespace {} is in {}", row.text(1), row.text(0)),
        })
        .collect();
    if outside.is_empty() {
        return Ok(());
    }
    let named: Vec<&str> = outside.iter().map(|v| v.description.as_str()).collect();
    let text = format!(
        "{}, which is not in the data directory: they would not be copied; move them there, and \
         clone again",
        named.join("; ")
    );
    let mut failure = Failure::new(Code::FailedPrecondition, "PATH_OUTSIDE_DATA_DIRECTORY", text);
    failure.violations = outside;
    Err(failure)
}
