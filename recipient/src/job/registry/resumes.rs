//! Clones that go on: after a stop of this service by themselves, else when somebody says so.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use marcot_common::{failure::Failure, time::timestamp};
use marcot_proto::recipient::v1 as pb;
use tracing::{info, warn};
use uuid::Uuid;

use super::{CloneJob, CloneStatus, Clones, refuse_if_busy};
use crate::{
    copy_journal::{CopyFound, FILE_NAME},
    install::place::{self, Form},
    job::{installed_journal, staging_directories, status::is_final},
    progress::Progress,
    request::{CloneRequest, Secrets},
    settings::Settings,
    staging::Staging,
};

/// Directories that may hold what a clone has staged: where it is, and where what was staged of a
/// lost snapshot is.
pub(super) fn staged(clone: &pb::Clone) -> Vec<PathBuf> {
    let id = clone.name.rsplit('/').next().unwrap_or_default();
    if Uuid::parse_str(id).is_err() {
        return Vec::new();
    }
    let target = Path::new(OsStr::from_bytes(&clone.destination));
    let parents = [Form::Exchange, Form::Move].map(|form| form.staging_parent(target));
    parents.iter().flat_map(|parent| staging_directories(parent, id)).collect()
}

/// What a clone has copied, as its journal tells.
fn found(clone: &pb::Clone) -> Option<Result<CopyFound, Failure>> {
    let directories = staged(clone);
    // An install keeps what is there by a journal of its own.
    if directories.iter().any(|directory| installed_journal(directory).exists()) {
        return None;
    }
    let directory = directories.into_iter().find(|directory| directory.join(FILE_NAME).exists())?;
    Some(CopyFound::look(&directory))
}

/// Whether a clone that has not come to its end can be gone on with; `None` when nothing of it is
/// staged.
pub(super) fn look(clone: &pb::Clone, settings: &Settings) -> Option<Result<(), Failure>> {
    if is_final(clone.state) && clone.state != i32::from(pb::State::Failed) {
        return None;
    }
    let look = |found: CopyFound| CloneRequest::from_record(&found.begun, None, settings);
    Some(found(clone)?.and_then(look).map(|_| ()))
}

/// A clone that this version of the program cannot go on with, and another one can: what is staged is
/// kept.
pub(super) fn keep_failed(clone: &mut pb::Clone, failure: &Failure) {
    clone.state = pb::State::Failed.into();
    clone.error = Some(failure.to_wire());
    clone.end_time.get_or_insert(timestamp(SystemTime::now()));
    clone.eta = None;
}

impl Clones {
    /// Goes on with the clone that the last stop of this service has interrupted.
    pub(super) fn go_on_with_interrupted(self: &Arc<Self>) {
        let Some(name) = self.lock().interrupted.take() else { return };
        if let Err(failure) = self.go_on_with(&name, None) {
            warn!(clone = %name, error = %failure, "the clone does not go on");
        }
    }

    /// Goes on with a clone: one that is paused, or one whose staged copy is kept. Idempotent.
    pub fn resume(
        self: &Arc<Self>,
        name: &str,
        secrets: Option<Secrets>,
    ) -> Result<pb::Clone, Failure> {
        let clone = self.get(name)?;
        let is_kept = clone.state == i32::from(pb::State::AwaitingCredentials)
            || clone.state == i32::from(pb::State::Failed);
        if !is_kept || found(&clone).is_none() {
            return self.set_paused(name, false);
        }
        self.go_on_with(&clone.name, secrets)
    }

    fn go_on_with(
        self: &Arc<Self>,
        name: &str,
        secrets: Option<Secrets>,
    ) -> Result<pb::Clone, Failure> {
        let clone = self.get(name)?;
        let found = found(&clone).ok_or_else(|| nothing_staged(&clone))??;
        let request = CloneRequest::from_record(&found.begun, secrets, &self.settings)?;
        // As they were when it stopped.
        request.limits.change(&clone.limits.unwrap_or_default())?;
        let mut table = self.lock();
        refuse_if_busy(&table)?;
        let progress = Arc::new(Progress::default());
        progress.go_on_from(&found, &clone);
        let was_paused = clone.state == i32::from(pb::State::Paused);
        let status = CloneStatus::resumed(clone, Arc::clone(&progress), was_paused);
        let id = name.rsplit('/').next().unwrap_or_default();
        let job = Arc::new(CloneJob { goes_on: true, ..self.job(id, request, status, progress) });
        if was_paused {
            job.gate.set_open(false);
        }
        let clone = job.status.clone_resource();
        self.history.save(&clone)?;
        info!(clone = %id, resumes = clone.resumes, "the clone is taken up again");
        self.spawn(&mut table, job);
        Ok(clone)
    }

    /// Gives up a clone that waits for a password: what it has staged goes.
    pub(super) fn discard_staged(&self, mut clone: pb::Clone) -> Result<pb::Clone, Failure> {
        let removal = self.begin_removal(&clone.name, |_| Ok(()))?;
        for directory in staged(&clone) {
            Staging::remove(&directory)?;
        }
        place::remove_inner(Path::new(OsStr::from_bytes(&clone.destination)));
        clone.state = pb::State::Cancelled.into();
        self.history.save(&clone)?;
        removal.done(Some(clone.clone()));
        Ok(clone)
    }
}

fn nothing_staged(clone: &pb::Clone) -> Failure {
    let state = pb::State::try_from(clone.state).unwrap_or_default().as_str_name();
    Failure::precondition(
        "CLONE_ENDED",
        format!("{} has ended ({state}) and nothing of it is staged; clone again", clone.name),
    )
}
