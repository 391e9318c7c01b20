//! Registers with the server as a reader of its redo log, so that it keeps files that were not read
//! yet.
//!
//! A registration is its connection's: it ends with it, whether by us, by our death, or by the
//! server, which drops a connection that is silent for `SILENCE_SECONDS`. So a donor that is frozen
//! holds up writers, who need room in the log, for no longer than that.

use marcot_common::failure::Failure;

use crate::innodb::server::{Session, SqlError};

/// After how many seconds of silence the server ends the registration. The follower advances it
/// several times a second.
const SILENCE_SECONDS: u32 = 5;

/// Registers on this connection. False where the server has no such function, or it is in use: then
/// the log is followed all the same, and an overrun is closed by pages.
pub(in crate::innodb) fn register(session: &mut Session) -> Result<bool, Failure> {
    let settings = format!("SET SESSION wait_timeout={SILENCE_SECONDS}");
    session.execute(&settings).map_err(|e| e.failure("follow the redo log"))?;
    match session.row("SELECT innodb_redo_log_consumer_register()") {
        Ok(Some(row)) if row.text(0) == "0" => Ok(true),
        Ok(_) => {
            tracing::warn!("the server's redo log has another consumer; it is followed without");
            Ok(false)
        }
        Err(error @ SqlError::Lost(_)) => Err(error.failure("register a redo log consumer")),
        Err(error) => {
            tracing::warn!(%error, "no redo log consumer could be registered; it is followed without");
            Ok(false)
        }
    }
}

/// Says that the log was read up to `lsn`.
pub(in crate::innodb) fn advance(session: &mut Session, lsn: u64) -> Result<(), SqlError> {
    // It answers 1 for an LSN that is not beyond the last one: nothing is to be done then.
    session.row(&format!("SELECT innodb_redo_log_consumer_advance({lsn})")).map(drop)
}
