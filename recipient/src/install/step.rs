//! The steps of an install: one name each, in the journal, the log, the status and the tests.

use marcot_proto::recipient::v1::InstallStep;

/// What has been done, or is about to be. The numbers stand in journals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Step {
    /// The new tree is whole and durable; the server may still run on the old one.
    Staged = 1,
    /// The server is stopped, and the locks of both trees are held.
    Stopped = 2,
    /// Form `exchange`: the two trees are about to change places.
    Exchanging = 3,
    /// Form `move`: the old tree's entries are on their way out.
    SettingAside = 4,
    /// Form `move`: the new tree's entries are on their way in.
    PuttingIn = 5,
    /// The new tree is the data directory, the old one is kept.
    InPlace = 6,
    /// The server runs on the new tree, closed to others.
    Started = 7,
    /// It has recovered, and answered.
    Healthy = 8,
    /// It is open to everybody. From here on only a caller's word brings the old tree back.
    Opened = 9,
    /// The new tree is accepted: the old one goes.
    Accepted = 10,
    /// Form `exchange`: the two trees are about to change back.
    ExchangingBack = 11,
    /// Form `move`: the new tree's entries are on their way out.
    TakingOut = 12,
    /// Form `move`: the old tree's entries are on their way back.
    PuttingBack = 13,
    /// The old tree is the data directory again; the new one is kept aside.
    RolledBack = 14,
    /// The old tree is the data directory, and the new one goes.
    LettingGo = 15,
}

impl Step {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::Staged,
        Self::Stopped,
        Self::Exchanging,
        Self::SettingAside,
        Self::PuttingIn,
        Self::InPlace,
        Self::Started,
        Self::Healthy,
        Self::Opened,
        Self::Accepted,
        Self::ExchangingBack,
        Self::TakingOut,
        Self::PuttingBack,
        Self::RolledBack,
        Self::LettingGo,
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Staged => "staged",
            Self::Stopped => "stopped",
            Self::Exchanging => "exchanging",
            Self::SettingAside => "setting_aside",
            Self::PuttingIn => "putting_in",
            Self::InPlace => "in_place",
            Self::Started => "started",
            Self::Healthy => "healthy",
            Self::Opened => "opened",
            Self::Accepted => "accepted",
            Self::ExchangingBack => "exchanging_back",
            Self::TakingOut => "taking_out",
            Self::PuttingBack => "putting_back",
            Self::RolledBack => "rolled_back",
            Self::LettingGo => "letting_go",
        }
    }

    /// Whether an install that has ended here has left nothing but the old tree and a clone that nobody
    /// asks for: unless it waits for a person, or a person has rolled it back.
    #[must_use]
    pub fn is_given_up(self) -> bool {
        matches!(self, Self::Staged | Self::Stopped | Self::RolledBack | Self::LettingGo)
    }

    /// Of a journal's record.
    #[must_use]
    pub fn of(kind: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|step| *step as u8 == kind)
    }

    /// As the API has it.
    #[must_use]
    pub fn to_wire(self) -> InstallStep {
        let name = format!("INSTALL_STEP_{}", self.name().to_uppercase());
        InstallStep::from_str_name(&name).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_is_found_by_its_number_and_has_a_name_on_the_wire() {
        for step in Step::ALL {
            assert_eq!(Step::of(step as u8), Some(step));
            assert_ne!(step.to_wire(), InstallStep::Unspecified, "{}", step.name());
            assert_eq!(step.to_wire() as i32, i32::from(step as u8));
        }
        assert_eq!(Step::of(0), None);
        assert_eq!(Step::of(16), None);
    }
}
