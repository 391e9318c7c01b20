//! One clone, from its request to its end. `run` is the table of contents.

pub mod history;
pub mod registry;
pub mod status;

use std::{path::PathBuf, sync::Arc};

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
    install::{OwnDirectory, install},
    list::{FileList, ListReceiver, merge},
    plan::FetchPlan,
    preflight::{self, Prepared},
    progress::Progress,
    request::CloneRequest,
    settings::Settings,
    source::{Source, blocking},
    staging::Staging,
    verify::{VerifiedTree, verify},
};

/// Most rounds over all stages: far more than any engine asks for before it gives up itself.
const ROUNDS_MAX: u32 = 64;

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
    /// Cancelled when the user cancels or the service stops.
    pub cancel: CancellationToken,
}

impl CloneJob {
    /// Runs the clone. Whatever happens, no half-made target and no staging is left.
    pub async fn run(&self) -> Result<(), Failure> {
        let prepared = self.until_cancelled(Box::pin(preflight::prepare(self))).await?;
        let source = Arc::clone(&prepared.source);
        let staging_directory = self.request.target.parent().map(PathBuf::from).unwrap_or_default();
        let staging = match Staging::create(&staging_directory, &self.id, prepared.owners) {
            Ok(staging) => Arc::new(staging),
            Err(failure) => {
                source.close(Outcome::Failed).await;
                return Err(failure);
            }
        };
        let result = self.copy_and_install(&prepared, &staging).await;
        let outcome = match &result {
            Ok(()) => Outcome::Completed,
            Err(_) if self.cancel.is_cancelled() => Outcome::Cancelled,
            Err(_) => Outcome::Failed,
        };
        source.close(outcome).await;
        let directory = staging.directory().to_owned();
        let removed = blocking(move || Staging::remove(&directory)).await;
        if let Err(failure) = removed {
            warn!(clone = %self.id, error = %failure, "staging directory is left");
        }
        result
    }

    async fn copy_and_install(
        &self,
        prepared: &Prepared,
        staging: &Arc<Staging>,
    ) -> Result<(), Failure> {
        let source = prepared.source.as_ref();
        let (whole, done) = self.copy_rounds(prepared, source, staging).await?;
        self.status.begin_stage(pbc::Stage::FileSync);
        let verified = self.verify(staging, whole, done.root.clone()).await?;
        self.status.end_stages();
        self.check_cancelled()?;
        let (staging, target) = (Arc::clone(staging), self.request.target.clone());
        let own = if self.request.replaces { OwnDirectory::Yes } else { OwnDirectory::No };
        blocking(move || install(&staging, &verified, &target, own)).await?;
        self.status.set_consistency(&done);
        info!(clone = %self.id, target = %self.request.target.display(), "clone installed");
        Ok(())
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
