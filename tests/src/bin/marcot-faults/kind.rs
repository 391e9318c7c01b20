//! What is done to a clone, and what must become of it.

use marcot_proto::{common::v1::Stage, recipient::v1::State};

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Cut,
    CutAtByte,
    Stall,
    LongStall,
    Slow,
    Flip,
    KillRecipient,
    StopRecipient,
    FreezeRecipient,
    PowerCut,
    FlipJournal,
    FlipStaged,
    FlipOldCopy,
    FullDisk,
    KillDonor,
    StopDonor,
    FreezeDonor,
    DonorAway,
    KillDatabase,
    StopDatabase,
    Pause,
    Cancel,
}

/// What must become of a clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expected {
    /// It completes, and is right.
    Completes,
    /// It fails for this reason, and leaves nothing.
    Fails(&'static str),
    /// It fails for this reason, or what was spoiled is fetched again: noticed in both cases.
    Notices(&'static str),
    /// It is cancelled, or has completed before the cancel came.
    Cancelled,
}

impl Kind {
    pub(crate) const ALL: [Self; 22] = [
        Self::Cut,
        Self::CutAtByte,
        Self::Stall,
        Self::LongStall,
        Self::Slow,
        Self::Flip,
        Self::KillRecipient,
        Self::StopRecipient,
        Self::FreezeRecipient,
        Self::PowerCut,
        Self::FlipJournal,
        Self::FlipStaged,
        Self::FlipOldCopy,
        Self::FullDisk,
        Self::KillDonor,
        Self::StopDonor,
        Self::FreezeDonor,
        Self::DonorAway,
        Self::KillDatabase,
        Self::StopDatabase,
        Self::Pause,
        Self::Cancel,
    ];

    /// What must become of the clone, and why.
    pub(crate) fn expectation(self) -> (Expected, &'static str) {
        use Expected::{Cancelled, Completes, Fails, Notices};
        match self {
            Self::Cut | Self::CutAtByte => (Completes, "calls are made again"),
            Self::Stall => (Completes, "it ends before the donor is given up"),
            Self::LongStall => (Completes, "keepalive gives the connections up, new ones are made"),
            Self::Slow => (Completes, "a slow clone is a healthy one"),
            Self::Flip => (Completes, "it is noticed, and asked for again"),
            Self::KillRecipient | Self::StopRecipient => {
                (Completes, "started again, it goes on with the same snapshot")
            }
            Self::FreezeRecipient => (Completes, "shorter than the lease"),
            Self::PowerCut => (Completes, "what is recorded is on the disk"),
            Self::FlipJournal => (Completes, "another snapshot, what is staged compared"),
            Self::FlipStaged => {
                (Notices("VERIFICATION_FAILED"), "--verify full; a unit under way is compared")
            }
            Self::FlipOldCopy => (Completes, "what an older copy gives is compared"),
            Self::FullDisk => (Fails("DISK_FULL"), "there is no room for the rest"),
            Self::KillDonor => (Completes, "another snapshot, what is staged compared"),
            Self::StopDonor => (Completes, "it drains, then as if it was killed"),
            Self::FreezeDonor => (Completes, "a lock that the server drops is taken again"),
            Self::DonorAway => (Completes, "it fails, and is resumed by hand"),
            Self::KillDatabase | Self::StopDatabase => {
                (Completes, "pages that changed since its redo was lost are sent again")
            }
            Self::Pause => (Completes, "nothing moves meanwhile, and nothing comes twice"),
            Self::Cancel => (Cancelled, "or it came too late"),
        }
    }

    /// Whether there is nothing to strike once all bytes have come.
    pub(crate) fn is_of_the_network(self) -> bool {
        matches!(
            self,
            Self::Cut
                | Self::CutAtByte
                | Self::Stall
                | Self::LongStall
                | Self::Slow
                | Self::Flip
                | Self::Pause
        )
    }

    /// Stages in which it can strike.
    pub(crate) fn strikes_in(self, stage: Stage) -> bool {
        match self {
            // Later there is nothing more to write, or to compare.
            Self::FullDisk | Self::FlipOldCopy => stage == Stage::FileCopy,
            kind => stage != Stage::FileSync || !kind.is_of_the_network(),
        }
    }

    /// Whether it takes most of a minute: not in a short run.
    pub(crate) fn is_long(self) -> bool {
        self == Self::LongStall
    }
}

impl Expected {
    /// Why a clone is not what it had to become.
    pub(crate) fn judge(self, state: State, reason: Option<&str>) -> Option<String> {
        let is_right = match self {
            Self::Completes => state == State::Completed,
            Self::Fails(expected) => state == State::Failed && reason == Some(expected),
            Self::Notices(expected) => match state {
                State::Completed => true,
                state => state == State::Failed && reason == Some(expected),
            },
            Self::Cancelled => matches!(state, State::Cancelled | State::Completed),
        };
        (!is_right).then(|| format!("{} {}", state.as_str_name(), reason.unwrap_or_default()))
    }
}

impl std::fmt::Display for Expected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Completes => f.write_str("completes"),
            Self::Fails(reason) => write!(f, "fails, {reason}"),
            Self::Notices(reason) => write!(f, "completes, or fails, {reason}"),
            Self::Cancelled => f.write_str("cancelled or complete"),
        }
    }
}
