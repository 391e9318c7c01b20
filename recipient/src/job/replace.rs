//! The part of a clone that replaces a server's data.

use std::sync::Arc;

use marcot_common::failure::Failure;
use marcot_engine::Advanced;
use marcot_proto::common::v1 as pbc;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{CloneJob, End, status::CloneStatus};
use crate::{
    install::{
        generation, identity,
        installer::Installer,
        locks::server_on,
        place::{Form, Place},
        replacement::{Replacement, Wishes},
        step::Step,
    },
    replica,
    server_control::{FirstStart, ServerControl, not_managed},
    settings::Settings,
    source::blocking,
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

    /// The old data go before the first byte, where the caller has said so.
    pub(super) async fn discard_old_data(&self) -> Result<(), Failure> {
        if !self.control.manages() {
            return Err(not_managed());
        }
        warn!(clone = %self.id, "the server is stopped and its data are removed, as asked for");
        let (directory, id) = (self.request.target.clone(), self.id.clone());
        let discarded = match self.control.stop().await {
            Ok(()) => blocking(move || identity::discard_all_else(&directory, &id)).await,
            Err(failure) => Err(failure),
        };
        let Err(failure) = discarded else { return Ok(()) };
        if generation::was_discarded(&self.request.target) {
            return Err(failure);
        }
        // Nothing has been removed.
        match self.control.start(FirstStart::No).await {
            Ok(()) => Err(failure),
            Err(start) => Err(Failure {
                message: format!(
                    "{}; and the server could not be started again: {}",
                    failure.message, start.message
                ),
                ..failure
            }),
        }
    }

    /// The staged tree replaces the server's data.
    pub(super) async fn replace(&self, form: Form) -> Result<End, Failure> {
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
        let replacement = blocking(move || {
            // Another recipient may have begun one while this clone was copied.
            no_earlier_install(&target)?;
            Replacement::create(place, &wishes)
        });
        let replacement = replacement.await.map(Arc::new)?;
        let replacement = Arc::clone(self.replacement.get_or_init(|| replacement));
        self.status.set_install(&replacement);
        if waits {
            return Ok(End::AwaitsInstall);
        }
        self.check_cancelled()?;
        let leaving = self.leaving.clone();
        let installer =
            installer(&self.settings, &self.status, &self.control, replacement, leaving);
        if is_managed {
            installer.install().await?;
        } else {
            installer.put_in_place_or_back().await?;
        }
        if !self.has_old_data() {
            // There is nothing to give back.
            let replacement = Arc::clone(&installer.replacement);
            blocking(move || replacement.accept()).await?;
            self.status.set_install(&installer.replacement);
        }
        self.status.end_stages();
        Ok(End::Completed)
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
