//! One clone's view of the server: its lists, round by round, and the point that ends them.
//!
//! Invariants:
//! * Every page is read after the checkpoint that recovery begins at, and before T (R1): from before
//!   commits are blocked nothing of an earlier round is read, nor of the log as it grows, unless the
//!   cut fails.
//! * A file counts as copied only if the walk under the locks finds it as it was listed: a plain
//!   one untouched, a tablespace of the same inode and space id. What has changed is read there
//!   and then.
//! * Under the locks each tablespace that the server has is found, by its first page.
//! * What is not in a list is left out by a rule of `classify`, and counted.

mod cut;
mod rounds;
mod system;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
    time::Duration,
};

use marcot_common::{
    entry::{Attributes, Change, FileId, Kind, Totals},
    failure::Failure,
    path::RelativePath,
    position::{Position, Stage},
};
use marcot_proto::common::v1::{ConsistencyLevel, Coordinates};

use self::system::System;
use super::{
    EngineShared,
    backup_lock::{DDL_TIMEOUT_DEFAULT, DdlBlock, DdlWatch},
    classify::{Class, Classifier},
    deletions::Listed,
    early::EarlySizes,
    flavor::Flavor,
    follower::Hold,
    known::{FoundSpaces, Known, Unwritten},
    late, mariadb, mysql,
    mysql::binlog::{BinlogReader, BinlogTail},
    read_gate::{GatedReader, ReadGate},
    redo_file::RedoFile,
    redo_log::{RedoLog, log_name},
    server::{Facts, Session},
    stash::{StashReader, Stashed},
    survey::{Mark, RedoSoFar, Survey},
    tablespace::{PageCounts, RawReader, TablespaceOf, TablespaceReader, open_inode},
};
use crate::{
    Advanced, EntryIterator, FileReader, Snapshot, SnapshotOptions,
    files::{
        clock,
        compare::{self, Base, Progress, Relisted},
        list::{List, Record},
        lock,
        reader::ListedFile,
        tree::{Tree, changed},
    },
};

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
    /// How far the server has flushed its log, as it has said last.
    flushed: AtomicU64,
    /// Storage engines that tables were in as it was opened.
    engines: BTreeSet<&'static str>,
    /// Where DDL is blocked for the whole clone.
    ddl_watch: Option<DdlWatch>,
    /// Closed from before the point on.
    gate: Arc<ReadGate>,
    /// One walk or cut at a time, and what it counts.
    advancing: Mutex<Advancing>,
    /// Held for moments only.
    state: Mutex<State>,
}

#[derive(Debug)]
struct Advancing {
    unsettled: u64,
    /// Of the walk after the present checkpoint.
    listed: Listed,
    early: EarlySizes,
    /// DDL blocked for the whole clone.
    ddl: Option<DdlBlock>,
}

#[derive(Debug)]
struct State {
    rounds: Vec<Round>,
    base: Arc<Base>,
    /// Of the newest walk.
    unwritten: Unwritten,
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

/// What a walk has found.
struct Walked {
    relisted: Relisted,
    /// To be read once commits are blocked.
    late: Vec<RelativePath>,
    spaces: FoundSpaces,
}

/// A file of the last list that is not read from where it lies.
#[derive(Debug, Clone)]
enum Served {
    Stashed(Stashed),
    Redo(RedoFile),
    Binlog(BinlogTail),
}

/// The consistent point.
#[derive(Debug)]
struct Point {
    coordinates: Coordinates,
    /// What is not read from its file.
    served: HashMap<FileId, Served>,
    totals: Totals,
    root: Attributes,
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

    fn next_round(&self, stage: Stage) -> Position {
        let count = self.rounds.iter().filter(|round| round.position.stage == stage).count();
        Position { stage, round: u32::try_from(count + 1).unwrap_or(u32::MAX) }
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
        let facts = Facts::read(&mut session)?;
        // All that is wrong at once: each is a person's errand.
        let mut problems = facts.problems(shared.server.allows_untested_version());
        let privileges = match facts.flavor {
            Flavor::MariaDb => mariadb::privileges::check_privileges(&mut session),
            Flavor::MySql => mysql::server::check_privileges(&mut session),
        };
        problems.extend(privileges.err());
        let classifier = match Classifier::new(&facts) {
            Ok(classifier) if problems.is_empty() => {
                classifier.for_binlog(options.binlog_base.as_deref())
            }
            other => {
                problems.extend(other.err());
                let all = Failure::all_of(problems);
                return Err(all.unwrap_or_else(|| Failure::bug("problems that are none")));
            }
        };
        let tree = Tree::open(&shared.data_directory)?;
        check_same_server(&mut session, &tree, &classifier)?;
        let ddl = match is_ddl_blocked(options, facts.flavor) {
            true => {
                let (limit, mut waits) = (ddl_timeout(options), || options.waiting.check());
                Some(DdlBlock::take(&shared.server, facts.flavor, limit, &mut waits)?)
            }
            false => None,
        };
        if facts.flavor == Flavor::MySql {
            mysql::server::check_state(&mut session)?;
        }
        // From here on every page that is read has all changes before the hold's checkpoint.
        let hold = Arc::new(shared.follower.hold(facts.flavor)?);
        let flushed = rounds::flushed(&mut session)?;
        RedoFile::check_size(&hold, flushed)?;
        let system = System::look(&tree, &classifier, facts.flavor)?;
        let mut unsettled = 0;
        let known = tablespaces(&mut session, facts.flavor)?;
        let redo = redo_so_far(&hold);
        let mut survey = Survey::new(&classifier, &known, redo, &mut unsettled);
        let spool = &shared.spool_directory;
        let waits: Progress<'_> = &mut |_| options.waiting.check();
        let first = compare::relist(&tree, &mut survey, None, spool, waits)?;
        survey.check_engines()?;
        let engines = std::mem::take(&mut survey.engines);
        let mut unwritten = std::mem::take(&mut survey.unwritten);
        // A walk may take longer than the server keeps a connection that is idle.
        let mut session = shared.server.connect()?;
        let confirmed = unwritten.confirm(&mut session, &known);
        confirmed.map_err(|e| e.failure("list tablespaces"))?;
        if facts.flavor == Flavor::MySql {
            // It writes the first page as it makes a file: one of zeros was lost, and the cut would say so.
            survey.spaces.check_made(&mut session, &unwritten, &HashSet::new())?;
        }
        late::check_size(&tree, &survey.late, shared.quota)?;
        clock::settle(first.newest_whole_second);
        let listed = listed(&hold, &first.base)?;
        let redo = first.growing;
        let list = Arc::new(first.list);
        let mut early = EarlySizes::default();
        early.note(&list, &classifier)?;
        let round =
            Round { position: Position::FIRST, totals: list.records.totals, list, since: None };
        let state = State {
            rounds: vec![round],
            base: Arc::new(first.base),
            unwritten,
            hold,
            redo,
            point: None,
            is_done: false,
        };
        Ok(Self {
            ddl_watch: ddl.as_ref().map(DdlBlock::watch),
            options: options.clone(),
            facts,
            classifier,
            tree,
            system,
            counts: Arc::default(),
            gate: Arc::default(),
            flushed: AtomicU64::new(flushed),
            engines,
            advancing: Mutex::new(Advancing { unsettled, listed, early, ddl }),
            state: Mutex::new(state),
            shared,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one assignment: it is whole even after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails where DDL was to be blocked up to the point, and has not been: a server that was
    /// started again is told of here, long before the cut.
    fn check_ddl_blocked(&self) -> Result<(), Failure> {
        self.ddl_watch.as_ref().map_or(Ok(()), DdlWatch::check)
    }

    /// Lists the tree as changes since `base`.
    fn relist(
        &self,
        known: &Known,
        unsettled: &mut u64,
        base: &Base,
        hold: &Arc<Hold>,
        progress: Progress<'_>,
    ) -> Result<Walked, Failure> {
        let redo = redo_so_far(hold);
        let mut survey = Survey::new(&self.classifier, known, redo, unsettled);
        let spool = &self.shared.spool_directory;
        let relisted = compare::relist(&self.tree, &mut survey, Some(base), spool, progress)?;
        survey.check_engines()?;
        self.state().unwritten = survey.unwritten;
        Ok(Walked { relisted, late: survey.late, spaces: survey.spaces })
    }

    /// Asks the server once more for what the walk knew by its word alone.
    fn confirm_unwritten(&self, known: &Known) -> Result<(), Failure> {
        // A walk may take longer than the server keeps a connection that is idle.
        let mut session = self.shared.server.connect()?;
        let mut unwritten = self.state().unwritten.clone();
        unwritten.confirm(&mut session, known).map_err(|e| e.failure("list tablespaces"))?;
        self.state().unwritten = unwritten;
        Ok(())
    }

    /// A reader of the redo log as it is now; `checkpoint` is where the listed one begins.
    fn growing_redo(&self, checkpoint: u64) -> Result<Box<dyn FileReader>, Failure> {
        let hold = Arc::clone(&self.state().hold);
        if hold.checkpoint() != checkpoint {
            return Err(changed(&path(log_name(self.facts.flavor))?));
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
            _ => {
                let unwritten = self.state().unwritten.get(space);
                TablespaceOf::look(&file, path, &shown, space, self.facts.flavor, unwritten)?
            }
        };
        let counts = Arc::clone(&self.counts);
        let reader = TablespaceReader::new(file, path.clone(), shown, size, of, counts);
        Ok(Box::new(match since.filter(|_| record.entry.change == Change::Patch) {
            Some(lsn) => reader.since(lsn),
            None => reader,
        }))
    }
}

/// Whether what is read of it may be newer than when it was listed; any other file is found changed.
fn reads_pages(record: &Record) -> bool {
    !matches!(Mark::of(record.identity.live), Mark::None | Mark::Redo(_))
}

fn tablespaces(session: &mut Session, flavor: Flavor) -> Result<Known, Failure> {
    Known::ask(session, flavor).map_err(|e| e.failure("list tablespaces"))
}

/// What a clone that recovers from the hold's checkpoint has of its log so far.
fn redo_so_far(hold: &Arc<Hold>) -> RedoSoFar {
    RedoSoFar { checkpoint: hold.checkpoint(), size: RedoFile::so_far(hold).size() }
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

    fn blocks_ddl(&self) -> bool {
        // Not asked of `advancing`, which is held for as long as a walk takes.
        is_ddl_blocked(&self.options, self.facts.flavor) && self.state().point.is_none()
    }

    fn storage_engines(&self) -> Vec<String> {
        self.engines.iter().map(ToString::to_string).collect()
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
        let (round, point, is_redo, redo) = {
            let state = self.state();
            // It is read in every round, also in those whose lists need not name it again.
            let is_redo = state.redo == Some(file);
            let redo = (is_redo && at == state.position()).then(|| Arc::clone(&state.hold));
            (state.round(at)?, state.point.clone(), is_redo, redo)
        };
        if point.is_none() {
            self.check_ddl_blocked()?;
        }
        if let Some(point) = &point {
            if at != REDO {
                return Err(Failure::precondition(
                    "STAGE_PASSED",
                    format!("{at} was read from, the point is fixed: no page is read after it"),
                ));
            }
            match point.served.get(&file) {
                Some(Served::Redo(redo)) => return Ok(Box::new(redo.reader())),
                Some(Served::Stashed(stashed)) => {
                    return Ok(Box::new(StashReader(stashed.clone())));
                }
                Some(Served::Binlog(tail)) => return Ok(Box::new(BinlogReader(tail.clone()))),
                None => {}
            }
        }
        // Of the log it is known here how far it may be read; of a table's file each read asks again.
        let _passed = if point.is_none() { Some(self.gate.pass()?) } else { None };
        if let Some(hold) = redo {
            return Ok(Box::new(RedoFile::so_far(&hold).reader()));
        }
        let record = round.list.find(file)?;
        let Some(record) = record.filter(|r| matches!(r.entry.kind, Some(Kind::Regular { .. })))
        else {
            if is_redo {
                // Another round has been given out meanwhile, to a call of which the caller does not know.
                return Err(changed(&path(log_name(self.facts.flavor))?));
            }
            return Err(Failure::invalid(
                "UNKNOWN_FILE",
                format!("file {} is no regular file in the list of {at}", file.0),
            ));
        };
        let reader = self.reader(&record, round.since)?;
        let gates = point.is_none() && reads_pages(&record);
        Ok(if gates {
            Box::new(GatedReader { gate: Arc::clone(&self.gate), reader })
        } else {
            reader
        })
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
                // What was read of it is right: it was asked after each read.
                state.hold.check_kept()?;
                state.is_done = true;
                return Ok(state.answer());
            }
        }
        self.next(&mut advancing, progress)?;
        Ok(self.state().answer())
    }
}

/// Most looks at the checkpoint: it may move several times a second.
const SAME_SERVER_LOOKS_MAX: u32 = 50;

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
    let checkpoint = || -> Result<u64, Failure> {
        Ok(RedoLog::open(classifier.flavor(), directory)?.head()?.checkpoint())
    };
    let mut seen = (0, 0);
    for _ in 0..SAME_SERVER_LOOKS_MAX {
        let before = checkpoint()?;
        let lsn = session.lsn().map_err(|e| e.failure("ask for the log sequence number"))?;
        let after = checkpoint()?;
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

/// Whether DDL is blocked from the beginning on: where that was asked for, and for MySQL, which builds
/// indexes and imports tablespaces without redo, and names no moment at which its DDL rests.
fn is_ddl_blocked(options: &SnapshotOptions, flavor: Flavor) -> bool {
    options.block_ddl || flavor == Flavor::MySql
}

fn ddl_timeout(options: &SnapshotOptions) -> Duration {
    options.ddl_timeout.unwrap_or(DDL_TIMEOUT_DEFAULT)
}

/// What a walk after the hold's checkpoint has found, where the log does not say what it deletes.
fn listed(hold: &Hold, tree: &Base) -> Result<Listed, Failure> {
    if hold.head.hides_ids() { Listed::of(tree) } else { Ok(Listed::default()) }
}

pub(super) fn path(name: &str) -> Result<RelativePath, Failure> {
    RelativePath::new(name.as_bytes()).map_err(|e| Failure::bug(format!("{name}: {e}")))
}

fn not_reached(asked: Position, at: Position) -> Failure {
    Failure::precondition(
        "STAGE_NOT_REACHED",
        format!("{asked} was asked for, the snapshot is at {at}"),
    )
    .with("position", at)
}
