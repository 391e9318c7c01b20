//! What the harness's programs share: settings by the environment, figures out of logs.

use std::time::Duration;

use crate::database::Version;

/// A setting, or its default.
#[must_use]
pub fn number(name: &str, default: u64) -> u64 {
    let Ok(text) = std::env::var(name) else { return default };
    text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number"))
}

/// Whether a run counts as one of full size: `MARCOT_FULL=1`. Less than the least of it fails then.
#[must_use]
pub fn is_full() -> bool {
    number("MARCOT_FULL", 0) != 0
}

/// A setting that is `small` in CI and at least `full` in a run of full size.
#[must_use]
pub fn sized(name: &str, small: u64, full: u64) -> u64 {
    let value = number(name, if is_full() { full } else { small });
    assert!(!is_full() || value >= full, "{name}={value}: a run of full size has {full} or more");
    value
}

/// Bytes of rows of a row of the matrix, and of a soak.
#[must_use]
pub fn bytes_of_rows(small: u64) -> u64 {
    sized("BYTES", small, 1 << 30)
}

/// Rest between two stages of a clone.
#[must_use]
pub fn pause(small: u64) -> Duration {
    Duration::from_secs(sized("PAUSE", small, 10))
}

/// The server that `DATABASE` and `VERSION` name.
#[must_use]
pub fn version() -> Version {
    match std::env::var("DATABASE").as_deref() {
        Ok("mysql") => return Version::MySql9_7,
        Ok("mariadb") | Err(_) => {}
        Ok(other) => panic!("DATABASE={other}: mariadb and mysql are there"),
    }
    match std::env::var("VERSION").as_deref() {
        Ok("11.8") => Version::V11_8,
        Ok("10.11") | Err(_) => Version::V10_11,
        Ok(other) => panic!("VERSION={other}: 10.11 and 11.8 are there"),
    }
}

/// Every value of a field in a log, in its order.
#[must_use]
pub fn logged_milliseconds(log: &str, key: &str) -> Vec<Duration> {
    let values = log.lines().filter_map(|line| line.split_once(key));
    let numbers = values.filter_map(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
    numbers.map(Duration::from_millis).collect()
}

/// Median, 99th percentile (nearest rank, never below it) and maximum, in milliseconds.
#[must_use]
pub fn quantiles(values: &[Duration]) -> [f64; 3] {
    let mut values = values.to_vec();
    values.sort();
    [0.5, 0.99, 1.0].map(|share: f64| {
        let rank = (values.len() as f64 * share).ceil() as usize;
        let value = values.get(rank.saturating_sub(1));
        value.map_or(0.0, |value| value.as_secs_f64() * 1000.0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let millis = |n: u64| Duration::from_millis(n);
        let values: Vec<Duration> = (1..=200).rev().map(millis).collect();
        assert_eq!(quantiles(&values), [100.0, 198.0, 200.0]);
        assert_eq!(quantiles(&[millis(7)]), [7.0, 7.0, 7.0]);
        assert_eq!(quantiles(&[]), [0.0, 0.0, 0.0]);
    }

    #[test]
    fn a_field_is_read_out_of_each_line_that_has_it() {
        let log = "a commit_wait_ms=3 commit_blocked_ms=12 b\nnothing\ncommit_blocked_ms=4";
        let expected = [12, 4].map(Duration::from_millis);
        assert_eq!(logged_milliseconds(log, "commit_blocked_ms="), expected);
    }
}
