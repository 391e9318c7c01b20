//! Stops and starts the server whose data directory is replaced.

pub mod health;
pub mod hooks;

use std::time::Duration;

use marcot_common::failure::Failure;

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
    /// Opens a server that was started for the first time to everybody.
    async fn open(&self) -> Result<(), Failure>;
    /// How a server that ends by itself is started again from now on.
    async fn set_mode(&self, _: FirstStart) {}
    /// Whether it can do all that.
    fn manages(&self) -> bool;
    /// How it is done, for logs and status.
    fn kind(&self) -> &'static str;
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
