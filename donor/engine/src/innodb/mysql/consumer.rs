//! Registers with the server as a reader of its redo log, so that it keeps files that were not read
//! yet.
//!
//! A registration is its connection's: it ends with it, whether by us, by our death, or by the
//! server, which drops a connection that is silent for `SILENCE_SECONDS`. So a donor that is frozen
//! holds up writers, who need room in the log, for no longer than that.

use std::time::{Duration, Instant};

use marcot_common::failure::Failure;

use crate::innodb::server::{Session, SqlError};

/// After how many seconds of silence the server ends the registration. The follower advances it
/// several times a second.
const SILENCE_SECONDS: u32 = 5;

/// First and longest pause before a registration is tried again. The server has room for one
/// consumer: our own of a moment ago goes within the first, another backup may hold it for hours,
/// and a try is a statement.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// The follower's registration, on the follower's connection.
#[derive(Debug)]
pub(in crate::innodb) struct Consumer {
    is_registered: bool,
    /// How far the server was told that we are.
    advanced: u64,
    pauses: Pauses,
}

impl Consumer {
    /// Registers on a connection. Where the server has no such function, or it is in use, the log is
    /// followed all the same, an overrun is closed by pages, and `advance` tries again.
    pub(in crate::innodb) fn register(session: &mut Session) -> Result<Self, Failure> {
        let mut consumer =
            Self { is_registered: false, advanced: 0, pauses: Pauses::new(Instant::now()) };
        consumer.connected(session)?;
        Ok(consumer)
    }

    /// Registers on a new connection: what the last one had has gone with it.
    pub(in crate::innodb) fn connected(&mut self, session: &mut Session) -> Result<(), Failure> {
        let settings = format!("SET SESSION wait_timeout={SILENCE_SECONDS}");
        session.execute(&settings).map_err(|e| e.failure("follow the redo log"))?;
        self.is_registered = false;
        self.try_register(session).map_err(|e| e.failure("register a redo log consumer"))
    }

    /// Fails only where the connection was lost.
    fn try_register(&mut self, session: &mut Session) -> Result<(), SqlError> {
        let why = match session.row("SELECT innodb_redo_log_consumer_register()") {
            Ok(Some(row)) if row.text(0) == "0" => {
                if self.pauses.tries > 0 {
                    tracing::info!("the redo log has this donor as its consumer now");
                }
                (self.is_registered, self.advanced) = (true, 0);
                self.pauses = Pauses::new(Instant::now());
                return Ok(());
            }
            Ok(_) => "the server's redo log has another consumer".to_owned(),
            Err(error @ SqlError::Lost(_)) => return Err(error),
            Err(error) => format!("no redo log consumer could be registered: {error}"),
        };
        // Told once: the tries that follow are of the same cause most often.
        if self.pauses.tries == 0 {
            tracing::warn!("{why}; it is followed without, and tried again");
        }
        self.pauses.failed(Instant::now());
        Ok(())
    }

    /// Says that the log was read up to `lsn`; registers first where that failed, once it is time.
    pub(in crate::innodb) fn advance(
        &mut self,
        session: &mut Session,
        lsn: u64,
    ) -> Result<(), Failure> {
        if !self.is_registered && self.pauses.is_over(Instant::now()) {
            // Who follows connects anew where it was lost.
            let _ = self.try_register(session);
        }
        if !self.is_registered || lsn == self.advanced {
            return Ok(());
        }
        self.advanced = lsn;
        // It answers 1 for an LSN that is not beyond the last one: nothing is to be done then.
        match session.row(&format!("SELECT innodb_redo_log_consumer_advance({lsn})")) {
            Ok(_) => Ok(()),
            // The registration has gone with it; `connected` makes another one.
            Err(SqlError::Lost(_)) => {
                self.is_registered = false;
                Ok(())
            }
            Err(error) => Err(error.failure("advance the redo log consumer")),
        }
    }
}

/// Pauses between tries, each twice the last.
#[derive(Debug)]
struct Pauses {
    /// How many have failed in a row.
    tries: u32,
    next: Duration,
    until: Instant,
}

impl Pauses {
    fn new(now: Instant) -> Self {
        Self { tries: 0, next: PAUSE_MIN, until: now }
    }

    fn failed(&mut self, now: Instant) {
        self.tries = self.tries.saturating_add(1);
        self.until = now + self.next;
        self.next = (self.next * 2).min(PAUSE_MAX);
    }

    fn is_over(&self, now: Instant) -> bool {
        now >= self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards both ends of the back-off: a registration that fails is tried again, soon at first, and
    /// never more than twice a minute later on.
    #[test]
    fn a_registration_is_tried_again_after_pauses_that_grow_to_a_bound() {
        let begun = Instant::now();
        let mut pauses = Pauses::new(begun);
        assert!(pauses.is_over(begun));
        let mut now = begun;
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            pauses.failed(now);
            let pause = Duration::from_secs(seconds);
            assert!(!pauses.is_over(now + pause - Duration::from_millis(1)), "{pause:?}");
            now += pause;
            assert!(pauses.is_over(now), "{pause:?}");
        }
    }
}
