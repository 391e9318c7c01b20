//! One clone's view of the server: its lists, round by round, and the point that ends them.
//!
//! Invariants:
//! * Every page is read after the checkpoint that recovery begins at, and before T (R1): once the
//!   cut is made nothing of an earlier round can be opened.
//! * A file counts as copied only if the walk under the locks finds it as it was listed: a plain
//!   one untouched, a tablespace of the same inode and space id. What has changed is read there
//!   and then.
//! * What is not in a list is left out by a rule of `classify`, and counted.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    os::unix::fs::FileExt as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use marcot_common::{
    entry::{Attributes, Change, Entry, FileId, Kind, Totals},
    failure::Failure,
    path::RelativePath,
    position::{Position, Stage},
};
use marcot_proto::common::v1::{ConsistencyLevel, Coordinates};
use tonic::Code;

use super::{
    EngineShared,
    classify::{Class, Classifier},
    cut::{self, BackupLock, LockError},
    follower::Hold,
    late::LateFiles,
    log_file::LogFile,
    page::{PageFormat, doublewrite_pages},
    point::{self, INFO_NAME},
    redo_file::{self, RedoFile},
    sabotage,
    server::{Facts, Session, check_privileges},
    stash::{Stash, StashReader, Stashed},
    survey::{Mark, RedoSoFar, Survey},
    tablespace::{PageCounts, RawReader, TablespaceOf, TablespaceReader, open_inode},
};
use crate::{
    Advanced, EntryIterator, FileReader, Snapshot, SnapshotOptions,
    files::{
        clock,
        compare::{self, Base, Progress, Relisted},
        list::{List, ListWriter, Record},
        lock,
        reader::ListedFile,
        tree::{Identity, Tree, changed},
        walk,
    },
};

/// Most rounds of FILE COPY: each copies what changed during the one before, so the later ones are
/// short; a server that creates tables faster than they can be copied needs --block-ddl.
const FILE_ROUNDS_MAX: u32 = 8;

/// Most rounds of PAGE COPY.
const PAGE_ROUNDS_MAX: u32 = 4;

/// Changed bytes that may be left to be read under the locks: some tenths of a second.
const LEFT_FOR_LOCKS_BYTES: u64 = 32 << 20;

/// Redo that is recovered in seconds, however small the server's log is.
const REDO_BYTES: u64 = 64 << 20;

/// Most looks at the checkpoint: it may move several times a second.
const SAME_SERVER_LOOKS_MAX: u32 = 50;

/// Most tries of a cut whose files do not come to rest.
const CUTS_MAX: u32 = 5;

/// Ids from here on are the server's own: the temporary tablespace (SRV_SPACE_ID_UPPER_BOUND).
const TABLE_SPACES_END: u32 = 0xffff_fff0;

/// Longest wait for a checkpoint: an idle server makes one within seconds.
const CHECKPOINT_MAX: Duration = Duration::from_secs(120);

const REDO: Position = Position { stage: Stage::RedoCopy, round: 1 };
const DONE: Position = Position { stage: Stage::Done, round: 1 };

/// A clone of a live server.
#[derive(Debug)]
pub(super) struct InnodbSnapshot {
    shared: Arc<EngineShared>,
    options: SnapshotOptions,
    facts: Facts,
    classifier: Classifier,
    tree: Tree,
    system: System,
    counts: Arc<PageCounts>,
    /// One walk or cut at a time, and what it counts.
    advancing: Mutex<Advancing>,
    /// Held for moments only.
    state: Mutex<State>,
}

#[derive(Debug)]
struct Advancing {
    unsettled: u64,
    /// Redo from before this LSN says that a tablespace is deleted which is there again by the same
    /// id (IMPORT): recovery must begin after it.
    replaced_at: u64,
    spaces: Spaces,
    session: Option<Session>,
    /// DDL blocked for the whole clone.
    ddl: Option<cut::DdlBlock>,
}

#[derive(Debug)]
struct State {
    rounds: Vec<Round>,
    base: Arc<Base>,
    hold: Arc<Hold>,
    /// The redo log's id, while it grows.
    redo: Option<FileId>,
    point: Option<Arc<Point>>,
    is_done: bool,
}

/// A list that was given out.
#[derive(Debug, Clone)]
struct Round {
    position: Position,
    list: Arc<List>,
    totals: Totals,
    /// PAGE COPY: pages below this LSN are as they were.
    since: Option<u64>,
}

/// The consistent point.
#[derive(Debug)]
struct Point {
    coordinates: Coordinates,
    stashed: HashMap<FileId, Stashed>,
    redo_id: FileId,
    redo: RedoFile,
    totals: Totals,
    root: Attributes,
}

/// Takes note of tablespaces that are there again by an id that was given out before: imported
/// ones, whose pages no redo carries.
fn note_replaced(
    advancing: &mut Advancing,
    session: &mut Session,
    relisted: &Relisted,
) -> Result<(), Failure> {
    if let Some(path) = advancing.spaces.first_replaced(relisted)? {
        let lsn = session.lsn().map_err(|e| e.failure("ask for the log sequence number"))?;
        tracing::info!(%path, lsn = lsn.current, "a tablespace was imported");
        advancing.replaced_at = lsn.current;
    }
    Ok(())
}

/// Inode and birth of a file.
type FileOf = (u64, (i64, u32));

/// Tablespaces of a walk.
#[derive(Debug, Default)]
struct Spaces {
    /// By id, the file that had it.
    files: HashMap<u32, FileOf>,
    /// Those whose first page was empty: their ids are not known yet.
    unsettled: HashSet<FileOf>,
    /// Tablespaces created later get higher ids.
    last: u32,
}

impl Spaces {
    /// Of a walk that began when the server knew tablespaces up to `last`.
    fn of(base: &Base, last: u32) -> Result<Self, Failure> {
        let mut spaces = Self { last, ..Self::default() };
        for record in base.records.read_from(0)? {
            let record = record?;
            match Mark::of(record.identity.live) {
                Mark::Settled(space) => {
                    spaces.files.insert(space, Self::file(&record));
                }
                Mark::Unsettled => {
                    spaces.unsettled.insert(Self::file(&record));
                }
                Mark::None | Mark::Redo(_) => {}
            }
        }
        Ok(spaces)
    }

    fn file(record: &Record) -> FileOf {
        (record.identity.inode, record.identity.modify_time)
    }

    /// A listed tablespace of an old id in a new file; renamed ones are the same file.
    fn first_replaced(&self, relisted: &Relisted) -> Result<Option<RelativePath>, Failure> {
        for record in relisted.list.records.read_from(0)? {
            let record = record?;
            let file = Self::file(&record);
            if let Mark::Settled(space) = Mark::of(record.identity.live)
                // The system's and undo tablespaces are not imported.
                && record.entry.path.name().ends_with(b".ibd")
                && space <= self.last
                && self.files.get(&space) != Some(&file)
                && !self.unsettled.contains(&file)
            {
                return Ok(Some(record.entry.path));
            }
        }
        Ok(None)
    }
}

/// The system tablespace's files.
#[derive(Debug)]
struct System {
    format: Arc<PageFormat>,
    first_pages: Vec<u32>,
    empty: [std::ops::Range<u32>; 2],
}

impl State {
    fn position(&self) -> Position {
        match (self.is_done, self.rounds.last()) {
            (true, _) => DONE,
            (false, Some(round)) => round.position,
            (false, None) => Position::FIRST,
        }
    }

    fn round(&self, at: Position) -> Result<Round, Failure> {
        let round = self.rounds.iter().find(|round| round.position == at);
        round.cloned().ok_or_else(|| not_reached(at, self.position()))
    }

    fn rounds_of(&self, stage: Stage) -> u32 {
        let count = self.rounds.iter().filter(|round| round.position.stage == stage).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    fn answer(&self) -> Advanced {
        let position = self.position();
        let mut advanced = Advanced {
            position,
            totals: self.rounds.last().map(|round| round.totals).unwrap_or_default(),
            consistency_level: ConsistencyLevel::Unspecified,
            coordinates: None,
            root: None,
        };
        if let Some(point) = self.point.as_ref().filter(|_| self.is_done) {
            advanced.totals = point.totals;
            advanced.consistency_level = ConsistencyLevel::Transactions;
            advanced.coordinates = Some(point.coordinates.clone());
            advanced.root = Some(point.root.clone());
        }
        advanced
    }
}

impl InnodbSnapshot {
    /// Looks at the server, takes hold of its redo log, and lists its files.
    pub(super) fn open(
        shared: Arc<EngineShared>,
        options: &SnapshotOptions,
    ) -> Result<Self, Failure> {
        let mut session = shared.server.connect()?;
        let facts = Facts::ask(&mut session)?;
        check_privileges(&mut session)?;
        let classifier = Classifier::new(&facts)?;
        let tree = Tree::open(&shared.data_directory)?;
        check_same_server(&mut session, &tree, &classifier)?;
        let ddl = match options.block_ddl {
            true => Some(cut::DdlBlock::take(&shared.server, ddl_timeout(options))?),
            false => None,
        };
        // From here on every page that is read has all changes before the hold's checkpoint.
        let hold = Arc::new(shared.follower.hold()?);
        let system = System::look(&tree, &classifier)?;
        let mut unsettled = 0;
        let known = session.tablespace_ids().map_err(|e| e.failure("list tablespaces"))?;
        let is_table = |id: &u32| *id < TABLE_SPACES_END;
        let last_space = known.iter().copied().filter(is_table).max().unwrap_or(0);
        let redo = redo_so_far(&hold);
        let mut survey = Survey::new(&classifier, known, redo, &mut unsettled);
        let spool = &shared.spool_directory;
        let first = compare::relist(&tree, &mut survey, None, spool, &mut |_| Ok(()))?;
        survey.check_engines()?;
        clock::settle(first.newest_whole_second);
        let spaces = Spaces::of(&first.base, last_space)?;
        let redo = first.growing;
        let list = Arc::new(first.list);
        let round =
            Round { position: Position::FIRST, totals: list.records.totals, list, since: None };
        let state = State {
            rounds: vec![round],
            base: Arc::new(first.base),
            hold,
            redo,
            point: None,
            is_done: false,
        };
        Ok(Self {
            options: options.clone(),
            facts,
            classifier,
            tree,
            system,
            counts: Arc::default(),
            advancing: Mutex::new(Advancing {
                unsettled,
                replaced_at: 0,
                spaces,
                session: Some(session),
                ddl,
            }),
            state: Mutex::new(state),
            shared,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one assignment: it is whole even after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists the tree as changes since `base`; also what is to be read late.
    fn relist(
        &self,
        session: &mut Session,
        unsettled: &mut u64,
        base: &Base,
        hold: &Arc<Hold>,
        progress: Progress<'_>,
    ) -> Result<(Relisted, Vec<RelativePath>), Failure> {
        let known = session.tablespace_ids().map_err(|e| e.failure("list tablespaces"))?;
        let redo = redo_so_far(hold);
        let mut survey = Survey::new(&self.classifier, known, redo, unsettled);
        let spool = &self.shared.spool_directory;
        let relisted = compare::relist(&self.tree, &mut survey, Some(base), spool, progress)?;
        survey.check_engines()?;
        Ok((relisted, survey.late))
    }

    /// Decides what comes after a round whose every byte is durable.
    fn next(&self, advancing: &mut Advancing, progress: Progress<'_>) -> Result<(), Failure> {
        let (base, hold, file_rounds, page_rounds) = {
            let state = self.state();
            let rounds = (state.rounds_of(Stage::FileCopy), state.rounds_of(Stage::PageCopy));
            (Arc::clone(&state.base), Arc::clone(&state.hold), rounds.0, rounds.1)
        };
        let mut session = match advancing.session.take() {
            Some(session) => session,
            None => self.shared.server.connect()?,
        };
        let (relisted, _) =
            self.relist(&mut session, &mut advancing.unsettled, &base, &hold, progress)?;
        note_replaced(advancing, &mut session, &relisted)?;
        advancing.session = Some(session);
        clock::settle(relisted.newest_whole_second);
        let changed = relisted.list.records.totals.data_bytes;
        if changed > LEFT_FOR_LOCKS_BYTES && file_rounds < FILE_ROUNDS_MAX && page_rounds == 0 {
            tracing::info!(changed, round = file_rounds + 1, "files changed, another round");
            let position = Position { stage: Stage::FileCopy, round: file_rounds + 1 };
            self.give_out(position, relisted, None);
            return Ok(());
        }
        let page_round = self.page_round(&hold, page_rounds, advancing.replaced_at, progress)?;
        if let Some((since, fresh)) = page_round {
            // Listed after the checkpoint: pages that a file had grown by before it are in no redo
            // of the clone, and must lie within its listed size.
            let mut session = self.shared.server.connect()?;
            let unsettled = &mut advancing.unsettled;
            let (relisted, _) = self.relist(&mut session, unsettled, &base, &fresh, progress)?;
            clock::settle(relisted.newest_whole_second);
            advancing.spaces = Spaces::of(&relisted.base, advancing.spaces.last)?;
            let relisted = self.with_patches(&relisted)?;
            let position = Position { stage: Stage::PageCopy, round: page_rounds + 1 };
            tracing::info!(since, redo_from = fresh.checkpoint.lsn, %position, "pages changed");
            self.give_out(position, relisted, Some(since));
            self.state().hold = fresh;
            return Ok(());
        }
        let point = self.cut(advancing, &base, &hold, progress)?;
        match point {
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
            Cut::TooMuch(relisted) => {
                if file_rounds >= FILE_ROUNDS_MAX || page_rounds > 0 {
                    return Err(too_fast(relisted.list.records.totals.data_bytes));
                }
                clock::settle(relisted.newest_whole_second);
                let position = Position { stage: Stage::FileCopy, round: file_rounds + 1 };
                self.give_out(position, *relisted, None);
            }
        }
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
        (2 * hold.capacity).max(REDO_BYTES).min(self.shared.quota / 2)
    }

    /// Whether pages are to be sent again: from which LSN on, and the hold that redo begins at
    /// then.
    fn page_round(
        &self,
        hold: &Arc<Hold>,
        rounds: u32,
        replaced_at: u64,
        progress: Progress<'_>,
    ) -> Result<Option<(u64, Arc<Hold>)>, Failure> {
        let since = hold.checkpoint.lsn;
        if replaced_at >= since {
            return self.hold_after(replaced_at, progress).map(|fresh| Some((since, fresh)));
        }
        match hold.end() {
            Ok(end) if end - since <= self.redo_bound(hold) => Ok(None),
            // What is left is as short as rounds can make it: recovery takes a little longer.
            Ok(_) if rounds >= PAGE_ROUNDS_MAX => Ok(None),
            Err(failure) if rounds >= PAGE_ROUNDS_MAX => Err(failure),
            _ => {
                let fresh = Arc::new(self.shared.follower.hold()?);
                let is_worth = hold.is_lost() || fresh.checkpoint.lsn > since;
                Ok(is_worth.then_some((since, fresh)))
            }
        }
    }

    /// Takes hold of the log from a checkpoint after `lsn`.
    fn hold_after(&self, lsn: u64, progress: Progress<'_>) -> Result<Arc<Hold>, Failure> {
        let deadline = Instant::now() + CHECKPOINT_MAX;
        loop {
            let fresh = self.shared.follower.hold()?;
            if fresh.checkpoint.lsn > lsn {
                return Ok(Arc::new(fresh));
            }
            if Instant::now() >= deadline {
                return Err(Failure::new(
                    Code::Unavailable,
                    "CHECKPOINT_STALLED",
                    format!(
                        "a tablespace was imported at LSN {lsn}, and the server has made no \
                         checkpoint after it in {} s (its last is at {}); lower \
                         innodb_max_dirty_pages_pct, or clone again later",
                        CHECKPOINT_MAX.as_secs(),
                        fresh.checkpoint.lsn
                    ),
                ));
            }
            progress(0)?;
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

    /// Takes the locks and fixes the point.
    fn cut(
        &self,
        advancing: &mut Advancing,
        base: &Base,
        hold: &Arc<Hold>,
        progress: Progress<'_>,
    ) -> Result<Cut, Failure> {
        let mut count = 0;
        let mut told = || {
            count += 1;
            progress(count)
        };
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
            let made = cut::retry_while_busy(ddl_timeout(&self.options), &mut told, |told| {
                self.try_cut(advancing, base, hold, told)
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
        told: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<Cut, LockError> {
        let resting = cut::rest_replica(&self.shared.server)?;
        let mut own;
        let mut held;
        let lock: &mut BackupLock = match &advancing.ddl {
            Some(ddl) => {
                held = ddl.lock();
                held.get()?
            }
            None => {
                own = BackupLock::block_ddl(&self.shared.server)?;
                &mut own
            }
        };
        let ddl_blocked = Instant::now();
        let (relisted, late) =
            self.relist(lock.session(), &mut advancing.unsettled, base, hold, &mut |_| told())?;
        let bytes = relisted.list.records.totals.data_bytes;
        let is_replaced = advancing.spaces.first_replaced(&relisted)?.is_some();
        if is_replaced || bytes > self.shared.quota.min(4 * LEFT_FOR_LOCKS_BYTES) {
            // DDL that is blocked for the whole clone stays blocked.
            if advancing.ddl.is_none() {
                lock.end()?;
            }
            return Ok(Cut::TooMuch(Box::new(relisted)));
        }
        let mut stash = Stash::create(&self.shared.spool_directory, self.shared.quota)?;
        let is_late = |path: &RelativePath| {
            sabotage::is("page-after-point") && path.as_bytes().starts_with(b"bank/")
        };
        let mut stashed = HashMap::new();
        self.stash(&relisted, &mut stash, &mut stashed, lock, |path| !is_late(path))?;
        let mut late = LateFiles::read(&self.tree, late, &mut stash)?;
        let root = walk::root_attributes(&self.tree)?;
        let commit_begun = Instant::now();
        lock.block_commit()?;
        let commit_blocked = Instant::now();
        cut::check_rest(lock.session())?;
        late.read_again(&self.tree, &mut stash)?;
        let coordinates = point::coordinates(lock.session(), &self.facts)
            .map_err(|e| e.failure("read the coordinates"))?;
        lock.end()?;
        let ended = Instant::now();
        let coordinates = match sabotage::is("late-coordinates") {
            true => {
                std::thread::sleep(Duration::from_millis(200));
                let late = point::coordinates(lock.session(), &self.facts);
                let late = late.map_err(|e| e.failure("read the coordinates"))?;
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
        drop(resting);
        tracing::info!(
            lsn = coordinates.lsn,
            binlog_file = %String::from_utf8_lossy(&coordinates.binlog_file),
            binlog_position = coordinates.binlog_position,
            gtid = %coordinates.gtid_executed,
            ddl_blocked_ms = millis(ddl_blocked, ended),
            commit_wait_ms = millis(commit_begun, commit_blocked),
            commit_blocked_ms = millis(commit_blocked, ended),
            "the point is fixed"
        );
        let point = self.finish(&relisted, late, stash, stashed, coordinates, root, hold, told);
        Ok(point?)
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
                stashed.insert(record.entry.file_id, stash.take(reader.as_mut())?);
                lock.keep_alive()?;
            }
        }
        Ok(())
    }

    /// After the locks: redo up to the point, and the list of all that was read under them.
    #[expect(clippy::too_many_arguments, reason = "the parts of one point, used once")]
    fn finish(
        &self,
        relisted: &Relisted,
        late: LateFiles,
        mut stash: Stash,
        mut stashed: HashMap<FileId, Stashed>,
        coordinates: Coordinates,
        root: Attributes,
        hold: &Arc<Hold>,
        told: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<Cut, Failure> {
        let lsn = coordinates.lsn;
        let mut session = self.shared.server.connect()?;
        let flush = session.execute("FLUSH NO_WRITE_TO_BINLOG ENGINE LOGS");
        flush.map_err(|e| e.failure("flush the redo log"))?;
        // With innodb_flush_log_at_trx_commit other than 1 this only writes the log; the server
        // flushes it within innodb_flush_log_at_timeout.
        hold.wait_for(lsn, told)?;
        let redo = RedoFile::compose(hold, lsn)?;
        let log = redo_file::attributes(&self.tree)?;
        let info = stash.put(&point::info(&coordinates)?)?;
        let mut extras: Vec<(RelativePath, Attributes, u64, Extra)> = late
            .into_files()
            .map(|file| {
                (file.path, file.attributes, file.stashed.length, Extra::Stashed(file.stashed))
            })
            .collect();
        extras.push((path(INFO_NAME)?, log.clone(), info.length, Extra::Stashed(info)));
        extras.push((path(super::log_file::LOG_NAME)?, log, redo.size(), Extra::Redo));
        extras.sort_by(|a, b| a.0.cmp(&b.0));
        let mut writer = ListWriter::create(&self.shared.spool_directory)?;
        let mut changes = relisted.list.records.read_from(0)?.peekable();
        let mut redo_id = FileId(0);
        let mut totals = relisted.base.records.totals;
        // The log that the recipient has a part of already.
        let known = match relisted.growing {
            Some(_) => find_path(&relisted.base, &path(super::log_file::LOG_NAME)?)?,
            None => None,
        };
        for (id, (path, attributes, size, extra)) in (relisted.base.next_id()..).zip(extras) {
            while let Some(change) =
                changes.next_if(|c| c.as_ref().map_or(true, |c| c.entry.path < path))
            {
                writer.append(&mut change?)?;
            }
            let (file_id, change) = match (&extra, &known) {
                (Extra::Redo, Some(known)) => {
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
            match extra {
                Extra::Redo => redo_id = file_id,
                Extra::Stashed(copy) => {
                    stashed.insert(file_id, copy);
                }
            }
        }
        for change in changes {
            writer.append(&mut change?)?;
        }
        let list = writer.finish()?;
        let point = Point { coordinates, stashed, redo_id, redo, totals, root };
        Ok(Cut::Made(Box::new((list, point))))
    }

    /// A reader of the redo log as it is now; `checkpoint` is where the listed one begins.
    fn growing_redo(&self, checkpoint: u64) -> Result<Box<dyn FileReader>, Failure> {
        let hold = Arc::clone(&self.state().hold);
        if hold.checkpoint.lsn != checkpoint {
            return Err(changed(&path(super::log_file::LOG_NAME)?));
        }
        Ok(Box::new(RedoFile::so_far(&hold).reader()))
    }

    /// A reader of a listed file.
    fn reader(&self, record: &Record, since: Option<u64>) -> Result<Box<dyn FileReader>, Failure> {
        let path = &record.entry.path;
        let Some(Kind::Regular { size, .. }) = record.entry.kind else {
            return Err(Failure::bug(format!("{path} is read and is no regular file")));
        };
        if let Mark::Redo(checkpoint) = Mark::of(record.identity.live) {
            return self.growing_redo(checkpoint);
        }
        if Mark::of(record.identity.live) == Mark::None {
            return Ok(Box::new(ListedFile::open(&self.tree, path, &record.identity)?));
        }
        let file = open_inode(&self.tree, path, &record.identity)?;
        let shown = self.tree.shown(Some(path));
        let Mark::Settled(space) = Mark::of(record.identity.live) else {
            return Ok(Box::new(RawReader::new(file, path.clone(), shown, size)));
        };
        let of = match self.classifier.file(path) {
            Class::System(index) => self.system.file(index),
            _ => TablespaceOf::look(&file, path, &shown, space)?,
        };
        let counts = Arc::clone(&self.counts);
        let reader = TablespaceReader::new(file, path.clone(), shown, size, of, counts);
        Ok(Box::new(match since.filter(|_| record.entry.change == Change::Patch) {
            Some(lsn) => reader.since(lsn),
            None => reader,
        }))
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

/// What a clone that recovers from the hold's checkpoint has of its log so far.
fn redo_so_far(hold: &Arc<Hold>) -> RedoSoFar {
    RedoSoFar { checkpoint: hold.checkpoint.lsn, size: RedoFile::so_far(hold).size() }
}

enum Extra {
    Redo,
    Stashed(Stashed),
}

enum Cut {
    Made(Box<(List, Point)>),
    /// More has changed than may be read under the locks.
    TooMuch(Box<Relisted>),
}

impl Snapshot for InnodbSnapshot {
    fn position(&self) -> Position {
        self.state().position()
    }

    fn totals(&self, at: Position) -> Result<Totals, Failure> {
        let state = self.state();
        match &state.point {
            Some(point) if state.is_done && at == DONE => Ok(point.totals),
            _ => Ok(state.round(at)?.totals),
        }
    }

    fn left_out(&self) -> BTreeMap<String, u64> {
        self.state().base.left_out.clone()
    }

    fn list(&self, at: Position, start: u64) -> Result<EntryIterator, Failure> {
        let round = self.state().round(at)?;
        let length = round.list.records.len();
        if start > length {
            return Err(Failure::invalid(
                "BAD_RANGE",
                format!("entry {start} is beyond the list of {at}, which has {length}"),
            ));
        }
        let records = round.list.records.read_from(start)?;
        Ok(Box::new(records.map(|record| record.map(|r| r.entry))))
    }

    fn open_file(&self, at: Position, file: FileId) -> Result<Box<dyn FileReader>, Failure> {
        let (round, point, redo) = {
            let state = self.state();
            // It is read in every round, also in those whose lists need not name it again.
            let redo = (at == state.position() && state.redo == Some(file))
                .then(|| Arc::clone(&state.hold));
            (state.round(at)?, state.point.clone(), redo)
        };
        if let Some(point) = point {
            if at != REDO {
                return Err(Failure::precondition(
                    "STAGE_PASSED",
                    format!("{at} was read from, the point is fixed: no page is read after it"),
                ));
            }
            if file == point.redo_id {
                return Ok(Box::new(point.redo.reader()));
            }
            if let Some(stashed) = point.stashed.get(&file) {
                return Ok(Box::new(StashReader(stashed.clone())));
            }
        }
        if let Some(hold) = redo {
            return Ok(Box::new(RedoFile::so_far(&hold).reader()));
        }
        let record = round.list.find(file)?;
        let Some(record) = record.filter(|r| matches!(r.entry.kind, Some(Kind::Regular { .. })))
        else {
            return Err(Failure::invalid(
                "UNKNOWN_FILE",
                format!("file {} is no regular file in the list of {at}", file.0),
            ));
        };
        self.reader(&record, round.since)
    }

    fn advance(&self, from: Position, progress: Progress<'_>) -> Result<Advanced, Failure> {
        let mut advancing = self.advancing.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut state = self.state();
            let position = state.position();
            if from != position || state.is_done {
                let passed = state.rounds.iter().rposition(|round| round.position == from);
                let is_last = match passed {
                    Some(index) if state.is_done => index + 1 == state.rounds.len(),
                    Some(index) => index + 2 == state.rounds.len(),
                    None => false,
                };
                return if is_last { Ok(state.answer()) } else { Err(not_reached(from, position)) };
            }
            if from == REDO {
                state.is_done = true;
                return Ok(state.answer());
            }
        }
        self.next(&mut advancing, progress)?;
        Ok(self.state().answer())
    }
}

impl System {
    /// Looks at the files of the system tablespace.
    fn look(tree: &Tree, classifier: &Classifier) -> Result<Self, Failure> {
        let mut first_pages = Vec::new();
        let mut format: Option<Arc<PageFormat>> = None;
        let mut empty = [0..0, 0..0];
        let mut next: u64 = 0;
        for name in classifier.system() {
            let shown = tree.path().join(String::from_utf8_lossy(name).as_ref());
            let file =
                File::open(&shown).map_err(|e| Failure::io("open tablespace", &shown, &e))?;
            let read = |e: std::io::Error| Failure::io("read tablespace", &shown, &e);
            let size = file.metadata().map_err(read)?.len();
            let known = match &format {
                Some(format) => Arc::clone(format),
                None => {
                    let relative = path(&String::from_utf8_lossy(name))?;
                    let of = TablespaceOf::look(&file, &relative, &shown, 0)?;
                    let page = of.format.physical_page_size();
                    let mut header = vec![0; page];
                    let offset = 5 * page as u64;
                    file.read_exact_at(&mut header, offset).map_err(read)?;
                    empty = doublewrite_pages(&header).map_err(|error| {
                        Failure::precondition(
                            "UNSUPPORTED_TABLESPACE",
                            format!("{}: {error}", shown.display()),
                        )
                    })?;
                    of.format
                }
            };
            first_pages.push(u32::try_from(next).unwrap_or(u32::MAX));
            next += size / known.physical_page_size() as u64;
            format = Some(known);
        }
        let format = format.ok_or_else(|| {
            Failure::precondition("UNSUPPORTED_TABLESPACE", "innodb_data_file_path is empty")
        })?;
        Ok(Self { format, first_pages, empty })
    }

    fn file(&self, index: usize) -> TablespaceOf {
        TablespaceOf {
            format: Arc::clone(&self.format),
            first_page: self.first_pages.get(index).copied().unwrap_or(0),
            empty: self.empty.clone(),
        }
    }
}

/// The log in the data directory must be the one that the server at hand writes: both name the same
/// checkpoint. It may be made between two looks, so several are taken.
fn check_same_server(
    session: &mut Session,
    tree: &Tree,
    classifier: &Classifier,
) -> Result<(), Failure> {
    let directory = tree.path();
    let other = |why: String| {
        let shown = directory.display();
        let text = format!("--data-directory {shown} is not this server's: {why}");
        Err(Failure::precondition("OTHER_DATA_DIRECTORY", text))
    };
    // InnoDB locks all its files while it runs.
    if let Some(name) = classifier.system().first()
        && lock::is_locked(tree, name) == Some(false)
    {
        return other(format!("no server has {} open", name.escape_ascii()));
    }
    let mut seen = (0, 0);
    for _ in 0..SAME_SERVER_LOOKS_MAX {
        let before = LogFile::open(directory)?.checkpoint()?.lsn;
        let lsn = session.lsn().map_err(|e| e.failure("ask for the log sequence number"))?;
        let after = LogFile::open(directory)?.checkpoint()?.lsn;
        // Made, and not yet told of; or told of, and made between our looks.
        if lsn.checkpoint == before || lsn.checkpoint == after {
            return Ok(());
        }
        seen = (lsn.checkpoint, after);
        std::thread::sleep(Duration::from_millis(5));
    }
    other(format!(
        "the server's last checkpoint is at LSN {}, that of the directory's redo log at {}",
        seen.0, seen.1
    ))
}

fn ddl_timeout(options: &SnapshotOptions) -> Duration {
    options.ddl_timeout.unwrap_or(cut::DDL_TIMEOUT_DEFAULT)
}

/// Whether another try of the cut may end better: a file that was written, a connection lost.
fn is_passing(failure: &Failure) -> bool {
    matches!(
        failure.reason.as_ref(),
        "FILE_CHANGED" | "FILE_VANISHED" | "DATABASE_LOST" | "REPLICA_NOT_STOPPED"
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

fn path(name: &str) -> Result<RelativePath, Failure> {
    RelativePath::new(name.as_bytes()).map_err(|e| Failure::bug(format!("{name}: {e}")))
}

fn millis(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_millis()).unwrap_or(u64::MAX)
}

fn not_reached(asked: Position, at: Position) -> Failure {
    Failure::precondition(
        "STAGE_NOT_REACHED",
        format!("{asked} was asked for, the snapshot is at {at}"),
    )
    .with("position", at)
}
