//! The rule by which clones give way: quickly back, slowly on. Pure.

use std::time::Duration;

/// Least rate: a clone that stands still holds the server's redo back, which is no kindness.
const RATE_MIN: u64 = 1 << 20;

/// What is added to a limit each time that commits are quick, beside a tenth of it.
const RATE_STEP: u64 = 1 << 20;

/// A limit, and what it goes by.
#[derive(Debug)]
pub(super) struct BackOff {
    bound: Duration,
    limit: Option<u64>,
}

impl BackOff {
    /// No limit; commits may take `bound`.
    pub(super) fn new(bound: Duration) -> Self {
        Self { bound, limit: None }
    }

    /// The limit in force, bytes per second.
    pub(super) fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// The limit from now on: commits take `latency`, clones read `rate` bytes per second.
    pub(super) fn next(&mut self, latency: Duration, rate: u64) -> Option<u64> {
        if latency > self.bound {
            // Of what they really read: a limit far above it would change nothing.
            let present = self.limit.map_or(rate, |limit| limit.min(rate.max(RATE_MIN)));
            self.limit = Some((present / 10 * 7).max(RATE_MIN));
        } else if latency < self.bound / 5 * 4
            && let Some(limit) = self.limit
        {
            let next = limit.saturating_add(limit / 10).saturating_add(RATE_STEP);
            // Nobody comes near it.
            self.limit = (next < rate.saturating_mul(4).max(64 * RATE_MIN)).then_some(next);
        }
        self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const BOUND: Duration = Duration::from_millis(10);
    const QUICK: Duration = Duration::from_millis(2);
    const SLOW: Duration = Duration::from_millis(30);

    /// Guards the server: while commits are slow the rate falls, by a share of what is read, down to
    /// its least and no further.
    #[test]
    fn slow_commits_bring_the_rate_down_to_its_least() {
        let mut back_off = BackOff::new(BOUND);
        assert_eq!(back_off.next(QUICK, 500 * MIB), None);
        assert_eq!(back_off.next(SLOW, 500 * MIB), Some(500 * MIB / 10 * 7));
        let mut rate = 350 * MIB;
        for _ in 0..40 {
            let limit = back_off.next(SLOW, rate).unwrap();
            assert!(limit <= rate.max(RATE_MIN), "{limit} of {rate}");
            rate = limit;
        }
        assert_eq!(rate, RATE_MIN);
    }

    /// Guards the clone: quick commits give the rate back, and the limit goes once nobody comes near
    /// it. Between quick and slow it stays.
    #[test]
    fn quick_commits_give_the_rate_back() {
        let mut back_off = BackOff::new(BOUND);
        let low = back_off.next(SLOW, 10 * MIB).unwrap();
        assert_eq!(back_off.next(BOUND / 10 * 9, low), Some(low));
        let mut last = low;
        let lifted = (0..200).any(|_| match back_off.next(QUICK, last.min(100 * MIB)) {
            Some(limit) => {
                assert!(limit > last, "{limit} after {last}");
                last = limit;
                false
            }
            None => true,
        });
        assert!(lifted, "still limited to {last}");
    }
}
