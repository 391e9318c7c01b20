//! Servers that were stopped for a clone and are not back: where they run without this recipient, nobody
//! else starts them again.
//!
//! Each try has the one place that clones and installs run in: trees must not move while a server comes up.
//! Between two tries the place is free, for whoever knows better.

use std::{sync::Arc, time::Duration};

use marcot_common::failure::Failure;
use tonic::Code;
use tracing::{error, info, warn};

use super::{Clones, Table, installs::is_kept, refuse_if_busy, resumes::staged};
use crate::{
    copy_journal,
    install::{generation, reconcile::Action, replacement::Replacement},
    job::status::is_final,
    server_control::{FirstStart, outlived_recipient},
    source::blocking,
};

/// After a try that has failed; each later pause is twice as long.
const PAUSE_MIN: Duration = Duration::from_secs(1);

/// Longest pause: a volume or a secret that is back is found within this.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// The one place that clones and installs run in, until this is dropped.
#[derive(Debug)]
struct PlaceTaken(Arc<Clones>);

impl Drop for PlaceTaken {
    fn drop(&mut self) {
        self.0.lock().starting = None;
    }
}

impl Clones {
    /// Starts a server that was stopped for a clone and is not back, as often as it takes while this
    /// process runs; tells whether there is one. The place is taken when this returns.
    pub(super) fn bring_server_back(self: &Arc<Self>) -> bool {
        {
            let mut table = self.lock();
            if table.brings_back || self.away(&table).is_empty() {
                return false;
            }
            table.brings_back = true;
        }
        let place = self.take_place().ok();
        tokio::spawn(Arc::clone(self).keep_bringing_back(place));
        true
    }

    async fn keep_bringing_back(self: Arc<Self>, mut place: Option<PlaceTaken>) {
        let mut pause = PAUSE_MIN;
        while let Some(taken) = self.next_place(place.take()).await {
            let clones = Arc::clone(&self);
            // A stop of the service waits for a command that runs.
            let tried = self.tasks.spawn(async move {
                let tried = clones.try_to_bring_back().await;
                if tried.is_ok() {
                    // A stop of one that is still starting comes to nothing, or hangs it for good.
                    let goes_on = clones.lock().interrupted.is_some();
                    let open = clones.leaving.run_until_cancelled(clones.control.wait_open());
                    if goes_on && let Some(Err(failure)) = open.await {
                        warn!(error = %failure, "the server that was started again does not answer yet");
                    }
                    // A copy would keep the place from the next tries.
                    clones.go_on_with_interrupted();
                }
                drop(taken);
                tried
            });
            let tried = tried.await;
            let tried = tried.unwrap_or_else(|e| {
                Err(Failure::bug(format!("the start of the server stopped: {e}")))
            });
            let Err(failure) = tried else { continue };
            if failure.reason == "SERVER_NOT_HEALTHY" {
                warn!(error = %failure, "the server is not seen to be up; it is looked at again");
            } else {
                error!(error = %failure, "the server could not be started again; it is tried again");
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.tasks.wait() => return,
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// The place, once it is free; `None` when there is nothing to start or to go on with any more, or this
    /// process ends.
    async fn next_place(self: &Arc<Self>, taken: Option<PlaceTaken>) -> Option<PlaceTaken> {
        if taken.is_some() {
            return taken;
        }
        loop {
            {
                let mut table = self.lock();
                if table.draining {
                    return None;
                }
                if self.away(&table).is_empty() && table.interrupted.is_none() {
                    table.brings_back = false;
                    info!("a server that was stopped for a clone is seen to");
                    return None;
                }
            }
            if let Ok(place) = self.take_place() {
                return Some(place);
            }
            // What runs may bring it back itself.
            tokio::select! {
                () = tokio::time::sleep(PAUSE_MIN) => {}
                () = self.tasks.wait() => return None,
            }
        }
    }

    fn take_place(self: &Arc<Self>) -> Result<PlaceTaken, Failure> {
        let mut table = self.lock();
        refuse_if_busy(&table)?;
        let away = self.away(&table).first().map(|(name, _)| name.clone());
        table.starting = away.or_else(|| table.interrupted.clone());
        Ok(PlaceTaken(Arc::clone(self)))
    }

    /// Clones for which the server is stopped, or closed, and whose installs nobody goes on with; a copy whose
    /// old data are still there has none.
    fn away(&self, table: &Table) -> Vec<(String, Option<Arc<Replacement>>)> {
        if !self.control.is_independent() {
            return Vec::new();
        }
        let own = self.settings.data_directory.as_deref();
        if own.is_some_and(generation::was_discarded) {
            // A server would make new, empty data.
            return Vec::new();
        }
        let is_away = |(name, install): &(&String, &Arc<Replacement>)| {
            let has_ended = table.past.get(*name).is_some_and(|clone| is_final(clone.state));
            install.is_away()
                && has_ended
                && install.action().is_ok_and(|action| {
                    matches!(
                        action,
                        Action::Install | Action::LetGo | Action::KeepAside | Action::Keep
                    )
                })
        };
        let installs = table.installs.iter().filter(is_away);
        let installs = installs.map(|(name, install)| (name.clone(), Some(Arc::clone(install))));
        installs.chain(table.away.iter().map(|name| (name.clone(), None))).collect()
    }

    /// Whether its server is still to be started again: what says so must not go before.
    pub(super) fn is_away(&self, table: &Table, name: &str) -> bool {
        self.away(table).iter().any(|(away, _)| away == name)
    }

    /// One try: the server runs for everybody afterwards, and that is recorded.
    async fn try_to_bring_back(&self) -> Result<(), Failure> {
        let (away, first) = {
            let table = self.lock();
            (self.away(&table), standing_start(&table))
        };
        let Some((clone, _)) = away.first() else { return Ok(()) };
        let control = self.control.as_ref();
        if !outlived_recipient(control).await {
            info!(%clone, "its server was stopped for it, and is started again");
            control.start(first).await?;
        } else if control.stands().await == Some(false) {
            let text =
                "a server runs and does not answer: it may be on its way down, or not up yet";
            return Err(Failure::new(Code::Unavailable, "SERVER_NOT_HEALTHY", text));
        } else {
            let installs = away.iter().filter_map(|(_, install)| install.clone());
            let closed: Vec<_> = installs.filter(|install| install.may_be_closed()).collect();
            if !closed.is_empty() {
                control.open().await?;
                // It takes writes now: a later try only looks at it.
                let noted = move || closed.iter().try_for_each(|install| install.note_open());
                if let Err(failure) = blocking(noted).await {
                    warn!(%clone, error = %failure, "that the server was opened could not be recorded");
                }
                control.wait_open().await?;
            }
        }
        for (name, install) in away {
            let noted = match install.clone() {
                Some(install) => blocking(move || install.note_back()).await,
                None => self.note_copy_back(&name).await,
            };
            match (noted, install) {
                (Err(failure), install) => {
                    // It costs the next start of this service a look more.
                    warn!(clone = %name, error = %failure, "that the server runs again could not be recorded");
                    if let Some(install) = install {
                        install.forget_away();
                    }
                }
                (Ok(()), Some(install)) => self.let_go_of(&name, install).await,
                (Ok(()), None) => {}
            }
        }
        Ok(())
    }

    /// In the journals of a copy that say that its server is stopped.
    async fn note_copy_back(&self, name: &str) -> Result<(), Failure> {
        self.lock().away.remove(name);
        let clone = self.get(name)?;
        blocking(move || {
            let mut away = staged(&clone).into_iter().filter(|path| copy_journal::is_away(path));
            away.try_for_each(|directory| copy_journal::note_back(&directory))
        })
        .await
    }

    /// Lets go of an install that was given up, once its server runs.
    async fn let_go_of(&self, name: &str, install: Arc<Replacement>) {
        // Of data that were discarded it is all that there is.
        let is_all = generation::was_discarded(&install.place.data_directory);
        if install.was_opened() || install.plan.waits || is_all {
            return;
        }
        let work = Arc::clone(&install);
        let removed = blocking(move || {
            if matches!(work.action()?, Action::LetGo | Action::KeepAside) {
                super::found::left(&work, work.let_go());
            }
            Ok(())
        });
        if removed.await.is_ok() && !install.place.staging.exists() {
            self.lock().installs.remove(name);
        }
    }
}

/// How a server is to be started on the data that stand.
pub(super) fn standing_start(table: &Table) -> FirstStart {
    let kept = table.installs.values().find(|install| is_kept(install));
    kept.map_or(FirstStart::No, |install| install.first_start())
}
