//! The part of a clone that replaces a server's data.

use std::sync::{Arc, atomic::Ordering};

use marcot_common::failure::Failure;
use marcot_engine::Advanced;
use marcot_proto::{common::v1 as pbc, donor::v1::Outcome};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{CloneJob, End, status::CloneStatus};
use crate::{
    install::{
        generation,
        hold::hold,
        identity,
        installer::Installer,
        locks::{check_seen, server_on},
        place::{Form, Place},
        replacement::{Replacement, Wishes, take_alone},
        step::Step,
    },
    replica,
    server_control::{FirstStart, ServerControl, not_managed},
    settings::Settings,
    source::{Source, blocking},
    staging::Staging,
    target::no_earlier_install,
};

impl CloneJob {
    /// What replaces a server's data has their label.
    pub(super) fn labelled(&self, staging: Staging) -> Staging {
        if self.request.form.is_some() {
            return staging.labelled_as(&self.request.target);
        }
        staging
    }

    /// Fails where the server is to replicate from the donor's, and could not: nothing has been
    /// replaced yet.
    pub(super) fn check_attachable(&self, done: &Advanced) -> Result<(), Failure> {
        match &self.request.replicate_from {
            Some(_) => replica::check_attachable(&done.coordinates.clone().unwrap_or_default()),
            None => Ok(()),
        }
    }

    /// The server replicates from the donor's, if that was asked for.
    pub(super) async fn attach_replica(&self, done: &Advanced) -> Result<(), Failure> {
        let Some(source) = &self.request.replicate_from else {
            return Ok(());
        };
        let attach = async {
            let engine = self.settings.engine.as_ref();
            let database = engine.map(|engine| engine.database.clone()).unwrap_or_default();
            let at = done.coordinates.clone().unwrap_or_default();
            let replicates = replica::attach(&database, &at, source).await?;
            if let Some(replacement) = self.replacement.get().cloned() {
                blocking(move || replacement.note_replicates()).await?;
            }
            // A server that crashes from now on goes on replicating.
            self.control.set_mode(FirstStart::Replica).await;
            replicates.catch_up().await
        };
        self.until_cancelled(attach).await.map_err(|failure| Failure {
            message: format!(
                "the clone is installed and its server is open, but it is no replica that has caught \
                 up: {}",
                failure.message
            ),
            ..failure
        })
    }

    /// Whether there is anything that an install keeps.
    fn has_old_data(&self) -> bool {
        self.request.had_data && !self.request.discard_old_data_first
    }

    /// The old data go before the first byte, where the caller has said so. What a stop has left of
    /// them goes when it is gone on with.
    pub(super) async fn discard_old_data(&self) -> Result<(), Failure> {
        if !self.request.discard_old_data_first {
            return Ok(());
        }
        blocking(|| {
            hold("discard");
            Ok(())
        })
        .await?;
        if !self.control.manages() {
            return Err(not_managed());
        }
        self.check_cancelled()?;
        // A donor beside this server may have begun to read them since that was looked at.
        let _alone = take_alone(&self.request.target)?;
        self.note_server(true).await?;
        warn!(clone = %self.id, "the server is stopped and its data are removed, as asked for");
        let (directory, id) = (self.request.target.clone(), self.id.clone());
        let mut discarded = self.control.stop().await;
        if discarded.is_ok() {
            blocking(|| {
                hold("discard_stopped");
                Ok(())
            })
            .await?;
            // A stop may take minutes, in which somebody has thought better of it.
            discarded = self.check_cancelled();
        }
        if discarded.is_ok() {
            discarded = blocking(move || identity::discard_all_else(&directory, &id)).await;
        }
        if discarded.is_err() && generation::was_discarded(&self.request.target) {
            return discarded;
        }
        let Err(failure) = discarded else {
            // The mark says from here on what becomes of the server.
            self.note_back().await;
            return Ok(());
        };
        // Nothing has been removed.
        match self.control.start(FirstStart::No).await {
            Ok(()) => {
                self.note_back().await;
                Err(failure)
            }
            Err(start) => Err(Failure {
                message: format!(
                    "{}; and the server could not be started again: {}",
                    failure.message, start.message
                ),
                ..failure
            }),
        }
    }

    /// Where the server runs without this recipient, the next one has to know that it was stopped.
    async fn note_server(&self, away: bool) -> Result<(), Failure> {
        match self.journal().filter(|_| self.control.is_independent()) {
            Some(journal) => blocking(move || journal.note_server(away)).await,
            None => Ok(()),
        }
    }

    async fn note_back(&self) {
        if let Err(failure) = self.note_server(false).await {
            warn!(clone = %self.id, error = %failure, "that the server runs again could not be recorded");
        }
    }

    /// The staged tree replaces the server's data.
    pub(super) async fn replace(&self, form: Form, source: &dyn Source) -> Result<End, Failure> {
        let place = Place::new(form, &self.request.target, &self.id);
        let is_managed = self.control.manages();
        let waits = !is_managed && server_on(&place.data_directory).is_some();
        let wishes = Wishes {
            clone: self.id.clone(),
            waits,
            had_data: self.has_old_data(),
            attaches: self.request.replicate_from.is_some(),
            keep_old: self.settings.install.keep_old_data,
        };
        let target = self.request.target.clone();
        let counts = Arc::clone(&self.progress.counts);
        // Of data that were discarded nothing stands there.
        let expected = if self.request.discard_old_data_first {
            String::new()
        } else {
            self.request.expected_generation.clone()
        };
        let replacement = blocking(move || {
            // Another recipient may have begun one while this clone was copied, or ended one.
            no_earlier_install(&target)?;
            generation::check(&target, &expected)?;
            check_seen(&target)?;
            Replacement::create(place, &wishes, &counts)
        });
        let replacement = replacement.await.map(Arc::new)?;
        let replacement = Arc::clone(self.replacement.get_or_init(|| replacement));
        self.status.set_install(&replacement);
        // The donor's part is done, and what goes on with this install from here needs nothing of it any more;
        // its server need not keep anything for the restart here.
        source.close(Outcome::Completed).await;
        self.check_cancelled()?;
        if waits {
            return Ok(End::AwaitsInstall);
        }
        let leaving = self.leaving.clone();
        let installer =
            installer(&self.settings, &self.status, &self.control, replacement, leaving);
        if is_managed {
            installer.install().await?;
        } else {
            installer.put_in_place_or_back().await?;
        }
        self.status.end_stages();
        Ok(End::Completed)
    }

    /// Where there was nothing to give back, nothing is kept either: once all is done, for until then the
    /// install's journal says what the clone is.
    pub(super) async fn accept_what_had_no_data(
        &self,
        done: &Result<(), Failure>,
    ) -> Result<(), Failure> {
        let Some(replacement) = self.replacement.get().cloned() else { return Ok(()) };
        let goes_on = done.is_err() && self.is_interrupted.load(Ordering::Relaxed);
        if self.has_old_data() || goes_on {
            return Ok(());
        }
        let accepted = Arc::clone(&replacement);
        blocking(move || accepted.accept()).await?;
        self.status.set_install(&replacement);
        Ok(())
    }
}

/// An installer that tells a clone's status of its steps.
#[must_use]
pub fn installer(
    settings: &Settings,
    status: &Arc<CloneStatus>,
    control: &Arc<dyn ServerControl>,
    replacement: Arc<Replacement>,
    leaving: CancellationToken,
) -> Installer {
    let (status, stops) = (Arc::clone(status), Arc::clone(status));
    Installer {
        replacement,
        control: Arc::clone(control),
        health_limit: settings.install.recovery_timeout,
        leaving,
        tell_stop: Box::new(move || stops.begin_stage(pbc::Stage::Restart)),
        tell: Box::new(move |replacement| {
            status.set_install(replacement);
            match replacement.step() {
                Step::Started => status.begin_stage(pbc::Stage::Recovery),
                Step::Healthy | Step::Opened => status.end_stages(),
                _ => {}
            }
        }),
    }
}
