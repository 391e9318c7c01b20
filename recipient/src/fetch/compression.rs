//! Whether a stream asks for compressed chunks: told, or found out by trying.

use std::time::Duration;

/// A stream faster than this gains nothing: a core's zstd at level 1 makes some 0.33 GB/s.
const FAST_BYTES_PER_SECOND: f64 = 300e6;

/// Less than this in one unit says nothing of the link.
const MEASURED_BYTES_MIN: u64 = 1 << 20;

/// Units between two trials of the other way: a link that has changed is noticed, and a trial that
/// loses costs a few hundredths.
const UNITS_BETWEEN_TRIALS: u32 = 16;

/// By how much compression must be faster: at a draw it only costs CPU.
const GAIN_MIN: f64 = 1.1;

/// How chunks are compressed (clone_enable_compression).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Not at all.
    #[default]
    Off,
    /// At this level of zstd.
    On(i32),
    /// At this level, while that is faster than without.
    Automatic(i32),
}

/// Chooses for one stream.
#[derive(Debug)]
pub struct Chooser {
    compression: Compression,
    is_on: bool,
    /// Bytes of data per second, without and with compression, when it was last measured.
    rates: [f64; 2],
    units_to_trial: u32,
    is_trial: bool,
}

impl Chooser {
    /// Begins without compression, unless it is told.
    #[must_use]
    pub fn new(compression: Compression) -> Self {
        let is_on = matches!(compression, Compression::On(_));
        Self { compression, is_on, rates: [0.0; 2], units_to_trial: 0, is_trial: false }
    }

    /// The level that the next unit is asked for with; `None`: as it is.
    #[must_use]
    pub fn level(&self) -> Option<i32> {
        match self.compression {
            Compression::On(level) | Compression::Automatic(level) if self.is_on => Some(level),
            _ => None,
        }
    }

    /// A unit has come: so many bytes of data in that time.
    pub fn measured(&mut self, data: u64, time: Duration) {
        let automatic = matches!(self.compression, Compression::Automatic(_));
        if !automatic || data < MEASURED_BYTES_MIN || time.is_zero() {
            return;
        }
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let rate = data as f64 / time.as_secs_f64();
        self.rates[usize::from(self.is_on)] = rate;
        if self.is_trial {
            self.is_trial = false;
            self.is_on = self.rates[1] > GAIN_MIN * self.rates[0];
            self.units_to_trial = UNITS_BETWEEN_TRIALS;
        } else if self.units_to_trial > 0 {
            self.units_to_trial -= 1;
        } else if self.is_on || rate < FAST_BYTES_PER_SECOND {
            self.is_on = !self.is_on;
            self.is_trial = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs units of 24 MiB over a link on which data come at these rates, without and with.
    fn units(chooser: &mut Chooser, count: u32, plain: f64, compressed: f64) -> u32 {
        (0..count)
            .filter(|_| {
                let is_on = chooser.level().is_some();
                let rate = if is_on { compressed } else { plain };
                let bytes = 24 << 20;
                chooser.measured(bytes, Duration::from_secs_f64(f64::from(24 << 20) / rate));
                is_on
            })
            .count()
            .try_into()
            .unwrap()
    }

    #[test]
    fn a_slow_link_is_compressed_and_a_fast_one_is_not() {
        let mut chooser = Chooser::new(Compression::Automatic(1));
        assert!(units(&mut chooser, 100, 12e6, 24e6) > 85);
        // The link has become fast: no more compression, and no trials of it.
        units(&mut chooser, 40, 800e6, 250e6);
        assert_eq!(units(&mut chooser, 100, 800e6, 250e6), 0);
        // And slow again.
        assert!(units(&mut chooser, 100, 12e6, 24e6) > 85);
    }

    #[test]
    fn what_does_not_shrink_is_not_compressed() {
        let mut chooser = Chooser::new(Compression::Automatic(1));
        assert!(units(&mut chooser, 100, 50e6, 50e6) < 10);
    }

    #[test]
    fn what_was_told_stays() {
        let mut on = Chooser::new(Compression::On(3));
        assert_eq!(units(&mut on, 40, 800e6, 20e6), 40);
        assert_eq!(on.level(), Some(3));
        let mut off = Chooser::new(Compression::Off);
        assert_eq!(units(&mut off, 40, 1e6, 20e6), 0);
    }
}
