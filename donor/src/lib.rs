//! The donor: serves a data directory as lists of files and ranges of bytes.
//!
//! ```text
//! request_body -> api -> lease -> engine -> chunk_reader -> outbox -> body
//! ```

#![forbid(unsafe_code)]

pub mod api;
pub mod body;
pub mod caps;
pub mod chunk_reader;
pub mod counts;
pub mod kindness;
pub mod lease;
pub mod metrics;
pub mod outbox;
pub mod places;
pub mod queue;
pub mod server;
pub mod status_page;
pub mod taken;
