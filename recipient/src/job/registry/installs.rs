//! What is done with installs: a start goes on with one, callers install, accept, roll back, and cancel.

use std::sync::Arc;

use marcot_common::{
    failure::Failure,
    telemetry::spans::{CLONE, fail},
};
use marcot_proto::recipient::v1 as pb;
use tracing::{Instrument as _, Span, error, info, info_span, warn};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use super::{Clones, Running, bring_back::standing_start, found::left, refuse_if_busy, unknown};
use crate::{
    install::{
        generation,
        installer::{Installer, was_left},
        reconcile::Action,
        replacement::Replacement,
        step::Step,
    },
    job::{
        End, installer,
        status::{CloneStatus, is_final},
    },
    server_control::FirstStart,
    source::blocking,
};

impl Clones {
    /// Goes on with an install, or a copy, that a stop has cut, and from then on removes kept data whose time
    /// is over. Returns how the server is to be started; `None` when that is the install's.
    pub fn go_on(self: &Arc<Self>) -> Option<FirstStart> {
        let untold = std::mem::take(&mut self.lock().untold);
        for clone in &untold {
            self.tell_end(clone);
        }
        let installs: Vec<_> = {
            let table = self.lock();
            let state = |name: &str| table.past.get(name).map(pb::Clone::state);
            let all = table.installs.iter().map(|(name, install)| (state(name), install));
            let wanted = all.filter(|(state, _)| *state != Some(pb::State::Cancelled));
            wanted.map(|(state, install)| (state, Arc::clone(install))).collect()
        };
        let clones = Arc::clone(self);
        tokio::spawn(clones.keep_up());
        let is_pending = |(state, install): &&(Option<pb::State>, Arc<Replacement>)| {
            let action = install.action();
            let waits = install.plan.waits;
            action.is_ok_and(|action| match action {
                Action::Install => !waits,
                // Its server is still to be opened.
                Action::Keep => *state == Some(pb::State::InProgress),
                action => action == Action::GoOn,
            })
        };
        let pending = installs.iter().find(is_pending).filter(|_| self.control.manages());
        let Some((_, replacement)) = pending.cloned() else {
            // A copy goes on once its server has been seen to.
            if !self.bring_server_back() {
                self.go_on_with_interrupted();
            }
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
            return Some(standing_start(&self.lock()));
        };
        let clones = Arc::clone(self);
        let span = install_span(&replacement);
        match self.occupy(&replacement) {
            Ok(running) => {
                running.status.spans.set_clone(span.clone());
                let work = async move {
                    let installer = clones.installer_for(&running, &replacement);
                    let result = clones.go_on_with_install(&installer).await;
                    clones.end_install(&running, &replacement, &result);
                    running.status.spans.release();
                    clones.bring_server_back();
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
                // Where the old data stand it may be tried again.
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
        if self.is_away(&self.lock(), &clone.name) {
            return Err(Failure::precondition(
                "SERVER_AWAY",
                format!(
                    "the server on {} was stopped and is not seen to run again: the old data stay until \
                     it is; look at the server, and accept {} then",
                    replacement.place.data_directory.display(),
                    clone.name
                ),
            ));
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
            replacement.begin_letting_go()?;
        }
        // Before anything goes: a stop on the way must not say that it waits.
        clone.state = pb::State::Cancelled.into();
        clone.install = None;
        self.history.save(&clone)?;
        self.note_end(&mut self.lock(), &clone);
        let mut is_left = false;
        if let Some(replacement) = removal.install() {
            left(replacement, replacement.let_go());
            is_left = replacement.place.staging.exists();
        }
        removal.done(Some(clone.clone()), is_left);
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
        let span = install_span(&replacement);
        running.status.spans.set_clone(span.clone());
        let task = self.tasks.spawn(
            async move {
                let (end, answer) = work(clones.installer_for(&running, &replacement)).await;
                let clone = clones.end_install(&running, &replacement, &end);
                running.status.spans.release();
                clones.bring_server_back();
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
            status: Arc::new(CloneStatus::again(clone, &self.counts)),
            job: None,
        };
        table.running = Some(running.clone());
        table.shown = Some(Arc::clone(&running.status));
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
        if let Err(failure) = end {
            fail(&Span::current(), failure);
        }
        if end.as_ref().is_err_and(was_left) {
            return self.leave_install(running, replacement);
        }
        let before = self.lock().past.get(&running.status.clone_resource().name).cloned();
        // What had ended has its end, whatever is done with its install afterwards.
        let had_ended = before.filter(|before| is_final(before.state) && end.is_ok());
        let mut clone = running.status.finish(end, false);
        if let Some(before) = had_ended {
            let install = clone.install.take();
            clone = pb::Clone { install, ..before };
        }
        if replacement.step() == Step::RolledBack && end.is_ok() {
            clone.state = pb::State::RolledBack.into();
            // Of a roll-back that had stopped half-way.
            clone.error = None;
        }
        let is_given_up = replacement.step().is_given_up()
            && !replacement.plan.waits
            // Else it is all that there is.
            && !generation::was_discarded(&replacement.place.data_directory);
        if is_given_up && end.is_err() && !replacement.was_opened() {
            // By itself: nobody has written to what is given up.
            left(replacement, replacement.give_up());
        }
        if let Err(failure) = self.history.save(&clone) {
            warn!(error = %failure, "the clone's record could not be written");
        }
        let mut table = self.lock();
        table.running = None;
        let before = table.past.get(&clone.name).map_or(0, |before| before.state);
        if !is_final(before) && is_final(clone.state) {
            self.note_end(&mut table, &clone);
        }
        if replacement.place.staging.exists() {
            table.installs.insert(clone.name.clone(), Arc::clone(replacement));
        } else {
            table.installs.remove(&clone.name);
        }
        table.past.insert(clone.name.clone(), clone.clone());
        drop(table);
        if clone.state != before {
            self.tell_end(&clone);
        }
        running.status.update(|published| *published = clone.clone());
        clone
    }
}

/// The span of an install that is all that is left of its clone.
fn install_span(replacement: &Replacement) -> Span {
    let clone = &replacement.plan.clone;
    let span = info_span!("install", clone = %clone);
    span.set_attribute(CLONE, format!("clones/{clone}"));
    span
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
