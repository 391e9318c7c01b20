//! What a peer costs a daemon: memory, descriptors, and time until all of it is given back.

use std::time::{Duration, Instant};

use crate::{process::Daemon, wait_for};

/// Most memory that a hostile peer may cost: some buffers for each of a clone's streams.
pub const GROWTH_BYTES_MAX: u64 = 32 << 20;

/// A measurement that has begun.
#[derive(Debug)]
pub struct Watch<'a> {
    daemon: &'a Daemon,
    resting_bytes: u64,
    descriptors: usize,
    begun: Instant,
}

impl<'a> Watch<'a> {
    /// Begins, with the daemon at rest: what it holds now is what it may hold at the end.
    #[must_use]
    pub fn begin(daemon: &'a Daemon) -> Self {
        daemon.forget_peak_rss();
        Self {
            daemon,
            resting_bytes: daemon.peak_rss_bytes(),
            descriptors: daemon.descriptors(),
            begun: Instant::now(),
        }
    }

    /// Asserts that it took no longer than `bound`, no more memory than there is for hostile peers,
    /// and that every descriptor is given back. Returns how many bytes it grew by at the most.
    #[track_caller]
    pub fn assert_harmless(self, what: &str, bound: Duration) -> u64 {
        let took = self.begun.elapsed();
        assert!(took <= bound, "{what} took {took:?}, at most {bound:?} are allowed");
        let grown = self.daemon.peak_rss_bytes().saturating_sub(self.resting_bytes);
        assert!(grown <= GROWTH_BYTES_MAX, "{what} cost {} KiB of memory", grown >> 10);
        wait_for(&format!("the descriptors of {what} to be closed"), || {
            (self.daemon.descriptors() <= self.descriptors).then_some(())
        });
        grown
    }
}
