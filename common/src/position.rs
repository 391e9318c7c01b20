//! Where a snapshot or a clone stands: a stage and a round in it.

use std::fmt;

use marcot_proto::common::v1 as pb;

/// A stage that has a list of files on the donor, or the end of all of them.
///
/// The order of the variants is the order of a clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Files are copied.
    FileCopy,
    /// Pages that changed meanwhile are copied again.
    PageCopy,
    /// The redo log is copied up to the consistent point.
    RedoCopy,
    /// The donor has nothing more to give.
    Done,
}

impl Stage {
    /// The wire's value.
    #[must_use]
    pub fn to_wire(self) -> pb::Stage {
        match self {
            Self::FileCopy => pb::Stage::FileCopy,
            Self::PageCopy => pb::Stage::PageCopy,
            Self::RedoCopy => pb::Stage::RedoCopy,
            Self::Done => pb::Stage::Done,
        }
    }

    /// Reads the wire's value; stages that only a recipient has are `None`.
    #[must_use]
    pub fn from_wire(value: i32) -> Option<Self> {
        match pb::Stage::try_from(value).ok()? {
            pb::Stage::FileCopy => Some(Self::FileCopy),
            pb::Stage::PageCopy => Some(Self::PageCopy),
            pb::Stage::RedoCopy => Some(Self::RedoCopy),
            pb::Stage::Done => Some(Self::Done),
            _ => None,
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FileCopy => "FILE COPY",
            Self::PageCopy => "PAGE COPY",
            Self::RedoCopy => "REDO COPY",
            Self::Done => "DONE",
        })
    }
}

/// A stage and its round, from 1. Positions of one clone only ever grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// The stage.
    pub stage: Stage,
    /// The round, from 1.
    pub round: u32,
}

impl Position {
    /// Where every snapshot begins.
    pub const FIRST: Self = Self { stage: Stage::FileCopy, round: 1 };
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} round {}", self.stage, self.round)
    }
}
