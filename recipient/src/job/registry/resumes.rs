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

use super::{CloneJob, CloneStatus, Clones, found::settle, refuse_if_busy};
use crate::{
    copy_journal::{self, CopyFound, FILE_NAME, tells_of_a_snapshot},
    counts::ResumeCause,
    install::{
        generation,
        place::{self, Form},
    },
    job::{installed_journal, staging_directories, status::is_final},
    progress::Progress,
    request::{CloneRequest, Secrets},
    settings::Settings,
    source::blocking,
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
    // Between two snapshots only the earlier one's journal tells anything.
    let has_journal = |directory: &&PathBuf| directory.join(FILE_NAME).exists();
    let told = directories.iter().find(|directory| tells_of_a_snapshot(directory));
    let directory = told.or_else(|| directories.iter().find(has_journal))?;
    Some(CopyFound::look(directory))
}

/// Whether a clone has left the server stopped whose data it was to discard.
pub(super) async fn is_away(clone: &pb::Clone, settings: &Arc<Settings>) -> bool {
    let (clone, settings) = (clone.clone(), Arc::clone(settings));
    // A look too many costs less than a server that stays down.
    blocking(move || Ok(has_left_stopped(&clone, &settings))).await.unwrap_or(true)
}

fn has_left_stopped(clone: &pb::Clone, settings: &Settings) -> bool {
    let has_come = matches!(clone.state(), pb::State::Completed | pb::State::RolledBack);
    let target = Path::new(OsStr::from_bytes(&clone.destination));
    let own = settings.data_directory.as_deref();
    let is_own =
        own.is_some_and(|own| own == target || own.canonicalize().is_ok_and(|own| own == target));
    !has_come && is_own && staged(clone).iter().any(|directory| says_away(directory, target))
}

/// Whether what is staged says that the server of the data that it replaces is to be started again: once those
/// have gone it is not.
pub(super) fn says_away(directory: &Path, target: &Path) -> bool {
    copy_journal::is_away(directory) && !generation::was_discarded(target)
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
        if let Err(failure) = self.go_on_with(&name, None, ResumeCause::Restart) {
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
        self.go_on_with(&clone.name, secrets, ResumeCause::Request)
    }

    fn go_on_with(
        self: &Arc<Self>,
        name: &str,
        secrets: Option<Secrets>,
        cause: ResumeCause,
    ) -> Result<pb::Clone, Failure> {
        let clone = self.get(name)?;
        let found = found(&clone).ok_or_else(|| nothing_staged(&clone))??;
        let request = CloneRequest::from_record(&found.begun, secrets, &self.settings)?;
        // As they were when it stopped.
        request.limits.change(&clone.limits.unwrap_or_default())?;
        if let Some(streams) = planned_streams(&found) {
            request.limits.plan_for(streams);
        }
        let mut table = self.lock();
        // After a restart the place is still kept for it.
        if cause != ResumeCause::Restart || table.draining {
            refuse_if_busy(&table)?;
        }
        let progress = Arc::new(Progress::new(&self.counts));
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
        self.counts.resume(cause);
        self.spawn(&mut table, job);
        Ok(clone)
    }

    /// Ends a clone that a stop has interrupted, and that was to go on once its server had been seen to.
    pub(super) fn cancel_interrupted(&self, mut clone: pb::Clone) -> Result<pb::Clone, Failure> {
        clone.requested_cancellation = true;
        self.history.save(&clone)?;
        settle(&mut clone, None);
        self.save(&clone);
        let mut table = self.lock();
        self.note_end(&mut table, &clone);
        table.past.insert(clone.name.clone(), clone.clone());
        drop(table);
        self.tell_end(&clone);
        Ok(clone)
    }

    /// Gives up a clone that waits for a password: what it has staged goes.
    pub(super) fn discard_staged(&self, mut clone: pb::Clone) -> Result<pb::Clone, Failure> {
        let removal = self.begin_removal(&clone.name, |_| Ok(()))?;
        // Before anything goes: a stop on the way must not say that it waits.
        clone.state = pb::State::Cancelled.into();
        self.history.save(&clone)?;
        // The journal says that its server is stopped: it goes after that.
        let target = Path::new(OsStr::from_bytes(&clone.destination));
        let directories = staged(&clone).into_iter().filter(|path| !says_away(path, target));
        for directory in directories {
            // What stays goes with the next look at what has ended.
            if let Err(failure) = Staging::remove(&directory) {
                warn!(clone = %clone.name, error = %failure, "staging directory is left");
            }
        }
        place::remove_inner(Path::new(OsStr::from_bytes(&clone.destination)));
        self.note_end(&mut self.lock(), &clone);
        removal.done(Some(clone.clone()), false);
        Ok(clone)
    }
}

/// Streams that an earlier run has cut large files for, where it says so.
fn planned_streams(found: &CopyFound) -> Option<usize> {
    usize::try_from(found.begun.planned_streams).ok().filter(|&streams| streams > 0)
}

fn nothing_staged(clone: &pb::Clone) -> Failure {
    let state = pb::State::try_from(clone.state).unwrap_or_default().as_str_name();
    Failure::precondition(
        "CLONE_ENDED",
        format!("{} has ended ({state}) and nothing of it is staged; clone again", clone.name),
    )
}
