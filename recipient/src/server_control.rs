//! Stops and starts the server whose data directory is replaced.

pub mod health;
pub mod hooks;

use std::time::{Duration, Instant};

use marcot_common::failure::Failure;

/// From the start command that an earlier recipient has given to the server's locks, at most: it takes them
/// first. One that has started nothing costs so much.
const APPEARS_MAX: Duration = Duration::from_secs(5);

/// Least time for a server that is opened to answer, however short a stop may be (`--stop-timeout`).
pub(crate) const OPENS_MIN: Duration = Duration::from_secs(60);

/// Between two looks for them.
const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// Whether a server starts on a data directory for the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstStart {
    /// On a clone that has not answered yet: no network, no replication, no events (R12, R13).
    Yes,
    /// On a clone that has answered and is not accepted: replication and events stay off (R13).
    Opened,
    /// As `Opened`, once it has been made a replica by the caller's wish: events stay off.
    Replica,
    /// On its own, known data.
    No,
}

impl FirstStart {
    /// Its name, as hooks are told.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Yes => "first",
            Self::Opened => "opened",
            Self::Replica => "replica",
            Self::No => "own",
        }
    }
}

/// What a server that answered had to show.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Health {
    /// Version; empty when a command was asked.
    pub version: String,
    /// Schemas seen.
    pub schemas: u64,
    /// Tables of which a row was read.
    pub tables_read: u64,
    /// From the question to the answer.
    pub took: Duration,
}

/// Stops and starts the server whose data directory is replaced.
#[tonic::async_trait]
pub trait ServerControl: Send + Sync + std::fmt::Debug {
    /// Stops the server cleanly and keeps it stopped until `start`. Idempotent. Returns when no
    /// process of it is left.
    async fn stop(&self) -> Result<(), Failure>;
    /// As `stop`, for a server on a clone that is given up: nothing that it has written is wanted, so
    /// it may be killed.
    async fn give_up(&self) -> Result<(), Failure> {
        self.stop().await
    }
    /// Starts the server. Returns when the process runs.
    async fn start(&self, first: FirstStart) -> Result<(), Failure>;
    /// Waits until the server answers and its health query passes; an error has the server's own
    /// lines where they can be had.
    async fn wait_healthy(&self, limit: Duration) -> Result<Health, Failure>;
    /// Whether the server answers now; `None` when nobody can tell. One that recovers holds its locks and
    /// does not.
    async fn answers(&self) -> Option<bool> {
        None
    }
    /// Opens a server that was started for the first time to everybody. Where it takes a stop and a start,
    /// it may not answer yet.
    async fn open(&self) -> Result<(), Failure>;
    /// Waits until a server that was opened answers: what follows talks to it.
    async fn wait_open(&self) -> Result<(), Failure> {
        Ok(())
    }
    /// Whether the server runs on where this recipient ends: whoever stops it then has to start it again.
    fn is_independent(&self) -> bool {
        false
    }
    /// Whether a server runs that an earlier process of this recipient has started.
    fn outlives_recipient(&self) -> bool {
        false
    }
    /// Whether the server that runs answers for a while, which one on its way down does not; `None` when nobody
    /// can tell.
    async fn stands(&self) -> Option<bool> {
        None
    }
    /// How a server that ends by itself is started again from now on.
    async fn set_mode(&self, _: FirstStart) {}
    /// Whether it can do all that.
    fn manages(&self) -> bool;
    /// How it is done, for logs and status.
    fn kind(&self) -> &'static str;
}

/// Whether a server runs that an earlier process of this recipient has started, perhaps just before it was
/// killed.
pub async fn outlived_recipient(control: &dyn ServerControl) -> bool {
    let begun = Instant::now();
    while control.is_independent() && begun.elapsed() < APPEARS_MAX {
        if control.outlives_recipient() {
            return true;
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
    control.outlives_recipient()
}

/// Nothing stops or starts the server: a person does.
#[derive(Debug)]
pub struct Unmanaged;

#[tonic::async_trait]
impl ServerControl for Unmanaged {
    async fn stop(&self) -> Result<(), Failure> {
        Err(not_managed())
    }

    async fn start(&self, _: FirstStart) -> Result<(), Failure> {
        Err(not_managed())
    }

    async fn wait_healthy(&self, _: Duration) -> Result<Health, Failure> {
        Err(not_managed())
    }

    async fn open(&self) -> Result<(), Failure> {
        Ok(())
    }

    fn manages(&self) -> bool {
        false
    }

    fn kind(&self) -> &'static str {
        "none"
    }
}

/// 3707.
#[must_use]
pub fn not_managed() -> Failure {
    Failure::precondition(
        "SERVER_NOT_MANAGED",
        "Restart server failed (the server is not managed by a supervisor process): this recipient \
         neither supervises it nor has --stop-command and --start-command",
    )
    .mysql(3707)
}
