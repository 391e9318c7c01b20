//! What a running service tells of itself: logs, trace context and metrics.
//!
//! ```text
//! caller's traceparent -> RpcLayer: span -> handler -> TraceInterceptor -> next service
//!                             |                |
//!                    RPC histogram (/metrics)  logs on standard error, with the trace's id
//!
//! spans -> bounded queue -> a thread -> OTLP collector, where one is named
//! ```
//!
//! Invariants:
//! * The log filter never cuts a trace: spans of level INFO and above carry their context whatever
//!   is logged.
//! * Labels of metrics are bounded by what the service offers, never by what callers send.

mod certificates;
pub mod connections;
pub mod families;
mod filter_file;
mod logs;
pub mod metrics;
mod process;
pub mod propagation;
pub mod rpc;
pub mod spans;
mod traces;

pub use logs::{LogFormat, LogOptions, Telemetry, TelemetryError, init};
