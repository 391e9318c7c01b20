//! How values are shown to a person: in a terminal, in messages and on the status page.

use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use marcot_proto::common::v1::Stage;

use crate::time::system_time;

/// Bytes with a binary unit: `512 B`, `1.50 GiB`.
#[must_use]
pub fn bytes(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown with two decimals")]
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    match unit {
        "B" => format!("{bytes} B"),
        unit => format!("{value:.2} {unit}"),
    }
}

/// A limit of bytes per second; zero is none.
#[must_use]
pub fn bandwidth(bytes_per_second: u64) -> String {
    match bytes_per_second {
        0 => "no limit".to_owned(),
        limit => format!("{}/s", bytes(limit)),
    }
}

/// Seconds as a person says them: `7 s`, `3 min 20 s`, `2 h 5 min`.
#[must_use]
pub fn seconds(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

/// RFC 3339 with milliseconds.
#[must_use]
pub fn time(timestamp: prost_types::Timestamp) -> String {
    moment(system_time(timestamp))
}

/// RFC 3339 with milliseconds.
#[must_use]
pub fn moment(time: SystemTime) -> String {
    let time = Timestamp::try_from(time).unwrap_or_default();
    time.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string()
}

/// From one point in time to another, at least zero.
#[must_use]
pub fn between(begin: prost_types::Timestamp, end: prost_types::Timestamp) -> Duration {
    system_time(end).duration_since(system_time(begin)).unwrap_or_default()
}

/// A stage as in performance_schema.clone_progress.
#[must_use]
pub fn stage(stage: i32) -> String {
    match Stage::try_from(stage) {
        Ok(stage) => stage.as_str_name().trim_start_matches("STAGE_").replace('_', " "),
        Err(_) => format!("stage {stage}"),
    }
}

/// A peer's text without what would move a terminal's cursor.
#[must_use]
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Bytes that are a path or a name, as text.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    clean(&String::from_utf8_lossy(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_rates_and_spans_are_said_as_a_person_says_them() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes(u64::MAX), "16384.00 PiB");
        assert_eq!(bandwidth(0), "no limit");
        assert_eq!(bandwidth(5 << 20), "5.00 MiB/s");
        assert_eq!(seconds(7), "7 s");
        assert_eq!(seconds(200), "3 min 20 s");
        assert_eq!(seconds(7500), "2 h 5 min");
    }

    #[test]
    fn what_a_peer_says_cannot_move_a_cursor() {
        assert_eq!(clean("a\u{1b}[2Jb\nc"), "a [2Jb c");
        assert_eq!(text(b"/a\xff\x07"), "/a\u{fffd} ");
    }

    #[test]
    fn times_are_in_utc_and_those_out_of_order_are_no_span() {
        let at = |seconds| prost_types::Timestamp { seconds, nanos: 5_000_000 };
        assert_eq!(time(at(0)), "1970-01-01T00:00:00.005Z");
        assert_eq!(between(at(5), at(7)), Duration::from_secs(2));
        assert_eq!(between(at(7), at(5)), Duration::ZERO);
    }
}
