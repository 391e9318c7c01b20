//! Copies the units of a plan into staging, by several streams at once.
//!
//! Each stream is a thread of its own with, for a donor, a connection of its own: one connection
//! is one core of TLS, and the thread that reads from the network also writes to the disk.

pub mod decode;
pub mod local;
pub mod remote;

use std::{sync::Arc, time::Duration};

use marcot_common::{failure::Failure, position::Position};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::{
    copy_journal::{CopyJournal, record::Unread},
    gate::Gate,
    growing::GrowingFiles,
    plan::FetchPlan,
    progress::Progress,
    retry::Patience,
    reuse::Reuse,
    staging::Staging,
    writer::UnitWriter,
};

/// Most bytes of a growing file that are read, and made durable, at a time.
const FOLLOW_BYTES: u64 = 16 << 20;

/// Pause once all of a growing file has been read: each look is a call and an fsync.
const FOLLOW_PAUSE: Duration = Duration::from_millis(500);

/// What all streams of a round share.
#[derive(Debug)]
pub struct FetchContext {
    /// Where units come from.
    pub plan: FetchPlan,
    /// Where they go.
    pub staging: Arc<Staging>,
    /// What is counted.
    pub progress: Arc<Progress>,
    /// The stage and round that is read.
    pub position: Position,
    /// Files that grow while they are read.
    pub growing: Arc<GrowingFiles>,
    /// Cancelled when all but growing files is copied.
    pub copied: CancellationToken,
    /// An older copy whose equal blocks are used.
    pub reuse: Option<Arc<Reuse>>,
    /// Closed while the clone is paused.
    pub gate: Arc<Gate>,
    /// Where what is durable is recorded; `None` for a copy that nobody goes on with.
    pub journal: Option<Arc<CopyJournal>>,
    /// How long a donor that is gone is waited for.
    pub donor_timeout: Duration,
    /// How long a call may stand still.
    pub stall_timeout: Duration,
    /// Stops all streams.
    pub stop: CancellationToken,
}

impl FetchContext {
    /// The tries of one stream.
    fn patience(&self) -> Patience<'_> {
        Patience::new(&self.progress.retries, self.donor_timeout)
    }

    /// Makes a unit durable, and records it.
    fn finish(&self, writer: UnitWriter<'_>) -> Result<(), Failure> {
        let (mut done, unfinished) = writer.finish()?;
        if let Some(journal) = &self.journal {
            done.unfinished = unfinished.iter().map(Unread::from).collect();
            journal.unit_done(&done)?;
        }
        self.progress.note_unfinished(unfinished)
    }
}

/// Work of one stream, on a thread of its own, until the plan has no more units.
pub type StreamWork = Box<dyn FnOnce(&FetchContext) -> Result<(), Failure> + Send>;

/// Runs all streams and waits for them; the first failure stops the others. `follower` reads what
/// grows meanwhile.
pub async fn fetch(
    context: Arc<FetchContext>,
    streams: Vec<StreamWork>,
    follower: Option<StreamWork>,
) -> Result<(), Failure> {
    let count = streams.len();
    let mut ends = Vec::with_capacity(count + 1);
    for (number, work) in streams.into_iter().chain(follower).enumerate() {
        let (sender, receiver) = oneshot::channel();
        let context = Arc::clone(&context);
        let thread = std::thread::Builder::new().name(format!("stream-{number}"));
        let spawned = thread.spawn(move || {
            context.progress.streams.add(1);
            let result = work(&context);
            context.progress.streams.subtract(1);
            if result.is_err() {
                context.stop.cancel();
            }
            // The job waits for every stream, unless it has been dropped with its runtime.
            drop(sender.send(result));
        });
        if let Err(e) = spawned {
            return Err(Failure::new(
                tonic::Code::ResourceExhausted,
                "NO_THREAD",
                format!("start a thread for a stream: {e}"),
            ));
        }
        ends.push(receiver);
    }
    let mut first_failure = None;
    for (number, end) in ends.into_iter().enumerate() {
        if number == count {
            context.copied.cancel();
        }
        let result = end.await.unwrap_or_else(|_| Err(Failure::bug("a stream panicked")));
        if let Err(failure) = result
            && (first_failure.is_none() || is_consequence(first_failure.as_ref()))
        {
            first_failure = Some(failure);
        }
    }
    first_failure.map_or(Ok(()), Err)
}

/// Whether a failure only says that another stream has failed.
fn is_consequence(failure: Option<&Failure>) -> bool {
    failure.is_some_and(|failure| failure.reason == "STOPPED")
}

/// What a stream ends with when another one has failed, or the user has cancelled.
#[must_use]
pub fn stopped() -> Failure {
    Failure::new(tonic::Code::Cancelled, "STOPPED", "the clone was stopped").mysql(1317)
}
