//! Goes through the steps of an install with the server at hand.

use std::{sync::Arc, time::Duration};

use marcot_common::{failure::Failure, telemetry::spans::traced};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::{debug_span, info, warn};

use super::{
    generation,
    hold::hold,
    reconcile::{Action, Standing},
    replacement::Replacement,
    step::Step,
};
use crate::{
    server_control::{FirstStart, ServerControl, outlived_recipient},
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
    /// Cancelled when this process ends: the server ends with it, and nothing is concluded from that.
    pub leaving: CancellationToken,
    /// Told before the server is stopped for the clone.
    pub tell_stop: Box<dyn Fn() + Send + Sync>,
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
        // What would not do afterwards is not worth a stop.
        self.claim().await?;
        (self.tell_stop)();
        // One that is still starting is waited for: as long as this process stays.
        let stop = traced(debug_span!("stop the server"), self.control.stop());
        let stopped = self.leaving.run_until_cancelled(stop).await;
        if let Err(failure) = stopped.ok_or_else(leaves)? {
            // It may be on its way down all the same.
            return Err(self.start_again(failure).await);
        }
        self.hold_between("server_stopped").await?;
        if let Err(failure) = self.put_in_place().await {
            let failure = self.bring_back(failure).await?;
            return Err(self.start_again(failure).await);
        }
        self.bring_up(false).await
    }

    /// Where nothing of ours keeps a server that somebody else starts away.
    async fn hold_between(&self, name: &'static str) -> Result<(), Failure> {
        blocking(move || {
            hold(name);
            Ok(())
        })
        .await
    }

    /// `Staged` to `InPlace`: the server is stopped.
    pub async fn put_in_place(&self) -> Result<(), Failure> {
        let put = self.with(|replacement| replacement.put_in_place());
        traced(debug_span!("put in place"), put).await
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

    /// From wherever a start has found it, to `Opened`.
    pub async fn go_on(&self) -> Result<(), Failure> {
        if self.with(|replacement| replacement.action()).await? == Action::Install {
            // The server does not run yet: this start has left that to the install.
            match self.with(|replacement| replacement.claim()).await {
                Ok(()) => self.install().await,
                Err(failure) if self.control.outlives_recipient() => Err(failure),
                Err(failure) => Err(self.start_again(failure).await),
            }
        } else {
            outlived_recipient(self.control.as_ref()).await;
            self.bring_up(true).await
        }
    }

    /// From `InPlace`, or wherever it was after that, to `Opened`. Where it goes on, an earlier process may
    /// have given the start command.
    async fn bring_up(&self, goes_on: bool) -> Result<(), Failure> {
        if let Err(failure) = self.prove(goes_on).await {
            // The next start goes on.
            self.check_leaving()?;
            return Err(self.roll_back(failure).await);
        }
        let open = traced(debug_span!("open the server"), self.open(goes_on));
        let opened = open.await.map_err(|failure| match self.check_leaving() {
            Err(leaving) => leaving,
            Ok(()) => Failure {
                message: format!(
                    "the clone is in place and its server was healthy, but {}: {}; the old data are \
                     kept: `marcot rollback` brings them back",
                    match self.replacement.is_reopened() {
                        true => "is not since it was opened to everybody",
                        false => "could not be opened to everybody",
                    },
                    failure.message
                ),
                ..failure
            },
        });
        if opened.is_ok() {
            self.hold_between("server_open").await?;
            self.note_back().await;
        }
        opened
    }

    /// Once its start command has been given the server takes writes: whatever it answers, it is not stopped for
    /// this again.
    async fn open(&self, goes_on: bool) -> Result<(), Failure> {
        let is_open =
            goes_on && self.replacement.is_reopened() && self.control.outlives_recipient();
        if !is_open {
            self.control.open().await?;
            if let Err(failure) = self.with(|replacement| replacement.note_open()).await {
                warn!(error = %failure, "that the server was opened could not be recorded");
            }
        }
        self.control.wait_open().await
    }

    async fn prove(&self, goes_on: bool) -> Result<(), Failure> {
        self.replacement.unlock_trees();
        self.hold_between("unlocked").await?;
        if self.replacement.step() < Step::Healthy {
            self.check_leaving()?;
            // A command that is given twice may fail, and the clone would pay for it: also where a kill
            // came between the start and its record. A server that somebody else has started meanwhile is
            // open to everybody: that one does not count.
            let runs = || goes_on && self.control.outlives_recipient();
            if !runs() {
                let start = self.control.start(FirstStart::Yes);
                match traced(debug_span!("start the server"), start).await {
                    Err(failure) if runs() => {
                        warn!(error = %failure, "a server runs all the same: its health decides");
                    }
                    started => started?,
                }
                self.hold_between("server_started").await?;
            }
            if self.replacement.step() < Step::Started {
                self.record(Step::Started).await?;
            }
            let health = self.control.wait_healthy(self.health_limit);
            let health = traced(debug_span!("wait until it is healthy"), health);
            let health = self.leaving.run_until_cancelled(health).await;
            let health = health.unwrap_or_else(|| Err(leaves()))?;
            info!(
                version = %health.version,
                schemas = health.schemas,
                tables_read = health.tables_read,
                took = ?health.took,
                "the server is healthy on the clone"
            );
            self.record(Step::Healthy).await?;
        }
        // Before it is opened: from here on there may be writes that a roll-back would lose.
        self.check_leaving()?;
        if self.replacement.step() < Step::Opened {
            self.record(Step::Opened).await?;
        }
        Ok(())
    }

    /// Stops the server, brings the old data back, and starts it on them. Returns the failure, which
    /// says so.
    async fn roll_back(&self, failure: Failure) -> Failure {
        warn!(error = %failure, "the server is not healthy on the clone: the old data come back");
        if let Err(stop) = self.control.give_up().await {
            return unfinished(failure, &stop);
        }
        match self.bring_back(failure).await {
            Ok(failure) => self.start_again(failure).await,
            Err(unfinished) => unfinished,
        }
    }

    /// By a caller's wish, from `Opened` as well.
    pub async fn roll_back_on_request(&self) -> Result<(), Failure> {
        self.claim().await?;
        self.hold_between("stopping_for_roll_back").await?;
        if let Err(failure) = self.control.stop().await {
            return Err(self.start_again(failure).await);
        }
        self.hold_between("stopped_for_roll_back").await?;
        match self.with(|replacement| replacement.put_back(REQUESTED)).await {
            Ok(()) => {
                self.replacement.unlock_trees();
                self.control.start(FirstStart::No).await?;
                self.note_back().await;
                Ok(())
            }
            Err(failure) => Err(self.roll_back_failed(failure).await),
        }
    }

    /// As `roll_back_on_request`, where a person starts the server.
    pub async fn put_back_without_server(&self) -> Result<(), Failure> {
        let result = self.with(|replacement| replacement.put_back(REQUESTED)).await;
        self.replacement.unlock_trees();
        result.map_err(|failure| match self.clone_stands() {
            true => failure,
            false => half_back(failure),
        })
    }

    /// Where nothing has moved the server runs on, else it stays stopped.
    async fn roll_back_failed(&self, failure: Failure) -> Failure {
        if self.clone_stands() {
            return self.start_again(failure).await;
        }
        self.replacement.unlock_trees();
        half_back(failure)
    }

    fn clone_stands(&self) -> bool {
        self.replacement.step() <= Step::Opened
            && self.replacement.standing().is_ok_and(|standing| standing == Standing::New)
    }

    /// Brings the old data back; the failure then says so. `Err`: they could not be brought back.
    async fn bring_back(&self, failure: Failure) -> Result<Failure, Failure> {
        let why = failure.label();
        let put_back = self.with(move |replacement| replacement.put_back(why));
        let put_back = traced(debug_span!("put back"), put_back).await;
        let stands = self.replacement.standing().is_ok_and(|standing| standing == Standing::Old);
        match put_back {
            // Where they stand, a record that could not be made changes nothing.
            Err(second) if !stands => Err(unfinished(failure, &second)),
            _ => Ok(Failure {
                message: format!("{}; the old data are back in their place", failure.message),
                ..failure
            }),
        }
    }

    /// Starts the server on what stands, in the way that this is to be started.
    async fn start_again(&self, failure: Failure) -> Failure {
        self.replacement.unlock_trees();
        if generation::was_discarded(&self.replacement.place.data_directory) {
            let message = format!(
                "{}; the old data were discarded, so the server stays stopped until another clone \
                 is installed",
                failure.message
            );
            return Failure { message, ..failure };
        }
        warn!(error = %failure, "the server is started again on what stands");
        match self.control.start(self.replacement.first_start()).await {
            Ok(()) => {
                self.note_back().await;
                failure
            }
            Err(start) => Failure {
                message: format!(
                    "{}; and the server could not be started again: {}",
                    failure.message, start.message
                ),
                ..failure
            },
        }
    }

    /// Before the server is stopped. Where it runs without this recipient, the next one must know that.
    async fn claim(&self) -> Result<(), Failure> {
        self.with(|replacement| replacement.claim()).await?;
        if !self.control.is_independent() {
            return Ok(());
        }
        let noted = self.with(|replacement| replacement.note_away()).await;
        if noted.is_err() {
            self.replacement.unlock_trees();
        }
        noted
    }

    /// The server runs as it did before: what could not be recorded costs the next start of this service a
    /// look more, and this process must not stop or start it again.
    async fn note_back(&self) {
        if let Err(failure) = self.with(|replacement| replacement.note_back()).await {
            warn!(error = %failure, "that the server runs again could not be recorded");
            self.replacement.forget_away();
        }
    }

    async fn record(&self, step: Step) -> Result<(), Failure> {
        self.with(move |replacement| replacement.record(step)).await
    }

    fn check_leaving(&self) -> Result<(), Failure> {
        if self.leaving.is_cancelled() { Err(leaves()) } else { Ok(()) }
    }

    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Replacement) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let replacement = Arc::clone(&self.replacement);
        let result = blocking(move || work(&replacement)).await;
        (self.tell)(&self.replacement);
        result
    }
}

/// Why the old data come back, when a caller has said so.
const REQUESTED: &str = "REQUESTED";

const LEAVES: &str = "RECIPIENT_STOPS";

/// The recipient ends in the middle of an install; its next start goes on.
fn leaves() -> Failure {
    Failure::new(
        Code::Unavailable,
        LEAVES,
        "the recipient stops; the install goes on when it starts",
    )
}

/// Whether an install was only left, by a process that ends.
#[must_use]
pub fn was_left(failure: &Failure) -> bool {
    failure.reason == LEAVES
}

/// Neither tree could be brought into place: what is there is left as it is.
fn unfinished(first: Failure, second: &Failure) -> Failure {
    let message = format!(
        "{}; and the old data could not be brought back: {}. Nothing is lost: `marcot rollback`, or \
         the next start of marcot-recipient, brings them back",
        first.message, second.message
    );
    Failure { message, code: Code::Internal, reason: "INSTALL_UNFINISHED".into(), ..first }
}

/// A roll-back that somebody has asked for stopped on its way.
fn half_back(failure: Failure) -> Failure {
    let message = format!(
        "the old data are on their way back, and the server is stopped: {}. Nothing is lost: `marcot \
         rollback`, or the next start of marcot-recipient, goes on",
        failure.message
    );
    Failure { message, code: Code::Internal, reason: "INSTALL_UNFINISHED".into(), ..failure }
}
