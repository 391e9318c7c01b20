//! What is told of work that is done in a span.

use opentelemetry::trace::Status;
use tracing::{Instrument as _, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use crate::failure::Failure;

/// Attribute that names a clone: `clones/{id}`.
pub const CLONE: &str = "marcot.clone";

/// Attribute that names a donor's snapshot: `snapshots/{id}`.
pub const SNAPSHOT: &str = "marcot.snapshot";

/// Attribute of bytes of data, as they are on the donor's disk.
pub const BYTES: &str = "marcot.bytes";

/// Does work in a span, which has its failure.
pub async fn traced<T>(
    span: Span,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let result = work.instrument(span.clone()).await;
    if let Err(failure) = &result {
        fail(&span, failure);
    }
    result
}

/// A span's work has failed.
pub fn fail(span: &Span, failure: &Failure) {
    span.set_attribute("error.type", failure.reason.to_string());
    span.set_status(Status::error(failure.message.clone()));
}

/// Tells of a number.
pub fn set_number(span: &Span, name: &'static str, value: u64) {
    span.set_attribute(name, number(value));
}

/// A number as attributes have it; as `u64` it would become a text.
#[must_use]
pub fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
