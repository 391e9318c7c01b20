//! Waiting until no later change can carry a time that was already listed.
//!
//! Inode times come from a coarse clock, so a file written again in the same tick in which it was
//! listed looks untouched (git calls it "racily clean"). Nothing is read before the clock has
//! left that tick: what such a write left is then what is read, and any later write shows.
//!
//! A file server whose clock stands still, or a file system whose times are coarser than one
//! second, is beyond this.

use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_getres, clock_gettime};

/// Longest wait for a tick: some kernels tick 100 times a second, and two ticks are waited for.
const WAIT_MAX: Duration = Duration::from_millis(20);

/// Waits until the times of inodes are past all that a walk ending now can have seen.
///
/// `newest_whole_second` is the newest ctime without a fraction: a sign of a file system whose
/// times are whole seconds (ext4 with small inodes), where the tick is a second.
pub(crate) fn settle(newest_whole_second: i64) {
    let begun = now();
    let tick = clock_getres(ClockId::RealtimeCoarse);
    let mut wait = (2 * nanoseconds(tick)).min(WAIT_MAX.as_nanos());
    if newest_whole_second == begun.tv_sec {
        wait += 1_000_000_000 - nanoseconds(begun) % 1_000_000_000;
    }
    let mut left = u64::try_from(wait).unwrap_or(u64::MAX);
    loop {
        std::thread::sleep(Duration::from_nanos(left));
        let now = nanoseconds(now());
        let end = nanoseconds(begun) + wait;
        // A clock set back would keep us: the bound is what has been slept.
        if now >= end || now < nanoseconds(begun) {
            return;
        }
        left = u64::try_from(end - now).unwrap_or(0).max(100_000);
    }
}

/// Whether every write from now on gives a file a later ctime than this one. A whole second may be
/// of a file system that has no finer times.
pub(crate) fn is_past(time: (i64, u32)) -> bool {
    let now = now();
    is_before(time, (now.tv_sec, u32::try_from(now.tv_nsec).unwrap_or(0)))
}

fn is_before((seconds, nanos): (i64, u32), now: (i64, u32)) -> bool {
    seconds < now.0 || (nanos != 0 && (seconds, nanos) < now)
}

fn now() -> Timespec {
    clock_gettime(ClockId::RealtimeCoarse)
}

fn nanoseconds(t: Timespec) -> u128 {
    let seconds = u128::try_from(t.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u128::try_from(t.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards the wait itself: without it the coarse clock stands where it stood.
    #[test]
    fn the_coarse_clock_has_moved_on_afterwards() {
        let before = nanoseconds(now());
        settle(0);
        let tick = nanoseconds(clock_getres(ClockId::RealtimeCoarse));
        assert!(nanoseconds(now()) > before + tick);
    }

    /// Guards files that are read in the tick of their last write, which a later one in it does not
    /// change.
    #[test]
    fn a_time_of_this_tick_is_not_past() {
        let now = (100, 500);
        assert!(is_before((99, 0), now) && is_before((99, 999), now) && is_before((100, 499), now));
        assert!(!is_before((100, 500), now) && !is_before((100, 501), now));
        assert!(!is_before((101, 0), now));
        // Of a file system that knows whole seconds.
        assert!(!is_before((100, 0), now));
    }

    /// Guards file systems with whole seconds: without the rule the same second goes on.
    #[test]
    fn whole_seconds_are_waited_out() {
        let before = now().tv_sec;
        settle(before);
        assert!(now().tv_sec > before);
    }
}
