//! What a start finds of installs: each is brought to a state in which a server may start, and the record of
//! its clone up to that.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use marcot_common::{failure::Failure, host::path_bytes, time};
use marcot_proto::recipient::v1 as pb;
use tracing::{error, info, warn};
use uuid::Uuid;

use super::resumes::says_away;
use crate::{
    certificate,
    counts::Counts,
    fetch::stopped,
    install::{
        generation,
        place::{self, Form},
        reconcile::Action,
        replacement::{self, Replacement},
        step::Step,
    },
    job::{
        installed_journal, staging_directories,
        status::{interrupted, is_final},
    },
    server_control::ServerControl,
    settings::Settings,
    source::blocking,
    staging::Staging,
};

/// Longest wait for a server of a recipient that was killed to end with it.
const ORPHAN_MAX: Duration = Duration::from_secs(60);

/// Between two looks at it.
const ORPHAN_PAUSE: Duration = Duration::from_millis(200);

/// An install that a start has found, brought to a state in which a server may start.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) replacement: Arc<Replacement>,
    action: Action,
    /// Whether this recipient stops and starts the server.
    manages: bool,
}

impl Found {
    /// The clone's name.
    pub(super) fn name(&self) -> String {
        format!("clones/{}", self.replacement.plan.clone)
    }

    /// A record of a clone that only its install tells of.
    pub(super) fn unknown_clone(&self) -> pb::Clone {
        let mut clone = pb::Clone {
            name: self.name(),
            destination: path_bytes(&self.replacement.place.data_directory),
            state: pb::State::InProgress.into(),
            ..pb::Clone::default()
        };
        settle(&mut clone, Some(self));
        clone
    }

    /// Ends an install that has not begun, of a clone that has ended, or that somebody has cancelled before
    /// this start. Of data that were discarded it is all that there is.
    pub(super) async fn give_up(&mut self) -> Result<(), Failure> {
        let is_all = generation::was_discarded(&self.replacement.place.data_directory);
        if self.action == Action::Install && !is_all {
            self.action = Action::LetGo;
            let replacement = Arc::clone(&self.replacement);
            let manages = self.manages;
            blocking(move || settle_trees(&replacement, Action::LetGo, manages)).await?;
        }
        Ok(())
    }

    /// Whether it keeps a tree.
    pub(super) fn keeps(&self) -> bool {
        self.replacement.place.staging.exists()
    }

    /// Whether the old data are back by nobody's wish: the clone was open to nobody.
    fn was_undone(&self) -> bool {
        !self.replacement.was_opened()
            && (self.manages || self.replacement.step() == Step::LettingGo)
    }
}

/// Brings every install of the data directory to a state in which a server may start.
pub(super) async fn reconcile(
    settings: &Settings,
    control: &Arc<dyn ServerControl>,
    counts: &Arc<Counts>,
) -> Result<Vec<Found>, Failure> {
    let Some(directory) = settings.data_directory.clone() else {
        return Ok(Vec::new());
    };
    let directory = directory.canonicalize().unwrap_or(directory);
    let mut found = Vec::new();
    let counts = Arc::clone(counts);
    for replacement in blocking(move || replacement::all(&directory, &counts)).await? {
        let replacement = Arc::new(replacement);
        let mut action = replacement.action()?;
        let is_all = generation::was_discarded(&replacement.place.data_directory);
        if action == Action::Install && !replacement.plan.waits && !control.manages() && !is_all {
            // Nobody would stop the server for it.
            action = Action::LetGo;
        }
        info!(
            clone = %replacement.plan.clone,
            step = replacement.step().name(),
            action = ?action,
            "an install was found"
        );
        if action == Action::BringBack {
            wait_for_no_server(&replacement, control).await?;
        }
        let work = Arc::clone(&replacement);
        let manages = control.manages();
        let action = blocking(move || settle_trees(&work, action, manages)).await?;
        found.push(Found { replacement, action, manages: control.manages() });
    }
    Ok(found)
}

/// A server whose trees are about to move must have ended: what ran it may have been killed.
async fn wait_for_no_server(
    replacement: &Replacement,
    control: &Arc<dyn ServerControl>,
) -> Result<(), Failure> {
    if control.manages() {
        control.stop().await?;
    }
    let begun = std::time::Instant::now();
    while let Some(pid) = replacement.server() {
        if begun.elapsed() >= ORPHAN_MAX {
            return Err(Failure::precondition(
                "SERVER_RUNNING",
                format!(
                    "an install in {} was cut at step {} and is to be undone, and process {pid} \
                     runs a server there; stop it, and start marcot-recipient again",
                    replacement.place.data_directory.display(),
                    replacement.step().name()
                ),
            ));
        }
        tokio::time::sleep(ORPHAN_PAUSE).await;
    }
    Ok(())
}

/// What cannot be removed stays: the tree that a server is to run on stands all the same. Returns what is to be
/// done then.
fn settle_trees(
    replacement: &Replacement,
    action: Action,
    manages: bool,
) -> Result<Action, Failure> {
    // Of data that were discarded the clone is all that there is: it is installed once more.
    let is_all = || generation::was_discarded(&replacement.place.data_directory);
    match action {
        Action::LetGo if replacement.step() != Step::LettingGo && is_all() => {
            replacement.put_back("INTERRUPTED")?;
            replacement.wait_again()?;
            return Ok(Action::Install);
        }
        // The journal says that its server is to be started again: it goes after that.
        Action::LetGo if replacement.is_away() => {
            left(replacement, replacement.begin_letting_go());
        }
        Action::LetGo => {
            left(replacement, replacement.let_go());
        }
        Action::BringBack => {
            // Where a person starts the server, nobody has seen whether it was open.
            let is_on_its_way_back = matches!(
                replacement.step(),
                Step::ExchangingBack | Step::TakingOut | Step::PuttingBack
            );
            let was_open = replacement.was_opened() || (!manages && is_on_its_way_back);
            replacement.put_back("INTERRUPTED")?;
            replacement.unlock_trees();
            if !was_open && is_all() {
                replacement.wait_again()?;
                return Ok(Action::Install);
            }
            // A tree that has been open may hold somebody's writes.
            if !was_open && !replacement.is_away() {
                left(replacement, replacement.let_go());
            }
        }
        Action::GoOn if replacement.step() == Step::Exchanging => replacement.note_in_place()?,
        // There was nothing to keep; its server may still have to be opened.
        Action::Keep if !replacement.plan.had_data && !replacement.is_away() => {
            left(replacement, replacement.accept());
        }
        Action::RemoveOld => {
            left(replacement, replacement.accept());
        }
        Action::Install | Action::GoOn | Action::Keep | Action::KeepAside => {}
        Action::Refuse => {
            error!(clone = %replacement.plan.clone, error = %replacement.refused(), "nothing is touched");
        }
    }
    Ok(action)
}

/// Says so where a tree could not be removed; `marcot prune` shows it, and the next start tries again.
pub(super) fn left(replacement: &Replacement, removed: Result<(), Failure>) {
    if let Err(failure) = removed {
        let (clone, staging) = (&replacement.plan.clone, replacement.place.staging.display());
        warn!(%clone, error = %failure, "{staging} is left");
    }
}

/// Brings the record of a clone up to what was found; tells whether it changed.
pub(super) fn settle(clone: &mut pb::Clone, found: Option<&Found>) -> bool {
    let before = clone.clone();
    let ended = is_final(before.state);
    match found.map(|found| (found, found.action)) {
        Some((found, Action::Install)) if found.replacement.plan.waits => {
            clone.state = pb::State::AwaitingInstall.into();
        }
        Some((found, Action::Install | Action::GoOn)) if found.manages => {
            clone.state = pb::State::InProgress.into();
            clone.end_time = None;
        }
        // Its server is still to be opened.
        Some((found, Action::Keep)) if !ended && found.manages && found.replacement.is_away() => {
            clone.state = pb::State::InProgress.into();
            clone.end_time = None;
        }
        // It was installed, or could not be made a replica, and said so.
        Some((_, Action::GoOn | Action::Keep | Action::RemoveOld)) if ended => {}
        Some((found, Action::GoOn | Action::Keep | Action::RemoveOld)) => {
            let result = found.replacement.check_attached();
            clone.error = result.as_ref().err().map(Failure::to_wire);
            clone.state =
                if result.is_ok() { pb::State::Completed } else { pb::State::Failed }.into();
        }
        Some((found, Action::BringBack | Action::KeepAside)) if found.was_undone() => {
            if !ended {
                end_interrupted(clone);
            }
        }
        Some((found, Action::BringBack | Action::KeepAside)) => {
            clone.state = pb::State::RolledBack.into();
            if found.replacement.was_opened() {
                // By a person's wish: what stopped it half-way is over.
                clone.error = None;
            }
        }
        Some((found, Action::Refuse)) if !ended => {
            clone.state = pb::State::Failed.into();
            clone.error = Some(found.replacement.refused().to_wire());
        }
        Some(_) | None if ended => {}
        Some(_) | None => end_interrupted(clone),
    }
    if let Some(found) = found {
        clone.install = Some(found.replacement.to_wire());
    }
    if is_final(clone.state) {
        clone.end_time.get_or_insert(time::timestamp(SystemTime::now()));
        clone.eta = None;
    }
    *clone != before
}

/// A stop of the service ended this clone: its staging goes, its record says how it ended.
fn end_interrupted(clone: &mut pb::Clone) {
    let id = clone.name.rsplit('/').next().unwrap_or_default().to_owned();
    let target = Path::new(OsStr::from_bytes(&clone.destination));
    let is_cancelled = clone.requested_cancellation;
    let mut end = if is_cancelled { pb::State::Cancelled } else { pb::State::Failed };
    if let Some(parent) = target.parent().filter(|_| Uuid::parse_str(&id).is_ok()) {
        // A new directory: the tree has left its staging directory by the one rename that installs.
        if certificate::is_of(target, &clone.name) {
            end = pb::State::Completed;
        }
        for parent in [parent.to_owned(), Form::Move.staging_parent(target)] {
            for directory in staging_directories(&parent, &id) {
                // A journal means that an install keeps what is there, or says that the server is stopped.
                if installed_journal(&directory).exists() || says_away(&directory, target) {
                    continue;
                }
                if let Err(failure) = Staging::remove(&directory) {
                    warn!(clone = %id, error = %failure, "staging directory is left");
                }
            }
        }
        place::remove_inner(target);
        info!(clone = %id, "cleared up after a clone that a stop has ended");
    }
    clone.state = end.into();
    match end {
        pb::State::Failed => clone.error = Some(interrupted()),
        pb::State::Cancelled => clone.error = Some(stopped().to_wire()),
        _ => {}
    }
    let now = Some(time::timestamp(SystemTime::now()));
    for row in &mut clone.stages {
        if row.state == i32::from(pb::State::InProgress) {
            row.state = end.into();
            row.end_time = now;
        }
    }
}
