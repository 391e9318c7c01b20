//! How many transactions the writers committed in each second: a clone counts only if its load kept
//! up through every stage.

use std::{
    fmt,
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use marcot_proto::{common::v1::Stage, recipient::v1::Clone as CloneOf};

use super::{Shared, lock};

/// How often the count is taken.
const SAMPLE: Duration = Duration::from_millis(50);

/// What is judged: shorter, and one stall of a shared machine decides; longer, and a stage that
/// stopped the writers hides between two that did not.
const WINDOW: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Pace {
    samples: Mutex<Vec<(Instant, u64)>>,
}

/// How the writers went on through one stage.
#[derive(Debug, Clone)]
pub struct StagePace {
    /// Which one.
    pub stage: &'static str,
    /// How long it took.
    pub duration: Duration,
    /// Commits per second over all of it.
    pub rate: f64,
    /// Commits in its worst second.
    pub rate_least: f64,
}

impl fmt::Display for StagePace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stage, duration, rate, rate_least } = self;
        write!(f, "{stage} {:.1} s {rate:.0}/s (least {rate_least:.0}/s)", duration.as_secs_f64())
    }
}

impl Pace {
    fn note(&self, at: Instant, commits: u64) {
        lock(&self.samples).push((at, commits));
    }

    /// Stages in which the donor's server works, and all of them in one: later stages concern the
    /// recipient alone.
    pub(super) fn of_stages(&self, clone: &CloneOf) -> Vec<StagePace> {
        // One reading of both clocks: a stage's times are those of the wall.
        let (now, wall) = (Instant::now(), SystemTime::now());
        let instant = |time: &Option<prost_types::Timestamp>| -> Option<Instant> {
            let time = SystemTime::try_from((*time)?).ok()?;
            now.checked_sub(wall.duration_since(time).unwrap_or_default())
        };
        let server_works = [Stage::FileCopy, Stage::PageCopy, Stage::RedoCopy];
        let stages = clone.stages.iter().filter(|row| server_works.contains(&row.stage()));
        let paces = stages.filter_map(|row| {
            let (begun, ended) = (instant(&row.begin_time)?, instant(&row.end_time)?);
            let stage = row.stage().as_str_name();
            Some(self.between(stage.trim_start_matches("STAGE_"), begun, ended))
        });
        let mut paces: Vec<StagePace> = paces.collect();
        // From the request on: a recipient that is frozen before its first stage has begun none.
        let last = clone.stages.iter().rfind(|row| server_works.contains(&row.stage()));
        if let (Some(begun), Some(ended)) =
            (instant(&clone.begin_time), last.and_then(|row| instant(&row.end_time)))
        {
            paces.push(self.between("ALL_STAGES", begun, ended));
        }
        paces
    }

    /// The longest time in which nobody took a count: no thread of this process had its turn.
    pub(super) fn longest_stall(&self, from: Instant, to: Instant) -> Duration {
        let samples = lock(&self.samples);
        let pairs = samples.windows(2).filter(|pair| pair[1].0 >= from && pair[0].0 <= to);
        let longest = pairs.map(|pair| pair[1].0 - pair[0].0).max();
        longest.unwrap_or_default().saturating_sub(SAMPLE)
    }

    fn between(&self, stage: &'static str, begun: Instant, ended: Instant) -> StagePace {
        let samples = lock(&self.samples);
        let duration = ended.saturating_duration_since(begun);
        // A stage of less than a window is judged by the second around it.
        let short = WINDOW.saturating_sub(duration) / 2;
        let from = begun.checked_sub(short).unwrap_or(begun);
        let to = ended + short;
        let windows = ((to - from).as_secs_f64() / WINDOW.as_secs_f64()).floor().max(1.0) as u32;
        let width = (to - from) / windows;
        let rates = (0..windows).map(|n| rate(&samples, from + width * n, from + width * (n + 1)));
        StagePace {
            stage,
            duration,
            rate: rate(&samples, from, to),
            rate_least: rates.fold(f64::INFINITY, f64::min),
        }
    }
}

fn rate(samples: &[(Instant, u64)], from: Instant, to: Instant) -> f64 {
    (count_at(samples, to) - count_at(samples, from)) / (to - from).as_secs_f64()
}

/// Commits up to a moment; between two samples they are taken as evenly spread.
fn count_at(samples: &[(Instant, u64)], at: Instant) -> f64 {
    let next = samples.partition_point(|(sampled, _)| *sampled < at);
    let (Some(before), Some(after)) = (next.checked_sub(1), samples.get(next)) else {
        // Outside of what was sampled nothing was committed.
        let edge = if next == 0 { samples.first() } else { samples.last() };
        return edge.map_or(0.0, |(_, commits)| *commits as f64);
    };
    let (begin, low) = samples[before];
    let (end, high) = *after;
    let share = (at - begin).as_secs_f64() / (end - begin).as_secs_f64().max(f64::EPSILON);
    low as f64 + (high - low) as f64 * share
}

/// Takes the count until the load is stopped.
pub(super) fn sample(shared: &Arc<Shared>) -> JoinHandle<()> {
    let shared = Arc::clone(shared);
    let thread = std::thread::Builder::new().name("pace".to_owned());
    let work = move || {
        while !shared.stopped() {
            let commits = shared.commits.load(std::sync::atomic::Ordering::Relaxed);
            shared.pace.note(Instant::now(), commits);
            std::thread::park_timeout(SAMPLE);
        }
        let commits = shared.commits.load(std::sync::atomic::Ordering::Relaxed);
        shared.pace.note(Instant::now(), commits);
    };
    thread.spawn(work).expect("a thread")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 500 commits/s, and one second of 50 in the middle.
    fn with_a_starved_second() -> (Instant, Pace) {
        let (begin, pace) = (Instant::now(), Pace::default());
        let mut commits = 0;
        for tenth in 0..100_u64 {
            pace.note(begin + Duration::from_millis(100 * tenth), commits);
            commits += if (40..50).contains(&tenth) { 5 } else { 50 };
        }
        (begin, pace)
    }

    #[test]
    fn one_starved_second_is_seen_in_a_stage_whose_average_is_high() {
        let (begin, pace) = with_a_starved_second();
        let second = |n| begin + Duration::from_secs(n);
        let all = pace.between("FILE_COPY", second(0), second(9));
        assert!(all.rate > 400.0 && (all.rate_least - 50.0).abs() < 1.0, "{all}");
        let after = pace.between("FILE_COPY", second(6), second(9));
        assert!((after.rate_least - 500.0).abs() < 1.0, "{after}");
    }

    #[test]
    fn a_stage_of_a_moment_is_judged_by_the_second_around_it() {
        let (begin, pace) = with_a_starved_second();
        let moment = begin + Duration::from_millis(4500);
        let cut = pace.between("REDO_COPY", moment, moment + Duration::from_millis(2));
        assert!(cut.rate_least < 60.0, "{cut}");
    }
}
