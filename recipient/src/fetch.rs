//! Copies the units of a plan into staging, by several streams at once.
//!
//! Each stream is a thread of its own with, for a donor, a connection of its own: one connection
//! is one core of TLS. The thread that reads from the network also writes to the disk, but for large
//! parts, which have a thread of their own to write them.

pub mod compression;
pub mod decode;
pub mod local;
pub mod remote;

use std::{
    collections::BTreeSet,
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use marcot_common::{
    failure::Failure,
    position::Position,
    telemetry::spans::{BYTES, fail, number, set_number},
};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing::{Span, debug_span, info, warn};

use crate::{
    copy_journal::{CopyJournal, record::Unread},
    gate::Gate,
    growing::GrowingFiles,
    limits::Limits,
    plan::{FetchPlan, Unit},
    progress::Progress,
    retry::Patience,
    reuse::Reuse,
    staging::Staging,
    tuner::{Tuner, WINDOW},
    writer::{UnitWriter, direct::DirectWriter},
};

/// Most bytes of a growing file that are read, and made durable, at a time.
const FOLLOW_BYTES: u64 = 16 << 20;

/// Pause once all of a growing file has been read: each look is a call and an fsync.
const FOLLOW_PAUSE: Duration = Duration::from_millis(500);

/// What all streams of a round share.
#[derive(Debug)]
pub struct FetchContext {
    /// `clones/{id}`.
    pub clone: String,
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
    /// What the clone may take.
    pub limits: Arc<Limits>,
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
    /// The span of what one unit, or one read of a growing file, takes: calls to a donor are beneath it.
    fn batch_span(&self, snapshot: &str, file_id: u64, offset: u64, parts: usize) -> Span {
        debug_span!(
            "batch",
            otel.kind = if snapshot.is_empty() { "internal" } else { "client" },
            marcot.clone = self.clone,
            marcot.snapshot = Some(snapshot).filter(|name| !name.is_empty()),
            marcot.position = %self.position,
            marcot.file_id = number(file_id),
            marcot.offset = number(offset),
            marcot.parts = number(parts as u64),
        )
    }

    /// As [`Self::batch_span`], of a unit.
    fn unit_span(&self, snapshot: &str, unit: &Unit) -> Span {
        let file_id = unit.parts.first().map_or(0, |part| part.file_id.0);
        self.batch_span(snapshot, file_id, unit.offset(), unit.parts.len())
    }

    /// The tries of one stream.
    fn patience(&self) -> Patience<'_> {
        Patience::new(&self.progress.retries, self.donor_timeout)
    }

    /// The next unit for a stream; `None` when all are given out, or the stream has to leave.
    fn next_unit(&self, seat: Seat) -> Result<Option<Unit>, Failure> {
        if seat >= self.limits.concurrency() {
            return Ok(None);
        }
        self.plan.next()
    }

    /// What writes large new files of a stream; without a thread of its own they go through the page
    /// cache.
    fn disk() -> Option<DirectWriter> {
        let started = DirectWriter::start();
        started.inspect_err(|e| warn!(error = %e, "no thread that writes past the page cache")).ok()
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

/// A stream's place, from 0 up: one at or above the number that is wanted leaves after its unit.
pub type Seat = usize;

/// Work of one stream, on a thread of its own, until the plan has no more units or it has to leave.
pub type StreamWork = Box<dyn FnOnce(&FetchContext, Seat) -> Result<(), Failure> + Send>;

/// Runs as many streams as the limits say, which may change meanwhile, and waits for them; the first
/// failure stops the others. `follower` reads what grows meanwhile.
pub async fn fetch(
    context: Arc<FetchContext>,
    stream: &(dyn Fn() -> StreamWork + Sync),
    follower: Option<StreamWork>,
) -> Result<(), Failure> {
    let mut first_failure = None;
    let mut note = |result: Result<(), Failure>| {
        if let Err(failure) = result
            && (first_failure.is_none() || is_consequence(first_failure.as_ref()))
        {
            first_failure = Some(failure);
        }
    };
    let follower = follower.map(|work| start("follower".to_owned(), &context, work, 0));
    let mut wanted = context.limits.watch_concurrency();
    let mut seats = BTreeSet::new();
    let mut streams = FuturesUnordered::new();
    let mut tuning = Tuning::new(&context);
    let mut looks = tokio::time::interval(WINDOW);
    loop {
        let count = *wanted.borrow_and_update();
        while let Some(seat) = (0..count).find(|seat| !seats.contains(seat))
            && !context.plan.is_drained()
            && !context.stop.is_cancelled()
        {
            seats.insert(seat);
            let end = start(format!("stream-{seat}"), &context, stream(), seat);
            streams.push(async move { (seat, end.await) });
        }
        tokio::select! {
            end = streams.next() => match end {
                Some((seat, result)) => {
                    seats.remove(&seat);
                    note(result);
                }
                None => break,
            },
            // The sender lives as long as the context.
            _ = wanted.changed() => {}
            _ = looks.tick() => tuning.look(&context),
        }
    }
    context.copied.cancel();
    if let Some(follower) = follower {
        note(follower.await);
    }
    first_failure.map_or(Ok(()), Err)
}

/// What is compared to find the number of streams.
struct Tuning {
    tuner: Option<Tuner>,
    /// As the window began: bytes, time that streams had waited for limits, and now.
    begun: (u64, u64, Instant),
    /// Whether something else than the streams has held the clone back since.
    is_held_back: bool,
}

impl Tuning {
    fn new(context: &FetchContext) -> Self {
        Self { tuner: None, begun: Self::counts(context), is_held_back: false }
    }

    fn counts(context: &FetchContext) -> (u64, u64, Instant) {
        let progress = &context.progress;
        // Of a clone over the network both grow; of a local one data alone.
        let bytes = progress.data_bytes.get() + progress.network_bytes.get();
        (bytes, progress.throttled.get(), Instant::now())
    }

    /// Sets the number of streams by what has come since the last window ended.
    fn look(&mut self, context: &FetchContext) {
        let Some(most) = context.limits.autotune_most() else {
            *self = Self::new(context);
            return;
        };
        let streams = context.limits.concurrency();
        let (then, now) = (self.begun, Self::counts(context));
        // What a limit, a person or the donor holds back says nothing of streams. A unit that has to be
        // copied again is taken back from what is counted.
        self.is_held_back |= !context.gate.is_open()
            || now.1 != then.1
            || now.0 < then.0
            || !context.progress.held_back().is_empty();
        let tuner = self.tuner.get_or_insert_with(|| Tuner::new(streams));
        let bytes = now.0.saturating_sub(then.0);
        if !self.is_held_back && !tuner.is_enough(bytes) {
            return;
        }
        let seconds = now.2.duration_since(then.2).as_secs_f64();
        let rate = (!self.is_held_back && seconds > 0.0).then(|| bytes as f64 / seconds);
        let wanted = tuner.look(rate, most);
        (self.begun, self.is_held_back) = (now, false);
        if wanted != streams {
            info!(from = streams, to = wanted, "another number of streams");
            context.limits.tune(wanted);
        }
    }
}

/// Starts a stream's thread; the future is its end. The job waits for every stream, unless it has been
/// dropped with its runtime.
fn start(
    name: String,
    context: &Arc<FetchContext>,
    work: StreamWork,
    seat: Seat,
) -> impl Future<Output = Result<(), Failure>> + use<> {
    let (sender, receiver) = oneshot::channel();
    let context = Arc::clone(context);
    let (stop, span) = (context.stop.clone(), Span::current());
    let spawned = std::thread::Builder::new().name(name).spawn(move || {
        let _in_the_clones_trace = span.entered();
        context.progress.streams.add(1);
        let result = work(&context, seat);
        context.progress.streams.subtract(1);
        if result.is_err() {
            context.stop.cancel();
        }
        drop(sender.send(result));
    });
    async move {
        if let Err(e) = spawned {
            stop.cancel();
            return Err(Failure::new(
                tonic::Code::ResourceExhausted,
                "NO_THREAD",
                format!("start a thread for a stream: {e}"),
            ));
        }
        receiver.await.unwrap_or_else(|_| {
            stop.cancel();
            Err(Failure::bug("a stream panicked"))
        })
    }
}

/// A batch has ended, with so many bytes of data.
fn end_batch(span: &Span, bytes: u64, result: &Result<(), Failure>) {
    set_number(span, BYTES, bytes);
    if let Err(failure) = result {
        fail(span, failure);
    }
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
