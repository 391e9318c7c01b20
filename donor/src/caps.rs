//! What all clones together may take of this host.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use marcot_common::pace::Pace;

/// Caps of bytes per second.
#[derive(Debug, Default)]
pub struct Caps {
    data: Pace,
    network: Pace,
    throttled_nanoseconds: AtomicU64,
}

impl Caps {
    /// Bytes of data and of payload per second; zero: no limit.
    #[must_use]
    pub fn new(data: u64, network: u64) -> Self {
        Self { data: Pace::new(data), network: Pace::new(network), ..Self::default() }
    }

    /// Waits after a chunk has been read, before it is sent; returns early once `stops`.
    pub fn pass_blocking(&self, data: u64, network: u64, stops: impl Fn() -> bool) {
        let waited =
            self.data.pass_blocking(data, &stops) + self.network.pass_blocking(network, &stops);
        let nanoseconds = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
        self.throttled_nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Bytes of data and of payload per second; zero: no limit.
    #[must_use]
    pub fn bytes_per_second(&self) -> (u64, u64) {
        (self.data.bytes_per_second(), self.network.bytes_per_second())
    }

    /// How long calls have waited, all together.
    #[must_use]
    pub fn throttled(&self) -> Duration {
        Duration::from_nanos(self.throttled_nanoseconds.load(Ordering::Relaxed))
    }
}
