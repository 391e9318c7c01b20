//! Engine `files` against real directories.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod model;
mod reading;
mod rounds;
mod rules;
mod support;
