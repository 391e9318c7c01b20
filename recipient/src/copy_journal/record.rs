//! Records of a copy's journal. Their numbers and tags are a format on disk: they never change.

use std::path::Path;

use marcot_common::{
    entry::{FileId, Totals},
    failure::Failure,
    path::RelativePath,
    position::{Position, Stage},
};
use prost::Message;

use super::FILE_NAME;
use crate::{
    certificate::digests::DigestRun, growing::GrowingFile, journal::Journal, plan::Part,
    staging::Owners, writer::Unfinished,
};

/// Longest text of why a file could not be read, bytes: a unit may have thousands of them. See
/// `plan::UNIT_PATH_BYTES_MAX`.
const WHY_BYTES_MAX: usize = 128;

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RecordKind {
    /// `Begun`; the first one.
    Begun = 1,
    /// `SnapshotOpened`; the second one.
    SnapshotOpened = 2,
    /// `Shaping`: a later round's list changes the tree; cut there, its shape is not known.
    Shaping = 3,
    /// `RoundBegun`: the tree has the shape of the round's list.
    RoundBegun = 4,
    /// `UnitDone`.
    UnitDone = 5,
    /// `Grown`.
    Grown = 6,
    /// Nothing: a recipient that was started again goes on.
    WentOn = 7,
    /// `DigestRun`: blocks of a file are other ones than they were.
    Changed = 8,
    /// Nothing: a run has ended by itself, and is no start that was cut short.
    Ended = 9,
    /// Nothing: a server that runs without the recipient is about to be stopped for data that are to be
    /// discarded.
    Away = 10,
    /// Nothing: it runs again, or its data have gone, which a mark in their place says from then on.
    Back = 11,
}

/// What was asked for.
#[derive(Clone, PartialEq, Message)]
pub struct Begun {
    /// `CloneInstanceRequest` without its secrets.
    #[prost(bytes = "vec", tag = "1")]
    pub request: Vec<u8>,
    /// Name of the form in which data are replaced; empty: none are.
    #[prost(string, tag = "2")]
    pub form: String,
    /// Whether there were data to be replaced.
    #[prost(bool, tag = "3")]
    pub had_data: bool,
    /// Where the clone is to stand.
    #[prost(bytes = "vec", tag = "4")]
    pub target: Vec<u8>,
    /// Streams that large files are cut for: units are told by where they begin. 0: an older version did
    /// not say.
    #[prost(uint32, tag = "5")]
    pub planned_streams: u32,
}

impl Begun {
    /// The first record of the journal in a staging directory; `None` where there is no journal.
    pub fn look(directory: &Path) -> Result<Option<Self>, Failure> {
        let path = directory.join(FILE_NAME);
        if !path.exists() {
            return Ok(None);
        }
        let mut first = None;
        // Of a large journal the rest is not read.
        let enough = || Failure::bug("the first record is enough");
        let read = Journal::read_with(&path, &mut |record| {
            first = Some(record);
            Err(enough())
        });
        match first.filter(|record| record.kind == RecordKind::Begun as u8) {
            Some(record) => decode(&record.payload).map(Some),
            None => read.and(Ok(None)),
        }
    }
}

/// The snapshot that is copied, and how the donor is reached again.
#[derive(Clone, PartialEq, Message)]
pub struct SnapshotOpened {
    /// `snapshots/{id}`.
    #[prost(string, tag = "1")]
    pub snapshot: String,
    /// Seed of the clone's key where the donor has accounts; empty where a snapshot is opened without a
    /// password.
    #[prost(bytes = "vec", tag = "2")]
    pub key_seed: Vec<u8>,
    /// Address that all connections go to.
    #[prost(string, tag = "3")]
    pub address: String,
    /// Whether they are encrypted.
    #[prost(bool, tag = "4")]
    pub encrypted: bool,
    /// SHA-256 of the certificate that they go to.
    #[prost(bytes = "vec", tag = "5")]
    pub fingerprint: Vec<u8>,
    /// Lease, milliseconds.
    #[prost(uint64, tag = "6")]
    pub lease_ms: u64,
    /// `GetServerInfoResponse`.
    #[prost(bytes = "vec", tag = "7")]
    pub server_info: Vec<u8>,
    /// Most entries that the donor may list.
    #[prost(uint64, tag = "8")]
    pub entries_max: u64,
    /// Whether files keep the donor's owners.
    #[prost(bool, tag = "9")]
    pub owners_preserved: bool,
    /// Else: who owns them.
    #[prost(uint32, tag = "10")]
    pub uid: u32,
    /// See `uid`.
    #[prost(uint32, tag = "11")]
    pub gid: u32,
    /// Seed of the clone's key where the donor has no accounts, and the snapshot is bound to it; empty
    /// where nobody logs in.
    #[prost(bytes = "vec", tag = "12")]
    pub bound_key_seed: Vec<u8>,
    /// Bytes that snapshots before it had sent, and that were right.
    #[prost(uint64, tag = "13")]
    pub verified_before: u64,
    /// Base name of the clone's binary log; empty: the donor's, or none is cloned.
    #[prost(string, tag = "14")]
    pub binlog_base: String,
}

impl SnapshotOpened {
    /// Who owns what is staged.
    #[must_use]
    pub fn owners(&self) -> Owners {
        if self.owners_preserved {
            Owners::Preserved
        } else {
            Owners::Fixed { uid: self.uid, gid: self.gid }
        }
    }

    /// Sets who owns what is staged.
    pub fn set_owners(&mut self, owners: Owners) {
        match owners {
            Owners::Preserved => self.owners_preserved = true,
            Owners::Fixed { uid, gid } => (self.uid, self.gid) = (uid, gid),
        }
    }
}

/// A list that stands beside the journal.
#[derive(Clone, PartialEq, Message)]
pub struct ListKept {
    /// Name of its file.
    #[prost(string, tag = "1")]
    pub file: String,
    /// See `Totals`.
    #[prost(uint64, tag = "2")]
    pub entries: u64,
    /// See `Totals`.
    #[prost(uint64, tag = "3")]
    pub files: u64,
    /// See `Totals`.
    #[prost(uint64, tag = "4")]
    pub size_bytes: u64,
    /// See `Totals`.
    #[prost(uint64, tag = "5")]
    pub allocated_bytes: u64,
    /// See `Totals`.
    #[prost(uint64, tag = "6")]
    pub data_bytes: u64,
}

impl ListKept {
    /// Of a list.
    #[must_use]
    pub fn new(file: String, totals: Totals) -> Self {
        let Totals { entries, files, size_bytes, allocated_bytes, data_bytes, .. } = totals;
        Self { file, entries, files, size_bytes, allocated_bytes, data_bytes }
    }

    /// Its counts.
    #[must_use]
    pub fn totals(&self) -> Totals {
        Totals {
            entries: self.entries,
            files: self.files,
            size_bytes: self.size_bytes,
            allocated_bytes: self.allocated_bytes,
            data_bytes: self.data_bytes,
            ..Totals::default()
        }
    }
}

/// A (stage, round).
#[derive(Clone, PartialEq, Message)]
pub struct At {
    /// As on the wire.
    #[prost(int32, tag = "1")]
    pub stage: i32,
    /// From 1.
    #[prost(uint32, tag = "2")]
    pub round: u32,
}

impl From<Position> for At {
    fn from(position: Position) -> Self {
        Self { stage: position.stage.to_wire().into(), round: position.round }
    }
}

impl At {
    /// As a position.
    #[must_use]
    pub fn position(&self) -> Option<Position> {
        Some(Position { stage: Stage::from_wire(self.stage)?, round: self.round })
    }
}

/// The tree has the shape of a round's list; its files are about to be copied.
#[derive(Clone, PartialEq, Message)]
pub struct RoundBegun {
    /// The round.
    #[prost(message, optional, tag = "1")]
    pub at: Option<At>,
    /// Its list.
    #[prost(message, optional, tag = "2")]
    pub list: Option<ListKept>,
    /// The whole tree's list.
    #[prost(message, optional, tag = "3")]
    pub whole: Option<ListKept>,
    /// Files that grow, or have grown, at its begin.
    #[prost(message, repeated, tag = "4")]
    pub growing: Vec<Grown>,
    /// Files that could not be read in earlier rounds, and are not listed again yet.
    #[prost(message, repeated, tag = "5")]
    pub unfinished: Vec<Unread>,
}

/// A file that could not be read.
#[derive(Clone, PartialEq, Message)]
pub struct Unread {
    /// Its id on the donor.
    #[prost(uint64, tag = "1")]
    pub file_id: u64,
    /// Where it was to go.
    #[prost(bytes = "vec", tag = "2")]
    pub path: Vec<u8>,
    /// Why.
    #[prost(string, tag = "3")]
    pub why: String,
}

impl From<&Unfinished> for Unread {
    fn from(file: &Unfinished) -> Self {
        Self {
            file_id: file.part.file_id.0,
            path: file.part.path.as_bytes().to_vec(),
            why: clipped(&file.failure.message, WHY_BYTES_MAX).to_owned(),
        }
    }
}

impl Unread {
    /// As an unfinished file.
    #[must_use]
    pub fn file(&self) -> Option<Unfinished> {
        let part = Part {
            file_id: FileId(self.file_id),
            path: RelativePath::new(&self.path).ok()?,
            size: 0,
            offset: 0,
            length: 0,
            whole: None,
            patches: false,
        };
        let failure = Failure::new(tonic::Code::Aborted, "FILE_CHANGED", self.why.clone());
        Some(Unfinished { part, failure })
    }
}

/// A growing file, and how much of it is durable.
#[derive(Clone, PartialEq, Message)]
pub struct Grown {
    /// Its id on the donor.
    #[prost(uint64, tag = "1")]
    pub file_id: u64,
    /// Where it goes.
    #[prost(bytes = "vec", tag = "2")]
    pub path: Vec<u8>,
    /// Bytes.
    #[prost(uint64, tag = "3")]
    pub durable: u64,
    /// Whether its whole size is known.
    #[prost(bool, tag = "4")]
    pub is_whole: bool,
    /// Digests of the blocks that are whole since the last record of it.
    #[prost(message, repeated, tag = "5")]
    pub digests: Vec<DigestRun>,
}

impl From<&GrowingFile> for Grown {
    fn from(file: &GrowingFile) -> Self {
        Self {
            file_id: file.file_id.0,
            path: file.path.as_bytes().to_vec(),
            durable: file.durable,
            is_whole: file.is_whole,
            digests: Vec::new(),
        }
    }
}

impl Grown {
    /// As a growing file.
    #[must_use]
    pub fn file(&self) -> Option<GrowingFile> {
        Some(GrowingFile {
            file_id: FileId(self.file_id),
            path: RelativePath::new(&self.path).ok()?,
            durable: self.durable,
            is_whole: self.is_whole,
        })
    }
}

/// A unit of the round that began last is durable.
#[derive(Clone, PartialEq, Message)]
pub struct UnitDone {
    /// Number of its first entry in the round's list.
    #[prost(uint64, tag = "1")]
    pub first: u64,
    /// Number of its last entry.
    #[prost(uint64, tag = "2")]
    pub last: u64,
    /// First byte, when it is a part of one file.
    #[prost(uint64, tag = "3")]
    pub offset: u64,
    /// Bytes of all its parts.
    #[prost(uint64, tag = "4")]
    pub length: u64,
    /// Bytes of data written.
    #[prost(uint64, tag = "5")]
    pub data_bytes: u64,
    /// Bytes of holes passed over.
    #[prost(uint64, tag = "6")]
    pub hole_bytes: u64,
    /// Bytes that an older copy has given.
    #[prost(uint64, tag = "7")]
    pub reused_bytes: u64,
    /// Files finished.
    #[prost(uint64, tag = "8")]
    pub files: u64,
    /// Digests of its blocks.
    #[prost(message, repeated, tag = "9")]
    pub digests: Vec<DigestRun>,
    /// Files of it that could not be read: a later round has to list them again.
    #[prost(message, repeated, tag = "10")]
    pub unfinished: Vec<Unread>,
}

/// A text's first bytes, of whole characters.
fn clipped(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|&at| text.is_char_boundary(at));
    &text[..end.unwrap_or(0)]
}

/// Reads a record's payload.
pub fn decode<M: Message + Default>(payload: &[u8]) -> Result<M, Failure> {
    M::decode(payload).map_err(|e| {
        Failure::new(
            tonic::Code::DataLoss,
            "JOURNAL_CORRUPT",
            format!("a record of a copy's journal cannot be read: {e}"),
        )
    })
}
