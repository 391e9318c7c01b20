//! What all clones together may take of this host.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use marcot_common::pace::Pace;

pub mod follow;

/// Caps of bytes per second.
#[derive(Debug, Default)]
pub struct Caps {
    data: Pace,
    network: Pace,
    /// While clones give way to the server.
    given_way: Pace,
    throttled_nanoseconds: AtomicU64,
    data_bytes: AtomicU64,
}

impl Caps {
    /// Bytes of data and of payload per second; zero: no limit.
    #[must_use]
    pub fn new(data: u64, network: u64) -> Self {
        Self { data: Pace::new(data), network: Pace::new(network), ..Self::default() }
    }

    /// Changes them, for calls that wait as well.
    pub fn set(&self, data: u64, network: u64) {
        self.data.set(data);
        self.network.set(network);
    }

    /// Waits after a chunk has been read, before it is sent; returns early once `stops`.
    pub fn pass_blocking(&self, data: u64, network: u64, stops: impl Fn() -> bool) {
        self.data_bytes.fetch_add(data, Ordering::Relaxed);
        let waited =
            self.data.pass_blocking(data, &stops) + self.network.pass_blocking(network, &stops);
        let waited = waited + self.given_way.pass_blocking(data, &stops);
        let nanoseconds = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
        self.throttled_nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Clones read no more than this, bytes per second, beside the caps; zero: no limit.
    pub fn give_way(&self, bytes_per_second: u64) {
        if self.given_way.bytes_per_second() != bytes_per_second {
            self.given_way.set(bytes_per_second);
        }
    }

    /// Bytes of data and of payload per second; zero: no limit.
    #[must_use]
    pub fn bytes_per_second(&self) -> (u64, u64) {
        (self.data.bytes_per_second(), self.network.bytes_per_second())
    }

    /// Data that clones have read since the start.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes.load(Ordering::Relaxed)
    }

    /// How long calls have waited, all together.
    #[must_use]
    pub fn throttled(&self) -> Duration {
        Duration::from_nanos(self.throttled_nanoseconds.load(Ordering::Relaxed))
    }
}
