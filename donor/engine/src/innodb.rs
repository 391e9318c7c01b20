//! Engine `innodb`: a live MariaDB or MySQL server; it is asked which.
//!
//! ```text
//! redo follower   C ------------------------------------------------> T
//! FILE COPY       all files, pages checked; again what changed
//! PAGE COPY         pages changed since C, when redo outgrew the log
//! the cut                                        backup locks, log_status: T, coordinates
//! REDO COPY                                        redo C..T, what was read under the locks
//! ```
//!
//! The clone is a fuzzy copy of the tablespaces and the redo that makes it whole: the stock server
//! starts on it by its ordinary crash recovery, as of T.

pub mod accounts;
pub mod facts;
pub mod health;
pub mod mariadb;
pub mod mysql;
pub mod page;
pub mod paths;
pub mod replica;

mod backup_lock;
mod classify;
mod commit_probe;
mod deletions;
mod early;
mod flavor;
mod follower;
mod known;
mod late;
mod point;
mod read_gate;
mod redo_file;
mod redo_log;
mod redo_spool;
mod sabotage;
mod server;
mod snapshot;
mod stash;
mod survey;
mod tablespace;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use marcot_common::failure::Failure;

pub use self::{backup_lock::DDL_TIMEOUT_DEFAULT, server::DatabaseConfig};
use self::{
    commit_probe::LogFlush,
    follower::Follower,
    server::{Facts, Server},
    snapshot::InnodbSnapshot,
};
use crate::{
    CommitProbe, Engine, EngineConfig, Snapshot, SnapshotOptions, files, server_facts::ServerFacts,
};

/// Makes snapshots of a live server.
#[derive(Debug)]
pub(crate) struct InnodbEngine {
    shared: Arc<EngineShared>,
}

/// What all snapshots of one server share.
#[derive(Debug)]
pub(super) struct EngineShared {
    server: Server,
    data_directory: PathBuf,
    spool_directory: PathBuf,
    quota: u64,
    checkpoint_timeout: Duration,
    follower: Follower,
    /// MariaDB has one BACKUP STAGE per server: cuts come one after another.
    cuts: Mutex<()>,
}

impl InnodbEngine {
    /// Checks the directories and how the server is to be reached; it need not run yet.
    pub(crate) fn open(config: &EngineConfig) -> Result<Self, Failure> {
        let data_directory = files::resolve("open data directory", &config.data_directory)?;
        let spool_directory = files::resolve("open spool directory", &config.spool_directory)?;
        let server = Server::new(&config.database)?.observed_by(config.observer.clone());
        let follower =
            Follower::new(server.clone(), &data_directory, &spool_directory, config.spool_quota);
        let shared = EngineShared {
            server,
            data_directory,
            spool_directory,
            quota: config.spool_quota,
            checkpoint_timeout: config.checkpoint_timeout,
            follower,
            cuts: Mutex::new(()),
        };
        Ok(Self { shared: Arc::new(shared) })
    }
}

impl Engine for InnodbEngine {
    fn name(&self) -> &'static str {
        "innodb"
    }

    fn data_directory(&self) -> &Path {
        &self.shared.data_directory
    }

    /// Also of a server that cannot be cloned: what stands in the way is told as it is opened, and a
    /// recipient compares the rest meanwhile.
    fn describe(&self) -> Result<ServerFacts, Failure> {
        let mut session = self.shared.server.connect()?;
        let facts = Facts::read(&mut session)?;
        facts::complete(&mut session, facts)
    }

    fn commit_probe(&self) -> Option<Result<Box<dyn CommitProbe>, Failure>> {
        Some(LogFlush::connect(&self.shared.server).map(|probe| Box::new(probe) as _))
    }

    fn open(&self, options: &SnapshotOptions) -> Result<Box<dyn Snapshot>, Failure> {
        Ok(Box::new(InnodbSnapshot::open(Arc::clone(&self.shared), options)?))
    }
}
