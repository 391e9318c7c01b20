//! A rate of bytes that many wait for together, and that can be changed while they wait.
//!
//! Who has moved bytes waits until time has paid for them, in the order of arrival. Time that nobody
//! used is credit for `CREDIT` at the most, so that a wait that ends late costs no rate.

use std::{
    future::Future,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use crate::config::parse_bytes;

/// Least rate: at it a chunk of 1 MiB waits for 16 s, well within every time-out of a call.
pub const BYTES_PER_SECOND_MIN: u64 = 64 << 10;

/// Reads a rate in bytes per second: 0 for no limit, or at least `BYTES_PER_SECOND_MIN`.
pub fn parse_bandwidth(text: &str) -> Result<u64, String> {
    let rate = parse_bytes(text).map_err(|e| e.to_string())?;
    if (1..BYTES_PER_SECOND_MIN).contains(&rate) {
        return Err(format!(
            "{rate} bytes per second are too few; at least 64KiB are needed, and 0 is no limit"
        ));
    }
    Ok(rate)
}

/// Timers wake up to some milliseconds late; of a clone of ten seconds this is a hundredth.
const CREDIT: Duration = Duration::from_millis(100);

/// Between two looks of a thread that waits: whether it is to stop, or the rate has changed.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// A rate.
#[derive(Debug)]
pub struct Pace {
    account: Mutex<Account>,
    changed: Notify,
}

#[derive(Debug)]
struct Account {
    /// Zero: no limit.
    bytes_per_second: u64,
    /// Bytes that somebody has moved so far.
    moved: u64,
    /// Bytes that time has paid for by `at`.
    paid: f64,
    at: Instant,
}

impl Account {
    /// Brings `paid` up to `now`.
    fn settle(&mut self, now: Instant) {
        let rate = self.bytes_per_second as f64;
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * rate;
        self.paid = (self.paid + earned).min(self.moved as f64 + CREDIT.as_secs_f64() * rate);
        self.at = now;
    }

    /// How long until the bytes up to `ticket` are paid for; `None` when they are.
    fn wait(&mut self, ticket: u64, now: Instant) -> Option<Duration> {
        if self.bytes_per_second == 0 {
            return None;
        }
        self.settle(now);
        let due = ticket as f64 - self.paid;
        (due > 0.0).then(|| Duration::from_secs_f64(due / self.bytes_per_second as f64))
    }
}

impl Default for Pace {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Pace {
    /// A rate in bytes per second; zero: no limit.
    #[must_use]
    pub fn new(bytes_per_second: u64) -> Self {
        let account = Account { bytes_per_second, moved: 0, paid: 0.0, at: Instant::now() };
        Self { account: Mutex::new(account), changed: Notify::new() }
    }

    /// The rate in force, bytes per second; zero: no limit.
    #[must_use]
    pub fn bytes_per_second(&self) -> u64 {
        self.lock().bytes_per_second
    }

    /// Changes it, for those who wait as well.
    pub fn set(&self, bytes_per_second: u64) {
        let mut account = self.lock();
        if account.bytes_per_second == 0 {
            // Nothing was counted while there was no limit.
            (account.paid, account.at) = (account.moved as f64, Instant::now());
        } else {
            account.settle(Instant::now());
        }
        account.bytes_per_second = bytes_per_second;
        drop(account);
        self.changed.notify_waiters();
    }

    /// Waits until `bytes`, which have been moved, are paid for; returns how long that took.
    pub async fn pass(&self, bytes: u64) -> Duration {
        let Some(ticket) = self.ticket(bytes) else { return Duration::ZERO };
        let begin = Instant::now();
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let Some(wait) = self.lock().wait(ticket, Instant::now()) else {
                return begin.elapsed();
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = changed => {}
            }
        }
    }

    /// As `pass`, on a thread; returns early once `stops`.
    pub fn pass_blocking(&self, bytes: u64, stops: impl Fn() -> bool) -> Duration {
        let Some(ticket) = self.ticket(bytes) else { return Duration::ZERO };
        let begin = Instant::now();
        loop {
            let wait = self.lock().wait(ticket, Instant::now());
            match wait {
                Some(wait) if !stops() => std::thread::sleep(wait.min(LOOK_PAUSE)),
                _ => return begin.elapsed(),
            }
        }
    }

    /// Counts bytes; `None` while there is no limit.
    fn ticket(&self, bytes: u64) -> Option<u64> {
        let mut account = self.lock();
        if account.bytes_per_second == 0 || bytes == 0 {
            return None;
        }
        // Credit is for time before these bytes.
        account.settle(Instant::now());
        account.moved += bytes;
        Some(account.moved)
    }

    fn lock(&self) -> MutexGuard<'_, Account> {
        // Every change leaves an account that is right by itself.
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for both of two rates; returns how long that took.
pub async fn both(
    first: impl Future<Output = Duration>,
    second: impl Future<Output = Duration>,
) -> Duration {
    let (first, second) = tokio::join!(first, second);
    first.max(second)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn account(rate: u64) -> Account {
        Account { bytes_per_second: rate, moved: 0, paid: 0.0, at: Instant::now() }
    }

    /// Guards the rate: over any run of pieces, what has passed is what time has paid for.
    #[test]
    fn pieces_of_any_size_pass_at_the_rate() {
        let rate = 1 << 20;
        let mut account = account(rate);
        let begin = account.at;
        let mut now = begin;
        for piece in [1 << 20, 5, 300_000, 7 << 20, 1, 64 << 10] {
            account.settle(now);
            account.moved += piece;
            let ticket = account.moved;
            while let Some(wait) = account.wait(ticket, now) {
                // A timer that wakes late by 3 ms.
                now += wait + Duration::from_millis(3);
            }
        }
        let expected = account.moved as f64 / rate as f64;
        let took = (now - begin).as_secs_f64();
        assert!((took - expected).abs() < 0.02 * expected, "{took} s instead of {expected}");
    }

    /// Guards against a burst after a rest: what was not used is lost, but for `CREDIT`.
    #[test]
    fn a_rest_saves_no_more_than_the_credit() {
        let mut account = account(1000);
        let later = account.at + Duration::from_secs(3600);
        account.settle(later);
        account.moved += 1100;
        let wait = account.wait(1100, later).expect("not all of it is paid for");
        assert!((wait.as_secs_f64() - 1.0).abs() < 0.01, "{wait:?}");
    }

    #[test]
    fn a_rate_that_is_too_low_is_refused() {
        assert_eq!(parse_bandwidth("0"), Ok(0));
        assert_eq!(parse_bandwidth("5MiB"), Ok(5 << 20));
        assert_eq!(parse_bandwidth("64KiB"), Ok(BYTES_PER_SECOND_MIN));
        assert!(parse_bandwidth("65535").unwrap_err().starts_with("65535 bytes per second"));
    }

    #[tokio::test]
    async fn without_a_limit_nobody_waits() {
        let pace = Pace::new(0);
        assert_eq!(pace.pass(1 << 40).await, Duration::ZERO);
        assert_eq!(pace.pass_blocking(1 << 40, || false), Duration::ZERO);
    }

    /// Guards `set`: who waits at the old rate goes on at the new one.
    #[tokio::test(start_paused = true)]
    async fn a_change_is_felt_by_those_who_wait() {
        let pace = Arc::new(Pace::new(BYTES_PER_SECOND_MIN));
        let waits = tokio::spawn({
            let pace = Arc::clone(&pace);
            async move { pace.pass(1 << 50).await }
        });
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        pace.set(0);
        waits.await.unwrap();
        assert_eq!(pace.bytes_per_second(), 0);
    }

    #[test]
    fn a_thread_that_waits_can_be_stopped() {
        let pace = Pace::new(BYTES_PER_SECOND_MIN);
        let waited = pace.pass_blocking(1 << 50, || true);
        assert!(waited < Duration::from_secs(10), "{waited:?}");
    }
}
