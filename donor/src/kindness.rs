//! Clones give way to the server's commits: a probe tells how long these take, and while they take
//! longer than they should, clones read more slowly.
//!
//! The probe asks the server to write its log out, as a commit does; it changes nothing. It runs while
//! a snapshot is held, and no connection is kept otherwise.

use std::{
    fmt,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use marcot_common::{config::parse_duration, failure::Failure};
use marcot_engine::{CommitProbe, Engine};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::back_off::BackOff;
use crate::{caps::Caps, lease::Leases};

mod back_off;

/// Between two probes: each costs the server a write of its log, of which it makes hundreds a second.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// Probes that are made before a clone reads, for what commits take without it.
const FIRST_PROBES: usize = 5;

/// Between those.
const FIRST_INTERVAL: Duration = Duration::from_millis(20);

/// Between two tries to reach a server that cannot be probed.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Probes of which the middle one counts: a single slow commit is no reason.
const PROBES_COUNTED: usize = 5;

/// With `auto`: commits may take twice what they take without clones, and this much longer.
const AUTO_MORE: Duration = Duration::from_millis(5);

/// When clones give way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GiveWay {
    /// Never.
    Off,
    /// When commits take twice as long as without clones, and 5 ms more.
    Automatic,
    /// When they take longer than this.
    Above(Duration),
}

impl FromStr for GiveWay {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            "auto" => Ok(Self::Automatic),
            _ => match parse_duration(text) {
                Ok(limit) if !limit.is_zero() => Ok(Self::Above(limit)),
                _ => Err("give off, auto, or a duration as 20ms".to_owned()),
            },
        }
    }
}

impl fmt::Display for GiveWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Automatic => f.write_str("auto"),
            Self::Above(limit) => write!(f, "{limit:?}"),
        }
    }
}

/// What is known of the server's commits now.
#[derive(Debug, Default)]
pub struct Kindness {
    told: Mutex<Told>,
}

/// What the last probes have found.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    /// What commits take; unset while nobody probes.
    pub latency: Option<Duration>,
    /// What they may take.
    pub bound: Option<Duration>,
    /// Bytes per second that clones may read all together; unset: as fast as they can.
    pub limit: Option<u64>,
}

impl Told {
    /// For a person: why clones are slow, if they are made so.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        let limit = self.limit?;
        let millis = |time: Option<Duration>| time.unwrap_or_default().as_secs_f64() * 1000.0;
        Some(format!(
            "the donor reads {}/s at the most: its server's commits take {:.1} ms, {:.1} ms are right",
            marcot_common::shown::bytes(limit),
            millis(self.latency),
            millis(self.bound)
        ))
    }
}

impl Kindness {
    /// What is known now.
    #[must_use]
    pub fn told(&self) -> Told {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, told: Told) {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = told;
    }
}

/// Probes the engine's server while snapshots are held, until `stop`. Blocks its thread.
pub struct Watch {
    /// When clones give way.
    pub give_way: GiveWay,
    /// Whose server is probed.
    pub engine: Arc<dyn Engine>,
    /// Whether a snapshot is held.
    pub leases: Arc<Leases>,
    /// What is slowed down.
    pub caps: Arc<Caps>,
    /// What is told.
    pub kindness: Arc<Kindness>,
}

impl Watch {
    /// Runs until `stop`.
    pub fn run(self, stop: &CancellationToken) {
        if self.give_way == GiveWay::Off {
            return;
        }
        while !stop.is_cancelled() {
            if self.leases.is_busy() {
                match self.engine.commit_probe() {
                    // An engine without a server has nobody to give way to.
                    None => return,
                    Some(Ok(probe)) => self.watch(probe, stop),
                    Some(Err(failure)) => self.cannot_probe(&failure, stop),
                }
                self.caps.give_way(0);
                self.kindness.tell(Told::default());
            }
            std::thread::sleep(PROBE_INTERVAL);
        }
    }

    /// While snapshots are held.
    fn watch(&self, mut probe: Box<dyn CommitProbe>, stop: &CancellationToken) {
        let bound = match self.bound(probe.as_mut()) {
            Ok(bound) => bound,
            Err(failure) => return self.cannot_probe(&failure, stop),
        };
        let mut back_off = BackOff::new(bound);
        let mut last: Vec<Duration> = Vec::with_capacity(PROBES_COUNTED);
        let mut read = (Instant::now(), self.caps.data_bytes());
        while !stop.is_cancelled() && self.leases.is_busy() {
            let latency = match probe.measure() {
                Ok(latency) => latency,
                Err(failure) => return self.cannot_probe(&failure, stop),
            };
            if last.len() == PROBES_COUNTED {
                last.remove(0);
            }
            last.push(latency);
            let now = (Instant::now(), self.caps.data_bytes());
            let rate = rate(read, now);
            read = now;
            let before = back_off.limit();
            let limit = back_off.next(middle(&last), rate);
            self.caps.give_way(limit.unwrap_or(0));
            let told = Told { latency: Some(middle(&last)), bound: Some(bound), limit };
            self.kindness.tell(told);
            if before.is_none() != limit.is_none() {
                match told.reason() {
                    Some(reason) => info!(reason, "clones give way"),
                    None => info!("clones read as fast as they can again"),
                }
            }
            std::thread::sleep(PROBE_INTERVAL);
        }
    }

    fn bound(&self, probe: &mut dyn CommitProbe) -> Result<Duration, Failure> {
        if let GiveWay::Above(limit) = self.give_way {
            return Ok(limit);
        }
        let mut first = Vec::with_capacity(FIRST_PROBES);
        for _ in 0..FIRST_PROBES {
            first.push(probe.measure()?);
            std::thread::sleep(FIRST_INTERVAL);
        }
        Ok(middle(&first) * 2 + AUTO_MORE)
    }

    /// Clones go on as they would without a probe; told once for each time that it is lost.
    fn cannot_probe(&self, failure: &Failure, stop: &CancellationToken) {
        warn!(error = %failure, "the server's commits cannot be measured: clones do not give way");
        let begun = Instant::now();
        while begun.elapsed() < RETRY_INTERVAL && !stop.is_cancelled() {
            std::thread::sleep(PROBE_INTERVAL);
        }
    }
}

fn middle(times: &[Duration]) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

fn rate(from: (Instant, u64), to: (Instant, u64)) -> u64 {
    let micros = to.0.saturating_duration_since(from.0).as_micros().max(1);
    let bytes = u128::from(to.1.saturating_sub(from.1));
    u64::try_from(bytes * 1_000_000 / micros).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_some_times_is_told_whatever_their_order() {
        let times = [9, 1, 5, 100, 2].map(Duration::from_millis);
        assert_eq!(middle(&times), Duration::from_millis(5));
        assert_eq!(middle(&[]), Duration::ZERO);
    }

    #[test]
    fn the_option_is_off_auto_or_a_duration() {
        assert_eq!("off".parse(), Ok(GiveWay::Off));
        assert_eq!("auto".parse(), Ok(GiveWay::Automatic));
        assert_eq!("20ms".parse(), Ok(GiveWay::Above(Duration::from_millis(20))));
        for wrong in ["", "0s", "fast", "20"] {
            assert!(wrong.parse::<GiveWay>().is_err(), "{wrong}");
        }
    }
}
