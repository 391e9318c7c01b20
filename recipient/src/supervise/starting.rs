//! Whether a server has come past its start. A MariaDB that gets SIGTERM before that may hang for ever:
//! it goes on to `ready for connections`, takes none, and does not end (seen with 10.11, in half of the
//! starts that were tried). Neither another signal nor a connection gets it out of that.

use std::time::{Duration, Instant};

use super::{Status, Supervisor, output::Logged};

/// Between two questions.
const ASK_PAUSE: Duration = Duration::from_millis(250);

/// From a server's `ready for connections` to its first answer, at most: it writes the line just before
/// it begins to take any, and SIGTERM in between is as bad. One that answers later is asked in vain.
const ANSWER_AFTER_READY_MAX: Duration = Duration::from_secs(5);

/// How far the server that runs has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// It has started, or none runs; or nobody can tell.
    Over,
    /// Its log says that it is ready; it does not answer.
    Ready,
    /// Its log says that it starts, and no more; it does not answer.
    Starting,
    /// It does not answer, and its log is not to be seen.
    Unseen,
}

impl Supervisor {
    /// Waits until the server that runs has come past its start or has ended, for up to `limit`.
    /// Returns where it is then.
    pub(super) async fn wait_until_started(&self, limit: Duration) -> Phase {
        let begun = Instant::now();
        let (mut told, mut ready) = (false, None);
        loop {
            let phase = self.phase().await;
            let is_answer_due = phase == Phase::Ready
                && ready.get_or_insert_with(Instant::now).elapsed() >= ANSWER_AFTER_READY_MAX;
            if phase == Phase::Over || is_answer_due {
                return phase;
            }
            if begun.elapsed() >= limit {
                tracing::warn!(
                    phase = ?phase,
                    seconds = begun.elapsed().as_secs(),
                    "the server has not come past its start; it is stopped all the same"
                );
                return phase;
            }
            if !told {
                tracing::info!(
                    "the server is still starting: it is waited for before it is stopped"
                );
                told = true;
            }
            tokio::time::sleep(ASK_PAUSE.min(limit.saturating_sub(begun.elapsed()))).await;
        }
    }

    /// How far the server that runs has come.
    pub(super) async fn phase(&self) -> Phase {
        if !matches!(*self.status.borrow(), Status::Running(_)) {
            return Phase::Over;
        }
        let answers = self.options.health.answers().await;
        match (answers, self.output.logged()) {
            (Some(true), _) | (None, Logged::Nothing) => Phase::Over,
            (_, Logged::Ready) => Phase::Ready,
            (_, Logged::Starting) => Phase::Starting,
            (Some(false), Logged::Nothing) => Phase::Unseen,
        }
    }
}
