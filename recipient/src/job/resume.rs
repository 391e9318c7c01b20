//! A clone that goes on with what an earlier run of it has staged.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, atomic::Ordering},
};

use marcot_common::{
    entry::{Change, Kind},
    failure::Failure,
    host::path_bytes,
    path::RelativePath,
    position::Position,
};
use marcot_proto::donor::v1::Outcome;
use tonic::Code;
use tracing::info;

use super::{CloneJob, End, is_of_a_lost_snapshot, staging_directories};
use crate::{
    certificate::{self, read::Certificate},
    copy_journal::{
        CopyFound, CopyJournal, FILE_NAME, RoundFound, open_lists,
        record::{Begun, SnapshotOpened},
        tells_of_a_snapshot,
    },
    donor_client::DonorSource,
    fetch::stopped,
    install::{installer::was_left, step::Step},
    list::FileList,
    plan::FinishedUnits,
    preflight::{Findings, Prepared, older_copy, server_paths},
    request::SourceRequest,
    retry::is_of_the_network,
    source::{Opened, Source as _, blocking},
    staging::Staging,
    target,
};

impl CloneJob {
    /// Whether a secret is missing without which no snapshot can be opened.
    pub(super) fn lacks_secret(&self) -> bool {
        self.request.lacks_secrets && self.donor_has_accounts.load(Ordering::Relaxed)
    }

    /// Whether its install is gone on with by the next start of this service.
    pub(super) fn install_is_left(&self, result: &Result<End, Failure>) -> bool {
        let (Some(replacement), Err(failure)) = (self.replacement.get(), result) else {
            return false;
        };
        if was_left(failure) {
            return true;
        }
        // Stopped before the first step, or while the replica caught up.
        self.is_interrupted.load(Ordering::Relaxed)
            && failure.reason == stopped().reason
            && self.control.manages()
            && matches!(replacement.step(), Step::Staged | Step::Opened)
    }

    /// Whether what is staged serves a later run of this clone.
    pub(super) fn can_be_gone_on_with(&self, result: &Result<End, Failure>) -> bool {
        if self.replacement.get().is_some() {
            // Its install has a journal of its own.
            return false;
        }
        match result {
            Ok(End::AwaitsCredentials) => true,
            Ok(_) => false,
            // It has not come to its journal, and so has found nothing wrong with what is staged.
            Err(failure)
                if self.goes_on
                    && self.journal().is_none()
                    && !matches!(&*failure.reason, "RECIPIENT_RESTARTED" | "JOURNAL_CORRUPT") =>
            {
                !self.cancel.is_cancelled() || self.is_interrupted.load(Ordering::Relaxed)
            }
            Err(_) if self.journal().is_none() && !self.has_older_staging() => false,
            Err(_) if self.is_interrupted.load(Ordering::Relaxed) => true,
            Err(_) if self.cancel.is_cancelled() => false,
            Err(failure) if is_of_the_network(failure) || is_of_a_lost_snapshot(failure) => true,
            // Another snapshot was refused for now, and somebody has to see to the donor first.
            Err(failure) => failure.is_retryable() && self.has_older_staging(),
        }
    }

    /// Whether what was staged of a lost snapshot is set aside.
    fn has_older_staging(&self) -> bool {
        let [_, older] = staging_directories(&self.request.staging_parent(), &self.id);
        older.join(FILE_NAME).exists()
    }

    /// Begins the journal of a copy that another process could go on with.
    pub(super) async fn begin_journal(
        &self,
        prepared: &Prepared,
        staging: &Arc<Staging>,
    ) -> Result<(), Failure> {
        let Some(mut snapshot) = prepared.source.record() else {
            return Ok(());
        };
        snapshot.entries_max = prepared.entries_max;
        snapshot.verified_before = self.progress.verified_bytes.get();
        snapshot.binlog_base = self.binlog_base.get().unwrap_or_default();
        snapshot.set_owners(prepared.owners);
        let begun = Begun {
            request: self.request.record.clone(),
            form: self.request.form.map(|form| form.name().to_owned()).unwrap_or_default(),
            had_data: self.request.had_data,
            target: path_bytes(&self.request.target).into(),
            planned_streams: u32::try_from(self.request.limits.planned_streams()).unwrap_or(0),
        };
        let directory = staging.directory().to_owned();
        let journal = blocking(move || CopyJournal::create(&directory, &begun, &snapshot)).await?;
        self.set_journal(Some(Arc::new(journal)));
        Ok(())
    }

    /// The certificate of the clone's tree at its target, when the recipient stopped between the
    /// rename and its record: nothing is staged any more, and the target names this very clone.
    async fn certificate_in_place(&self) -> Result<Option<Certificate>, Failure> {
        if self.request.form.is_some() {
            return Ok(None);
        }
        let target = self.request.target.clone();
        let name = self.status.clone_resource().name;
        let [directory, older] = staging_directories(&self.request.staging_parent(), &self.id);
        blocking(move || {
            if directory.join("tree").exists() || older.exists() {
                return Ok(None);
            }
            // A target without a certificate that can be read is somebody else's: told as such.
            let found = Certificate::open(&target.join(certificate::FILE_NAME)).ok();
            Ok(found.filter(|certificate| certificate.summary.clone == name))
        })
        .await
    }

    /// Goes on with the snapshot and the round that were being copied.
    pub(super) async fn go_on(&self) -> Result<End, Failure> {
        if self.request.lacks_secrets && self.request.replicate_from.is_some() {
            return Ok(End::AwaitsCredentials);
        }
        if let Some(certificate) = self.certificate_in_place().await? {
            info!(clone = %self.id, "the copy had come to stand when the recipient stopped");
            self.set_certified(&certificate);
            return Ok(End::Completed);
        }
        let mut findings = Findings::default();
        target::check(&self.request, &self.settings, &mut findings);
        let engine = self.settings.engine.as_ref();
        server_paths::check(&self.request, engine, &BTreeMap::new(), &mut findings).await;
        if let Some(failure) = findings.into_failure() {
            return Err(failure);
        }
        let SourceRequest::Donor(donor) = &self.request.source else {
            return Err(Failure::bug("a copy of this host's own data has no journal"));
        };
        let parent = self.request.staging_parent();
        let [directory, older] = staging_directories(&parent, &self.id);
        let (journal, found) = match blocking({
            let directory = directory.clone();
            move || CopyJournal::open(&directory)
        })
        .await
        {
            Ok((journal, found)) => (Arc::new(journal), found),
            // Killed after the snapshot was lost, before another's journal was begun.
            Err(_) if self.has_older_staging() && !tells_of_a_snapshot(&directory) => {
                let found = CopyFound::look(&older)?;
                self.note_donor(&found.snapshot);
                return Err(lost("the recipient stopped before another snapshot was opened"));
            }
            // It does not say what is right; the donor does.
            Err(failure) if failure.reason == "JOURNAL_CORRUPT" => {
                let found = CopyFound::look(&directory)?;
                self.note_donor(&found.snapshot);
                return Err(lost(&failure.message));
            }
            Err(failure) => return Err(failure),
        };
        self.set_journal(Some(journal));
        let CopyFound { snapshot, round, .. } = found;
        self.note_donor(&snapshot);
        let attach = DonorSource::attach(donor, &snapshot, &self.settings, &self.progress);
        let source = Arc::new(self.until_cancelled(Box::pin(attach)).await?);
        let Some(round) = round else {
            source.close(Outcome::Failed).await;
            return Err(lost("the recipient stopped while it brought the tree to another shape"));
        };
        info!(
            clone = %self.id,
            snapshot = %snapshot.snapshot,
            position = %round.position,
            units = round.finished.len(),
            bytes = round.done.data_bytes,
            "the clone goes on"
        );
        let owners = snapshot.owners();
        let staging = Arc::new(self.labelled(Staging::open(&parent, &self.id, owners)?));
        // Of a unit that was cut short a part may be there.
        let reuse = Some(older_copy(&self.request)?.unwrap_or_default());
        let prepared = Prepared {
            opened: Opened { position: round.position, ..source.opened() },
            source,
            owners,
            reuse,
            entries_max: snapshot.entries_max,
        };
        let result = match self.discard_old_data().await {
            Ok(()) => self.copy_and_install(&prepared, &staging, Some(round)).await,
            Err(failure) => Err(failure),
        };
        self.close(prepared.source.as_ref(), &result).await;
        result
    }

    /// What holds for further snapshots as well.
    fn note_donor(&self, snapshot: &SnapshotOpened) {
        let fingerprint = <[u8; 32]>::try_from(&snapshot.fingerprint[..]).ok();
        self.pins.get_or_init(|| (snapshot.encrypted, fingerprint));
        self.donor_has_accounts.store(!snapshot.key_seed.is_empty(), Ordering::Relaxed);
        let base = Some(snapshot.binlog_base.clone()).filter(|base| !base.is_empty());
        self.binlog_base.note(base);
    }

    /// The lists of a round that was being copied, and which of its units need not be copied again;
    /// `None` when none need: the donor may have passed the round, and reads nothing of it any more.
    pub(super) async fn reopen_round(
        &self,
        prepared: &Prepared,
        staging: &Arc<Staging>,
        round: RoundFound,
    ) -> Result<(FileList, FileList, Option<FinishedUnits>), Failure> {
        let directory = staging.directory().to_owned();
        let (lists, round) = blocking(move || Ok((open_lists(&directory, &round), round))).await?;
        // The donor's list may have come damaged off this disk: another snapshot gives a right one.
        let (list, whole) = lists.map_err(|failure| lost(&failure.message))?;
        let is_first = round.position == Position::FIRST;
        if is_first {
            self.status.set_estimate(round.position, list.totals(), false);
        }
        for grown in &round.growing {
            // The first bytes of a growing file are not read again.
            let size = staging.size_of(&grown.path).map_err(|failure| lost(&failure.message))?;
            if size < grown.durable {
                return Err(lost(&format!(
                    "{} has {size} bytes where it is staged, {} of it were durable",
                    grown.path, grown.durable
                )));
            }
        }
        self.growing.restore(round.growing);
        // The donor could not read them: they need not be there.
        let unread: HashSet<_> =
            round.unfinished.iter().map(|file| file.part.path.clone()).collect();
        self.progress.note_unfinished(round.unfinished)?;
        let plan = self.plan(prepared, &list, FinishedUnits::default())?;
        let (staging, cancel) = (Arc::clone(staging), self.cancel.clone());
        let progress = Arc::clone(&self.progress);
        let (mut found, mut finished) = (round.finished, FinishedUnits::default());
        let mut is_whole = true;
        blocking(move || {
            if is_first {
                for entry in list.entries()? {
                    let entry = entry?;
                    if cancel.is_cancelled() {
                        return Err(stopped());
                    }
                    staging.make(&entry)?;
                }
            }
            if !is_first {
                check_there(&staging, &list, &whole, &unread)?;
            }
            while let Some(unit) = plan.next()? {
                let is_there = unit.parts.iter().all(|part| {
                    if unread.contains(&part.path) {
                        return true;
                    }
                    let staged = staging.look(&part.path).map(|stat| stat.st_size);
                    staged.is_ok_and(|size| u64::try_from(size).is_ok_and(|size| size == part.size))
                });
                match found.take(&unit) {
                    Some(done) if is_there => finished.insert(done),
                    Some(done) => {
                        progress.take_back(&done);
                        is_whole = false;
                    }
                    None => is_whole = false,
                }
            }
            // Cut otherwise by another version: compared again, and counted once.
            found.into_rest().for_each(|done| progress.take_back(&done));
            Ok((list, whole, (!is_whole).then_some(finished)))
        })
        .await
    }
}

/// Fails where a file is lost of which this round gives nothing, or not all: of pages that have not changed
/// nothing comes, and zeros would stay in their place.
fn check_there(
    staging: &Staging,
    list: &FileList,
    whole: &FileList,
    unread: &HashSet<RelativePath>,
) -> Result<(), Failure> {
    let mut comes = HashSet::new();
    for entry in list.entries()? {
        let entry = entry?;
        if matches!(entry.change, Change::Add | Change::Replace) {
            comes.insert(entry.path);
        }
    }
    for entry in whole.entries()? {
        let entry = entry?;
        let is_file = matches!(entry.kind, Some(Kind::Regular { .. })) && !entry.growing;
        let is_staged = !is_file || comes.contains(&entry.path) || unread.contains(&entry.path);
        if !is_staged && staging.look(&entry.path).is_err() {
            return Err(lost(&format!("{} is not staged any more", entry.path)));
        }
    }
    Ok(())
}

/// The snapshot cannot be gone on with; what is staged serves another.
pub(super) fn lost(why: &str) -> Failure {
    Failure::new(Code::NotFound, "UNKNOWN_SNAPSHOT", why.to_owned())
}
