//! Times and durations on the wire.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::failure::Failure;

/// Writes a point in time.
#[must_use]
pub fn timestamp(time: SystemTime) -> prost_types::Timestamp {
    prost_types::Timestamp::from(time)
}

/// Reads a point in time; one before 1970 or beyond all reason becomes 1970.
#[must_use]
pub fn system_time(timestamp: prost_types::Timestamp) -> SystemTime {
    SystemTime::try_from(timestamp).unwrap_or(UNIX_EPOCH)
}

/// Writes a duration.
#[must_use]
pub fn duration_to_wire(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

/// Reads a duration, which must not be negative.
pub fn duration_from_wire(duration: prost_types::Duration) -> Result<Duration, Failure> {
    Duration::try_from(duration)
        .map_err(|_| Failure::invalid("BAD_DURATION", format!("duration {duration} is not valid")))
}
