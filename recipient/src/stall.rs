//! Whether a donor gets on: one that lives and sends next to nothing stands still.
//!
//! Invariant: whatever a donor sends, and however it cuts it into calls, no more than the limit is
//! spent waiting for `PROGRESS_BYTES` of what was asked for. Time in which the recipient itself is busy, or
//! holds back, is not held against the donor.

use std::time::Duration;

use marcot_common::failure::Failure;
use tokio::time::Instant;
use tonic::Code;

/// Least that must come within the limit: with the default of 2 min some 550 bytes a second, of which
/// the slowest link that is worth a clone brings a hundred times as many.
pub const PROGRESS_BYTES: u64 = 64 << 10;

/// What a range counts for, however few bytes it has: a block, for a disk reads no less to find it.
pub const RANGE_BYTES: u64 = 4 << 10;

/// How one stream, list or advance gets on.
#[derive(Debug)]
pub struct Pulse {
    limit: Duration,
    waited: Duration,
    bytes: u64,
    has_moved: bool,
}

impl Pulse {
    /// Nothing has come yet.
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        Self { limit, waited: Duration::ZERO, bytes: 0, has_moved: false }
    }

    /// Waits for the donor, for what is left of the limit; `what` begins the failure's text.
    pub async fn wait<T>(
        &mut self,
        what: &str,
        answer: impl Future<Output = T>,
    ) -> Result<T, Failure> {
        let left = self.limit.saturating_sub(self.waited);
        let begun = Instant::now();
        // What is there already is taken, unless the time is over: else a flood of nothing that is
        // always there would be waited for without an end.
        let answer = match left.is_zero() {
            true => None,
            false => tokio::time::timeout(left, answer).await.ok(),
        };
        match answer {
            Some(answer) => {
                self.waited += begun.elapsed();
                Ok(answer)
            }
            None => Err(self.stalled(what)),
        }
    }

    /// So many bytes of what was asked for have come.
    pub fn came(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes >= PROGRESS_BYTES {
            self.moved();
        }
    }

    /// All has come that was to come.
    pub fn moved(&mut self) {
        self.begin();
        self.has_moved = true;
    }

    /// Whether it has moved since this was asked last.
    pub fn take_moved(&mut self) -> bool {
        std::mem::take(&mut self.has_moved)
    }

    fn begin(&mut self) {
        self.bytes = 0;
        self.waited = Duration::ZERO;
    }

    fn stalled(&mut self, what: &str) -> Failure {
        let text = format!(
            "{what}: {} bytes came in {:?}, at least {PROGRESS_BYTES} must (--stall-timeout)",
            self.bytes, self.limit
        );
        self.begin();
        Failure::new(Code::Unavailable, "STALLED", text).mysql(1159).from_donor()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(200);

    /// Sends `bytes` every 20 ms until it fails, or has done so 50 times.
    async fn trickle(pulse: &mut Pulse, bytes: u64) -> Result<(), Failure> {
        for _ in 0..50 {
            pulse.wait("ListFiles", tokio::time::sleep(Duration::from_millis(20))).await?;
            pulse.came(bytes);
        }
        Ok(())
    }

    /// Guards the limit against a donor that always sends something: with the time counted from the
    /// last byte it is never reached.
    #[tokio::test(start_paused = true)]
    async fn a_trickle_is_a_stall_and_a_slow_stream_is_not() {
        let mut pulse = Pulse::new(LIMIT);
        let begun = Instant::now();
        let failure = trickle(&mut pulse, 1).await.unwrap_err();
        assert_eq!((&*failure.reason, failure.mysql_error), ("STALLED", Some(3862)));
        assert!(failure.message.contains("bytes came in 200ms, at least 65536"), "{failure}");
        assert!(begun.elapsed() < LIMIT * 3, "{:?}", begun.elapsed());
        assert!(!pulse.take_moved());
        trickle(&mut pulse, PROGRESS_BYTES / 2).await.unwrap();
        assert!(pulse.take_moved());
        assert!(!pulse.take_moved());
    }

    /// Guards against empty messages that are always there: the time over, none is taken any more.
    #[tokio::test]
    async fn a_flood_of_nothing_ends() {
        let mut pulse = Pulse::new(LIMIT);
        pulse.waited = LIMIT;
        pulse.wait("ReadRanges", std::future::ready(())).await.unwrap_err();
        pulse.wait("ReadRanges", std::future::ready(())).await.unwrap();
    }
}
