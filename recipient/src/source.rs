//! Where a clone's files come from: a donor over the network, or an engine in this process.

use std::{collections::BTreeMap, sync::Arc};

use marcot_common::{entry::Totals, failure::Failure, position::Position};
use marcot_engine::{Advanced, Engine, Snapshot, SnapshotOptions};
use marcot_proto::donor::v1::Outcome;
use tokio_util::sync::CancellationToken;

use crate::{
    copy_journal::record::SnapshotOpened,
    fetch::{StreamWork, local, stopped},
    list::{FileList, ListReceiver},
    plan::Cut,
    settings::CONCURRENCY_MAX,
};

/// A snapshot that a clone reads from.
#[tonic::async_trait]
pub trait Source: std::fmt::Debug + Send + Sync {
    /// Where the snapshot began, what it is estimated to hold, and what it leaves out.
    fn opened(&self) -> Opened;

    /// What it takes to go on with the snapshot from another process; `None` when nothing does.
    fn record(&self) -> Option<SnapshotOpened>;

    /// How large files are cut for this source.
    fn cut(&self) -> Cut;

    /// Reads the list of `position` into `receiver`.
    async fn list(&self, position: Position, receiver: ListReceiver) -> Result<FileList, Failure>;

    /// Most streams and followers that it serves at one time.
    fn streams_max(&self) -> usize {
        CONCURRENCY_MAX
    }

    /// Work for one of several streams.
    fn stream(&self) -> StreamWork;

    /// Work for a stream that reads what grows.
    fn follower(&self) -> StreamWork;

    /// Moves on from `from`, all of which is durable.
    async fn advance(&self, from: Position) -> Result<Advanced, Failure>;

    /// Frees the snapshot. What fails is only logged: the lease ends it.
    async fn close(&self, outcome: Outcome);
}

/// A snapshot that has been opened.
#[derive(Debug, Clone)]
pub struct Opened {
    /// The first stage and round.
    pub position: Position,
    /// What it is estimated to hold.
    pub estimate: Totals,
    /// Entries left out, by reason.
    pub left_out: BTreeMap<String, u64>,
    /// Storage engines that tables are in, where that is known.
    pub storage_engines: Vec<String>,
}

/// The engine in this process, for CLONE LOCAL.
#[derive(Debug)]
pub struct LocalSource {
    snapshot: Arc<dyn Snapshot>,
}

impl LocalSource {
    /// Opens a snapshot.
    pub async fn open(
        engine: Arc<dyn Engine>,
        mut options: SnapshotOptions,
    ) -> Result<Self, Failure> {
        // A clone that is cancelled drops this future.
        let _waits = options.begin_to_wait();
        let open = move || engine.open(&options);
        let snapshot = blocking(open).await?;
        Ok(Self { snapshot: Arc::from(snapshot) })
    }
}

#[tonic::async_trait]
impl Source for LocalSource {
    fn opened(&self) -> Opened {
        let position = self.snapshot.position();
        Opened {
            position,
            estimate: self.snapshot.totals(position).unwrap_or_default(),
            left_out: self.snapshot.left_out(),
            storage_engines: self.snapshot.storage_engines(),
        }
    }

    /// The snapshot ends with this process.
    fn record(&self) -> Option<SnapshotOpened> {
        None
    }

    fn cut(&self) -> Cut {
        Cut::WholeFiles
    }

    async fn list(
        &self,
        position: Position,
        mut receiver: ListReceiver,
    ) -> Result<FileList, Failure> {
        let snapshot = Arc::clone(&self.snapshot);
        blocking(move || {
            for entry in snapshot.list(position, 0)? {
                receiver.push(&entry?)?;
            }
            receiver.finish(snapshot.totals(position)?)
        })
        .await
    }

    fn stream(&self) -> StreamWork {
        let snapshot = Arc::clone(&self.snapshot);
        Box::new(move |context, seat| local::copy_units(&snapshot, context, seat))
    }

    fn follower(&self) -> StreamWork {
        let snapshot = Arc::clone(&self.snapshot);
        Box::new(move |context, _| local::follow(&snapshot, context))
    }

    async fn advance(&self, from: Position) -> Result<Advanced, Failure> {
        let snapshot = Arc::clone(&self.snapshot);
        let gone = CancellationToken::new();
        // Dropped where the clone is cancelled: else locks would be waited for, and held, for nobody.
        let _gone_with_this = gone.clone().drop_guard();
        blocking(move || {
            let mut stops = |_| if gone.is_cancelled() { Err(stopped()) } else { Ok(()) };
            snapshot.advance(from, &mut stops)
        })
        .await
    }

    async fn close(&self, _: Outcome) {}
}

/// Runs blocking work on a thread of its own.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(Failure::bug(format!("work on a thread of its own stopped: {e}"))))
}
