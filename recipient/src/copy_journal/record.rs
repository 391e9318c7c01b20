//! Records of a copy's journal. Their numbers and tags are a format on disk: they never change.

use marcot_common::{
    entry::{FileId, Totals},
    failure::Failure,
    path::RelativePath,
    position::{Position, Stage},
};
use prost::Message;

use crate::{
    certificate::digests::DigestRun, growing::GrowingFile, plan::Part, staging::Owners,
    writer::Unfinished,
};

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
}

/// The snapshot that is copied, and how the donor is reached again.
#[derive(Clone, PartialEq, Message)]
pub struct SnapshotOpened {
    /// `snapshots/{id}`.
    #[prost(string, tag = "1")]
    pub snapshot: String,
    /// Seed of the clone's key; empty where nobody logs in.
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
            why: file.failure.message.clone(),
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
