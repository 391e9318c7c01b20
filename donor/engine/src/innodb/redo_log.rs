//! The server's redo log while the server writes it, of either kind of server.

use std::path::Path;

use marcot_common::failure::Failure;
use tonic::Code;

use super::{
    deletions::Deletion,
    flavor::Flavor,
    mariadb::{
        log_file::{self, LogFile},
        redo::{self as mariadb_redo, Checkpoint, Header, MTR_BYTES_MAX, Parsed},
    },
    mysql::{
        log_files::{self, LogFiles},
        redo as mysql_redo,
    },
};

/// Blocks that MariaDB writes ahead of its LSN at the most.
const WRITE_AHEAD_BYTES: u64 = 64 << 10;

/// An open log.
#[derive(Debug)]
pub(super) enum RedoLog {
    MariaDb(Box<LogFile>),
    MySql(Box<LogFiles>),
}

/// What a clone's log begins with: its server's head, and the checkpoint that recovery begins at.
#[derive(Debug, Clone)]
pub(super) enum Head {
    MariaDb { header: Box<Header>, checkpoint: Checkpoint },
    MySql { header: Box<mysql_redo::Header>, checkpoint: u64 },
}

impl Head {
    /// Where recovery begins.
    pub(super) fn checkpoint(&self) -> u64 {
        match self {
            Self::MariaDb { checkpoint, .. } => checkpoint.lsn,
            Self::MySql { checkpoint, .. } => *checkpoint,
        }
    }

    /// Whether the log does not say which tablespace it deletes. MySQL: none is deleted while it is
    /// cloned.
    pub(super) fn hides_ids(&self) -> bool {
        matches!(self, Self::MariaDb { header, .. } if header.hides_ids())
    }

    /// The first LSN that is needed for it.
    pub(super) fn start(&self) -> u64 {
        match self {
            Self::MariaDb { checkpoint, .. } => checkpoint.lsn,
            Self::MySql { checkpoint, .. } => mysql_redo::block_start(*checkpoint),
        }
    }
}

/// What was taken of some bytes that were read.
#[derive(Debug)]
pub(super) struct Taken {
    /// How many are right, from the first on.
    pub(super) bytes: usize,
    /// The LSN up to which the log was read with them.
    pub(super) position: u64,
    /// What it says is deleted.
    pub(super) deletions: Vec<Deletion>,
    /// What is wrong with the next ones, if that is not that they are cut.
    pub(super) misread: Option<String>,
}

impl RedoLog {
    /// Opens the log of a data directory.
    pub(super) fn open(flavor: Flavor, data_directory: &Path) -> Result<Self, Failure> {
        Ok(match flavor {
            Flavor::MariaDb => Self::MariaDb(Box::new(LogFile::open(data_directory)?)),
            Flavor::MySql => Self::MySql(Box::new(LogFiles::open(data_directory)?)),
        })
    }

    /// The newest checkpoint.
    pub(super) fn head(&self) -> Result<Head, Failure> {
        Ok(match self {
            Self::MariaDb(log) => Head::MariaDb {
                header: Box::new(log.header().clone()),
                checkpoint: log.checkpoint()?,
            },
            Self::MySql(log) => {
                Head::MySql { header: Box::new(log.header().clone()), checkpoint: log.checkpoint() }
            }
        })
    }

    /// Bytes of records that it holds.
    pub(super) fn capacity(&self) -> u64 {
        match self {
            Self::MariaDb(log) => log.capacity(),
            Self::MySql(log) => log.capacity(),
        }
    }

    /// LSN of the first byte that is read to go on from `position`.
    pub(super) fn read_start(&self, position: u64) -> u64 {
        match self {
            Self::MariaDb(_) => position,
            Self::MySql(_) => mysql_redo::block_start(position),
        }
    }

    /// Opens what has taken the log's place.
    pub(super) fn refresh(&mut self, data_directory: &Path, position: u64) -> Result<(), Failure> {
        if let Self::MariaDb(log) = self
            && let Some(replaced) = log.reopen_if_replaced(data_directory)?
        {
            tracing::info!(first_lsn = replaced.header().first_lsn(), "the redo log was resized");
            **log = replaced;
            if position < log.header().first_lsn() {
                return Err(overrun("was resized", position, log.capacity()));
            }
        }
        Ok(())
    }

    /// Reads from `read_start(position)` on, up to what the server has flushed: how many bytes.
    pub(super) fn read(
        &mut self,
        position: u64,
        flushed: u64,
        buffer: &mut [u8],
        data_directory: &Path,
    ) -> Result<usize, Failure> {
        match self {
            Self::MariaDb(log) => {
                let wanted = usize::try_from(flushed - position).unwrap_or(usize::MAX);
                let length = wanted.min(buffer.len());
                log.read(position, &mut buffer[..length]).map_err(|e| {
                    Failure::io("read redo log", &data_directory.join(log_file::LOG_NAME), &e)
                })?;
                Ok(length)
            }
            Self::MySql(log) => log.read(position, flushed, buffer),
        }
    }

    /// Whether what was read counts: MariaDB's server, now at `current`, has not come round to it.
    pub(super) fn check_overrun(&self, position: u64, current: u64) -> Result<(), Failure> {
        match self {
            Self::MariaDb(log) if current + WRITE_AHEAD_BYTES > position + log.capacity() => {
                Err(overrun("has come round", position, log.capacity()))
            }
            _ => Ok(()),
        }
    }

    /// Takes of what was read what is right, and gives it the form that it has in a clone's log.
    pub(super) fn take(
        &mut self,
        position: u64,
        flushed: u64,
        buffer: &mut [u8],
    ) -> Result<Taken, Failure> {
        match self {
            Self::MariaDb(log) => Ok(take_mtrs(log, position, buffer)),
            Self::MySql(log) => log.take(position, flushed, buffer),
        }
    }
}

/// Walks along whole mini-transactions and makes each end as in a first lap.
fn take_mtrs(log: &LogFile, position: u64, buffer: &mut [u8]) -> Taken {
    let header = log.header();
    let mut deletions = Vec::new();
    let mut at = 0;
    let then = loop {
        match mariadb_redo::parse_mtr(&buffer[at..], header.is_encrypted()) {
            Parsed::Mtr(mtr) => {
                let end = at + mtr.record_bytes;
                if mtr.sequence_bit != log.sequence_bit(position + end as u64) {
                    break Parsed::Cut;
                }
                // The checksum does not cover this byte.
                buffer[end] = 1;
                let lsn = position + at as u64;
                let records = &buffer[at..end];
                mariadb_redo::deleted_spaces(records, header.hides_ids(), &mut |space| {
                    deletions.push(Deletion { lsn, end: lsn + mtr.bytes as u64, space });
                });
                at += mtr.bytes;
            }
            then => break then,
        }
    };
    let is_whole = matches!(then, Parsed::Cut) && buffer.len() >= MTR_BYTES_MAX;
    let misread = match then {
        _ if at > 0 || is_whole => None,
        Parsed::Bad(bad) => Some(bad.to_string()),
        _ => Some("a mini-transaction is cut or of another lap".to_owned()),
    };
    Taken { bytes: at, position: position + at as u64, deletions, misread }
}

/// Name of a clone's log in its data directory.
pub(super) fn log_name(flavor: Flavor) -> &'static str {
    match flavor {
        Flavor::MariaDb => log_file::LOG_NAME,
        Flavor::MySql => log_files::LOG_NAME,
    }
}

fn overrun(what: &str, position: u64, capacity: u64) -> Failure {
    Failure::new(
        Code::Aborted,
        "REDO_OVERRUN",
        format!(
            "the redo log {what} before LSN {position} was read: it holds {capacity} bytes; raise \
             innodb_log_file_size"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::innodb::mariadb::redo::{HEADER_BYTES, START_OFFSET};

    /// A log's file: its head, and these mini-transactions of its first lap.
    fn made(directory: &Path, mtrs: &[Vec<u8>]) -> RedoLog {
        let mut head = vec![0; HEADER_BYTES];
        head[..4].copy_from_slice(b"Phys");
        head[8..16].copy_from_slice(&START_OFFSET.to_be_bytes());
        let crc = crc32c::crc32c(&head[..508]);
        head[508..].copy_from_slice(&crc.to_be_bytes());
        head.resize(usize::try_from(START_OFFSET).unwrap(), 0);
        let mut file = [head, mtrs.concat()].concat();
        file.resize(1 << 20, 0);
        std::fs::write(directory.join(log_file::LOG_NAME), file).unwrap();
        RedoLog::open(Flavor::MariaDb, directory).unwrap()
    }

    /// A page's change, in a mini-transaction of its own.
    fn mtr(page: u8) -> Vec<u8> {
        let record = [0x35, 7, page, 1, 2, page];
        [&record[..], &[1], &crc32c::crc32c(&record).to_be_bytes()].concat()
    }

    /// Guards the bound by the flushed LSN. What lies beyond it may be right by its checksum and its
    /// lap's bit, and be something else a moment later: here it is right. With `read` filling its
    /// buffer all of it is taken.
    #[test]
    fn nothing_is_taken_beyond_what_was_flushed() {
        let directory = tempfile::tempdir().unwrap();
        let mtrs: Vec<_> = (1..=5).map(mtr).collect();
        let length = mtrs[0].len() as u64;
        for flushed in START_OFFSET + 1..=START_OFFSET + 5 * length {
            let mut log = made(directory.path(), &mtrs);
            let mut buffer = vec![0; 4096];
            let read = log.read(START_OFFSET, flushed, &mut buffer, directory.path()).unwrap();
            let taken = log.take(START_OFFSET, flushed, &mut buffer[..read]).unwrap();
            let whole = (flushed - START_OFFSET) / length;
            assert_eq!(taken.position, START_OFFSET + whole * length, "flushed up to {flushed}");
        }
    }
}
