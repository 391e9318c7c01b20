//! Which failures are tried again, how often, and after which pause.
//!
//! Invariants:
//! * Progress, as `stall` counts it, resets everything, and that of one stream counts for all: a clone
//!   that gets on, however slowly, never runs out of tries. What a peer sends wrong counts for each
//!   stream alone.
//! * What the network does is tried for `donor_timeout`; what a peer sends wrong a few times, for a
//!   flipped bit does not come twice and a broken peer always does.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use marcot_common::failure::Failure;
use tonic::Code;

use crate::{counts::Counts, progress::Counter};

/// clone_donor_timeout_after_network_failure, as the plugin has it.
pub const DONOR_TIMEOUT_DEFAULT: Duration = Duration::from_secs(5 * 60);

/// Its longest value, as the plugin has it.
pub const DONOR_TIMEOUT_MAX: Duration = Duration::from_secs(30 * 60);

/// Shortest time that a call must be given before it counts as standing still.
pub const STALL_TIMEOUT_MIN: Duration = Duration::from_secs(1);

/// Longest that a donor may be given to list its files: hundreds of millions, by a slow disk.
pub const OPEN_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// First pause; each later one is twice as long.
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// Longest pause: a donor that is back is found within this.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Wrong bytes in a row, without a right one between, before the peer is taken for broken.
const WRONG_MAX: u32 = 3;

/// Retries of one clone, for its status.
#[derive(Debug)]
pub struct Retries {
    /// How many there were.
    pub count: Counter,
    state: Mutex<Told>,
    begun: Instant,
    /// When something right came last, in microseconds since the begin.
    progressed: AtomicU64,
    counts: Arc<Counts>,
}

impl Default for Retries {
    fn default() -> Self {
        Self::new(&Arc::default())
    }
}

#[derive(Debug, Default)]
struct Told {
    last_cause: String,
    /// Streams and calls that wait for the donor.
    waiting: usize,
}

impl Retries {
    /// None yet; those that come count in `counts` too.
    #[must_use]
    pub fn new(counts: &Arc<Counts>) -> Self {
        Self {
            count: Counter::default(),
            state: Mutex::default(),
            begun: Instant::now(),
            progressed: AtomicU64::new(0),
            counts: Arc::clone(counts),
        }
    }

    /// Cause of the last one, and whether something waits for the donor now.
    #[must_use]
    pub fn told(&self) -> (String, bool) {
        let state = self.lock();
        (state.last_cause.clone(), state.waiting > 0)
    }

    /// Counts one.
    pub fn note(&self, failure: &Failure) {
        self.count.add(1);
        self.counts.retry(failure.label());
        self.lock().last_cause.clone_from(&failure.message);
    }

    /// When something right came last.
    #[must_use]
    pub fn progressed(&self) -> Instant {
        self.begun + Duration::from_micros(self.progressed.load(Ordering::Relaxed))
    }

    fn progress(&self) {
        let now = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.progressed.store(now, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a failure is to be met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The connection, or what lies between: try until the donor is given up.
    Network,
    /// Bytes that no right donor sends.
    Wrong,
    /// No other try ends better.
    Final,
}

fn kind_of(failure: &Failure) -> Kind {
    match failure.reason.as_ref() {
        "PEER_UNREACHABLE" | "DONOR_UNREACHABLE" | "STALLED" | "DONOR_TIMEOUT" | "CANCELLED"
        | "DEADLINE_EXCEEDED" | "PEER_ERROR" => Kind::Network,
        // A handshake that was cut, not one that was refused.
        "TLS_FAILED" if failure.code == Code::Unavailable => Kind::Network,
        // A call that was cut may hold its place until the donor has noticed.
        "READER_LIMIT" | "CALL_LIMIT" => Kind::Network,
        // Other clones of this host log in.
        "TOO_MANY_LOG_INS" => Kind::Network,
        // Cut, or at a standstill, between two steps of a log-in.
        "LOG_IN_TIMEOUT" => Kind::Network,
        // The donor is there, its database is being started again.
        "DATABASE_UNREACHABLE" | "DATABASE_LOST" => Kind::Network,
        // A call from before this service was started again still fixes the point.
        "STAGE_ADVANCING" => Kind::Network,
        "PEER_MISBEHAVED" | "CHUNK_CORRUPT" | "MESSAGE_CORRUPT" => Kind::Wrong,
        // A message of either side that was changed on its way and could not be read.
        reason if reason.starts_with("BAD_") => Kind::Wrong,
        _ => Kind::Final,
    }
}

/// Whether a clone failed since its donor could not be reached: it may be gone on with later.
#[must_use]
pub fn is_of_the_network(failure: &Failure) -> bool {
    kind_of(failure) == Kind::Network
}

/// The tries of one stream or call.
#[derive(Debug)]
pub struct Patience<'a> {
    retries: &'a Retries,
    limit: Duration,
    /// Whether a donor that refuses for now is waited for as well.
    awaits_refusals: bool,
    since: Option<Instant>,
    failed: Option<Instant>,
    pause: Duration,
    wrong: u32,
}

impl<'a> Patience<'a> {
    /// Nothing has failed yet; a donor that is gone is waited for as long as `limit`.
    #[must_use]
    pub fn new(retries: &'a Retries, limit: Duration) -> Self {
        let (since, failed, pause) = (None, None, PAUSE_MIN);
        Self { retries, limit, awaits_refusals: false, since, failed, pause, wrong: 0 }
    }

    /// A donor that is there, and says that it cannot serve at this moment, is waited for as well: for
    /// a clone that has something to lose.
    #[must_use]
    pub fn awaiting_refusals(mut self) -> Self {
        self.awaits_refusals = true;
        self
    }

    /// Something right has come, be it a byte: what was wrong before it was no habit.
    pub fn right(&mut self) {
        self.wrong = 0;
    }

    /// So much that is right has come that the donor gets on.
    pub fn progress(&mut self) {
        self.retries.progress();
        self.answered();
    }

    /// The donor has answered, if with nothing: of what others wait for that says nothing.
    pub fn answered(&mut self) {
        if self.since.take().is_some() {
            self.retries.lock().waiting -= 1;
        }
        self.pause = PAUSE_MIN;
        self.wrong = 0;
    }

    /// The pause before the next try; the failure itself when there is to be none.
    pub fn after(&mut self, failure: Failure) -> Result<Duration, Failure> {
        let now = Instant::now();
        self.retries.counts.fail(&failure);
        let kind = match kind_of(&failure) {
            Kind::Final if self.awaits_refusals && failure.is_retryable() => Kind::Network,
            kind => kind,
        };
        if kind == Kind::Wrong {
            self.wrong += 1;
        }
        let first = self.since.is_none();
        let since = *self.since.get_or_insert(now);
        if first {
            self.retries.lock().waiting += 1;
        }
        let progressed = self.retries.progressed();
        if progressed > self.failed.replace(now).unwrap_or(now) {
            self.pause = PAUSE_MIN;
        }
        let waited = now.saturating_duration_since(since.max(progressed));
        let is_over = match kind {
            Kind::Final => true,
            // A right byte now and then between wrong ones is no clone either.
            Kind::Wrong => self.wrong >= WRONG_MAX || waited + self.pause > self.limit,
            Kind::Network => waited + self.pause > self.limit,
        };
        if is_over {
            return Err(match kind {
                Kind::Network if !self.limit.is_zero() => given_up(failure, waited),
                _ => failure,
            });
        }
        tracing::warn!(error = %failure, pause = ?self.pause, "trying again");
        self.retries.note(&failure);
        let pause = jittered(self.pause);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        Ok(pause)
    }
}

impl Drop for Patience<'_> {
    fn drop(&mut self) {
        if self.since.is_some() {
            self.retries.lock().waiting -= 1;
        }
    }
}

/// The last failure, which says how long the donor was waited for.
fn given_up(failure: Failure, waited: Duration) -> Failure {
    let message = format!(
        "{}; the donor was waited for {} s (clone_donor_timeout_after_network_failure)",
        failure.message,
        waited.as_secs()
    );
    Failure { message, code: Code::Unavailable, ..failure }
}

/// Half of a pause and a random part of the other half: streams that were cut together do not come
/// back together.
fn jittered(pause: Duration) -> Duration {
    let half = pause / 2;
    let random = u64::from(uuid::Uuid::new_v4().as_fields().0);
    half + half.mul_f64(f64::from(u32::try_from(random).unwrap_or(0)) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(reason: &'static str) -> Failure {
        Failure::new(Code::Unavailable, reason, "why")
    }

    /// Guards the bound: without it a donor that is gone for good is waited for for ever.
    #[test]
    fn a_donor_that_stays_away_is_given_up_and_one_that_comes_back_is_not() {
        let retries = Retries::default();
        let limit = Duration::from_millis(1000);
        let mut patience = Patience::new(&retries, limit);
        patience.after(failure("PEER_UNREACHABLE")).unwrap();
        assert!(retries.told().1);
        patience.progress();
        assert!(!retries.told().1);
        // Begins no earlier than what `after` counts from: a sleep may end late.
        let mut begun: Option<Instant> = None;
        let last = loop {
            let waited = begun.map_or(Duration::ZERO, |begun| begun.elapsed());
            match patience.after(failure("LOG_IN_TIMEOUT")) {
                Ok(pause) => {
                    assert!(waited + pause <= limit, "{waited:?} and {pause:?}");
                    begun.get_or_insert_with(Instant::now);
                    std::thread::sleep(pause);
                }
                Err(last) => break last,
            }
        };
        assert!(last.message.starts_with("why; the donor was waited for "), "{last}");
        assert_eq!(last.reason, "LOG_IN_TIMEOUT");
        drop(patience);
        assert!(!retries.told().1);
        assert!(retries.count.get() >= 2);
    }

    /// Guards a stream that is cut again and again before its turn comes, while others get on: the
    /// donor is there. Without the time of all streams' progress it ends the clone.
    #[test]
    fn the_progress_of_one_stream_keeps_the_others_waiting() {
        let retries = Retries::default();
        let limit = Duration::from_millis(500);
        let (mut starved, mut lucky) =
            (Patience::new(&retries, limit), Patience::new(&retries, limit));
        let begun = Instant::now();
        while begun.elapsed() < limit * 3 {
            // Right before it: a sleep that ends late is no time without progress.
            lucky.progress();
            let pause = starved.after(failure("STALLED")).unwrap();
            assert!(pause <= PAUSE_MIN, "{pause:?}");
            std::thread::sleep(pause);
        }
        let last = loop {
            match starved.after(failure("STALLED")) {
                Ok(pause) => std::thread::sleep(pause),
                Err(last) => break last,
            }
        };
        assert_eq!(last.reason, "STALLED");
    }

    #[test]
    fn wrong_bytes_are_tried_again_twice_and_other_failures_never() {
        let retries = Retries::default();
        let mut patience = Patience::new(&retries, DONOR_TIMEOUT_DEFAULT);
        for _ in 0..2 {
            patience.after(failure("PEER_MISBEHAVED")).unwrap();
        }
        let last = patience.after(failure("PEER_MISBEHAVED")).unwrap_err();
        assert_eq!((&*last.reason, &*last.message), ("PEER_MISBEHAVED", "why"));
        patience.progress();
        assert_eq!(patience.after(failure("DISK_FULL")).unwrap_err().reason, "DISK_FULL");
        patience.progress();
        patience.after(failure("CHUNK_CORRUPT")).unwrap();
        assert_eq!(retries.counts.checksum_failures.get(), 1);
        let of = |reason| retries.counts.retries.get_or_create(&[("reason", reason)]).get();
        assert_eq!((of("PEER_MISBEHAVED"), of("DISK_FULL"), of("CHUNK_CORRUPT")), (2, 0, 1));
    }

    /// Guards against a donor that sends a right byte between two wrong ones, for ever.
    #[test]
    fn wrong_bytes_with_right_ones_between_end_with_the_time() {
        let retries = Retries::default();
        let limit = Duration::from_millis(500);
        let mut patience = Patience::new(&retries, limit);
        let last = loop {
            // Pauses that double fit in three times at most.
            assert!(retries.count.get() < 8, "it goes on");
            patience.right();
            match patience.after(failure("CHUNK_CORRUPT")) {
                Ok(pause) => std::thread::sleep(pause),
                Err(last) => break last,
            }
        };
        assert_eq!(last.reason, "CHUNK_CORRUPT");
        assert!(retries.count.get() >= 1, "{}", retries.count.get());
    }

    /// Guards what is staged when another snapshot is refused for now: without it the clone ends.
    #[test]
    fn a_refusal_for_now_is_waited_for_where_that_was_asked_for() {
        let retries = Retries::default();
        let limit = Failure::new(Code::ResourceExhausted, "SNAPSHOT_LIMIT", "why");
        let limit = limit.retry_after(Duration::from_secs(10));
        let draining = failure("DRAINING");
        for refusal in [limit, draining] {
            Patience::new(&retries, DONOR_TIMEOUT_DEFAULT).after(refusal.clone()).unwrap_err();
            let mut patient = Patience::new(&retries, DONOR_TIMEOUT_DEFAULT).awaiting_refusals();
            patient.after(refusal).unwrap();
            patient.after(Failure::precondition("NO_SPACE", "why")).unwrap_err();
        }
    }

    #[test]
    fn a_timeout_of_zero_tries_nothing_again() {
        let retries = Retries::default();
        let mut patience = Patience::new(&retries, Duration::ZERO);
        let last = patience.after(failure("PEER_UNREACHABLE")).unwrap_err();
        assert_eq!(last.message, "why");
    }

    #[test]
    fn pauses_differ_and_stay_within_their_half() {
        let pauses: Vec<_> = (0..50).map(|_| jittered(PAUSE_MAX)).collect();
        assert!(pauses.iter().all(|pause| (PAUSE_MAX / 2..=PAUSE_MAX).contains(pause)));
        assert!(pauses.windows(2).any(|two| two[0] != two[1]));
    }
}
