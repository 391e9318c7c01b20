//! Snapshot engines: how a data directory becomes lists of files and ranges of bytes.
//!
//! An engine is one file and one arm where it is chosen. The donor serves a snapshot over the
//! network; the recipient links the same engines for CLONE LOCAL.
//!
//! Everything here blocks: callers run it on threads of their own.

#![forbid(unsafe_code)]

mod files;
#[doc(hidden)]
pub mod innodb;
mod observer;
mod options;
pub mod server_facts;

pub use innodb::DatabaseConfig;
pub use observer::{Blocked, Observer};
pub use options::EngineOptions;

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use marcot_common::{
    entry::{Attributes, Entry, FileId, Totals},
    failure::Failure,
    position::Position,
};
use marcot_proto::common::v1::{ConsistencyLevel, Coordinates};
use tonic::Code;

use crate::server_facts::ServerFacts;

/// Makes snapshots of one data directory.
pub trait Engine: fmt::Debug + Send + Sync {
    /// The engine's name, as `--engine` takes it.
    fn name(&self) -> &'static str;

    /// The data directory, resolved.
    fn data_directory(&self) -> &std::path::Path;

    /// What there is to say of the server whose directory it is; nothing where there is none.
    fn describe(&self) -> Result<ServerFacts, Failure> {
        Ok(ServerFacts::default())
    }

    /// A probe of how long the server's commits take; `None`: there is no server.
    fn commit_probe(&self) -> Option<Result<Box<dyn CommitProbe>, Failure>> {
        None
    }

    /// Takes a snapshot: from here until the snapshot is dropped, what it lists can be read.
    fn open(&self, options: &SnapshotOptions) -> Result<Box<dyn Snapshot>, Failure>;
}

/// Tells how long commits take on a server.
pub trait CommitProbe: Send {
    /// Waits for as long as a commit of this moment would.
    fn measure(&mut self) -> Result<Duration, Failure>;
}

/// What the caller asks of a snapshot.
#[derive(Debug, Clone, Default)]
pub struct SnapshotOptions {
    /// Block DDL on the server for the whole clone.
    pub block_ddl: bool,
    /// Longest wait for the backup lock.
    pub ddl_timeout: Option<Duration>,
    /// Base name, without a directory, of the binary log that the clone's server has, where that is
    /// known.
    pub binlog_base: Option<String>,
    /// Whether anyone still waits for the snapshot to be opened.
    pub waiting: Waiting,
}

/// Tells an engine that opens a snapshot that nobody waits for it any more.
#[derive(Debug, Clone, Default)]
pub struct Waiting(Arc<AtomicBool>);

/// While it lives someone waits.
#[derive(Debug)]
pub struct WaitingGuard(Waiting);

impl SnapshotOptions {
    /// Says that someone waits for one more snapshot, for as long as what is returned lives.
    #[must_use]
    pub fn begin_to_wait(&mut self) -> WaitingGuard {
        self.waiting = Waiting::default();
        WaitingGuard(self.waiting.clone())
    }
}

impl Waiting {
    /// Fails once nobody waits.
    pub fn check(&self) -> Result<(), Failure> {
        if self.0.load(Ordering::Relaxed) {
            let text = "nobody waits for the snapshot any more";
            return Err(Failure::new(Code::Cancelled, "CANCELLED", text));
        }
        Ok(())
    }
}

impl Drop for WaitingGuard {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// A frozen view of a data directory, at a stage and round. Dropping it frees all that it holds.
pub trait Snapshot: fmt::Debug + Send + Sync {
    /// The stage and round that `list` reaches up to.
    fn position(&self) -> Position;

    /// Counts of one list.
    fn totals(&self, at: Position) -> Result<Totals, Failure>;

    /// Entries left out, by reason.
    fn left_out(&self) -> BTreeMap<String, u64>;

    /// Whether DDL waits on the server until its point is fixed, or it ends.
    fn blocks_ddl(&self) -> bool {
        false
    }

    /// Storage engines that tables are in, ascending; none where that is not known.
    fn storage_engines(&self) -> Vec<String> {
        Vec::new()
    }

    /// Entries of a list from a number on, in ascending path order.
    fn list(&self, at: Position, start: u64) -> Result<EntryIterator, Failure>;

    /// Opens a listed regular file for reading. `FILE_VANISHED` and `FILE_CHANGED` concern this
    /// file alone: the next round lists it again.
    fn open_file(&self, at: Position, file: FileId) -> Result<Box<dyn FileReader>, Failure>;

    /// Moves on from `from`, every byte of which is durable on the recipient. Idempotent.
    /// Calls `progress` with the count of entries looked at, several times a second; an error from
    /// it stops the work.
    fn advance(
        &self,
        from: Position,
        progress: &mut dyn FnMut(u64) -> Result<(), Failure>,
    ) -> Result<Advanced, Failure>;
}

/// Entries of a list, in order.
pub type EntryIterator = Box<dyn Iterator<Item = Result<Entry, Failure>> + Send>;

/// Where a snapshot has moved on to.
#[derive(Debug, Clone)]
pub struct Advanced {
    /// The next stage and round.
    pub position: Position,
    /// What its list holds; at the end what the whole tree holds.
    pub totals: Totals,
    /// At the end: what the copy is consistent with.
    pub consistency_level: ConsistencyLevel,
    /// At the end: where it stands in its database's history.
    pub coordinates: Option<Coordinates>,
    /// At the end: attributes of the data directory itself, which is in no list.
    pub root: Option<Attributes>,
}

/// A part of a file whose content is all of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte after it.
    pub end: u64,
    /// What it holds.
    pub content: Content,
}

/// What a part of a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Bytes to be read.
    Data,
    /// It reads as zero and is not allocated.
    Hole,
    /// What an earlier round has given of the same file. Only entries that patch have such parts.
    Unchanged,
}

/// Reads one listed file through a descriptor bound to what was listed.
pub trait FileReader: fmt::Debug + Send {
    /// Size that may be read: the listed one, or the present one of a growing file.
    fn size(&self) -> u64;

    /// Bytes that are read together or not at all: ranges and calls begin and end at multiples.
    fn unit(&self) -> u64 {
        1
    }

    /// Whether more may be appended: what was read of it stays as it is.
    fn is_growing(&self) -> bool {
        false
    }

    /// The span that begins at `offset`, cut at `end`; `offset < end <= size()`.
    fn span(&mut self, offset: u64, end: u64) -> Result<Span, Failure>;

    /// Fills `buffer` from `offset` on.
    fn read_exact_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), Failure>;

    /// Says whether the file is still the one that was listed; call it after the last read.
    fn check_unchanged(&mut self) -> Result<(), Failure>;

    /// The file itself, where its bytes may be copied by the file system (reflink,
    /// copy_file_range) without a look at them.
    fn file(&self) -> Option<&File>;
}

/// How an engine is chosen and configured.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Engine name: one of `ENGINE_NAMES`.
    pub engine: String,
    /// The data directory.
    pub data_directory: PathBuf,
    /// Where lists and other temporary files go; they have no names and vanish with the process.
    pub spool_directory: PathBuf,
    /// Most bytes of redo that are kept for all clones together, and most that one has read under a
    /// lock.
    pub spool_quota: u64,
    /// Longest wait for the server's next checkpoint, where one is needed.
    pub checkpoint_timeout: Duration,
    /// The database server, for engines that talk to one.
    pub database: DatabaseConfig,
    /// Who is told what the server has felt.
    pub observer: Observer,
}

/// Names of all engines, as `--engine` takes them.
pub const ENGINE_NAMES: &[&str] = &["files", "innodb"];

/// Opens the engine that `config` names.
pub fn open_engine(config: &EngineConfig) -> Result<Arc<dyn Engine>, Failure> {
    match config.engine.as_str() {
        "files" => Ok(Arc::new(files::FilesEngine::open(config)?)),
        "innodb" => Ok(Arc::new(innodb::InnodbEngine::open(config)?)),
        other => Err(Failure::invalid(
            "UNKNOWN_ENGINE",
            format!(
                "engine `{}` is not known; engines: {}",
                other.escape_debug(),
                ENGINE_NAMES.join(", ")
            ),
        )),
    }
}
