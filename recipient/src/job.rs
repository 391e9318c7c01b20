//! One clone, from its request to its end. `run` is the table of contents.

pub mod history;
pub mod registry;
pub mod status;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use marcot_common::{
    entry::{Attributes, Change, Kind},
    failure::Failure,
    position::{Position, Stage},
};
use marcot_engine::Advanced;
use marcot_proto::{common::v1 as pbc, donor::v1::Outcome};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::status::CloneStatus;
use crate::{
    fetch::{FetchContext, fetch, stopped},
    gate::Gate,
    growing::GrowingFiles,
    install::{
        fresh::{OwnDirectory, install},
        identity,
        installer::Installer,
        locks::server_on,
        place::{Form, Place},
        replacement::{Replacement, make_inner, remove_inner},
        step::Step,
    },
    list::{FileList, ListReceiver, merge},
    plan::FetchPlan,
    preflight::{self, Prepared},
    progress::Progress,
    replica,
    request::CloneRequest,
    retry::Patience,
    reuse::Reuse,
    server_control::{ServerControl, not_managed},
    settings::Settings,
    source::{Source, blocking},
    staging::{STAGING_PREFIX, Staging},
    verify::{VerifiedTree, verify},
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

/// How a clone has ended, when not by a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It stands where it was to stand.
    Completed,
    /// It is whole, and waits for its server to be stopped (3707).
    AwaitsInstall,
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
    /// The install, once it has begun.
    pub replacement: OnceLock<Arc<Replacement>>,
    /// Cancelled when the user cancels or the service stops.
    pub cancel: CancellationToken,
}

impl CloneJob {
    /// Runs the clone. Whatever happens, no half-made target is left, and no staging but of an
    /// install that keeps a tree there.
    ///
    /// A snapshot that is lost, with its donor's service or by its lease, is opened anew; what is
    /// staged by then is the older copy whose equal blocks are used.
    pub async fn run(&self) -> Result<End, Failure> {
        let mut older = None;
        let mut lost = 0;
        let result = loop {
            let result = self.copy_snapshot(older.take()).await;
            match result {
                Err(failure)
                    if failure.reason == "UNKNOWN_SNAPSHOT"
                        && lost < SNAPSHOTS_LOST_MAX
                        && !self.cancel.is_cancelled() =>
                {
                    lost += 1;
                    warn!(clone = %self.id, error = %failure, "the snapshot is lost, another is opened");
                    self.progress.begin_again(failure.message);
                    self.growing.clear();
                    self.status.begin_again();
                    match self.keep_staged().await {
                        Ok(kept) => older = kept,
                        Err(failure) => break Err(failure),
                    }
                }
                result => break result,
            }
        };
        // A clone that was rolled back by itself was open to nobody: it holds nothing of value.
        let stays = self.replacement.get().is_some_and(|replacement| {
            replacement.must_stay() && replacement.step() != Step::RolledBack
        });
        let [staged, older] = staging_directories(&self.request.staging_parent(), &self.id);
        let gone = if stays { vec![older] } else { vec![staged, older] };
        for directory in gone {
            if let Err(failure) = blocking(move || Staging::remove(&directory)).await {
                warn!(clone = %self.id, error = %failure, "staging directory is left");
            }
        }
        if self.request.form == Some(Form::Move) {
            remove_inner(&self.request.target);
        }
        result
    }

    /// Copies one snapshot to its end.
    async fn copy_snapshot(&self, older: Option<PathBuf>) -> Result<End, Failure> {
        let prepare = Box::pin(self.prepare(older.is_some()));
        let mut prepared = self.until_cancelled(prepare).await?;
        if let Some(older) = older {
            prepared.reuse = Some(Arc::new(Reuse::open(&older)?));
        }
        let source = Arc::clone(&prepared.source);
        if self.request.discard_old_data_first
            && let Err(failure) = self.discard_old_data().await
        {
            source.close(Outcome::Failed).await;
            return Err(failure);
        }
        let parent = self.request.staging_parent();
        if self.request.form == Some(Form::Move) {
            make_inner(&parent)?;
        }
        let staging = match Staging::create(&parent, &self.id, prepared.owners) {
            Ok(staging) => Arc::new(staging),
            Err(failure) => {
                source.close(Outcome::Failed).await;
                return Err(failure);
            }
        };
        let result = self.copy_and_install(&prepared, &staging).await;
        let outcome = match &result {
            Ok(_) => Outcome::Completed,
            Err(_) if self.cancel.is_cancelled() => Outcome::Cancelled,
            Err(_) => Outcome::Failed,
        };
        source.close(outcome).await;
        result
    }

    /// Checks all, and opens a snapshot. A donor that was there before is waited for.
    async fn prepare(&self, again: bool) -> Result<Prepared, Failure> {
        let limit = if again { self.settings.donor_timeout } else { Duration::ZERO };
        let mut patience = Patience::new(&self.progress.retries, limit);
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

    /// Sets aside what is staged; returns its tree.
    async fn keep_staged(&self) -> Result<Option<PathBuf>, Failure> {
        let [staged, older] = staging_directories(&self.request.staging_parent(), &self.id);
        blocking(move || {
            Staging::remove(&older)?;
            match rustix::fs::rename(&staged, &older) {
                Ok(()) => Ok(Some(older.join("tree"))),
                Err(rustix::io::Errno::NOENT) => Ok(None),
                Err(e) => Err(Failure::io("set aside", &staged, &e.into())),
            }
        })
        .await
    }

    async fn copy_and_install(
        &self,
        prepared: &Prepared,
        staging: &Arc<Staging>,
    ) -> Result<End, Failure> {
        let source = prepared.source.as_ref();
        let (whole, done) = self.copy_rounds(prepared, source, staging).await?;
        self.status.begin_stage(pbc::Stage::FileSync);
        let verified = self.verify(staging, whole, done.root.clone()).await?;
        self.status.end_stages();
        self.check_cancelled()?;
        self.status.set_consistency(&done);
        if let Some(form) = self.request.form {
            // The donor's part is done; its server need not keep anything for the restart here.
            source.close(Outcome::Completed).await;
            let end = Box::pin(self.replace(form)).await?;
            if end == End::Completed && self.control.manages() {
                self.attach_replica(&done).await?;
            }
            return Ok(end);
        }
        let (staging, target) = (Arc::clone(staging), self.request.target.clone());
        let own = if self.request.replaces { OwnDirectory::Yes } else { OwnDirectory::No };
        blocking(move || install(&staging, &verified, &target, own)).await?;
        info!(clone = %self.id, target = %self.request.target.display(), "clone installed");
        Ok(End::Completed)
    }

    /// The server replicates from the donor's, if that was asked for.
    async fn attach_replica(&self, done: &Advanced) -> Result<(), Failure> {
        let Some(source) = &self.request.replicate_from else {
            return Ok(());
        };
        let attach = async {
            let engine = self.settings.engine.as_ref();
            let database = engine.map(|engine| engine.database.clone()).unwrap_or_default();
            let at = done.coordinates.clone().unwrap_or_default();
            replica::attach(&database, &at, source).await
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

    /// The old data go before the first byte, where the caller has said so.
    async fn discard_old_data(&self) -> Result<(), Failure> {
        if !self.control.manages() {
            return Err(not_managed());
        }
        warn!(clone = %self.id, "the server is stopped and its data are removed, as asked for");
        self.control.stop().await?;
        let directory = self.request.target.clone();
        blocking(move || identity::discard_all_else(&directory)).await
    }

    /// The staged tree replaces the server's data.
    async fn replace(&self, form: Form) -> Result<End, Failure> {
        let place = Place::new(form, &self.request.target, &self.id);
        let is_managed = self.control.manages();
        let waits = !is_managed && server_on(&place.data_directory).is_some();
        let (id, keep) = (self.id.clone(), self.settings.install.keep_old_data);
        let replacement =
            blocking(move || Replacement::create(place, &id, waits, keep)).await.map(Arc::new)?;
        let replacement = Arc::clone(self.replacement.get_or_init(|| replacement));
        self.status.set_install(&replacement);
        if waits {
            return Ok(End::AwaitsInstall);
        }
        self.check_cancelled()?;
        let installer = installer(&self.settings, &self.status, &self.control, replacement);
        if is_managed {
            installer.install().await?;
            if !self.request.had_data {
                // There is nothing to give back.
                let replacement = Arc::clone(&installer.replacement);
                blocking(move || replacement.accept()).await?;
                self.status.set_install(&installer.replacement);
            }
        } else {
            installer.put_in_place_or_back().await?;
        }
        self.status.end_stages();
        Ok(End::Completed)
    }

    /// Copies round after round until the donor has nothing more to give.
    async fn copy_rounds(
        &self,
        prepared: &Prepared,
        source: &dyn Source,
        staging: &Arc<Staging>,
    ) -> Result<(FileList, Advanced), Failure> {
        let mut position = prepared.opened.position;
        let mut whole: Option<FileList> = None;
        for _ in 0..ROUNDS_MAX {
            self.status.begin_round(position);
            let list = self.list(source, staging, position, prepared.entries_max).await?;
            self.status.set_estimate(position, list.totals(), false);
            let shaped = self.shape(staging, whole, list.clone()).await?;
            self.copy(prepared, staging, &list, position).await?;
            self.link(staging, list, shaped.clone()).await?;
            whole = Some(shaped);
            self.until_cancelled(async {
                self.gate.pass().await;
                Ok(())
            })
            .await?;
            let advanced = self.until_cancelled(source.advance(position)).await?;
            if advanced.position <= position {
                return Err(Failure::peer_misbehaved(format!(
                    "the donor went from {position} to {}",
                    advanced.position
                )));
            }
            position = advanced.position;
            if position.stage == Stage::Done {
                self.check_all_finished()?;
                let whole = whole.ok_or_else(|| Failure::bug("no list was read"))?;
                return Ok((whole, advanced));
            }
        }
        Err(Failure::peer_misbehaved(format!("the donor asks for more than {ROUNDS_MAX} rounds")))
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
        self.until_cancelled(source.list(position, receiver)).await
    }

    /// Brings the staged tree to the list's shape: directories, symbolic links, what is gone.
    async fn shape(
        &self,
        staging: &Arc<Staging>,
        whole: Option<FileList>,
        list: FileList,
    ) -> Result<FileList, Failure> {
        let (staging, progress) = (Arc::clone(staging), Arc::clone(&self.progress));
        let (growing, cancel) = (Arc::clone(&self.growing), self.cancel.clone());
        blocking(move || {
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
                match (entry.change, &entry.kind) {
                    (Change::Rename, _) => staging.put_back(entry.file_id, &entry.path)?,
                    (Change::Truncate, Some(Kind::Regular { size, .. })) => {
                        staging.open_file(&entry.path, *size)?;
                    }
                    // Made, or cut to its size, when it is written.
                    (Change::Patch, _) => {}
                    _ => staging.make(&entry)?,
                }
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
    ) -> Result<(), Failure> {
        let context = FetchContext {
            plan: FetchPlan::new(list, &self.growing, prepared.source.cut())?,
            staging: Arc::clone(staging),
            progress: Arc::clone(&self.progress),
            position,
            growing: Arc::clone(&self.growing),
            copied: CancellationToken::new(),
            reuse: prepared.reuse.clone(),
            gate: Arc::clone(&self.gate),
            donor_timeout: self.settings.donor_timeout,
            stop: self.cancel.child_token(),
        };
        let source = prepared.source.as_ref();
        let streams = source.streams(self.request.concurrency);
        let grows = !self.growing.growing().is_empty();
        let follower = grows.then(|| source.follower());
        fetch(Arc::new(context), streams, follower).await
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

    async fn verify(
        &self,
        staging: &Arc<Staging>,
        whole: FileList,
        root: Option<Attributes>,
    ) -> Result<VerifiedTree, Failure> {
        let (staging, cancel) = (Arc::clone(staging), self.cancel.clone());
        blocking(move || {
            verify(&staging, &whole, root.as_ref(), &|| {
                if cancel.is_cancelled() { Err(stopped()) } else { Ok(()) }
            })
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

/// An installer that tells a clone's status of its steps.
#[must_use]
pub fn installer(
    settings: &Settings,
    status: &Arc<CloneStatus>,
    control: &Arc<dyn ServerControl>,
    replacement: Arc<Replacement>,
) -> Installer {
    let status = Arc::clone(status);
    Installer {
        replacement,
        control: Arc::clone(control),
        health_limit: settings.install.recovery_timeout,
        tell: Box::new(move |replacement| {
            status.set_install(replacement);
            match replacement.step() {
                Step::Stopped | Step::Exchanging | Step::SettingAside | Step::PuttingIn => {
                    status.begin_stage(pbc::Stage::Restart);
                }
                Step::Started => status.begin_stage(pbc::Stage::Recovery),
                Step::Healthy | Step::Opened => status.end_stages(),
                _ => {}
            }
        }),
    }
}
