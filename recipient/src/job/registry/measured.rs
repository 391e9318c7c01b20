//! What metrics ask of clones.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use marcot_common::time::system_time;
use marcot_proto::recipient::v1 as pb;

use super::{Clones, Counts, Table, installs::is_kept};
use crate::counts::duration;

/// The last clone that completed, of this process or an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LastSuccess {
    /// When it ended.
    pub end: SystemTime,
    /// How long it took.
    pub took: Duration,
}

/// The clone that runs, or ran last in this process.
#[derive(Debug, Clone)]
pub struct ShownClone {
    /// Its resource.
    pub clone: pb::Clone,
    /// When anything moved last.
    pub last_progress: SystemTime,
    /// Streams at work.
    pub streams: u64,
}

impl Table {
    pub(super) fn note_success(&mut self, clone: &pb::Clone) {
        let took = duration(clone.begin_time.as_ref(), clone.end_time.as_ref());
        if clone.state() != pb::State::Completed {
            return;
        }
        if let (Some(took), Some(end)) = (took, clone.end_time.map(system_time))
            && self.last_success.is_none_or(|last| last.end < end)
        {
            self.last_success = Some(LastSuccess { end, took });
        }
    }
}

impl Clones {
    /// What is counted.
    #[must_use]
    pub fn counts(&self) -> &Arc<Counts> {
        &self.counts
    }

    /// Counts the end of a clone.
    pub(super) fn note_end(&self, table: &mut Table, clone: &pb::Clone) {
        self.counts.finish(clone);
        table.note_success(clone);
    }

    /// The clone that runs, or ran last.
    #[must_use]
    pub fn shown(&self) -> Option<ShownClone> {
        let status = self.lock().shown.clone()?;
        Some(ShownClone {
            clone: status.clone_resource(),
            last_progress: status.last_progress(),
            streams: status.streams(),
        })
    }

    /// The last clone that completed.
    #[must_use]
    pub fn last_success(&self) -> Option<LastSuccess> {
        self.lock().last_success
    }

    /// Clones that wait for a person: for a password, and for their server to be stopped.
    #[must_use]
    pub fn waiting(&self) -> [(&'static str, usize); 2] {
        let table = self.lock();
        let count = |state| table.past.values().filter(|clone| clone.state() == state).count();
        [
            ("credentials", count(pb::State::AwaitingCredentials)),
            ("install", count(pb::State::AwaitingInstall)),
        ]
    }

    /// Installs that keep the data from before them.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.lock().installs.values().filter(|install| is_kept(install)).count()
    }
}
