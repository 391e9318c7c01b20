//! Installs beside and after their clones: what a start finds of them, and what callers ask of them.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use marcot_common::{failure::Failure, host::path_bytes, time};
use marcot_proto::recipient::v1 as pb;
use tonic::Code;
use tracing::{Instrument as _, error, info, info_span, warn};
use uuid::Uuid;

use super::{Clones, Running, refuse_if_busy, unknown};
use crate::{
    install::{
        installer::Installer,
        place::{self, Form},
        reconcile::{Action, decide},
        replacement::{self, Replacement},
        step::Step,
    },
    job::{
        End, installer, staging_directories,
        status::{CloneStatus, interrupted, is_final},
    },
    server_control::ServerControl,
    settings::Settings,
    source::blocking,
    staging::{Staging, allocated_bytes},
};

/// How often it is looked whether kept data have outlived their time.
const KEEP_CHECK: Duration = Duration::from_secs(5);

/// Longest wait for a server of a recipient that was killed to end with it.
const ORPHAN_MAX: Duration = Duration::from_secs(60);

/// Between two looks at it.
const ORPHAN_PAUSE: Duration = Duration::from_millis(200);

/// An install that a start has found, brought to a state in which a server may start.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) replacement: Arc<Replacement>,
    action: Action,
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
        let action = decide(replacement.step(), replacement.standing()?);
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
        found.push(Found { replacement, action });
    }
    found.retain(|found| found.replacement.place.staging.exists());
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
        Action::LetGo if replacement.plan.waits => Ok(()),
        Action::LetGo => replacement.remove(),
        Action::BringBack => {
            let was_open = replacement.was_opened();
            replacement.put_back()?;
            replacement.unlock_trees();
            // A tree that has been open may hold somebody's writes.
            if was_open { Ok(()) } else { replacement.remove() }
        }
        Action::GoOn if replacement.step() == Step::Exchanging => replacement.note_in_place(),
        Action::RemoveOld => replacement.accept(),
        Action::GoOn | Action::Keep | Action::KeepAside => Ok(()),
        Action::Refuse => {
            error!(
                clone = %replacement.plan.clone,
                data_directory = %replacement.place.data_directory.display(),
                staging = %replacement.place.staging.display(),
                step = replacement.step().name(),
                "neither the old data nor the clone stand in the data directory: somebody has \
                 moved them, and nothing is touched"
            );
            Ok(())
        }
    }
}

/// Brings the record of a clone that had not ended up to what was found; tells whether it changed.
pub(super) fn settle(clone: &mut pb::Clone, found: Option<&Found>) -> bool {
    let before = clone.state;
    let state = match found.map(|found| found.action) {
        Some(Action::LetGo) if found.is_some_and(|found| found.replacement.plan.waits) => {
            Some(pb::State::AwaitingInstall)
        }
        Some(Action::GoOn) => Some(pb::State::InProgress),
        Some(Action::Keep) => Some(pb::State::Completed),
        Some(Action::BringBack | Action::KeepAside) => Some(pb::State::RolledBack),
        _ => None,
    };
    match state {
        Some(state) => {
            clone.state = state.into();
            if state == pb::State::Completed {
                clone.error = None;
            }
        }
        None if is_final(before) => return false,
        None => end_interrupted(clone),
    }
    if is_final(clone.state) {
        clone.end_time.get_or_insert(time::timestamp(SystemTime::now()));
        clone.eta = None;
    }
    clone.state != before || !is_final(before)
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
                if directory.join("journal").exists() {
                    continue;
                }
                if let Err(failure) = Staging::remove(&directory) {
                    warn!(clone = %id, error = %failure, "staging directory is left");
                }
            }
        }
        replacement::remove_inner(target);
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
    /// Goes on with an install that a stop has cut, and from then on removes kept data whose time
    /// is over. Returns whether the server is started by it.
    pub fn go_on(self: &Arc<Self>) -> bool {
        let pending = {
            let table = self.lock();
            table.installs.values().find(|install| is_pending(install)).cloned()
        };
        let clones = Arc::clone(self);
        tokio::spawn(async move { clones.remove_outlived().await });
        let Some(replacement) = pending.filter(|_| self.control.manages()) else {
            return false;
        };
        let clones = Arc::clone(self);
        let span = info_span!("install", clone = %replacement.plan.clone);
        match self.occupy(&replacement) {
            Ok(running) => {
                let work = async move {
                    let installer = clones.installer_for(&running, &replacement);
                    let result = installer.bring_up().await.map(|()| End::Completed);
                    clones.end_install(&running, &replacement, &result);
                };
                self.tasks.spawn(work.instrument(span));
                true
            }
            Err(failure) => {
                warn!(error = %failure, "the install does not go on");
                false
            }
        }
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
        if !matches!(replacement.step(), Step::InPlace | Step::Opened | Step::Accepted) {
            return Err(not_installed(&clone));
        }
        self.operate(&replacement, |installer| async move {
            let replacement = Arc::clone(&installer.replacement);
            let result = blocking(move || replacement.accept()).await;
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
        if !matches!(replacement.step(), Step::InPlace | Step::Opened) {
            return Err(not_installed(&clone));
        }
        if !discard_writes {
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
            (Ok(End::Completed), result)
        })
        .await
    }

    /// Ends a clone that waits to be installed.
    pub(super) fn cancel_waiting(&self, mut clone: pb::Clone) -> Result<pb::Clone, Failure> {
        let mut table = self.lock();
        refuse_if_busy(&table)?;
        if let Some(replacement) = table.installs.remove(&clone.name) {
            replacement.remove()?;
        }
        clone.state = pb::State::Cancelled.into();
        clone.install = None;
        self.history.save(&clone)?;
        table.past.insert(clone.name.clone(), clone.clone());
        Ok(clone)
    }

    /// What clones have left of this recipient's data directory.
    pub fn leftovers(&self) -> Vec<pb::Leftover> {
        let Some(directory) = &self.settings.data_directory else {
            return Vec::new();
        };
        let directory = directory.canonicalize().unwrap_or_else(|_| directory.clone());
        let table = self.lock();
        let mut found = Vec::new();
        for form in [Form::Exchange, Form::Move] {
            let Ok(entries) = std::fs::read_dir(form.staging_parent(&directory)) else {
                continue;
            };
            for path in entries.flatten().map(|entry| entry.path()) {
                let Some(id) = path.file_name().and_then(place::clone_id) else { continue };
                let name = format!("clones/{id}");
                let is_running = table.running.as_ref().is_some_and(|running| running.id == id);
                let (content, removable) = match table.installs.get(&name).map(|i| i.step()) {
                    _ if is_running => ("of the clone that runs", false),
                    Some(Step::RolledBack) => ("a clone that was rolled back", true),
                    Some(Step::Staged) => ("a clone that waits to be installed", false),
                    Some(_) => {
                        ("the data from before the clone; `marcot accept` removes them", false)
                    }
                    None if path.join("journal").exists() => ("of another data directory", false),
                    None => ("of a clone that has ended", !table.past.contains_key(&name)),
                };
                found.push(pb::Leftover {
                    name: format!("leftovers/{id}"),
                    allocated_bytes: allocated_bytes(&path),
                    path: path_bytes(&path),
                    content: content.to_owned(),
                    removable,
                });
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    /// Removes one of them.
    pub fn remove_leftover(&self, name: &str) -> Result<(), Failure> {
        let leftover = self.leftovers().into_iter().find(|leftover| leftover.name == name);
        let Some(leftover) = leftover else {
            let shown: String = name.chars().take(80).collect();
            return Err(Failure::new(
                Code::NotFound,
                "UNKNOWN_LEFTOVER",
                format!("`{shown}` is no leftover; `marcot prune` lists them"),
            ));
        };
        if !leftover.removable {
            return Err(Failure::precondition(
                "LEFTOVER_IN_USE",
                format!("{name} is {} and cannot be removed so", leftover.content),
            ));
        }
        let id = name.rsplit('/').next().unwrap_or_default();
        let replacement = self.lock().installs.remove(&format!("clones/{id}"));
        match replacement {
            Some(replacement) => replacement.remove(),
            None => Staging::remove(&PathBuf::from(OsStr::from_bytes(&leftover.path))),
        }
    }

    /// Removes the old data of clones that were open for as long as these were to be kept.
    async fn remove_outlived(self: Arc<Self>) {
        loop {
            let now = SystemTime::now();
            let outlived: Vec<String> = {
                let table = self.lock();
                let is_over = |install: &&Arc<Replacement>| {
                    install.step() == Step::Opened
                        && install.keep_until().is_some_and(|until| until <= now)
                };
                let names = table.installs.iter().filter(|(_, install)| is_over(install));
                names.map(|(name, _)| name.clone()).collect()
            };
            for name in outlived {
                info!(clone = %name, "the old data have been kept for their time, and go");
                if let Err(failure) = self.accept(&name).await {
                    warn!(clone = %name, error = %failure, "the old data stay");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(KEEP_CHECK) => {}
                () = self.tasks.wait() => return,
            }
        }
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
        installer(&self.settings, &running.status, &self.control, Arc::clone(replacement))
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

    fn end_install(
        &self,
        running: &Running,
        replacement: &Arc<Replacement>,
        end: &Result<End, Failure>,
    ) -> pb::Clone {
        running.status.set_install(replacement);
        let mut clone = running.status.finish(end, false);
        if replacement.step() == Step::RolledBack && end.is_ok() {
            clone.state = pb::State::RolledBack.into();
        }
        if replacement.step() == Step::RolledBack && end.is_err() {
            // By itself: nobody has written to what is given up.
            if let Err(failure) = replacement.remove() {
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

/// Whether the clone stands and its server has not been proven yet.
fn is_pending(replacement: &Replacement) -> bool {
    matches!(replacement.step(), Step::InPlace | Step::Started | Step::Healthy)
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
