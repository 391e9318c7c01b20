//! Whether a recipient gets on with its snapshot: one that takes next to nothing of it holds the server's redo,
//! and DDL, for nothing.
//!
//! Invariants:
//! * What counts is what leads to the end: bytes of the list that is being copied, `TIMES_COUNTED` times
//!   at most, and another list. A byte that is read for ever is none.
//! * There is no limit on a snapshot's age: one that gets on is held for as long as it takes.
//! * Time in which the donor itself is at work for the recipient counts once that has ended with nothing.

use std::time::{Duration, Instant};

use marcot_common::{entry::Totals, position::Position};

/// How often a byte of a list may count: what a cut connection loses is read again.
const TIMES_COUNTED: u64 = 2;

/// Bytes of an entry in a list, which is taken as well: a path, attributes.
const ENTRY_BYTES: u64 = 256;

/// Least that a recipient must take of its snapshot.
#[derive(Debug, Clone, Copy)]
pub struct LeastTaken {
    /// Within this (`--snapshot-idle-max`).
    pub idle: Duration,
    /// Within this while DDL waits for it (`--ddl-block-idle-max`).
    pub ddl_idle: Duration,
    /// Bytes a second, on an average over it (`--snapshot-rate-min`); 0: whatever is read will do.
    pub rate: u64,
}

impl LeastTaken {
    /// The time that counts, and the name of its option.
    #[must_use]
    pub fn window(&self, blocks_ddl: bool) -> (Duration, &'static str) {
        match blocks_ddl && self.ddl_idle < self.idle {
            true => (self.ddl_idle, "--ddl-block-idle-max"),
            false => (self.idle, "--snapshot-idle-max"),
        }
    }

    /// Bytes that must be taken within a time.
    #[must_use]
    pub fn bytes(&self, within: Duration) -> u64 {
        let bytes = u128::from(self.rate) * within.as_millis() / 1000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }
}

/// What was taken of a snapshot.
#[derive(Debug)]
pub struct Taken {
    position: Position,
    /// Since enough was taken last.
    since: Instant,
    bytes: u64,
    /// Of the list at `position`.
    counted: u64,
}

impl Taken {
    /// Nothing yet.
    #[must_use]
    pub fn new(position: Position, now: Instant) -> Self {
        Self { position, since: now, bytes: 0, counted: 0 }
    }

    /// The snapshot is at `position`: another one than before is as good as any bytes.
    pub fn at(&mut self, position: Position, now: Instant) {
        if self.position != position {
            *self = Self::new(position, now);
        }
    }

    /// So many bytes of files, holes among them, were taken of a list of `whole`; `needed` are enough.
    pub fn add(&mut self, bytes: u64, whole: &Totals, needed: u64, now: Instant) {
        // By the sizes of files, as what is taken: where they are compressed they have less on disk.
        let list = whole.size_bytes.saturating_add(whole.entries.saturating_mul(ENTRY_BYTES));
        let left = list.saturating_mul(TIMES_COUNTED).saturating_sub(self.counted);
        let bytes = bytes.min(left);
        self.counted += bytes;
        self.bytes = self.bytes.saturating_add(bytes);
        if bytes > 0 && self.bytes >= needed {
            (self.since, self.bytes) = (now, 0);
        }
    }

    /// Since when, and the bytes that were taken since then: too few.
    #[must_use]
    pub fn since(&self) -> (Instant, u64) {
        (self.since, self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: u64 = 1000;
    const WINDOW: Duration = Duration::from_secs(10);

    fn least() -> LeastTaken {
        LeastTaken { idle: WINDOW * 24, ddl_idle: WINDOW, rate: RATE }
    }

    /// Reads `bytes` each second of a list of `whole` bytes; after how many seconds it is too slow, of 1000.
    fn too_slow_after(bytes: u64, whole: u64) -> Option<u64> {
        // Files that are compressed have a part of their size on disk.
        let whole = Totals { size_bytes: whole, data_bytes: whole / 4, ..Totals::default() };
        let begun = Instant::now();
        let mut taken = Taken::new(Position::FIRST, begun);
        (1..=1000).find(|second| {
            let now = begun + Duration::from_secs(*second);
            taken.add(bytes, &whole, least().bytes(WINDOW), now);
            now - taken.since().0 >= WINDOW
        })
    }

    /// Guards the server against a recipient that reads a byte now and then, or the same bytes for ever:
    /// without the rate the first is never too slow, without the count of a list's bytes the second.
    #[test]
    fn a_byte_now_and_then_is_too_slow_and_so_are_the_same_bytes_for_ever() {
        assert_eq!(too_slow_after(1, 1 << 40), Some(10));
        assert_eq!(too_slow_after(RATE / 2, 1 << 40), Some(10));
        // Slow, and quick enough: for ever.
        assert_eq!(too_slow_after(RATE + RATE / 10, 1 << 40), None);
        // To its end, though there is less on disk.
        assert_eq!(too_slow_after(RATE + RATE / 10, 1100 * RATE), None);
        // A list of 20 s, read for ever: twice it counts, and then not.
        let ended = too_slow_after(RATE, 20 * RATE).unwrap();
        assert!((40..=60).contains(&ended), "{ended}");
    }

    #[test]
    fn another_list_begins_anew_and_ddl_has_a_shorter_time() {
        let begun = Instant::now();
        let mut taken = Taken::new(Position::FIRST, begun);
        let later = begun + WINDOW;
        taken.at(Position::FIRST, later);
        assert_eq!(taken.since(), (begun, 0));
        taken.at(Position { round: 2, ..Position::FIRST }, later);
        assert_eq!(taken.since(), (later, 0));
        assert_eq!(least().window(true), (WINDOW, "--ddl-block-idle-max"));
        assert_eq!(least().window(false), (WINDOW * 24, "--snapshot-idle-max"));
        let shorter = LeastTaken { idle: WINDOW / 2, ..least() };
        assert_eq!(shorter.window(true), (WINDOW / 2, "--snapshot-idle-max"));
        assert_eq!(least().bytes(Duration::from_millis(1500)), 1500);
    }
}
