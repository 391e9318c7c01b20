//! Engine `files`: a directory that nobody writes.
//!
//! ```text
//! round 1          rounds 2..=5                              done
//! walk: all  --->  walk again, compare: what differs  --->   walk again: nothing differs
//! ```
//!
//! Invariants:
//! * A byte counts as copied only if its file looked the same, by inode, size, mtime and ctime,
//!   when it was listed, before it was read, after it was read and at the last walk. The state
//!   that the copy has is one that the directory had for the whole time between last list and end.
//! * Nothing is read before the clock has left the tick in which it was listed (see `clock`).
//! * No list is held whole in memory.

pub(crate) mod attributes;
pub(crate) mod clock;
pub(crate) mod compare;
pub(crate) mod list;
pub(crate) mod lock;
pub(crate) mod names;
pub(crate) mod offences;
pub(crate) mod reader;
pub(crate) mod tree;
pub(crate) mod walk;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use marcot_common::{
    entry::{Attributes, FileId, Kind, Totals},
    failure::Failure,
    position::{Position, Stage},
};
use marcot_proto::common::v1::ConsistencyLevel;
use tonic::Code;

use self::{
    compare::{Base, Progress, Relisted},
    list::List,
    reader::ListedFile,
    tree::{Identity, Tree},
    walk::TakeAll,
};
use crate::{Advanced, Engine, EngineConfig, EntryIterator, FileReader, Snapshot, SnapshotOptions};

/// Most rounds. One copies all; a second or third picks up what a person or a log rotation
/// touched. Who still writes after five is a server, and its files would never come to rest.
const ROUNDS_MAX: u32 = 5;

/// Where every clone by this engine ends.
const DONE: Position = Position { stage: Stage::Done, round: 1 };

/// Makes snapshots of a directory that nobody writes.
#[derive(Debug)]
pub(crate) struct FilesEngine {
    data_directory: PathBuf,
    spool_directory: PathBuf,
}

impl FilesEngine {
    /// Checks the directories and resolves them.
    pub(crate) fn open(config: &EngineConfig) -> Result<Self, Failure> {
        Ok(Self {
            data_directory: resolve("open data directory", &config.data_directory)?,
            spool_directory: resolve("open spool directory", &config.spool_directory)?,
        })
    }
}

pub(crate) fn resolve(action: &str, path: &Path) -> Result<PathBuf, Failure> {
    let resolved = path.canonicalize().map_err(|e| Failure::io(action, path, &e))?;
    if resolved.is_dir() {
        return Ok(resolved);
    }
    Err(Failure::precondition(
        "NOT_A_DIRECTORY",
        format!("{action} {}: it is not a directory", path.display()),
    ))
}

impl Engine for FilesEngine {
    fn name(&self) -> &'static str {
        "files"
    }

    fn data_directory(&self) -> &Path {
        &self.data_directory
    }

    fn open(&self, _options: &SnapshotOptions) -> Result<Box<dyn Snapshot>, Failure> {
        let tree = Tree::open(&self.data_directory)?;
        lock::refuse_running_server(&tree)?;
        let first =
            compare::relist(&tree, &mut TakeAll, None, &self.spool_directory, &mut |_| Ok(()))?;
        clock::settle(first.newest_whole_second);
        Ok(Box::new(FilesSnapshot {
            tree,
            spool_directory: self.spool_directory.clone(),
            advancing: Mutex::new(()),
            state: Mutex::new(State {
                lists: vec![Arc::new(first.list)],
                base: Arc::new(first.base),
                is_done: false,
                root: None,
            }),
        }))
    }
}

/// The lists of one clone so far.
#[derive(Debug)]
struct FilesSnapshot {
    tree: Tree,
    spool_directory: PathBuf,
    /// One walk at a time.
    advancing: Mutex<()>,
    /// Held for moments only.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Of rounds 1, 2, ...
    lists: Vec<Arc<List>>,
    /// The tree as the last round has it.
    base: Arc<Base>,
    is_done: bool,
    /// The data directory's own attributes, at the end.
    root: Option<Attributes>,
}

impl State {
    fn round(&self) -> u32 {
        u32::try_from(self.lists.len()).unwrap_or(u32::MAX)
    }

    fn position(&self) -> Position {
        if self.is_done {
            return DONE;
        }
        Position { stage: Stage::FileCopy, round: self.round() }
    }

    fn list(&self, at: Position) -> Result<Arc<List>, Failure> {
        let index = at.round.checked_sub(1).and_then(|n| usize::try_from(n).ok());
        index
            .filter(|_| at.stage == Stage::FileCopy)
            .and_then(|n| self.lists.get(n).cloned())
            .ok_or_else(|| not_reached(at, self.position()))
    }

    fn answer(&self) -> Advanced {
        let position = self.position();
        let (totals, consistency_level) = if self.is_done {
            let level = ConsistencyLevel::QuiescentFiles;
            (self.base.records.totals, level)
        } else {
            let totals = self.lists.last().map(|l| l.records.totals);
            (totals.unwrap_or_default(), ConsistencyLevel::Unspecified)
        };
        Advanced { position, totals, consistency_level, coordinates: None, root: self.root.clone() }
    }
}

impl FilesSnapshot {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one assignment: it is whole even after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Walks the tree again and compares it with the last round's.
    fn relist(&self, base: &Base, progress: Progress<'_>) -> Result<Relisted, Failure> {
        self.check_same_directory()?;
        lock::refuse_running_server(&self.tree)?;
        let spool = &self.spool_directory;
        let relisted = compare::relist(&self.tree, &mut TakeAll, Some(base), spool, progress)?;
        clock::settle(relisted.newest_whole_second);
        Ok(relisted)
    }

    /// Another directory under the same name would go unseen: the tree is read by descriptor.
    fn check_same_directory(&self) -> Result<(), Failure> {
        let now = rustix::fs::stat(self.tree.path());
        if now.is_ok_and(|stat| Identity::of(&stat).is_same_inode(&self.tree.identity())) {
            return Ok(());
        }
        Err(self.source_changed("the data directory itself has been moved or replaced"))
    }

    fn source_changed(&self, what: &str) -> Failure {
        Failure::new(
            Code::Aborted,
            "SOURCE_CHANGED",
            format!(
                "{what}: stop what writes to {}, or use an engine for a running server",
                self.tree.path().display()
            ),
        )
    }
}

impl Snapshot for FilesSnapshot {
    fn position(&self) -> Position {
        self.state().position()
    }

    fn totals(&self, at: Position) -> Result<Totals, Failure> {
        let state = self.state();
        if state.is_done && at == DONE {
            return Ok(state.base.records.totals);
        }
        Ok(state.list(at)?.records.totals)
    }

    fn left_out(&self) -> BTreeMap<String, u64> {
        self.state().base.left_out.clone()
    }

    fn list(&self, at: Position, start: u64) -> Result<EntryIterator, Failure> {
        let list = self.state().list(at)?;
        let length = list.records.len();
        if start > length {
            return Err(Failure::invalid(
                "BAD_RANGE",
                format!("entry {start} is beyond the list of {at}, which has {length}"),
            ));
        }
        let records = list.records.read_from(start)?;
        Ok(Box::new(records.map(|record| record.map(|r| r.entry))))
    }

    fn open_file(&self, at: Position, file: FileId) -> Result<Box<dyn FileReader>, Failure> {
        let list = self.state().list(at)?;
        let record = list.find(file)?;
        let Some(record) = record.filter(|r| matches!(r.entry.kind, Some(Kind::Regular { .. })))
        else {
            return Err(Failure::invalid(
                "UNKNOWN_FILE",
                format!("file {} is no regular file in the list of {at}", file.0),
            ));
        };
        let file = ListedFile::open(&self.tree, &record.entry.path, &record.identity)?;
        Ok(Box::new(file))
    }

    fn advance(&self, from: Position, progress: Progress<'_>) -> Result<Advanced, Failure> {
        let _one_at_a_time = self.advancing.lock().unwrap_or_else(PoisonError::into_inner);
        let (base, round) = {
            let state = self.state();
            let previous = match state.position() {
                DONE => state.round(),
                position => position.round - 1,
            };
            if from.stage == Stage::FileCopy && from.round == previous && previous != 0 {
                return Ok(state.answer());
            }
            if from != state.position() || state.is_done {
                return Err(not_reached(from, state.position()));
            }
            (Arc::clone(&state.base), from.round)
        };
        let relisted = self.relist(&base, progress)?;
        let Some(path) = relisted.first_change else {
            let root = walk::root_attributes(&self.tree)?;
            let mut state = self.state();
            state.root = Some(root);
            state.is_done = true;
            return Ok(state.answer());
        };
        if round >= ROUNDS_MAX {
            let what = format!("{path} has changed again in round {round} of {ROUNDS_MAX}");
            return Err(self.source_changed(&what).with("path", path));
        }
        tracing::info!(round = round + 1, %path, "source changed, another round");
        let mut state = self.state();
        state.lists.push(Arc::new(relisted.list));
        state.base = Arc::new(relisted.base);
        Ok(state.answer())
    }
}

fn not_reached(asked: Position, at: Position) -> Failure {
    Failure::precondition(
        "STAGE_NOT_REACHED",
        format!("{asked} was asked for, the snapshot is at {at}"),
    )
    .with("position", at)
}
