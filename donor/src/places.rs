//! How many calls run at one time, and how many bytes wait for their callers: of each snapshot, and of all.

use std::{sync::Arc, time::Duration};

use marcot_common::failure::Failure;
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tonic::Code;

use crate::{
    chunk_reader::{CallerGone, Frame, Lend, Lent},
    lease::{self, Held},
    outbox::Outbox,
};

/// Most ReadRanges calls at one time, of all snapshots: each has a thread, of which the runtime has
/// 512. As many as the default of eight snapshots may have.
const READS_MAX: usize = 256;

/// Most lists and advances at one time, of all snapshots: see `READS_MAX`.
const WALKS_MAX: usize = 96;

/// Most callers at one time that are told what the server is: each is some questions to the database.
const FACTS_MAX: usize = 16;

/// How often a reader that waits looks whether its caller is still there.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How soon one may try again who found no place.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Places of calls, all snapshots together.
#[derive(Debug, Clone)]
pub struct Places {
    reads: Arc<Semaphore>,
    walks: Arc<Semaphore>,
    facts: Arc<Semaphore>,
}

/// The places of a call: among those of its snapshot, and among all.
type Taken = [OwnedSemaphorePermit; 2];

impl Default for Places {
    fn default() -> Self {
        Self {
            reads: Arc::new(Semaphore::new(READS_MAX)),
            walks: Arc::new(Semaphore::new(WALKS_MAX)),
            facts: Arc::new(Semaphore::new(FACTS_MAX)),
        }
    }
}

impl Places {
    /// For a call that reads.
    pub fn read(&self, held: &Held) -> Result<Taken, Failure> {
        let text = format!("{} ReadRanges calls run for this snapshot", lease::READERS_MAX);
        let own = place(&held.readers, "READER_LIMIT", &text)?;
        let text = format!("{READS_MAX} ReadRanges calls run on this donor");
        Ok([own, place(&self.reads, "READER_LIMIT", &text)?])
    }

    /// For a call that looks through a snapshot's list; `own` are the snapshot's places for such.
    pub fn walk(&self, own: &Arc<Semaphore>, what: &str) -> Result<Taken, Failure> {
        let text = format!("{} {what} calls run for this snapshot", lease::WALKS_MAX);
        let own = place(own, "CALL_LIMIT", &text)?;
        let text = format!("{WALKS_MAX} ListFiles and AdvanceStage calls run on this donor");
        Ok([own, place(&self.walks, "CALL_LIMIT", &text)?])
    }

    /// For a call that asks what the server is.
    pub fn facts(&self) -> Result<OwnedSemaphorePermit, Failure> {
        let text = format!("{FACTS_MAX} callers ask what this server is");
        place(&self.facts, "CALL_LIMIT", &text)
    }
}

fn place(
    places: &Arc<Semaphore>,
    reason: &'static str,
    what: &str,
) -> Result<OwnedSemaphorePermit, Failure> {
    let taken = Arc::clone(places).try_acquire_owned();
    let none = |_| Failure::new(Code::ResourceExhausted, reason, what).retry_after(RETRY_AFTER);
    taken.map_err(none)
}

/// Lends bytes of what may be held for a snapshot's recipient, to a thread of its own.
pub fn lender(held: Arc<Held>, outbox: Arc<Outbox<Result<Frame, Failure>>>) -> Lend {
    Box::new(move |bytes| {
        let units = u32::try_from(bytes.div_ceil(lease::HELD_UNIT_BYTES)).unwrap_or(u32::MAX);
        let [own, of_peer] = &held.held_units;
        let is_over = || held.ended.is_cancelled() || outbox.is_closed();
        Ok(Lent([lend_units(own, units, &is_over)?, lend_units(of_peer, units, &is_over)?]))
    })
}

fn lend_units(
    all: &Arc<Semaphore>,
    units: u32,
    is_over: &dyn Fn() -> bool,
) -> Result<OwnedSemaphorePermit, CallerGone> {
    if let Ok(lent) = Arc::clone(all).try_acquire_many_owned(units) {
        return Ok(lent);
    }
    while !is_over() {
        let lent = Arc::clone(all).acquire_many_owned(units);
        let lent = Handle::current().block_on(tokio::time::timeout(LOOK_INTERVAL, lent));
        if let Ok(lent) = lent {
            // The semaphore is never closed.
            return lent.map_err(|_| CallerGone);
        }
    }
    Err(CallerGone)
}
