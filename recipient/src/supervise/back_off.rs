//! When a server that has ended by itself is started again.

use std::time::Duration;

use super::Restart;

/// First pause; each later one is twice as long.
const PAUSE_MIN: Duration = Duration::from_secs(1);

/// Longest pause: a volume or a secret that is back is found within this.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// A server that has run for so long did start: what ends it then is counted anew.
const QUIET: Duration = Duration::from_secs(60);

/// Counts the ends of a server.
#[derive(Debug)]
pub(super) struct RestartPolicy {
    restart: Restart,
    limit: Option<u32>,
    in_a_row: u32,
}

impl RestartPolicy {
    pub(super) fn new(restart: Restart, limit: Option<u32>) -> Self {
        Self { restart, limit, in_a_row: 0 }
    }

    /// The pause before the next start of a server that has ended with `code` after `ran`; `None`
    /// when there is to be none.
    pub(super) fn after(&mut self, code: u8, ran: Duration) -> Option<Duration> {
        let again = match self.restart {
            Restart::Always => true,
            Restart::OnFailure => code != 0,
            Restart::Never => false,
        };
        if ran >= QUIET {
            self.in_a_row = 0;
        }
        if !again || self.limit.is_some_and(|limit| self.in_a_row >= limit) {
            return None;
        }
        let pause = PAUSE_MIN.saturating_mul(1 << self.in_a_row.min(10)).min(PAUSE_MAX);
        self.in_a_row += 1;
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_shrink_after_a_quiet_time() {
        let mut policy = RestartPolicy::new(Restart::OnFailure, None);
        let seconds: Vec<_> =
            (0..8).map(|_| policy.after(1, Duration::ZERO).unwrap().as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(policy.after(1, QUIET).unwrap(), PAUSE_MIN);
        assert_eq!(policy.after(0, Duration::ZERO), None);
    }

    #[test]
    fn a_limit_ends_it_and_so_does_the_policy() {
        let mut policy = RestartPolicy::new(Restart::Always, Some(2));
        assert!(policy.after(0, Duration::ZERO).is_some());
        assert!(policy.after(0, Duration::ZERO).is_some());
        assert_eq!(policy.after(0, Duration::ZERO), None);
        assert_eq!(RestartPolicy::new(Restart::Never, None).after(137, Duration::ZERO), None);
    }
}
