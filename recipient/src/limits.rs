//! What a clone may take: bytes per second, and streams. Changed while it runs (UpdateCloneLimits).

use std::{
    future::Future,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use marcot_common::{
    failure::Failure,
    pace::{BYTES_PER_SECOND_MIN, Pace, both},
};
use marcot_proto::recipient::v1 as pb;
use tokio::sync::watch;

use crate::{
    progress::Progress,
    settings::{CONCURRENCY_DEFAULT_MAX, CONCURRENCY_MAX, default_concurrency},
};

/// Limits unless a clone asks for others.
#[derive(Debug, Clone, Copy, Default)]
pub struct LimitDefaults {
    /// Most streams; `None`: one for each core, or as many as are worth it, at most 8.
    pub concurrency: Option<usize>,
    /// Whether the number of streams is found while a clone runs.
    pub autotune: bool,
    /// Bytes of data per second; zero: no limit.
    pub data: u64,
    /// Bytes on the network per second; zero: no limit.
    pub network: u64,
}

impl LimitDefaults {
    /// Most streams, where their number is found while a clone runs and where it is not.
    #[must_use]
    pub fn most(&self, autotune: bool) -> usize {
        let unless_given = || match autotune {
            true => CONCURRENCY_DEFAULT_MAX,
            false => default_concurrency(),
        };
        self.concurrency.unwrap_or_else(unless_given)
    }
}

/// Limits of one clone.
#[derive(Debug)]
pub struct Limits {
    /// Streams that were asked for at first: large files are cut for them, also by a run that goes on.
    planned: AtomicUsize,
    asked: Mutex<Streams>,
    /// Streams that there are to be now.
    concurrency: watch::Sender<usize>,
    data: Pace,
    network: Pace,
}

/// What is asked for of streams.
#[derive(Debug, Clone, Copy)]
struct Streams {
    most: usize,
    autotune: bool,
    /// How many the donor reads for.
    served: usize,
}

impl Streams {
    /// Most that there may be.
    fn bound(self) -> usize {
        self.most.min(self.served)
    }

    /// How many there are, now that there were `now`.
    fn wanted(self, now: usize) -> usize {
        if self.autotune { now.clamp(1, self.bound()) } else { self.bound() }
    }
}

impl Default for Limits {
    /// One stream, and no limit.
    fn default() -> Self {
        Self {
            planned: AtomicUsize::new(1),
            asked: Mutex::new(Streams { most: 1, autotune: false, served: CONCURRENCY_MAX }),
            concurrency: watch::Sender::new(1),
            data: Pace::default(),
            network: Pace::default(),
        }
    }
}

impl Limits {
    /// What is asked for, and defaults for the rest.
    pub fn new(asked: &pb::CloneLimits, defaults: &LimitDefaults) -> Result<Self, Failure> {
        check(asked)?;
        let autotune = asked.autotune_concurrency.unwrap_or(defaults.autotune);
        let most = asked.concurrency_max.map_or_else(|| defaults.most(autotune), to_usize);
        let streams = Streams { most, autotune, served: CONCURRENCY_MAX };
        let limits = Self {
            planned: AtomicUsize::new(most),
            asked: Mutex::new(streams),
            concurrency: watch::Sender::new(streams.wanted(default_concurrency())),
            data: Pace::new(defaults.data),
            network: Pace::new(defaults.network),
        };
        limits.apply(asked);
        Ok(limits)
    }

    /// Changes those that are set, for streams that run.
    pub fn change(&self, asked: &pb::CloneLimits) -> Result<(), Failure> {
        check(asked)?;
        self.apply(asked);
        Ok(())
    }

    fn apply(&self, asked: &pb::CloneLimits) {
        self.set_streams(|streams| {
            streams.most = asked.concurrency_max.map_or(streams.most, to_usize);
            streams.autotune = asked.autotune_concurrency.unwrap_or(streams.autotune);
        });
        if let Some(rate) = asked.data_bytes_per_second_max {
            self.data.set(rate);
        }
        if let Some(rate) = asked.network_bytes_per_second_max {
            self.network.set(rate);
        }
    }

    /// Has no more streams than are served: another one would be refused, again and again.
    pub fn set_served(&self, streams: usize) {
        self.set_streams(|asked| asked.served = streams.max(1));
    }

    fn set_streams(&self, change: impl FnOnce(&mut Streams)) {
        let mut streams = self.asked();
        change(&mut streams);
        self.concurrency.send_if_modified(|now| {
            let wanted = streams.wanted(*now);
            std::mem::replace(now, wanted) != wanted
        });
    }

    /// Those in force.
    #[must_use]
    pub fn to_wire(&self) -> pb::CloneLimits {
        let asked = *self.asked();
        pb::CloneLimits {
            concurrency_max: u32::try_from(asked.most).ok(),
            data_bytes_per_second_max: Some(self.data.bytes_per_second()),
            network_bytes_per_second_max: Some(self.network.bytes_per_second()),
            autotune_concurrency: Some(asked.autotune),
        }
    }

    fn asked(&self) -> MutexGuard<'_, Streams> {
        // Every change is one assignment.
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Streams that large files are cut for.
    #[must_use]
    pub fn planned_streams(&self) -> usize {
        self.planned.load(Ordering::Relaxed)
    }

    /// Large files were cut for so many by an earlier run, on a host with another number of cores perhaps.
    pub fn plan_for(&self, streams: usize) {
        self.planned.store(streams.clamp(1, CONCURRENCY_MAX), Ordering::Relaxed);
    }

    /// Most streams that may be found, where their number is found while the clone runs.
    #[must_use]
    pub fn autotune_most(&self) -> Option<usize> {
        let asked = *self.asked();
        asked.autotune.then_some(asked.bound())
    }

    /// Says how many streams there are to be, where that is found.
    pub fn tune(&self, streams: usize) {
        let asked = self.asked();
        if asked.autotune {
            self.concurrency.send_replace(asked.wanted(streams));
        }
    }

    /// Streams that there are to be now.
    #[must_use]
    pub fn concurrency(&self) -> usize {
        *self.concurrency.borrow()
    }

    /// Tells of every change of the number of streams.
    #[must_use]
    pub fn watch_concurrency(&self) -> watch::Receiver<usize> {
        self.concurrency.subscribe()
    }

    /// Waits after bytes have come.
    pub async fn pass(&self, data: u64, network: u64, progress: &Progress) {
        self.count(both(self.data.pass(data), self.network.pass(network)), progress).await;
    }

    async fn count(&self, waits: impl Future<Output = Duration>, progress: &Progress) {
        progress.throttled.add(nanoseconds(waits.await));
    }

    /// As `pass`, on a thread, for data that come from this host; returns early once `stops`.
    pub fn pass_blocking(&self, data: u64, progress: &Progress, stops: impl Fn() -> bool) {
        progress.throttled.add(nanoseconds(self.data.pass_blocking(data, stops)));
    }
}

fn to_usize(streams: u32) -> usize {
    usize::try_from(streams).unwrap_or(CONCURRENCY_MAX)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Checks what a caller asks for.
fn check(asked: &pb::CloneLimits) -> Result<(), Failure> {
    let bad = |text: String| Err(Failure::invalid("BAD_LIMIT", text));
    if let Some(streams) = asked.concurrency_max
        && !(1..=CONCURRENCY_MAX).contains(&to_usize(streams))
    {
        return bad(format!("concurrency_max is {streams}, 1 to {CONCURRENCY_MAX} are allowed"));
    }
    for (name, rate) in [
        ("data_bytes_per_second_max", asked.data_bytes_per_second_max),
        ("network_bytes_per_second_max", asked.network_bytes_per_second_max),
    ] {
        if let Some(rate) = rate.filter(|rate| (1..BYTES_PER_SECOND_MIN).contains(rate)) {
            return bad(format!(
                "{name} is {rate}, at least {BYTES_PER_SECOND_MIN} bytes per second are needed; 0 is \
                 no limit"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(concurrency: u32, data: u64, network: u64) -> pb::CloneLimits {
        pb::CloneLimits {
            concurrency_max: Some(concurrency),
            data_bytes_per_second_max: Some(data),
            network_bytes_per_second_max: Some(network),
            autotune_concurrency: Some(false),
        }
    }

    #[test]
    fn what_is_not_asked_for_stays() {
        let defaults =
            LimitDefaults { concurrency: Some(4), data: 1 << 20, ..LimitDefaults::default() };
        let limits = Limits::new(&pb::CloneLimits::default(), &defaults).unwrap();
        assert_eq!(limits.to_wire(), asked(4, 1 << 20, 0));
        let change = pb::CloneLimits {
            network_bytes_per_second_max: Some(5 << 20),
            ..pb::CloneLimits::default()
        };
        limits.change(&change).unwrap();
        assert_eq!(limits.to_wire(), asked(4, 1 << 20, 5 << 20));
        limits.change(&asked(2, 0, 0)).unwrap();
        assert_eq!(limits.to_wire(), asked(2, 0, 0));
    }

    /// Guards a donor of fewer places than streams are asked for: whoever has none would ask for one
    /// until the clone's end, and count as a network that fails.
    #[test]
    fn there_are_no_more_streams_than_the_donor_reads_for() {
        let limits = Limits::new(&asked(40, 0, 0), &LimitDefaults::default()).unwrap();
        assert_eq!(limits.concurrency(), 40);
        limits.set_served(32);
        assert_eq!(limits.concurrency(), 32);
        limits.change(&asked(64, 0, 0)).unwrap();
        assert_eq!((limits.concurrency(), limits.to_wire()), (32, asked(64, 0, 0)));
        limits.change(&asked(3, 0, 0)).unwrap();
        assert_eq!(limits.concurrency(), 3);
        let autotune = pb::CloneLimits { autotune_concurrency: Some(true), ..asked(40, 0, 0) };
        limits.change(&autotune).unwrap();
        limits.tune(40);
        assert_eq!((limits.concurrency(), limits.autotune_most()), (32, Some(32)));
        limits.set_served(0);
        assert_eq!(limits.concurrency(), 1, "without a stream nothing would come");
    }

    #[test]
    fn a_limit_that_cannot_be_is_named_and_changes_nothing() {
        let limits = Limits::new(&asked(3, 0, 0), &LimitDefaults::default()).unwrap();
        for (wrong, name) in [
            (asked(0, 0, 0), "concurrency_max is 0"),
            (asked(129, 0, 0), "concurrency_max is 129"),
            (asked(2, 1, 0), "data_bytes_per_second_max is 1,"),
            (asked(2, 0, 65_535), "network_bytes_per_second_max is 65535,"),
        ] {
            let failure = limits.change(&wrong).unwrap_err();
            assert_eq!(failure.reason, "BAD_LIMIT");
            assert!(failure.message.starts_with(name), "{}", failure.message);
        }
        assert_eq!(limits.to_wire(), asked(3, 0, 0));
    }
}
