//! The cut: what is read under the server's locks, the point, and the list that ends with it.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use marcot_common::{
    entry::{Attributes, Change, Entry, FileId, Kind, Totals},
    failure::Failure,
    path::RelativePath,
};
use marcot_proto::common::v1::Coordinates;
use tonic::Code;

use super::{Advancing, InnodbSnapshot, Point, Served, Walked, ddl_timeout, path, tablespaces};
use crate::{
    files::{
        compare::{Base, Progress, Relisted},
        list::{List, ListWriter, Record},
        tree::Identity,
        walk,
    },
    innodb::{
        backup_lock::{self, BackupLock, LockError},
        deletions::Listed,
        early::EarlySizes,
        flavor::Flavor,
        follower::Hold,
        known::FoundSpaces,
        late::LateFiles,
        mariadb::{
            binlog,
            replica_rest::{self, RestingReplica},
        },
        mysql::{binlog::BinlogTail, log_status},
        point::{self, INFO_NAME},
        redo_file::{self, RedoFile},
        redo_log::log_name,
        sabotage,
        server::Session,
        stash::{Stash, Stashed},
    },
};

/// Changed bytes that may be left to be read under the locks: some tenths of a second.
pub(super) const LEFT_FOR_LOCKS_BYTES: u64 = 32 << 20;

/// Most tries of a cut whose files do not come to rest.
const CUTS_MAX: u32 = 5;

/// What was read under the locks.
struct Read<'a> {
    late: &'a LateFiles,
    stash: Stash,
    stashed: HashMap<FileId, Stashed>,
    binlog: Option<BinlogTail>,
    root: Attributes,
    spaces: FoundSpaces,
}

/// A file that the last list has beside what has changed in the tree.
struct Extra {
    path: RelativePath,
    attributes: Attributes,
    size: u64,
    served: Served,
}

/// What came of a try.
pub(super) enum Cut {
    Made(Box<(List, Point)>),
    /// More has changed than may be read under the locks.
    TooMuch(Box<Relisted>),
    /// Recovery must begin at this LSN or later: a tablespace was discarded before it, and is there.
    Replaced(u64),
    /// Its redo was lost.
    Lost,
}

impl InnodbSnapshot {
    /// Takes the locks and fixes the point.
    pub(super) fn cut(
        &self,
        advancing: &mut Advancing,
        base: &Base,
        hold: &Arc<Hold>,
        late: Vec<RelativePath>,
        progress: Progress<'_>,
    ) -> Result<Cut, Failure> {
        let mut count = 0;
        let mut told = || {
            count += 1;
            progress(count)
        };
        let stash = Stash::create(&self.shared.spool_directory, self.shared.quota)?;
        let mut late = LateFiles::read(&self.tree, late, stash, &mut told)?;
        let _one_at_a_time = loop {
            match self.shared.cuts.try_lock() {
                Ok(guard) => break guard,
                Err(std::sync::TryLockError::Poisoned(guard)) => break guard.into_inner(),
                Err(std::sync::TryLockError::WouldBlock) => {
                    told()?;
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        };
        let mut tries = 0;
        loop {
            tries += 1;
            let made =
                backup_lock::retry_while_busy(ddl_timeout(&self.options), &mut told, |told| {
                    self.try_cut(advancing, base, hold, &mut late, told)
                });
            match made {
                Err(failure) if tries < CUTS_MAX && is_passing(&failure) => {
                    tracing::warn!(error = %failure, "the cut failed, trying again");
                }
                other => return other,
            }
        }
    }

    fn try_cut(
        &self,
        advancing: &mut Advancing,
        base: &Base,
        hold: &Arc<Hold>,
        late: &mut LateFiles,
        told: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<Cut, LockError> {
        // What was read a while ago is brought up to date: little is left for the locks.
        late.read_again(&self.tree, told)?;
        // Dropped after the locks, also where the cut fails: what starts the SQL threads again may
        // need what they hold up.
        let mut resting = match self.facts.flavor {
            Flavor::MariaDb => {
                self.write_back_binlog(&mut self.shared.server.connect()?)?;
                replica_rest::rest_replica(&self.shared.server, told)?
            }
            // What a replica applies is in its binary log as all else, and decided by its end.
            Flavor::MySql => None,
        };
        let Some(block) = advancing.ddl.take() else {
            let mut own = BackupLock::block_ddl(&self.shared.server, self.facts.flavor)?;
            return self.cut_under(&mut own, &mut resting, advancing, base, hold, late, told);
        };
        let cut = match block.lock().get() {
            Ok(lock) => self.cut_under(lock, &mut resting, advancing, base, hold, late, told),
            Err(failure) => Err(failure.into()),
        };
        // Whatever has ended this try, a connection that may hold commits up ends with it; another
        // try takes locks of its own.
        if block.is_reusable() {
            advancing.ddl = Some(block);
        }
        cut
    }

    /// Fixes the point under locks that block DDL.
    #[expect(clippy::too_many_arguments, reason = "the parts of one cut, used once")]
    fn cut_under(
        &self,
        lock: &mut BackupLock,
        resting: &mut Option<RestingReplica>,
        advancing: &mut Advancing,
        base: &Base,
        hold: &Arc<Hold>,
        late: &mut LateFiles,
        told: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<Cut, LockError> {
        let ddl_blocked = Instant::now();
        let known = tablespaces(lock.session(), self.facts.flavor)?;
        let Walked { relisted, late: late_paths, spaces } =
            self.relist(&known, &mut advancing.unsettled, base, hold, &mut |_| {
                told()?;
                lock.keep_alive()
            })?;
        if !sabotage::is("page-after-point") {
            known.check_found(lock.session(), self.facts.flavor, &spaces)?;
        }
        let bytes = relisted.list.records.totals.data_bytes;
        let replaced = hold.deleted(None)?.replaced(&relisted.base, &advancing.listed)?;
        let quota = self.shared.quota.saturating_sub(late.bytes());
        if replaced.is_some() || bytes > quota.min(4 * LEFT_FOR_LOCKS_BYTES) {
            // DDL that is blocked for the whole clone stays blocked; a lock of this try's own ends
            // with its connection.
            return Ok(replaced.map_or_else(|| Cut::TooMuch(Box::new(relisted)), Cut::Replaced));
        }
        let mut stash = Stash::create(&self.shared.spool_directory, quota)?;
        let is_late = |path: &RelativePath| {
            sabotage::is("page-after-point") && path.as_bytes().starts_with(b"bank/")
        };
        let mut stashed = HashMap::new();
        self.stash(&relisted, &mut stash, &mut stashed, lock, |path| !is_late(path))?;
        late.add(&self.tree, late_paths, &mut || lock.keep_alive())?;
        late.read_again(&self.tree, &mut || lock.keep_alive())?;
        let root = walk::root_attributes(&self.tree)?;
        if self.facts.flavor == Flavor::MariaDb {
            self.write_back_binlog(lock.session())?;
        }
        let closed = self.gate.close(&mut || {
            told()?;
            lock.keep_alive()
        })?;
        let commit_begun = Instant::now();
        lock.block_commit()?;
        let commit_blocked = Instant::now();
        if self.facts.flavor == Flavor::MariaDb {
            replica_rest::check_rest(lock.session())?;
        }
        late.read_again(&self.tree, &mut || Ok(()))?;
        let coordinates = self.coordinates(lock)?;
        // While the lock is held no binary log is purged.
        let binlog = match self.facts.flavor {
            Flavor::MariaDb => None,
            Flavor::MySql => {
                let base = self.options.binlog_base.as_deref();
                BinlogTail::open(&self.facts, self.tree.path(), &coordinates, base)?
            }
        };
        // MySQL's lock stays until the point stands: nobody's commits wait for it, and another try would
        // find the work of DDL that has run meanwhile, of which no redo tells.
        let goes_first = self.facts.flavor == Flavor::MariaDb;
        match goes_first {
            true => lock.end()?,
            false => lock.prove()?,
        }
        let ended = Instant::now();
        let coordinates = match sabotage::is("late-coordinates") {
            true => {
                std::thread::sleep(Duration::from_millis(200));
                let late = self.coordinates(lock)?;
                Coordinates { lsn: coordinates.lsn, ..late }
            }
            false => coordinates,
        };
        if sabotage::is("page-after-point") {
            for _ in 0..30 {
                std::thread::sleep(Duration::from_millis(100));
                lock.keep_alive()?;
            }
            self.stash(&relisted, &mut stash, &mut stashed, lock, is_late)?;
        }
        *resting = None;
        tracing::info!(
            lsn = coordinates.lsn,
            binlog_file = %String::from_utf8_lossy(&coordinates.binlog_file),
            binlog_position = coordinates.binlog_position,
            gtid = %coordinates.gtid_executed,
            ddl_blocked_ms = millis(ddl_blocked, ended),
            commit_wait_ms = millis(commit_begun, commit_blocked),
            commit_blocked_ms = millis(commit_blocked, ended),
            pages_checked = self.counts.checked.load(Ordering::Relaxed),
            pages_read_again = self.counts.read_again.load(Ordering::Relaxed),
            "the point is fixed"
        );
        let relisted = self.with_grown(relisted, &advancing.early)?;
        let read = Read { late, stash, stashed, binlog, root, spaces };
        let point = self.finish(&relisted, &advancing.listed, read, coordinates, hold, told)?;
        if matches!(point, Cut::Made(_)) {
            closed.keep();
            if !goes_first && let Err(failure) = lock.end() {
                tracing::warn!(error = %failure, "the lock on DDL goes with its connection");
            }
        }
        Ok(point)
    }

    /// Leaves little of the binary log for the sync that commits wait for.
    fn write_back_binlog(&self, session: &mut Session) -> Result<(), Failure> {
        binlog::write_back_current(session, &self.facts, self.tree.path())
            .map_err(|e| e.failure("ask for the binary log's name"))
    }

    /// Where the server is. MariaDB: commits are blocked.
    fn coordinates(&self, lock: &mut BackupLock) -> Result<Coordinates, Failure> {
        match self.facts.flavor {
            Flavor::MariaDb => point::coordinates(lock.session(), &self.facts)
                .map_err(|e| e.failure("read the coordinates")),
            Flavor::MySql => log_status::coordinates(lock.session(), &self.facts),
        }
    }

    /// A list that also extends the tablespaces which recovery reads early.
    fn with_grown(&self, relisted: Relisted, early: &EarlySizes) -> Result<Relisted, Failure> {
        let grown = early.grown(&relisted.base, &relisted.list, &self.classifier, &self.tree)?;
        if grown.is_empty() {
            return Ok(relisted);
        }
        let mut writer = ListWriter::create(&self.shared.spool_directory)?;
        let mut grown = grown.into_iter().peekable();
        for change in relisted.list.records.read_from(0)? {
            let mut change = change?;
            while let Some(mut grown) = grown.next_if(|g| g.entry.path < change.entry.path) {
                writer.append(&mut grown)?;
            }
            writer.append(&mut change)?;
        }
        for mut grown in grown {
            writer.append(&mut grown)?;
        }
        Ok(Relisted { list: writer.finish()?, ..relisted })
    }

    /// Reads at once what a list asks for of the paths that `takes` names.
    fn stash(
        &self,
        relisted: &Relisted,
        stash: &mut Stash,
        stashed: &mut HashMap<FileId, Stashed>,
        lock: &mut BackupLock,
        takes: impl Fn(&RelativePath) -> bool,
    ) -> Result<(), Failure> {
        for record in relisted.list.records.read_from(0)? {
            let record = record?;
            if record.entry.content_bytes() > 0 && takes(&record.entry.path) {
                let mut reader = self.reader(&record, None)?;
                let copy = stash.take(reader.as_mut(), &mut || lock.keep_alive())?;
                stashed.insert(record.entry.file_id, copy);
            }
        }
        Ok(())
    }

    /// After the locks: redo up to the point, and the list of all that was read under them.
    fn finish(
        &self,
        relisted: &Relisted,
        listed: &Listed,
        read: Read<'_>,
        coordinates: Coordinates,
        hold: &Arc<Hold>,
        told: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<Cut, Failure> {
        let Read { late, mut stash, stashed, binlog, root, spaces } = read;
        let lsn = coordinates.lsn;
        let mut session = self.shared.server.connect()?;
        let flush = session.execute("FLUSH NO_WRITE_TO_BINLOG ENGINE LOGS");
        flush.map_err(|e| e.failure("flush the redo log"))?;
        let flushed_in = match self.facts.flavor {
            Flavor::MariaDb => flushed_late(&mut session)?,
            // Its flush is one, whatever is set.
            Flavor::MySql => Duration::ZERO,
        };
        hold.wait_for(lsn, flushed_in, told)?;
        // All of it up to the point is known by now: also what was discarded just before the locks.
        let deleted = hold.deleted(Some(lsn))?;
        if let Some(lsn) = deleted.replaced(&relisted.base, listed)? {
            return Ok(Cut::Replaced(lsn));
        }
        let redo = RedoFile::compose(hold, lsn)?;
        let unwritten = self.state().unwritten.clone();
        if spaces.has_unwritten(&unwritten)
            && let Some(mut made) = redo.made_spaces()?
        {
            made.retain(|&space| !deleted.has(space));
            spaces.check_made(&mut session, &unwritten, &made)?;
        }
        let name = log_name(self.facts.flavor);
        // The log's own attributes are those of a file that is always there.
        let like = match self.facts.flavor {
            Flavor::MariaDb => name.as_bytes(),
            Flavor::MySql => self.classifier.system().first().map_or(&b""[..], |name| name),
        };
        let like = redo_file::attributes(&self.tree, like)?;
        let info = stash.put(&point::info(&coordinates, self.facts.flavor)?)?;
        let mut extras: Vec<Extra> = Vec::new();
        let mut add = |path: RelativePath, attributes: &Attributes, size: u64, served: Served| {
            extras.push(Extra { path, attributes: attributes.clone(), size, served });
        };
        for file in late.files() {
            let size = file.stashed.length;
            add(file.path, &file.attributes, size, Served::Stashed(file.stashed));
        }
        add(path(INFO_NAME)?, &like, info.length, Served::Stashed(info));
        add(path(name)?, &like, redo.size(), Served::Redo(redo));
        if let Some(tail) = binlog {
            let index = stash.put(&tail.index)?;
            add(path(&tail.index_path)?, &like, index.length, Served::Stashed(index));
            add(path(&tail.path)?, &like, tail.length(), Served::Binlog(tail));
        }
        extras.sort_by(|a, b| a.path.cmp(&b.path));
        let mut served: HashMap<FileId, Served> =
            stashed.into_iter().map(|(id, copy)| (id, Served::Stashed(copy))).collect();
        let mut totals = relisted.base.records.totals;
        // The log that the recipient has a part of already.
        let known = match relisted.growing {
            Some(_) => find_path(&relisted.base, &path(name)?)?,
            None => None,
        };
        let list = self.with_extras(relisted, extras, known, &mut totals, &mut served)?;
        // Last of all: another try may follow one that fails, and needs what comes.
        hold.fix(lsn)?;
        Ok(Cut::Made(Box::new((list, Point { coordinates, served, totals, root }))))
    }

    /// The last list, with what is not in the tree.
    fn with_extras(
        &self,
        relisted: &Relisted,
        extras: Vec<Extra>,
        known: Option<Record>,
        totals: &mut Totals,
        all_served: &mut HashMap<FileId, Served>,
    ) -> Result<List, Failure> {
        let mut writer = ListWriter::create(&self.shared.spool_directory)?;
        let mut changes = relisted.list.records.read_from(0)?.peekable();
        for (id, extra) in (relisted.base.next_id()..).zip(extras) {
            let Extra { path, attributes, size, served } = extra;
            while let Some(change) =
                changes.next_if(|c| c.as_ref().map_or(true, |c| c.entry.path < path))
            {
                writer.append(&mut change?)?;
            }
            let (file_id, change) = match (&served, &known) {
                (Served::Redo(_), Some(known)) => {
                    totals.remove(&known.entry);
                    (known.entry.file_id, Change::Patch)
                }
                _ => (FileId(id), Change::Add),
            };
            let entry = Entry {
                number: 0,
                file_id,
                change,
                path,
                kind: Some(Kind::Regular { size, allocated: size }),
                attributes,
                growing: false,
            };
            totals.add(&entry);
            writer.append(&mut Record { entry, identity: Identity::NONE })?;
            all_served.insert(file_id, served);
        }
        for change in changes {
            writer.append(&mut change?)?;
        }
        writer.finish()
    }
}

/// The record of a path of the whole tree.
fn find_path(base: &Base, path: &RelativePath) -> Result<Option<Record>, Failure> {
    for record in base.records.read_from(0)? {
        let record = record?;
        if record.entry.path >= *path {
            return Ok(Some(record).filter(|record| record.entry.path == *path));
        }
    }
    Ok(None)
}

/// Whether another try of the cut may end better: a file that was written, a connection lost, a
/// replica's threads that rested for too short a time. Those that have not stopped in all that time
/// would have to be waited for once more, while no other clone can be cut.
fn is_passing(failure: &Failure) -> bool {
    match failure.reason.as_ref() {
        "FILE_CHANGED" | "FILE_VANISHED" | "DATABASE_LOST" => true,
        "REPLICA_NOT_STOPPED" => failure.code == Code::Aborted,
        _ => false,
    }
}

fn millis(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_millis()).unwrap_or(u64::MAX)
}

/// How long after it was written a server's redo log may be flushed: with a MariaDB's
/// innodb_flush_log_at_trx_commit other than 1, FLUSH ENGINE LOGS only writes it.
fn flushed_late(session: &mut Session) -> Result<Duration, Failure> {
    let names =
        "SELECT @@GLOBAL.innodb_flush_log_at_trx_commit, @@GLOBAL.innodb_flush_log_at_timeout";
    let row = session.row(names).map_err(|e| e.failure("ask how the redo log is flushed"))?;
    Ok(row.map_or(Duration::ZERO, |row| late_by(row.number(0), row.number(1))))
}

/// By the two variables: when it is flushed, and each how many seconds (1 to 2700) at the latest.
fn late_by(at_commit: u64, each_seconds: u64) -> Duration {
    match at_commit {
        1 => Duration::ZERO,
        _ => Duration::from_secs(each_seconds),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards servers that flush their log rarely: without the time that they take for it, a clone of one
    /// that flushes it each two minutes ends in REDO_STALLED.
    #[test]
    fn a_log_that_is_flushed_late_is_waited_for_as_long() {
        assert_eq!(late_by(1, 2700), Duration::ZERO);
        for at_commit in [0, 2, 3] {
            assert_eq!(late_by(at_commit, 120), Duration::from_secs(120));
        }
    }
}
