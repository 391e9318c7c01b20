//! What this process has counted since its start, of all clones together.

use std::{sync::Arc, time::Duration};

use marcot_common::telemetry::families::Counters;
use marcot_engine::{Blocked, Observer};
use prometheus_client::metrics::{counter::Counter, histogram::Histogram};

use crate::lease::Ending;

/// From the best that a server's locks take to far beyond what anyone bears, seconds.
const COMMIT_BLOCK_BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// The same up to a clone that blocks DDL from its begin to its end.
const DDL_BLOCK_BUCKETS: [f64; 13] =
    [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0, 3600.0, 21600.0];

/// Counts; clones share them.
#[derive(Debug, Clone)]
pub struct Counts {
    /// Data that was sent, before it was compressed.
    pub raw_bytes: Counter,
    /// How long commits waited, each time.
    pub commit_blocks: Histogram,
    /// How long DDL waited, each time.
    pub ddl_blocks: Histogram,
    /// Snapshots opened.
    pub opened: Counter,
    /// Snapshots ended, by outcome.
    pub finished: Counters,
}

impl Default for Counts {
    fn default() -> Self {
        let finished = Counters::default();
        for ending in Ending::ALL {
            drop(finished.get_or_create(&[("outcome", ending.label())]));
        }
        Self {
            raw_bytes: Counter::default(),
            commit_blocks: Histogram::new(COMMIT_BLOCK_BUCKETS),
            ddl_blocks: Histogram::new(DDL_BLOCK_BUCKETS),
            opened: Counter::default(),
            finished,
        }
    }
}

impl Counts {
    /// Counts what the server's users have waited for.
    #[must_use]
    pub fn observer(&self) -> Observer {
        let (commits, ddl) = (self.commit_blocks.clone(), self.ddl_blocks.clone());
        Observer::new(move |what, how_long: Duration| {
            let blocks = match what {
                Blocked::Commits => &commits,
                Blocked::Ddl => &ddl,
            };
            blocks.observe(how_long.as_secs_f64());
        })
    }

    /// A snapshot has ended.
    pub fn end(&self, outcome: &'static str) {
        self.finished.get_or_create(&[("outcome", outcome)]).inc();
    }

    /// Shares the counts.
    #[must_use]
    pub fn shared(self) -> Arc<Self> {
        Arc::new(self)
    }
}
