//! How an advance gets on: what counts is what the donor has looked at, not that it says so.

use std::time::{Duration, Instant};

use marcot_common::failure::Failure;
use tonic::Code;

use crate::retry::Patience;

/// Longest advance, all its calls together: a donor looks at its directory once, and one of a hundred
/// million files, or 50 TiB at 600 MB/s, takes a day.
pub(super) const ADVANCE_MAX: Duration = Duration::from_secs(24 * 3600);

/// Most words of progress in one advance: a donor of Marcot's sends one in 2 s, so 43,200 in a day.
pub(super) const WORDS_MAX: u32 = 500_000;

/// What all calls of one advance have brought.
#[derive(Debug)]
pub(super) struct AdvanceWatch {
    limit: Duration,
    begun: Instant,
    words: u32,
    /// Most entries that any call has told.
    furthest: Option<u64>,
}

/// What one of its calls has brought.
#[derive(Debug)]
pub(super) struct CallWatch {
    begun: Instant,
    moved: Instant,
    entries: Option<u64>,
}

impl AdvanceWatch {
    /// Nothing is known yet; `limit` is for how long it may stand still.
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, begun: Instant::now(), words: 0, furthest: None }
    }

    /// Begins a call.
    pub(super) fn call(&self) -> CallWatch {
        let now = Instant::now();
        CallWatch { begun: now, moved: now, entries: None }
    }

    /// For how long the next word of a call may be waited.
    pub(super) fn left(&self, call: &CallWatch) -> Duration {
        let whole = ADVANCE_MAX.saturating_sub(self.begun.elapsed());
        self.limit.saturating_sub(call.moved.elapsed()).min(whole)
    }

    /// Takes note of a word of progress.
    pub(super) fn word(
        &mut self,
        call: &mut CallWatch,
        entries: u64,
        patience: &mut Patience<'_>,
    ) -> Result<(), Failure> {
        self.words += 1;
        if self.words > WORDS_MAX {
            return Err(Failure::peer_misbehaved(format!(
                "AdvanceStage: more than {WORDS_MAX} words of progress in one advance"
            )));
        }
        if call.entries.replace(entries) != Some(entries) {
            call.moved = Instant::now();
            // A call that was made again begins anew: it counts once it gets further than the one
            // before, or lives longer.
            let is_further = self.furthest.is_none_or(|furthest| entries > furthest);
            if is_further || call.begun.elapsed() > self.limit {
                patience.progress();
            }
            self.furthest = self.furthest.max(Some(entries));
        }
        Ok(())
    }

    /// Whether the whole advance has taken too long.
    pub(super) fn check_whole(&self) -> Result<(), Failure> {
        if self.begun.elapsed() < ADVANCE_MAX {
            return Ok(());
        }
        let text = format!(
            "AdvanceStage: {} entries were looked at in {} h, as long as one advance may take",
            self.furthest.unwrap_or(0),
            ADVANCE_MAX.as_secs() / 3600
        );
        Err(Failure::new(Code::DeadlineExceeded, "ADVANCE_TOO_LONG", text).mysql(1159).from_donor())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::retry::Retries;

    /// Guards an advance against words without an end, and against a day: a donor that counts up and
    /// down moves for ever.
    #[test]
    fn an_advance_ends_after_so_many_words_and_after_a_day() {
        let retries = Retries::default();
        let mut patience = Patience::new(&retries, Duration::from_secs(5));
        let mut watch = AdvanceWatch::new(Duration::from_secs(60));
        let mut call = watch.call();
        for word in 0..WORDS_MAX {
            watch.word(&mut call, u64::from(word % 2), &mut patience).unwrap();
        }
        let failure = watch.word(&mut call, 7, &mut patience).unwrap_err();
        assert_eq!(failure.reason, "PEER_MISBEHAVED");
        assert!(failure.message.contains("more than 500000 words"), "{failure}");

        watch.check_whole().unwrap();
        assert!(watch.left(&call) > Duration::from_secs(50));
        let Some(yesterday) = Instant::now().checked_sub(ADVANCE_MAX) else { return };
        watch.begun = yesterday;
        assert_eq!(watch.left(&call), Duration::ZERO);
        let failure = watch.check_whole().unwrap_err();
        assert_eq!((&*failure.reason, failure.mysql_error), ("ADVANCE_TOO_LONG", Some(3862)));
    }
}
