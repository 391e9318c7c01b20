//! What comes after a round: another one, or the cut.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use marcot_common::{
    entry::Change,
    failure::Failure,
    position::{Position, Stage},
};
use tonic::Code;

use super::{
    Advancing, InnodbSnapshot, REDO, Round, Walked, check_same_server,
    cut::{Cut, LEFT_FOR_LOCKS_BYTES},
    listed, tablespaces,
};
use crate::{
    files::{
        clock,
        compare::{Base, Progress, Relisted},
        list::ListWriter,
    },
    innodb::{
        follower::Hold,
        redo_file::RedoFile,
        server::{Facts, Session, lost_lineage},
        survey::Mark,
    },
};

/// Most rounds of whole files, in FILE COPY and between the rounds of pages: each copies what changed
/// during the one before, so the later ones are short; a server that creates tables faster than they
/// can be copied needs --block-ddl.
const FILE_ROUNDS_MAX: usize = 8;

/// Most rounds of pages.
const PAGE_ROUNDS_MAX: usize = 4;

/// Redo that is recovered in seconds, however small the server's log is.
const REDO_BYTES: u64 = 64 << 20;

impl InnodbSnapshot {
    /// Decides what comes after a round whose every byte is durable.
    pub(super) fn next(
        &self,
        advancing: &mut Advancing,
        progress: Progress<'_>,
    ) -> Result<(), Failure> {
        self.check_ddl_blocked()?;
        let (base, hold, file_rounds, page_rounds) = {
            let state = self.state();
            let pages = state.rounds.iter().filter(|round| round.since.is_some()).count();
            let rounds = (state.rounds.len() - pages, pages);
            (Arc::clone(&state.base), Arc::clone(&state.hold), rounds.0, rounds.1)
        };
        // None is kept from round to round: a server drops one that is idle for as long as a file copy
        // takes, and may be started again.
        let mut session = self.shared.server.connect()?;
        // Before the walk: what is deleted during it may have been found still.
        // A log that was lost needs another checkpoint anyway.
        let deleted = hold.deleted(None).unwrap_or_default();
        let known = tablespaces(&mut session, self.facts.flavor)?;
        self.check_flushed(&mut session)?;
        drop(session);
        let Walked { relisted, late, .. } =
            self.relist(&known, &mut advancing.unsettled, &base, &hold, progress)?;
        self.confirm_unwritten(&known)?;
        let replaced = deleted.replaced(&relisted.base, &advancing.listed)?;
        clock::settle(relisted.newest_whole_second);
        let changed = relisted.list.records.totals.data_bytes;
        let is_much = changed > LEFT_FOR_LOCKS_BYTES && file_rounds < FILE_ROUNDS_MAX;
        if is_much && page_rounds == 0 {
            return self.list_files(advancing, relisted);
        }
        if let Some((since, fresh)) = self.page_round(&hold, page_rounds, replaced, progress)? {
            return self.list_pages(advancing, &base, since, fresh, progress);
        }
        // A round of pages has such files as well.
        if is_much {
            return self.list_files(advancing, relisted);
        }
        let cut = match self.cut(advancing, &base, &hold, late, progress) {
            Err(failure) if hold.is_lost() && page_rounds < PAGE_ROUNDS_MAX => {
                tracing::warn!(error = %failure, "the redo log was lost at the cut");
                Cut::Lost
            }
            cut => cut?,
        };
        match cut {
            Cut::Made(made) => {
                let (list, point) = *made;
                let mut state = self.state();
                let totals = list.records.totals;
                state.rounds.push(Round {
                    position: REDO,
                    list: Arc::new(list),
                    totals,
                    since: None,
                });
                state.point = Some(Arc::new(point));
            }
            Cut::Replaced(_) | Cut::Lost => {
                let replaced = if let Cut::Replaced(lsn) = cut { Some(lsn) } else { None };
                let round = self.page_round(&hold, page_rounds, replaced, progress)?;
                let Some((since, fresh)) = round else {
                    return Err(Failure::bug("no page round after an import or a loss"));
                };
                self.list_pages(advancing, &base, since, fresh, progress)?;
            }
            Cut::TooMuch(relisted) => {
                let bytes = relisted.list.records.totals.data_bytes;
                tracing::info!(bytes, "more has changed than may be read under the locks");
                if file_rounds >= FILE_ROUNDS_MAX {
                    return Err(too_fast(relisted.list.records.totals.data_bytes));
                }
                clock::settle(relisted.newest_whole_second);
                self.list_files(advancing, *relisted)?;
            }
        }
        Ok(())
    }

    /// Gives out a round of what has changed, as whole files. Redo begins where it did: it has what
    /// was done to them since. After a round of pages it is one of PAGE COPY, for stages do not go back.
    fn list_files(&self, advancing: &mut Advancing, relisted: Relisted) -> Result<(), Failure> {
        let position = {
            let state = self.state();
            state.next_round(state.position().stage)
        };
        let changed = relisted.list.records.totals.data_bytes;
        tracing::info!(changed, round = position.round, %position, "files changed, another round");
        advancing.early.note(&relisted.list, &self.classifier)?;
        self.give_out(position, relisted, None);
        Ok(())
    }

    /// Gives out a round of PAGE COPY: all pages from `since` on, for redo that begins at `fresh`.
    fn list_pages(
        &self,
        advancing: &mut Advancing,
        base: &Base,
        since: u64,
        fresh: Arc<Hold>,
        progress: Progress<'_>,
    ) -> Result<(), Failure> {
        // Listed after the checkpoint: pages that a file had grown by before it are in no redo of
        // the clone, and must lie within its listed size.
        let mut session = self.shared.server.connect()?;
        let known = tablespaces(&mut session, self.facts.flavor)?;
        drop(session);
        let unsettled = &mut advancing.unsettled;
        let Walked { relisted, .. } = self.relist(&known, unsettled, base, &fresh, progress)?;
        self.confirm_unwritten(&known)?;
        clock::settle(relisted.newest_whole_second);
        advancing.listed = listed(&fresh, &relisted.base)?;
        let relisted = self.with_patches(&relisted)?;
        let position = self.state().next_round(Stage::PageCopy);
        tracing::info!(since, redo_from = fresh.checkpoint(), %position, "pages changed");
        advancing.early.note(&relisted.list, &self.classifier)?;
        self.give_out(position, relisted, Some(since));
        self.state().hold = fresh;
        Ok(())
    }

    fn give_out(&self, position: Position, relisted: Relisted, since: Option<u64>) {
        let list = Arc::new(relisted.list);
        let totals = list.records.totals;
        let mut state = self.state();
        state.rounds.push(Round { position, list, totals, since });
        state.redo = relisted.growing;
        state.base = Arc::new(relisted.base);
    }

    /// Redo that a clone may start with: more than what the server's own log holds, which is never
    /// less than its distance from the last checkpoint, and short enough to be recovered soon.
    fn redo_bound(&self, hold: &Hold) -> u64 {
        let bound = (2 * hold.capacity).max(REDO_BYTES).min(self.shared.quota / 2);
        bound.min(RedoFile::bytes_max(hold))
    }

    /// Whether pages are to be sent again: from which LSN on, and the hold that redo begins at
    /// then.
    fn page_round(
        &self,
        hold: &Arc<Hold>,
        rounds: usize,
        replaced: Option<u64>,
        progress: Progress<'_>,
    ) -> Result<Option<(u64, Arc<Hold>)>, Failure> {
        let since = hold.checkpoint();
        if let Some(lsn) = replaced {
            if rounds >= PAGE_ROUNDS_MAX {
                return Err(imported_again(lsn));
            }
            tracing::info!(lsn, "a tablespace that the redo log deletes is there, by an import");
            let fresh = self.hold_after(lsn, progress)?;
            self.check_fresh(&fresh, since, rounds)?;
            return Ok(Some((since, fresh)));
        }
        match hold.end() {
            Ok(end) if end - since <= self.redo_bound(hold) => Ok(None),
            // What is left is as short as rounds can make it: recovery takes longer.
            Ok(end) if rounds >= PAGE_ROUNDS_MAX && end - since <= self.shared.quota / 2 => {
                RedoFile::check_size(hold, end).map(|()| None)
            }
            Ok(end) if rounds >= PAGE_ROUNDS_MAX => Err(never_shorter(end - since)),
            Err(failure) if rounds >= PAGE_ROUNDS_MAX => Err(failure),
            _ => {
                let fresh = Arc::new(self.shared.follower.hold(self.facts.flavor)?);
                self.check_fresh(&fresh, since, rounds)?;
                let is_worth = hold.is_lost() || fresh.checkpoint() > since;
                Ok(is_worth.then_some((since, fresh)))
            }
        }
    }

    /// Fails when the server's LSN is behind what it had flushed as it was last asked, what was
    /// followed of its log, or a page that was read: no crash takes that back, but an older copy of
    /// its files does.
    fn check_flushed(&self, session: &mut Session) -> Result<(), Failure> {
        // Before it is asked: pages may be read, and its log be followed, all the time.
        let hold = Arc::clone(&self.state().hold);
        let known = self.counts.newest.load(Ordering::Relaxed).max(hold.followed());
        let flushed = flushed(session)?;
        let before = self.flushed.fetch_max(flushed, Ordering::Relaxed);
        check_not_behind(flushed, before.max(known))
    }

    /// Fails unless pages from `since` on close the gap up to a fresh checkpoint (R6): the server is
    /// the same one, on the same files, and its LSN has not gone back.
    fn check_lineage(&self, fresh: &Hold, since: u64) -> Result<(), Failure> {
        let mut session = self.shared.server.connect()?;
        self.check_flushed(&mut session)?;
        self.facts.check_lineage(&Facts::ask(&self.shared.server, &mut session)?)?;
        check_same_server(&mut session, &self.tree, &self.classifier)?;
        check_checkpoint(fresh.checkpoint(), since)
    }

    /// Fails unless another round of pages, after `rounds` of them, leads on: the last one must leave redo
    /// that one file holds. Before that the checkpoint may lie far back, a later round begins at a newer one.
    fn check_fresh(&self, fresh: &Hold, since: u64, rounds: usize) -> Result<(), Failure> {
        self.check_lineage(fresh, since)?;
        if rounds + 1 < PAGE_ROUNDS_MAX {
            return Ok(());
        }
        RedoFile::check_size(fresh, self.flushed.load(Ordering::Relaxed))
    }

    /// Takes hold of the log from a checkpoint at or after `lsn`.
    fn hold_after(&self, lsn: u64, progress: Progress<'_>) -> Result<Arc<Hold>, Failure> {
        let limit = self.shared.checkpoint_timeout;
        let deadline = Instant::now() + limit;
        let mut looks = 0;
        loop {
            let fresh = self.shared.follower.hold(self.facts.flavor)?;
            if fresh.checkpoint() >= lsn {
                return Ok(Arc::new(fresh));
            }
            if Instant::now() >= deadline {
                return Err(Failure::new(
                    Code::Unavailable,
                    "CHECKPOINT_STALLED",
                    format!(
                        "a tablespace was discarded at LSN {lsn} and imported, and the server has \
                         made no checkpoint after it in {limit:?} (its last is at {}); set \
                         innodb_max_dirty_pages_pct to 0 for a while, clone again later, or raise \
                         --checkpoint-timeout",
                        fresh.checkpoint()
                    ),
                ));
            }
            looks += 1;
            progress(looks)?;
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// A list that, beside what has changed, names every tablespace that has not.
    fn with_patches(&self, relisted: &Relisted) -> Result<Relisted, Failure> {
        let mut writer = ListWriter::create(&self.shared.spool_directory)?;
        let mut changed = relisted.list.records.read_from(0)?.peekable();
        for record in relisted.base.records.read_from(0)? {
            let mut record = record?;
            while let Some(change) =
                changed.next_if(|c| c.as_ref().map_or(true, |c| c.entry.path <= record.entry.path))
            {
                let mut change = change?;
                let is_same = change.entry.path == record.entry.path;
                writer.append(&mut change)?;
                if is_same {
                    record.identity.live = 0;
                }
            }
            if let Mark::Settled(_) = Mark::of(record.identity.live) {
                record.entry.change = Change::Patch;
                writer.append(&mut record)?;
            }
        }
        for change in changed {
            writer.append(&mut change?)?;
        }
        Ok(Relisted {
            list: writer.finish()?,
            base: relisted.base.clone(),
            first_change: relisted.first_change.clone(),
            newest_whole_second: relisted.newest_whole_second,
            growing: relisted.growing,
        })
    }
}

/// How far the server has flushed its redo log.
pub(super) fn flushed(session: &mut Session) -> Result<u64, Failure> {
    let lsn = session.lsn().map_err(|e| e.failure("ask for the log sequence number"))?;
    Ok(lsn.flushed)
}

fn check_not_behind(flushed: u64, before: u64) -> Result<(), Failure> {
    if flushed >= before {
        return Ok(());
    }
    let why = format!("it had flushed its redo log up to LSN {before}, it is at LSN {flushed} now");
    Err(lost_lineage(why))
}

fn check_checkpoint(checkpoint: u64, since: u64) -> Result<(), Failure> {
    if checkpoint >= since {
        return Ok(());
    }
    let why = format!("its last checkpoint was at LSN {since}, it is at LSN {checkpoint} now");
    Err(lost_lineage(why))
}

fn never_shorter(bytes: u64) -> Failure {
    Failure::new(
        Code::Aborted,
        "REDO_NOT_CONVERGING",
        format!(
            "{PAGE_ROUNDS_MAX} rounds of PAGE COPY have left {bytes} bytes of redo, more than half \
             of --spool-quota: pages change faster than they are copied; give the clone more \
             bandwidth, or clone when less is written"
        ),
    )
    .with("bytes", bytes)
}

fn imported_again(lsn: u64) -> Failure {
    Failure::new(
        Code::Aborted,
        "SOURCE_CHANGED",
        format!(
            "in each of {PAGE_ROUNDS_MAX} rounds of PAGE COPY tablespaces were discarded or dropped \
             (last at LSN {lsn}) and others are there since, which may be imported ones; clone again \
             with clone_block_ddl"
        ),
    )
}

fn too_fast(bytes: u64) -> Failure {
    Failure::new(
        Code::Aborted,
        "SOURCE_CHANGED",
        format!(
            "{bytes} bytes of tables were created or changed by DDL since the last round; clone \
             again with clone_block_ddl"
        ),
    )
}
