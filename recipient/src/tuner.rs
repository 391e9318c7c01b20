//! How many streams a clone is worth, found while it runs: half as many more are kept where they bring
//! more, one fewer where it brings as much.
//!
//! ```text
//! rest --> try more  --brings a tenth more--> keep, try more again
//!              |--else back--> try fewer --brings as much--> keep, try fewer again
//!                                  |--else back--> rest, twice as long as the last time
//! ```

use std::time::Duration;

/// Least time between two looks: what ends and is made durable meanwhile evens out.
pub const WINDOW: Duration = Duration::from_secs(2);

/// Least bytes of each stream between two looks, unless nothing is compared: they are counted by chunks
/// of 1 MiB, so that two windows differ by an eighth at the most, and mostly by much less.
const WINDOW_BYTES: u64 = 8 << 20;

/// One more stream has to bring this much more, or it is not worth its memory and the donor's work.
const GAIN_MIN: f64 = 1.10;

/// One fewer may bring this little less: what two windows differ by without any change.
const LOSS_MAX: f64 = 0.97;

/// Windows between two tries in vain, at first and at the most: a link changes in minutes.
const REST_MIN: u32 = 5;
const REST_MAX: u32 = 60;

/// Finds the number of streams.
#[derive(Debug)]
pub struct Tuner {
    streams: usize,
    /// A number that is tried: the one before, and what came by it in a second.
    trial: Option<(usize, f64)>,
    /// The window after a change has something of both.
    settles: bool,
    upwards: bool,
    /// Tries in vain since something was found.
    in_vain: u32,
    rest: u32,
    rest_next: u32,
}

impl Tuner {
    /// Begins with so many streams.
    #[must_use]
    pub fn new(streams: usize) -> Self {
        Self {
            streams,
            trial: None,
            settles: true,
            upwards: true,
            in_vain: 0,
            rest: 0,
            rest_next: REST_MIN,
        }
    }

    /// Whether so many bytes are enough for a look.
    #[must_use]
    pub fn is_enough(&self, bytes: u64) -> bool {
        self.settles || bytes >= WINDOW_BYTES * self.streams as u64
    }

    /// How many streams the next window has, 1 to `most`, after one in which so many bytes came in a
    /// second; `None` for one that says nothing, since something else than the streams held it back.
    pub fn look(&mut self, bytes_per_second: Option<f64>, most: usize) -> usize {
        if self.streams > most {
            (self.streams, self.trial, self.settles) = (most, None, true);
            return self.streams;
        }
        let Some(rate) = bytes_per_second.filter(|rate| *rate > 0.0) else {
            // What was compared with is long ago by the time that something can be told again.
            if let Some((before, _)) = self.trial.take() {
                self.streams = before;
            }
            self.settles = true;
            return self.streams;
        };
        if std::mem::take(&mut self.settles) {
            return self.streams;
        }
        match self.trial.take() {
            Some((before, rate_before)) => {
                let least = if self.streams > before { GAIN_MIN } else { LOSS_MAX };
                if rate >= rate_before * least {
                    (self.in_vain, self.rest_next) = (0, REST_MIN);
                    self.step(rate, most);
                } else {
                    self.streams = before;
                    self.settles = true;
                    self.turn();
                }
            }
            None if self.rest > 0 => self.rest -= 1,
            None => self.step(rate, most),
        }
        self.streams
    }

    /// Tries another number in the direction at hand.
    fn step(&mut self, rate: f64, most: usize) {
        let next = match self.upwards {
            true => (self.streams + self.streams.div_ceil(2)).min(most),
            false => (self.streams - 1).max(1),
        };
        if next == self.streams {
            return self.turn();
        }
        self.trial = Some((self.streams, rate));
        self.streams = next;
        self.settles = true;
    }

    /// The other direction next; a rest once neither has led anywhere.
    fn turn(&mut self) {
        self.upwards = !self.upwards;
        self.in_vain += 1;
        if self.in_vain >= 2 {
            (self.in_vain, self.rest) = (0, self.rest_next);
            self.rest_next = (self.rest_next * 2).min(REST_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Streams after each of some windows, on a machine where a number of them brings `rate`; windows
    /// differ by one in a hundred without any change.
    fn run(tuner: &mut Tuner, windows: u32, most: usize, rate: impl Fn(f64) -> f64) -> Vec<usize> {
        let mut streams = tuner.streams;
        let numbers = (0..windows).map(|window| {
            let noise = 1.0 + f64::from(window % 3) * 0.01 - 0.01;
            streams = tuner.look(Some(rate(streams as f64) * noise), most);
            streams
        });
        numbers.collect()
    }

    fn most_common(numbers: &[usize]) -> usize {
        let count = |n: &usize| numbers.iter().filter(|other| *other == n).count();
        *numbers.iter().max_by_key(|n| count(n)).unwrap()
    }

    #[test]
    fn a_link_on_which_each_stream_brings_as_much_gets_all_of_them() {
        let mut tuner = Tuner::new(2);
        let numbers = run(&mut tuner, 20, 8, |n| n * 10.0);
        assert_eq!(most_common(&numbers[10..]), 8, "{numbers:?}");
    }

    #[test]
    fn a_link_that_is_full_with_three_gets_three_or_four() {
        let mut tuner = Tuner::new(2);
        let numbers = run(&mut tuner, 60, 8, |n| n.min(3.0) * 10.0);
        assert!((3..=4).contains(&most_common(&numbers[20..])), "{numbers:?}");
    }

    #[test]
    fn where_streams_stand_in_each_others_way_they_become_fewer() {
        let mut tuner = Tuner::new(6);
        let numbers = run(&mut tuner, 60, 8, |n| 100.0 - 4.0 * (n - 2.0).abs());
        assert!((1..=3).contains(&most_common(&numbers[30..])), "{numbers:?}");
        let mut tuner = Tuner::new(6);
        let numbers = run(&mut tuner, 60, 8, |_| 100.0);
        assert_eq!(most_common(&numbers[30..]), 1, "one brings as much: {numbers:?}");
    }

    #[test]
    fn a_link_that_changes_is_followed_both_ways() {
        let mut tuner = Tuner::new(2);
        run(&mut tuner, 40, 8, |n| n.min(2.0) * 10.0);
        let wide = run(&mut tuner, 150, 8, |n| n * 10.0);
        assert_eq!(most_common(&wide[100..]), 8, "{wide:?}");
        let narrow = run(&mut tuner, 150, 8, |n| n.min(2.0) * 10.0);
        assert!(most_common(&narrow[100..]) <= 3, "{narrow:?}");
    }

    /// Guards a clone that is throttled or paused: nothing is tried by what says nothing.
    #[test]
    fn a_window_that_says_nothing_ends_a_trial_and_the_least_of_a_changed_limit_holds() {
        let mut tuner = Tuner::new(2);
        tuner.look(Some(10.0), 8);
        assert_eq!(tuner.look(Some(10.0), 8), 3, "one more is tried");
        assert_eq!(tuner.look(None, 8), 2);
        assert_eq!(tuner.look(Some(0.0), 8), 2);
        for _ in 0..10 {
            assert_eq!(tuner.look(None, 8), 2);
        }
        assert_eq!(tuner.look(Some(10.0), 1), 1);
    }
}
