//! Goes through the steps of an install with the server at hand.

use std::{sync::Arc, time::Duration};

use marcot_common::failure::Failure;
use tonic::Code;
use tracing::{info, warn};

use super::{replacement::Replacement, step::Step};
use crate::{
    server_control::{FirstStart, ServerControl},
    source::blocking,
};

/// An install and the server that it concerns.
pub struct Installer {
    /// The install.
    pub replacement: Arc<Replacement>,
    /// The server.
    pub control: Arc<dyn ServerControl>,
    /// Longest recovery of a server on a new tree.
    pub health_limit: Duration,
    /// Told after every step.
    pub tell: Box<dyn Fn(&Replacement) + Send + Sync>,
}

impl std::fmt::Debug for Installer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Installer").field("replacement", &self.replacement).finish_non_exhaustive()
    }
}

impl Installer {
    /// From `Staged` to `Opened`. After an error the old data stand, and their server runs.
    pub async fn install(&self) -> Result<(), Failure> {
        if let Err(failure) = self.control.stop().await {
            // It may be on its way down all the same.
            return Err(self.start_again(failure).await);
        }
        if let Err(failure) = self.put_in_place().await {
            let failure = self.bring_back(failure).await?;
            return Err(self.start_again(failure).await);
        }
        self.bring_up().await
    }

    /// `Staged` to `InPlace`: the server is stopped.
    pub async fn put_in_place(&self) -> Result<(), Failure> {
        self.step(|replacement| replacement.put_in_place()).await
    }

    /// `Staged` to `InPlace` without a server to start: a person starts it.
    pub async fn put_in_place_or_back(&self) -> Result<(), Failure> {
        let result = self.put_in_place().await;
        let result = match result {
            Ok(()) => Ok(()),
            Err(failure) => Err(match self.bring_back(failure).await {
                Ok(failure) | Err(failure) => failure,
            }),
        };
        self.replacement.unlock_trees();
        result
    }

    /// From `InPlace`, or wherever it was after that, to `Opened`.
    pub async fn bring_up(&self) -> Result<(), Failure> {
        if let Err(failure) = self.prove().await {
            return Err(self.roll_back(failure).await);
        }
        // Before it is opened: from here on there may be writes that a roll-back would lose.
        self.record(Step::Opened).await?;
        self.control.open().await.map_err(|failure| Failure {
            message: format!(
                "the clone is in place and its server was healthy, but could not be opened to \
                 everybody: {}; the old data are kept: `marcot rollback` brings them back",
                failure.message
            ),
            ..failure
        })?;
        Ok(())
    }

    async fn prove(&self) -> Result<(), Failure> {
        self.replacement.unlock_trees();
        if self.replacement.step() < Step::Healthy {
            self.control.start(FirstStart::Yes).await?;
            if self.replacement.step() < Step::Started {
                self.record(Step::Started).await?;
            }
            let health = self.control.wait_healthy(self.health_limit).await?;
            info!(
                version = %health.version,
                schemas = health.schemas,
                tables_read = health.tables_read,
                took = ?health.took,
                "the server is healthy on the clone"
            );
            self.record(Step::Healthy).await?;
        }
        Ok(())
    }

    /// Stops the server, brings the old data back, and starts it on them. Returns the failure, which
    /// says so.
    async fn roll_back(&self, failure: Failure) -> Failure {
        warn!(error = %failure, "the server is not healthy on the clone: the old data come back");
        if let Err(stop) = self.control.stop().await {
            return unfinished(failure, &stop);
        }
        match self.bring_back(failure).await {
            Ok(failure) => self.start_again(failure).await,
            Err(unfinished) => unfinished,
        }
    }

    /// By a caller's wish, from `Opened` as well.
    pub async fn roll_back_on_request(&self) -> Result<(), Failure> {
        self.control.stop().await?;
        self.step(|replacement| replacement.put_back()).await?;
        self.replacement.unlock_trees();
        self.control.start(FirstStart::No).await
    }

    /// As `roll_back_on_request`, where a person starts the server.
    pub async fn put_back_without_server(&self) -> Result<(), Failure> {
        let result = self.step(|replacement| replacement.put_back()).await;
        self.replacement.unlock_trees();
        result
    }

    /// Brings the old data back; the failure then says so. `Err`: they could not be brought back.
    async fn bring_back(&self, failure: Failure) -> Result<Failure, Failure> {
        match self.step(|replacement| replacement.put_back()).await {
            Ok(()) => Ok(Failure {
                message: format!("{}; the old data are back in their place", failure.message),
                ..failure
            }),
            Err(second) => Err(unfinished(failure, &second)),
        }
    }

    async fn start_again(&self, failure: Failure) -> Failure {
        self.replacement.unlock_trees();
        match self.control.start(FirstStart::No).await {
            Ok(()) => failure,
            Err(start) => Failure {
                message: format!(
                    "{}; and the server could not be started again: {}",
                    failure.message, start.message
                ),
                ..failure
            },
        }
    }

    async fn record(&self, step: Step) -> Result<(), Failure> {
        self.step(move |replacement| replacement.record(step)).await
    }

    async fn step(
        &self,
        work: impl FnOnce(&Replacement) -> Result<(), Failure> + Send + 'static,
    ) -> Result<(), Failure> {
        let replacement = Arc::clone(&self.replacement);
        let result = blocking(move || work(&replacement)).await;
        (self.tell)(&self.replacement);
        result
    }
}

/// Neither tree could be brought into place: what is there is left as it is.
fn unfinished(first: Failure, second: &Failure) -> Failure {
    let message = format!(
        "{}; and the old data could not be brought back: {}. Nothing is lost: the next start of \
         marcot-recipient brings them back",
        first.message, second.message
    );
    Failure { message, code: Code::Internal, reason: "INSTALL_UNFINISHED".into(), ..first }
}
