//! Installs beside and after their clones: what a start finds of them, and what callers ask of them.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use marcot_common::{failure::Failure, host::path_bytes, time};
use marcot_proto::recipient::v1 as pb;
use tracing::{Instrument as _, error, info, info_span, warn};
use uuid::Uuid;

use super::{Clones, Running, refuse_if_busy, unknown};
use crate::{
    install::{
        generation,
        installer::{Installer, was_left},
        place::{self, Form},
        reconcile::Action,
        replacement::{self, Replacement},
        step::Step,
    },
    job::{
        End, installed_journal, installer, staging_directories,
        status::{CloneStatus, interrupted, is_final},
    },
    server_control::{FirstStart, ServerControl},
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

    /// Whether it keeps a tree.
    pub(super) fn keeps(&self) -> bool {
        self.replacement.place.staging.exists()
    }
}

/// Brings every install of the data directory to a state in which a server may start.
pub(super) async fn reconcile(
    settings: &Settings,
    control: &Arc<dyn ServerControl>,
) -> Result<Vec<Found>, Failure> {
    let Some(directory) = settings.data_directory.clone() else {
        return Ok(Vec::new());
    };
    let directory = directory.canonicalize().unwrap_or(directory);
    let mut found = Vec::new();
    for replacement in blocking(move || replacement::all(&directory)).await? {
        let replacement = Arc::new(replacement);
        let mut action = replacement.action()?;
        if action == Action::Install && !replacement.plan.waits && !control.manages() {
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
        blocking(move || settle_trees(&work, action)).await?;
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

fn settle_trees(replacement: &Replacement, action: Action) -> Result<(), Failure> {
    match action {
        Action::LetGo => replacement.let_go(),
        Action::BringBack => {
            let was_open = replacement.was_opened();
            replacement.put_back()?;
            replacement.unlock_trees();
            // A tree that has been open may hold somebody's writes.
            if was_open { Ok(()) } else { replacement.let_go() }
        }
        Action::GoOn if replacement.step() == Step::Exchanging => replacement.note_in_place(),
        Action::RemoveOld => replacement.accept(),
        Action::Install | Action::GoOn | Action::Keep | Action::KeepAside => Ok(()),
        Action::Refuse => {
            error!(clone = %replacement.plan.clone, error = %replacement.refused(), "nothing is touched");
            Ok(())
        }
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
        // It was installed, or could not be made a replica, and said so.
        Some((_, Action::GoOn | Action::Keep | Action::RemoveOld)) if ended => {}
        Some((found, Action::GoOn | Action::Keep | Action::RemoveOld)) => {
            let result = found.replacement.check_attached();
            clone.error = result.as_ref().err().map(Failure::to_wire);
            clone.state =
                if result.is_ok() { pb::State::Completed } else { pb::State::Failed }.into();
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
    let mut end = pb::State::Failed;
    if let Some(parent) = target.parent().filter(|_| Uuid::parse_str(&id).is_ok()) {
        let [staging, _] = staging_directories(parent, &id);
        let tree = staging.join("tree");
        // A new directory: the tree has left its staging directory by the one rename that installs.
        if staging.is_dir() && !tree.exists() && target.is_dir() {
            end = pb::State::Completed;
        }
        for parent in [parent.to_owned(), Form::Move.staging_parent(target)] {
            for directory in staging_directories(&parent, &id) {
                // A journal means that an install keeps what is there.
                if installed_journal(&directory).exists() {
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
    if end == pb::State::Failed {
        clone.error = Some(interrupted());
    }
    let now = Some(time::timestamp(SystemTime::now()));
    for row in &mut clone.stages {
        if row.state == i32::from(pb::State::InProgress) {
            row.state = end.into();
            row.end_time = now;
        }
    }
}

impl Clones {
    /// Goes on with an install, or a copy, that a stop has cut, and from then on removes kept data whose time
    /// is over. Returns how the server is to be started; `None` when that is the install's.
    pub fn go_on(self: &Arc<Self>) -> Option<FirstStart> {
        let installs: Vec<_> = self.lock().installs.values().cloned().collect();
        let clones = Arc::clone(self);
        tokio::spawn(clones.keep_up());
        let is_pending = |install: &&Arc<Replacement>| {
            let action = install.action();
            let waits = install.plan.waits;
            action.is_ok_and(|action| match action {
                Action::Install => !waits,
                action => action == Action::GoOn,
            })
        };
        let pending = installs.iter().find(is_pending).filter(|_| self.control.manages());
        let Some(replacement) = pending.cloned() else {
            self.go_on_with_interrupted();
            let own = self.settings.data_directory.as_deref();
            if let Some(own) = own.filter(|own| generation::was_discarded(own)) {
                error!(
                    data_directory = %own.display(),
                    "the data were discarded for a clone that is not there yet: the server stays \
                     stopped until a clone is installed; to start it on what is there, remove {}",
                    generation::DISCARDED_FILE
                );
                return None;
            }
            let opened = installs.iter().find(|install| is_kept(install));
            return Some(opened.map_or(FirstStart::No, |install| install.first_start()));
        };
        let clones = Arc::clone(self);
        let span = info_span!("install", clone = %replacement.plan.clone);
        match self.occupy(&replacement) {
            Ok(running) => {
                let work = async move {
                    let installer = clones.installer_for(&running, &replacement);
                    let result = clones.go_on_with_install(&installer).await;
                    clones.end_install(&running, &replacement, &result);
                };
                self.tasks.spawn(work.instrument(span));
                None
            }
            Err(failure) => {
                warn!(error = %failure, "the install does not go on");
                Some(replacement.first_start())
            }
        }
    }

    async fn go_on_with_install(&self, installer: &Installer) -> Result<End, Failure> {
        installer.go_on().await?;
        installer.replacement.check_attached()?;
        if !installer.replacement.plan.had_data {
            let replacement = Arc::clone(&installer.replacement);
            blocking(move || replacement.accept()).await?;
        }
        Ok(End::Completed)
    }

    /// Installs a clone that waits for its server to be stopped.
    pub async fn install(self: &Arc<Self>, name: &str) -> Result<pb::Clone, Failure> {
        let clone = self.get(name)?;
        let replacement = self.lock().installs.get(&clone.name).cloned();
        let waits = clone.state == i32::from(pb::State::AwaitingInstall);
        let Some(replacement) = replacement.filter(|_| waits) else {
            let state = pb::State::try_from(clone.state).unwrap_or_default().as_str_name();
            return Err(Failure::precondition(
                "NOT_WAITING",
                format!("{} does not wait to be installed ({state})", clone.name),
            ));
        };
        if let Some(pid) = replacement.server() {
            return Err(Failure::precondition(
                "SERVER_RUNNING",
                format!(
                    "process {pid} runs a server on {}; stop it, and install again",
                    replacement.place.data_directory.display()
                ),
            )
            .mysql(3707));
        }
        self.operate(&replacement, |installer| async move {
            let replacement = Arc::clone(&installer.replacement);
            match installer.put_in_place_or_back().await {
                Ok(()) => (Ok(End::Completed), Ok(())),
                // It stands as before, and may be tried again.
                Err(failure) => {
                    let text = Err(failure.clone());
                    let waits_again = blocking(move || replacement.wait_again()).await;
                    match waits_again {
                        Ok(()) => (Ok(End::AwaitsInstall), text),
                        Err(_) => (Err(failure), text),
                    }
                }
            }
        })
        .await
    }

    /// Removes the data from before the clone.
    pub async fn accept(self: &Arc<Self>, name: &str) -> Result<pb::Clone, Failure> {
        let clone = self.get(name)?;
        let Some(replacement) = self.lock().installs.get(&clone.name).cloned() else {
            let step = clone.install.as_ref().map(pb::Install::step);
            if step == Some(pb::InstallStep::Accepted) {
                return Ok(clone);
            }
            return Err(not_installed(&clone));
        };
        // A server that is managed must have been healthy, and open.
        let may_be = match replacement.step() {
            Step::Opened | Step::Accepted => true,
            Step::InPlace | Step::Started | Step::Healthy => !self.control.manages(),
            _ => false,
        };
        if !may_be {
            return Err(not_installed(&clone));
        }
        self.operate(&replacement, |installer| async move {
            let replacement = Arc::clone(&installer.replacement);
            let result = blocking(move || replacement.accept()).await;
            if result.is_ok() {
                installer.control.set_mode(FirstStart::No).await;
            }
            (Ok(End::Completed), result)
        })
        .await
    }

    /// Brings the data from before the clone back.
    pub async fn roll_back(
        self: &Arc<Self>,
        name: &str,
        discard_writes: bool,
    ) -> Result<pb::Clone, Failure> {
        let clone = self.get(name)?;
        if clone.state == i32::from(pb::State::RolledBack) {
            return Ok(clone);
        }
        let Some(replacement) = self.lock().installs.get(&clone.name).cloned() else {
            return Err(not_installed(&clone));
        };
        if !replacement.is_pending() || replacement.step() == Step::Staged {
            return Err(not_installed(&clone));
        }
        let may_hold_writes = replacement.was_opened() || !self.control.manages();
        if may_hold_writes && !discard_writes {
            return Err(Failure::precondition(
                "WRITES_WOULD_BE_LOST",
                format!(
                    "the server has taken writes on {} since {} was installed, or may have: they \
                     are not in the old data; roll back with --discard-writes (the clone's tree is \
                     kept aside all the same)",
                    replacement.place.data_directory.display(),
                    clone.name
                ),
            ));
        }
        if !self.control.manages() && replacement.server().is_some() {
            return Err(crate::server_control::not_managed());
        }
        let managed = self.control.manages();
        self.operate(&replacement, move |installer| async move {
            let result = if managed {
                installer.roll_back_on_request().await
            } else {
                installer.put_back_without_server().await
            };
            let is_half_back = matches!(
                installer.replacement.step(),
                Step::ExchangingBack | Step::TakingOut | Step::PuttingBack
            );
            match result {
                Err(failure) if is_half_back => (Err(failure.clone()), Err(failure)),
                result => (Ok(End::Completed), result),
            }
        })
        .await
    }

    /// Ends a clone that waits to be installed.
    pub(super) fn cancel_waiting(&self, mut clone: pb::Clone) -> Result<pb::Clone, Failure> {
        let removal = self.begin_removal(&clone.name, |_| Ok(()))?;
        if let Some(replacement) = removal.install() {
            replacement.let_go()?;
        }
        clone.state = pb::State::Cancelled.into();
        clone.install = None;
        self.history.save(&clone)?;
        removal.done(Some(clone.clone()));
        Ok(clone)
    }

    /// Does something with an install, to its end, whatever becomes of the caller.
    async fn operate<F, W>(
        self: &Arc<Self>,
        replacement: &Arc<Replacement>,
        work: F,
    ) -> Result<pb::Clone, Failure>
    where
        F: FnOnce(Installer) -> W + Send + 'static,
        W: Future<Output = (Result<End, Failure>, Result<(), Failure>)> + Send,
    {
        let running = self.occupy(replacement)?;
        let (clones, replacement) = (Arc::clone(self), Arc::clone(replacement));
        let span = info_span!("install", clone = %replacement.plan.clone);
        let task = self.tasks.spawn(
            async move {
                let (end, answer) = work(clones.installer_for(&running, &replacement)).await;
                let clone = clones.end_install(&running, &replacement, &end);
                answer.map(|()| clone)
            }
            .instrument(span),
        );
        task.await.unwrap_or_else(|e| Err(Failure::bug(format!("the install stopped: {e}"))))
    }

    fn installer_for(&self, running: &Running, replacement: &Arc<Replacement>) -> Installer {
        let leaving = self.leaving.clone();
        installer(&self.settings, &running.status, &self.control, Arc::clone(replacement), leaving)
    }

    /// Takes the one place that clones and installs run in.
    fn occupy(&self, replacement: &Arc<Replacement>) -> Result<Running, Failure> {
        let mut table = self.lock();
        refuse_if_busy(&table)?;
        let name = format!("clones/{}", replacement.plan.clone);
        let clone = table.past.get(&name).cloned().ok_or_else(|| unknown(&name))?;
        let running = Running {
            id: replacement.plan.clone.clone(),
            status: Arc::new(CloneStatus::again(clone)),
            job: None,
        };
        table.running = Some(running.clone());
        Ok(running)
    }

    /// This process ends in the middle: the record stays as it is, for the next start.
    fn leave_install(&self, running: &Running, replacement: &Arc<Replacement>) -> pb::Clone {
        info!("the service stops; the install goes on when it is started again");
        let clone = running.status.clone_resource();
        self.save(&clone);
        let mut table = self.lock();
        table.running = None;
        table.installs.insert(clone.name.clone(), Arc::clone(replacement));
        table.past.insert(clone.name.clone(), clone.clone());
        clone
    }

    fn end_install(
        &self,
        running: &Running,
        replacement: &Arc<Replacement>,
        end: &Result<End, Failure>,
    ) -> pb::Clone {
        running.status.set_install(replacement);
        if end.as_ref().is_err_and(was_left) {
            return self.leave_install(running, replacement);
        }
        let mut clone = running.status.finish(end, false);
        if replacement.step() == Step::RolledBack && end.is_ok() {
            clone.state = pb::State::RolledBack.into();
        }
        if replacement.step() == Step::RolledBack && end.is_err() && !replacement.was_opened() {
            // By itself: nobody has written to what is given up.
            if let Err(failure) = replacement.let_go() {
                warn!(error = %failure, "staging directory is left");
            }
        }
        if let Err(failure) = self.history.save(&clone) {
            warn!(error = %failure, "the clone's record could not be written");
        }
        let mut table = self.lock();
        table.running = None;
        if replacement.place.staging.exists() {
            table.installs.insert(clone.name.clone(), Arc::clone(replacement));
        } else {
            table.installs.remove(&clone.name);
        }
        table.past.insert(clone.name.clone(), clone.clone());
        drop(table);
        running.status.update(|published| *published = clone.clone());
        clone
    }
}

/// Whether the clone stands and is open, and the old tree is kept.
pub(super) fn is_kept(replacement: &Replacement) -> bool {
    replacement.action().is_ok_and(|action| action == Action::Keep)
}

fn not_installed(clone: &pb::Clone) -> Failure {
    let state = pb::State::try_from(clone.state).unwrap_or_default().as_str_name();
    Failure::precondition(
        "NOT_INSTALLED",
        format!(
            "{} keeps no old data ({state}): there is nothing to accept or roll back",
            clone.name
        ),
    )
}
