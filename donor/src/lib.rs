//! The donor: serves a data directory as lists of files and ranges of bytes.
//!
//! ```text
//! api -> lease -> engine -> chunk_reader -> body
//! ```

#![forbid(unsafe_code)]

pub mod api;
pub mod body;
pub mod caps;
pub mod chunk_reader;
pub mod lease;
pub mod metrics;
pub mod server;
