//! What a clone may take: bytes per second, and streams. Changed while it runs (UpdateCloneLimits).

use std::{future::Future, time::Duration};

use marcot_common::{
    failure::Failure,
    pace::{BYTES_PER_SECOND_MIN, Pace, both},
};
use marcot_proto::recipient::v1 as pb;
use tokio::sync::watch;

use crate::{progress::Progress, settings::CONCURRENCY_MAX};

/// Limits unless a clone asks for others.
#[derive(Debug, Clone, Copy, Default)]
pub struct LimitDefaults {
    /// Streams.
    pub concurrency: usize,
    /// Bytes of data per second; zero: no limit.
    pub data: u64,
    /// Bytes on the network per second; zero: no limit.
    pub network: u64,
}

/// Limits of one clone.
#[derive(Debug)]
pub struct Limits {
    /// Streams that were asked for at first: large files are cut for them, also by a run that goes on.
    planned: usize,
    concurrency: watch::Sender<usize>,
    data: Pace,
    network: Pace,
}

impl Default for Limits {
    /// One stream, and no limit.
    fn default() -> Self {
        let (concurrency, data, network) =
            (watch::Sender::new(1), Pace::default(), Pace::default());
        Self { planned: 1, concurrency, data, network }
    }
}

impl Limits {
    /// What is asked for, and defaults for the rest.
    pub fn new(asked: &pb::CloneLimits, defaults: &LimitDefaults) -> Result<Self, Failure> {
        check(asked)?;
        let planned = asked.concurrency_max.map_or(defaults.concurrency, to_usize);
        let limits = Self {
            planned,
            concurrency: watch::Sender::new(planned),
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
        if let Some(streams) = asked.concurrency_max {
            self.concurrency.send_replace(to_usize(streams));
        }
        if let Some(rate) = asked.data_bytes_per_second_max {
            self.data.set(rate);
        }
        if let Some(rate) = asked.network_bytes_per_second_max {
            self.network.set(rate);
        }
    }

    /// Those in force.
    #[must_use]
    pub fn to_wire(&self) -> pb::CloneLimits {
        pb::CloneLimits {
            concurrency_max: u32::try_from(self.concurrency()).ok(),
            data_bytes_per_second_max: Some(self.data.bytes_per_second()),
            network_bytes_per_second_max: Some(self.network.bytes_per_second()),
        }
    }

    /// Streams that large files are cut for.
    #[must_use]
    pub fn planned_streams(&self) -> usize {
        self.planned
    }

    /// Most streams.
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
        }
    }

    #[test]
    fn what_is_not_asked_for_stays() {
        let defaults = LimitDefaults { concurrency: 4, data: 1 << 20, network: 0 };
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
