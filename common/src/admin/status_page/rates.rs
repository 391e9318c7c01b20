//! Rates of the last minutes, sampled, and drawn as a chart.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use askama::Template;

use crate::shown;

/// Between two samples.
pub const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// Samples that are kept: five minutes, some 10 KiB.
const SAMPLES_MAX: usize = 300;

/// Width of the drawing: a unit for each sample that is kept.
const WIDTH: usize = SAMPLES_MAX;
const HEIGHT: f64 = 60.0;

/// Totals that grow, sampled: their rates are drawn.
#[derive(Debug)]
pub struct Rates<const N: usize> {
    names: [&'static str; N],
    kept: Mutex<Kept<N>>,
}

#[derive(Debug)]
struct Kept<const N: usize> {
    last: Option<(Instant, [u64; N])>,
    /// Bytes per second, oldest first.
    rates: VecDeque<[u64; N]>,
}

#[derive(Template)]
#[template(path = "rates.html")]
struct Chart {
    lines: Vec<Line>,
    most: String,
    width: usize,
    height: f64,
    minutes: usize,
}

/// One of a chart's lines.
struct Line {
    name: &'static str,
    now: String,
    /// An SVG path.
    path: String,
}

impl<const N: usize> Rates<N> {
    /// No sample yet; `names` are those of the totals.
    #[must_use]
    pub fn new(names: [&'static str; N]) -> Self {
        let kept = Kept { last: None, rates: VecDeque::with_capacity(SAMPLES_MAX) };
        Self { names, kept: Mutex::new(kept) }
    }

    /// Takes totals of bytes. One that has become smaller counts as standing still.
    pub fn sample(&self, totals: [u64; N]) {
        self.sample_at(Instant::now(), totals);
    }

    fn sample_at(&self, now: Instant, totals: [u64; N]) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((then, before)) = kept.last {
            let millis = u64::try_from((now - then).as_millis()).unwrap_or(u64::MAX).max(1);
            let rate = |i: usize| totals[i].saturating_sub(before[i]).saturating_mul(1000) / millis;
            if kept.rates.len() == SAMPLES_MAX {
                kept.rates.pop_front();
            }
            kept.rates.push_back(std::array::from_fn(rate));
        }
        kept.last = Some((now, totals));
    }

    /// The chart as HTML; nothing before the second sample.
    #[must_use]
    pub fn chart(&self) -> String {
        let rates: Vec<[u64; N]> = {
            let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.rates.iter().copied().collect()
        };
        let Some(now) = rates.last() else { return String::new() };
        let most = rates.iter().flatten().copied().max().unwrap_or(0);
        let line = |i: usize| Line {
            name: self.names[i],
            now: format!("{}/s", shown::bytes(now[i])),
            path: path(rates.iter().map(|rates| rates[i]), rates.len(), most),
        };
        let chart = Chart {
            lines: (0..N).map(line).collect(),
            most: format!("{}/s", shown::bytes(most)),
            width: WIDTH,
            height: HEIGHT,
            minutes: SAMPLES_MAX / 60,
        };
        // Writing to a string does not fail.
        chart.render().unwrap_or_default()
    }
}

/// An SVG path of values, the last of them at the right edge; a most of zero lies on the ground.
fn path(values: impl Iterator<Item = u64>, count: usize, most: u64) -> String {
    let begin = WIDTH - count;
    let mut path = String::new();
    for (i, value) in values.enumerate() {
        #[expect(clippy::cast_precision_loss, reason = "drawn a few pixels high")]
        let part = if most == 0 { 0.0 } else { value as f64 / most as f64 };
        let command = if i == 0 { 'M' } else { 'L' };
        // Writing to a string does not fail.
        write!(path, "{command}{} {:.1}", begin + i, HEIGHT - part * (HEIGHT - 2.0)).ok();
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_between_two_samples_and_old_ones_go() {
        let rates = Rates::new(["data"]);
        let begin = Instant::now();
        assert_eq!(rates.chart(), "");
        for i in 0..=u32::try_from(SAMPLES_MAX).unwrap() + 10 {
            rates.sample_at(begin + SAMPLE_INTERVAL * i, [u64::from(i) * (1 << 20)]);
        }
        assert_eq!(rates.kept.lock().unwrap().rates, vec![[1 << 20]; SAMPLES_MAX]);
        let chart = rates.chart();
        assert!(chart.contains("1.00 MiB/s"), "{chart}");
        assert!(chart.contains("M0 2.0L1 2.0"), "{chart}");
    }

    #[test]
    fn a_total_that_shrinks_stands_still_and_a_quiet_chart_lies_on_the_ground() {
        let rates = Rates::new(["data", "network"]);
        let begin = Instant::now();
        for (i, total) in [7, 3, 3].into_iter().enumerate() {
            rates.sample_at(begin + SAMPLE_INTERVAL * u32::try_from(i).unwrap(), [total, total]);
        }
        let chart = rates.chart();
        assert!(chart.contains("M298 60.0L299 60.0"), "{chart}");
        assert_eq!(chart.matches("0 B/s").count(), 4, "{chart}");
    }
}
