//! One clone's view of the server: its lists, round by round, and the point that ends them.
//!
//! Invariants:
//! * Every page is read after the checkpoint that recovery begins at, and before T (R1): once the
//!   cut is made nothing of an earlier round can be opened.
//! * A file counts as copied only if the walk under the locks finds it as it was listed: a plain
//!   one untouched, a tablespace of the same inode and space id. What has changed is read there
//!   and then.
//! * What is not in a list is left out by a rule of `classify`, and counted.

mod cut;
mod rounds;
mod system;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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
    backup_lock::{DDL_TIMEOUT_DEFAULT, DdlBlock},
    classify::{Class, Classifier},
    deletions::Listed,
    early::EarlySizes,
    flavor::Flavor,
    follower::Hold,
    late, mariadb, mysql,
    mysql::binlog::{BinlogReader, BinlogTail},
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
    /// Storage engines that tables were in as it was opened.
    engines: BTreeSet<&'static str>,
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
        let facts = Facts::read(&mut session)?;
        // All that is wrong at once: each is a person's errand.
        let mut problems = facts.problems(shared.server.allows_untested_version());
        let privileges = match facts.flavor {
            Flavor::MariaDb => mariadb::privileges::check_privileges(&mut session),
            Flavor::MySql => mysql::server::check_privileges(&mut session),
        };
        problems.extend(privileges.err());
        let classifier = match Classifier::new(&facts) {
            Ok(classifier) if problems.is_empty() => classifier,
            other => {
                problems.extend(other.err());
                let all = Failure::all_of(problems);
                return Err(all.unwrap_or_else(|| Failure::bug("problems that are none")));
            }
        };
        let tree = Tree::open(&shared.data_directory)?;
        check_same_server(&mut session, &tree, &classifier)?;
        // MySQL builds indexes and imports tablespaces without redo, and names no moment at which
        // its DDL rests: it is blocked from the beginning on.
        let ddl = match options.block_ddl || facts.flavor == Flavor::MySql {
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
        let system = System::look(&tree, &classifier, facts.flavor)?;
        let mut unsettled = 0;
        let known = tablespaces(&mut session, facts.flavor)?;
        let redo = redo_so_far(&hold);
        let mut survey = Survey::new(&classifier, known, redo, &mut unsettled);
        let spool = &shared.spool_directory;
        let waits: Progress<'_> = &mut |_| options.waiting.check();
        let first = compare::relist(&tree, &mut survey, None, spool, waits)?;
        survey.check_engines()?;
        let engines = std::mem::take(&mut survey.engines);
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

    /// Lists the tree as changes since `base`; also what is to be read late.
    fn relist(
        &self,
        known: HashSet<u32>,
        unsettled: &mut u64,
        base: &Base,
        hold: &Arc<Hold>,
        progress: Progress<'_>,
    ) -> Result<(Relisted, Vec<RelativePath>), Failure> {
        let redo = redo_so_far(hold);
        let mut survey = Survey::new(&self.classifier, known, redo, unsettled);
        let spool = &self.shared.spool_directory;
        let relisted = compare::relist(&self.tree, &mut survey, Some(base), spool, progress)?;
        survey.check_engines()?;
        Ok((relisted, survey.late))
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
            _ => TablespaceOf::look(&file, path, &shown, space, self.facts.flavor)?,
        };
        let counts = Arc::clone(&self.counts);
        let reader = TablespaceReader::new(file, path.clone(), shown, size, of, counts);
        Ok(Box::new(match since.filter(|_| record.entry.change == Change::Patch) {
            Some(lsn) => reader.since(lsn),
            None => reader,
        }))
    }
}

/// Tablespaces that the server knows: four bytes and their room in a table for each.
fn tablespaces(session: &mut Session, flavor: Flavor) -> Result<HashSet<u32>, Failure> {
    session.tablespace_ids(flavor).map_err(|e| e.failure("list tablespaces"))
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
            match point.served.get(&file) {
                Some(Served::Redo(redo)) => return Ok(Box::new(redo.reader())),
                Some(Served::Stashed(stashed)) => {
                    return Ok(Box::new(StashReader(stashed.clone())));
                }
                Some(Served::Binlog(tail)) => return Ok(Box::new(BinlogReader(tail.clone()))),
                None => {}
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

fn ddl_timeout(options: &SnapshotOptions) -> Duration {
    options.ddl_timeout.unwrap_or(DDL_TIMEOUT_DEFAULT)
}

/// What a walk after the hold's checkpoint has found, where the log does not say what it deletes.
fn listed(hold: &Hold, tree: &Base) -> Result<Listed, Failure> {
    if hold.head.hides_ids() { Listed::of(tree) } else { Ok(Listed::default()) }
}

fn path(name: &str) -> Result<RelativePath, Failure> {
    RelativePath::new(name.as_bytes()).map_err(|e| Failure::bug(format!("{name}: {e}")))
}

fn not_reached(asked: Position, at: Position) -> Failure {
    Failure::precondition(
        "STAGE_NOT_REACHED",
        format!("{asked} was asked for, the snapshot is at {at}"),
    )
    .with("position", at)
}
