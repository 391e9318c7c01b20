//! One clone, from its request to its end. `run` is the table of contents.

mod certify;
pub mod history;
pub mod registry;
mod replace;
mod resume;
mod stage_span;
pub mod status;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError, atomic::AtomicBool},
    time::Duration,
};

use marcot_common::{
    entry::{Change, Entry, Kind},
    failure::Failure,
    position::{Position, Stage},
    telemetry::spans::traced,
};
use marcot_engine::Advanced;
use marcot_proto::{common::v1 as pbc, donor::v1::Outcome};
use tokio_util::sync::CancellationToken;
use tracing::{debug_span, info, warn};

pub use self::replace::installer;
use self::status::CloneStatus;
use crate::{
    copy_journal::{CopyJournal, RoundFound, is_away},
    fetch::{FetchContext, fetch, stopped},
    gate::Gate,
    growing::GrowingFiles,
    install::{
        fresh::{OwnDirectory, install},
        generation,
        hold::hold,
        place::{Form, make_inner, remove_inner},
        replacement::Replacement,
        step::Step,
    },
    list::{FileList, ListReceiver, merge},
    plan::{FetchPlan, FinishedUnits},
    preflight::{self, Prepared, binary_logs::KnownBase},
    progress::Progress,
    request::CloneRequest,
    retry::Patience,
    server_control::ServerControl,
    settings::Settings,
    source::{Source, blocking},
    staging::{OlderTree, STAGING_PREFIX, Staging, put_back_all},
};

/// Most rounds over all stages: far more than any engine asks for before it gives up itself.
const ROUNDS_MAX: u32 = 64;

/// Most snapshots that one clone may lose: a donor that is restarted more often is being worked on.
const SNAPSHOTS_LOST_MAX: u32 = 3;

/// Where a clone's bytes are staged, and where what was staged of a lost snapshot is set aside.
#[must_use]
pub fn staging_directories(parent: &Path, id: &str) -> [PathBuf; 2] {
    [format!("{STAGING_PREFIX}{id}"), format!("{STAGING_PREFIX}{id}-older")]
        .map(|name| parent.join(name))
}

/// The journal of the install that keeps a staging directory, if there is one.
#[must_use]
pub fn installed_journal(staging: &Path) -> PathBuf {
    staging.join("journal")
}

/// How a clone has ended, when not by a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It stands where it was to stand.
    Completed,
    /// It is whole, and waits for its server to be stopped (3707).
    AwaitsInstall,
    /// It needs a secret that nobody has stored; what is staged is kept.
    AwaitsCredentials,
}

/// A clone that runs.
#[derive(Debug)]
pub struct CloneJob {
    /// The clone's id, the last part of its name.
    pub id: String,
    /// What was asked for.
    pub request: CloneRequest,
    /// The recipient's settings.
    pub settings: Arc<Settings>,
    /// What others see of it.
    pub status: Arc<CloneStatus>,
    /// What is counted.
    pub progress: Arc<Progress>,
    /// Files that grow on the donor.
    pub growing: Arc<GrowingFiles>,
    /// Closed while the clone is paused.
    pub gate: Arc<Gate>,
    /// The server whose data are replaced.
    pub control: Arc<dyn ServerControl>,
    /// Cancelled when this process ends, whatever still runs.
    pub leaving: CancellationToken,
    /// The install, once it has begun.
    pub replacement: OnceLock<Arc<Replacement>>,
    /// Whether it goes on with what an earlier run of it has staged.
    pub goes_on: bool,
    /// Whether the donor asks whom to log in.
    pub donor_has_accounts: AtomicBool,
    /// Name of the clone's binary log.
    pub binlog_base: KnownBase,
    /// Whether connections are encrypted, and to which certificate: as the first one was.
    pub pins: OnceLock<(bool, Option<[u8; 32]>)>,
    /// Where what is durable is recorded, once there is something to go on with.
    pub journal: Mutex<Option<Arc<CopyJournal>>>,
    /// Whether the service stops: the clone goes on when it is started again.
    pub is_interrupted: AtomicBool,
    /// Cancelled when the user cancels or the service stops.
    pub cancel: CancellationToken,
}

impl CloneJob {
    /// Runs the clone. Whatever happens, no half-made target is left, and no staging but of an
    /// install that keeps a tree there, or of a copy that can be gone on with.
    ///
    /// A snapshot that is lost, with its donor's service or by its lease, is opened anew; what is
    /// staged by then stays, and only blocks that differ are fetched.
    pub async fn run(&self) -> Result<End, Failure> {
        let mut lost = 0;
        let mut goes_on = self.goes_on;
        let result = loop {
            let result = if std::mem::take(&mut goes_on) {
                Box::pin(self.go_on()).await
            } else {
                self.copy_snapshot(lost > 0).await
            };
            match result {
                Err(failure)
                    if (self.goes_on || lost > 0)
                        && failure.reason == "ACCESS_DENIED"
                        && !self.cancel.is_cancelled() =>
                {
                    warn!(clone = %self.id, error = %failure, "a right password is awaited");
                    break Ok(End::AwaitsCredentials);
                }
                Err(failure)
                    if is_of_a_lost_snapshot(&failure)
                        && self.lacks_secret()
                        && !self.cancel.is_cancelled() =>
                {
                    info!(clone = %self.id, error = %failure, "the snapshot is lost, a password is awaited");
                    break Ok(End::AwaitsCredentials);
                }
                Err(failure)
                    if is_of_a_lost_snapshot(&failure)
                        && lost < SNAPSHOTS_LOST_MAX
                        && !self.cancel.is_cancelled() =>
                {
                    lost += 1;
                    warn!(clone = %self.id, error = %failure, "the snapshot is lost, another is opened");
                    self.progress.begin_again(failure);
                    self.growing.clear();
                    self.status.begin_again();
                    if let Err(failure) = self.keep_staged().await {
                        break Err(failure);
                    }
                }
                result => break result,
            }
        };
        if self.can_be_gone_on_with(&result) || self.install_is_left(&result) {
            if let Some(journal) = self.journal()
                && let Err(failure) = blocking(move || journal.ended()).await
            {
                warn!(clone = %self.id, error = %failure, "the copy's journal does not tell of this end");
            }
            return result;
        }
        let [staged, older] = staging_directories(&self.request.staging_parent(), &self.id);
        let replacement = self.replacement.get().cloned();
        let waits = result.is_ok();
        // Of data that were discarded there is nothing but this copy.
        let is_all = generation::was_discarded(&self.request.target);
        self.set_journal(None);
        let removed = blocking(move || {
            let is_away = [&staged, &older].iter().any(|directory| is_away(directory));
            if replacement.is_none() && is_away && !is_all {
                // Its server is stopped still, and the next start has to know.
                return Ok(());
            }
            Staging::remove(&older)?;
            match replacement {
                None => Staging::remove(&staged),
                // A clone that was rolled back by itself was open to nobody: it holds nothing of
                // value.
                Some(replacement) => match replacement.step() {
                    Step::Staged if waits || is_all => Ok(()),
                    Step::RolledBack if is_all => Ok(()),
                    step if step.is_given_up() => replacement.give_up(),
                    _ => Ok(()),
                },
            }
        });
        if let Err(failure) = removed.await {
            warn!(clone = %self.id, error = %failure, "staging directory is left");
        }
        if self.request.form == Some(Form::Move) {
            remove_inner(&self.request.target);
        }
        result
    }

    /// Copies one snapshot to its end; `again` when one was lost.
    async fn copy_snapshot(&self, again: bool) -> Result<End, Failure> {
        let span = debug_span!("prepare", marcot.again = again);
        let prepare = Box::pin(traced(span, self.prepare(again)));
        let mut prepared = self.until_cancelled(prepare).await?;
        if again && prepared.reuse.is_none() {
            prepared.reuse = Some(Arc::default());
        }
        let source = Arc::clone(&prepared.source);
        let parent = self.request.staging_parent();
        if self.request.form == Some(Form::Move) {
            make_inner(&parent)?;
        }
        let staging = match Staging::create(&parent, &self.id, prepared.owners) {
            Ok(staging) => Arc::new(self.labelled(staging)),
            Err(failure) => {
                source.close(Outcome::Failed).await;
                return Err(failure);
            }
        };
        let begin = async {
            // Before the data go: a recipient that is stopped after that goes on with the clone.
            self.begin_journal(&prepared, &staging).await?;
            self.discard_old_data().await
        };
        let result = match begin.await {
            Ok(()) => self.copy_and_install(&prepared, &staging, None).await,
            Err(failure) => Err(failure),
        };
        self.close(source.as_ref(), &result).await;
        result
    }

    /// Ends the snapshot, unless somebody goes on with it.
    async fn close(&self, source: &dyn Source, result: &Result<End, Failure>) {
        let outcome = match result {
            Ok(_) => Outcome::Completed,
            // Nobody goes on with a snapshot that was given up here, or that no journal tells of: it must not
            // hold a place, redo and DDL.
            Err(failure)
                if self.can_be_gone_on_with(result)
                    && self.journal().is_some()
                    && !is_of_a_lost_snapshot(failure) =>
            {
                return;
            }
            Err(_) if self.cancel.is_cancelled() => Outcome::Cancelled,
            Err(_) => Outcome::Failed,
        };
        source.close(outcome).await;
    }

    /// The journal, when there is something to go on with.
    fn journal(&self) -> Option<Arc<CopyJournal>> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_journal(&self, journal: Option<Arc<CopyJournal>>) {
        *self.journal.lock().unwrap_or_else(PoisonError::into_inner) = journal;
    }

    /// Checks all, and opens a snapshot. A donor that was there before is waited for, also one that is
    /// there again and cannot serve yet: its database is not up, its places are taken, it drains.
    async fn prepare(&self, again: bool) -> Result<Prepared, Failure> {
        let limit = if again { self.settings.donor_timeout } else { Duration::ZERO };
        let mut patience = Patience::new(&self.progress.retries, limit).awaiting_refusals();
        loop {
            match preflight::prepare(self).await {
                Ok(prepared) => return Ok(prepared),
                Err(failure) if again => {
                    tokio::time::sleep(patience.after(failure)?).await;
                }
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Sets aside what is staged: the next snapshot's first list takes from it.
    async fn keep_staged(&self) -> Result<(), Failure> {
        let [staged, older] = staging_directories(&self.request.staging_parent(), &self.id);
        self.set_journal(None);
        blocking(move || {
            let failed = |e: io::Error| Failure::io("set aside", &staged, &e);
            let trees = [staged.join("tree"), older.join("tree")];
            match trees.each_ref().map(|tree| tree.is_dir()) {
                // It was still taking from the one before it.
                [true, true] => {
                    let [staged_tree, older_tree] = trees;
                    put_back_all(&staged_tree, &older_tree).map_err(failed)?;
                    Staging::remove(&staged)
                }
                [false, true] => Staging::remove(&staged),
                [_, false] => {
                    Staging::remove(&older)?;
                    match rustix::fs::rename(&staged, &older) {
                        Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
                        Err(e) => Err(failed(e.into())),
                    }
                }
            }
        })
        .await
    }

    async fn copy_and_install(
        &self,
        prepared: &Prepared,
        staging: &Arc<Staging>,
        from: Option<RoundFound>,
    ) -> Result<End, Failure> {
        let source = prepared.source.as_ref();
        let (whole, done) = self.copy_rounds(prepared, source, staging, from).await?;
        self.status.begin_stage(pbc::Stage::FileSync);
        let verify = self.verify(staging, whole, &done);
        let verified = traced(self.status.spans.current(), verify).await?;
        self.status.end_stages();
        blocking(|| {
            hold("verified");
            Ok(())
        })
        .await?;
        // A person who has paused the clone does not want it installed.
        self.until_cancelled(async {
            self.gate.pass().await;
            Ok(())
        })
        .await?;
        self.check_cancelled()?;
        self.status.set_consistency(&done);
        self.check_attachable(&done)?;
        if let Some(form) = self.request.form {
            let end = Box::pin(self.replace(form, source)).await?;
            if end == End::Completed {
                let attached = match self.control.manages() {
                    true => self.attach_replica(&done).await,
                    false => Ok(()),
                };
                self.accept_what_had_no_data(&attached).await?;
                attached?;
            }
            return Ok(end);
        }
        let (staging, target) = (Arc::clone(staging), self.request.target.clone());
        let own = if self.request.replaces { OwnDirectory::Yes } else { OwnDirectory::No };
        blocking(move || install(&staging, &verified, &target, own)).await?;
        info!(clone = %self.id, target = %self.request.target.display(), "clone installed");
        Ok(End::Completed)
    }

    /// Copies round after round until the donor has nothing more to give.
    async fn copy_rounds(
        &self,
        prepared: &Prepared,
        source: &dyn Source,
        staging: &Arc<Staging>,
        mut from: Option<RoundFound>,
    ) -> Result<(FileList, Advanced), Failure> {
        let mut position = prepared.opened.position;
        let mut whole: Option<FileList> = None;
        let goes_on = from.is_some();
        for _ in 0..ROUNDS_MAX {
            self.status.begin_round(position);
            let round = self.copy_round(prepared, source, staging, position, whole, from.take());
            let (shaped, advanced) = Box::pin(traced(self.status.spans.current(), round)).await?;
            whole = Some(shaped);
            if advanced.position <= position {
                return Err(Failure::peer_misbehaved(format!(
                    "the donor went from {position} to {}",
                    advanced.position
                )));
            }
            position = advanced.position;
            if position.stage == Stage::Done {
                self.check_all_finished().map_err(|failure| match goes_on {
                    // The point may have been fixed for a call from before the last stop of this service, while
                    // the file was read again: another snapshot tells.
                    true => resume::lost(&failure.message),
                    false => failure,
                })?;
                let whole = whole.ok_or_else(|| Failure::bug("no list was read"))?;
                return Ok((whole, advanced));
            }
        }
        Err(Failure::peer_misbehaved(format!("the donor asks for more than {ROUNDS_MAX} rounds")))
    }

    /// Copies one round, and has the donor move on; `whole` is the list of all rounds before it.
    async fn copy_round(
        &self,
        prepared: &Prepared,
        source: &dyn Source,
        staging: &Arc<Staging>,
        position: Position,
        whole: Option<FileList>,
        from: Option<RoundFound>,
    ) -> Result<(FileList, Advanced), Failure> {
        let (list, shaped, finished) = if let Some(round) = from {
            self.reopen_round(prepared, staging, round).await?
        } else {
            let list = self.list(source, staging, position, prepared.entries_max).await?;
            self.status.set_estimate(position, list.totals(), false);
            let shaped = self.shape(staging, whole, list.clone(), position).await?;
            (list, shaped, Some(FinishedUnits::default()))
        };
        if let Some(finished) = finished {
            self.copy(prepared, staging, &list, position, finished).await?;
        }
        self.progress.settle_lost();
        self.link(staging, list, shaped.clone()).await?;
        self.until_cancelled(async {
            self.gate.pass().await;
            Ok(())
        })
        .await?;
        let advance =
            traced(debug_span!("advance", otel.kind = "client"), source.advance(position));
        Ok((shaped, self.until_cancelled(advance).await?))
    }

    async fn list(
        &self,
        source: &dyn Source,
        staging: &Arc<Staging>,
        position: Position,
        entries_max: u64,
    ) -> Result<FileList, Failure> {
        let directory = staging.directory().to_owned();
        let receiver =
            blocking(move || ListReceiver::create(&directory, position, entries_max)).await?;
        let list = source.list(position, receiver);
        self.until_cancelled(traced(debug_span!("list", otel.kind = "client"), list)).await
    }

    /// Brings the staged tree to the list's shape: directories, symbolic links, what is gone.
    async fn shape(
        &self,
        staging: &Arc<Staging>,
        whole: Option<FileList>,
        list: FileList,
        position: Position,
    ) -> Result<FileList, Failure> {
        let (staging, progress) = (Arc::clone(staging), Arc::clone(&self.progress));
        let (growing, cancel) = (Arc::clone(&self.growing), self.cancel.clone());
        let journal = self.journal();
        let [_, older] = staging_directories(&self.request.staging_parent(), &self.id);
        blocking(move || {
            let is_first = whole.is_none();
            let lost = if is_first { OlderTree::open(&older)? } else { None };
            if let Some(journal) = journal.as_ref().filter(|_| !is_first) {
                journal.shaping(position)?;
            }
            let merged = match whole {
                Some(whole) => merge(&whole, &list, &mut staging.changes())?,
                None => list.clone(),
            };
            for entry in list.entries()? {
                let entry = entry?;
                if cancel.is_cancelled() {
                    return Err(stopped());
                }
                progress.listed_again(&entry);
                growing.listed(&entry)?;
                shape_entry(&staging, journal.as_deref(), lost.as_ref(), &entry)?;
            }
            if lost.is_some() {
                Staging::remove(&older)?;
            }
            if let Some(journal) = journal {
                if !is_first {
                    // What the record says of the tree's shape must outlive a cut of power; a first
                    // round's is made again.
                    staging.sync()?;
                }
                journal.round_begun(position, &list, &merged, &growing.all(), &progress)?;
            }
            Ok(merged)
        })
        .await
    }

    async fn copy(
        &self,
        prepared: &Prepared,
        staging: &Arc<Staging>,
        list: &FileList,
        position: Position,
        finished: FinishedUnits,
    ) -> Result<(), Failure> {
        let context = FetchContext {
            clone: format!("clones/{}", self.id),
            plan: self.plan(prepared, list, finished)?,
            journal: self.journal(),
            staging: Arc::clone(staging),
            progress: Arc::clone(&self.progress),
            position,
            growing: Arc::clone(&self.growing),
            copied: CancellationToken::new(),
            reuse: prepared.reuse.clone(),
            gate: Arc::clone(&self.gate),
            limits: Arc::clone(&self.request.limits),
            donor_timeout: self.settings.donor_timeout,
            stall_timeout: self.settings.stall_timeout,
            stop: self.cancel.child_token(),
        };
        let source = prepared.source.as_ref();
        let grows = !self.growing.growing().is_empty();
        let follower = grows.then(|| source.follower());
        // A follower takes one of the donor's places.
        let streams_max = source.streams_max().saturating_sub(usize::from(grows));
        self.request.limits.set_served(streams_max);
        fetch(Arc::new(context), &|| source.stream(), follower).await
    }

    fn plan(
        &self,
        prepared: &Prepared,
        list: &FileList,
        finished: FinishedUnits,
    ) -> Result<FetchPlan, Failure> {
        let (cut, streams) = (prepared.source.cut(), self.request.limits.planned_streams());
        FetchPlan::new(list, &self.growing, cut, streams, finished)
    }

    /// Makes hard links, now that the files that they name are there.
    async fn link(
        &self,
        staging: &Arc<Staging>,
        list: FileList,
        whole: FileList,
    ) -> Result<(), Failure> {
        let staging = Arc::clone(staging);
        blocking(move || {
            let targets = whole.link_targets()?;
            for entry in list.entries()? {
                let entry = entry?;
                let Some(Kind::HardLink { file_id }) = entry.kind else {
                    continue;
                };
                let target = targets.get(&file_id).ok_or_else(|| {
                    let path = &entry.path;
                    Failure::peer_misbehaved(format!("hard link {path} names no listed file"))
                })?;
                staging.make_link(&entry.path, target)?;
            }
            Ok(())
        })
        .await
    }

    /// A file that the donor could not read in one round must have been listed in a later one.
    fn check_all_finished(&self) -> Result<(), Failure> {
        match self.progress.any_unfinished() {
            None => Ok(()),
            Some(unfinished) => Err(Failure::peer_misbehaved(format!(
                "{} could not be read ({}) and was not listed again",
                unfinished.part.path, unfinished.failure
            ))),
        }
    }

    fn check_cancelled(&self) -> Result<(), Failure> {
        if self.cancel.is_cancelled() { Err(stopped()) } else { Ok(()) }
    }

    async fn until_cancelled<T>(
        &self,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        self.cancel.run_until_cancelled(work).await.unwrap_or_else(|| Err(stopped()))
    }
}

/// Whether only another snapshot serves, with what is staged: this one has ended, or has passed what
/// is to be read of it.
fn is_of_a_lost_snapshot(failure: &Failure) -> bool {
    matches!(failure.reason.as_ref(), "UNKNOWN_SNAPSHOT" | "STAGE_PASSED")
}

/// Brings what is staged of one entry to the entry's shape.
fn shape_entry(
    staging: &Staging,
    journal: Option<&CopyJournal>,
    lost: Option<&OlderTree>,
    entry: &Entry,
) -> Result<(), Failure> {
    if let (Change::Truncate | Change::Patch, Some(Kind::Regular { size, .. }), Some(journal)) =
        (entry.change, &entry.kind, journal)
    {
        journal.resized(entry.file_id, staging.size_of(&entry.path)?, *size)?;
    }
    match (entry.change, &entry.kind) {
        (Change::Rename, _) => staging.put_back(entry.file_id, &entry.path)?,
        (Change::Truncate, Some(Kind::Regular { size, .. })) => {
            staging.open_file(&entry.path, *size)?;
        }
        // Made, or cut to its size, when it is written.
        (Change::Patch, _) => {}
        (_, Some(Kind::Regular { .. })) if !entry.growing => {
            if let Some(lost) = lost {
                staging.take(lost, &entry.path)?;
            }
        }
        _ => staging.make(entry)?,
    }
    Ok(())
}

#[cfg(test)]
mod tests;
