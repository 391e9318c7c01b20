//! How long a commit takes now: the log is written out, as for a commit, and nothing is changed.

use std::time::{Duration, Instant};

use marcot_common::failure::Failure;

use super::server::{Server, Session};
use crate::CommitProbe;

/// Longest wait for one: a server that takes longer is in trouble that no pace of a clone mends.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// A connection that probes.
pub(super) struct LogFlush(Session);

impl LogFlush {
    pub(super) fn connect(server: &Server) -> Result<Self, Failure> {
        server.connect_for(ANSWER_MAX).map(Self)
    }
}

impl CommitProbe for LogFlush {
    fn measure(&mut self) -> Result<Duration, Failure> {
        let begun = Instant::now();
        let flushed = self.0.execute("FLUSH NO_WRITE_TO_BINLOG ENGINE LOGS");
        flushed.map_err(|error| error.failure("measure a commit (needs RELOAD)"))?;
        Ok(begun.elapsed())
    }
}
