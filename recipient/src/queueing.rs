//! Waiting for a place on a donor that has none free.

use std::time::{Duration, Instant};

use marcot_common::failure::Failure;

use crate::job::CloneJob;

/// Longest wait of one call: so soon does a lost connection show, and another place in the queue.
const CALL_MAX: Duration = Duration::from_secs(20);

/// Longest wait of the first call: a place in the queue is told with its end.
const FIRST_CALL_MAX: Duration = Duration::from_secs(1);

/// Least time between two calls, whatever the donor answers: well within what it keeps a turn for.
const PAUSE: Duration = Duration::from_secs(1);

/// A clone that waits for its turn, within a limit.
pub struct Queueing<'a> {
    limit: Duration,
    begun: Instant,
    job: Option<&'a CloneJob>,
}

impl<'a> Queueing<'a> {
    /// Nothing has been refused yet; zero: a full donor is not waited for.
    #[must_use]
    pub fn new(limit: Duration, job: Option<&'a CloneJob>) -> Self {
        Self { limit, begun: Instant::now(), job }
    }

    /// How long the next call may wait at the donor; `None`: not at all.
    #[must_use]
    pub fn call(&self) -> Option<Duration> {
        let left = self.limit.saturating_sub(self.begun.elapsed());
        let is_first = self.begun.elapsed() < FIRST_CALL_MAX;
        let most = if is_first { FIRST_CALL_MAX } else { CALL_MAX };
        Some(left.min(most)).filter(|wait| !wait.is_zero())
    }

    /// Whether the donor has said that there is a queue, and there is time to wait in it.
    #[must_use]
    pub fn waits_on(&self, failure: &Failure) -> bool {
        let number = |key: &str| failure.metadata.get(key).and_then(|n| n.parse::<u32>().ok());
        let (Some(place), Some(of)) = (number("queue_place"), number("queue_length")) else {
            return false;
        };
        if failure.reason != "SNAPSHOT_LIMIT" || self.call().is_none() {
            return false;
        }
        if let Some(job) = self.job {
            job.status.set_queued(Some(format!(
                "waits for a place on the donor, as number {place} of {of}"
            )));
        }
        true
    }

    /// Between two calls.
    pub async fn pause(&self) {
        tokio::time::sleep(PAUSE).await;
    }
}

impl Drop for Queueing<'_> {
    fn drop(&mut self) {
        if let Some(job) = self.job {
            job.status.set_queued(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn refusal(place: &str) -> Failure {
        Failure::new(Code::ResourceExhausted, "SNAPSHOT_LIMIT", "full")
            .with("queue_place", place)
            .with("queue_length", 3)
    }

    /// Guards the end of a clone that a full donor never serves, and one whose donor has no queue.
    #[test]
    fn a_place_is_waited_for_within_the_limit_and_where_there_is_a_queue() {
        let queueing = Queueing::new(Duration::from_secs(60), None);
        assert_eq!(queueing.call(), Some(FIRST_CALL_MAX));
        assert!(queueing.waits_on(&refusal("2")));
        assert!(!queueing.waits_on(&refusal("soon")));
        let full = Failure::new(Code::ResourceExhausted, "SNAPSHOT_LIMIT", "full");
        assert!(!queueing.waits_on(&full));
        let none = Queueing::new(Duration::ZERO, None);
        assert_eq!(none.call(), None);
        assert!(!none.waits_on(&refusal("1")));
        let short = Queueing::new(Duration::from_millis(1), None);
        std::thread::sleep(Duration::from_millis(2));
        assert!(!short.waits_on(&refusal("1")));
    }
}
