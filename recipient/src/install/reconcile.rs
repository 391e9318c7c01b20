//! What becomes of an install that was cut by a crash: one rule for each state.

use super::step::Step;

/// Which tree stands in the data directory's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The one from before the clone.
    Old,
    /// The clone.
    New,
    /// Entries of both, or of neither: a move was cut.
    Between,
    /// Another directory: somebody else has moved them.
    Other,
}

/// What is to be done before a server may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The old tree stands, the clone is whole: it is installed, or waits if it was to wait.
    Install,
    /// The old tree stands; the clone goes.
    LetGo,
    /// The old tree is brought back; the clone goes.
    BringBack,
    /// The clone stands. It is started, asked for its health, and opened.
    GoOn,
    /// The clone stands and is open; the old tree is kept.
    Keep,
    /// The old tree goes: the clone was accepted.
    RemoveOld,
    /// The old tree stands again, by a person's wish; the clone is kept aside.
    KeepAside,
    /// Nothing is touched: what stands there is neither tree, and a person must look.
    Refuse,
}

/// The rule. What had not come to stand whole is undone; what stands whole is gone on with, and
/// brought back when its server is not healthy.
#[must_use]
pub fn decide(last: Step, standing: Standing) -> Action {
    use Standing::{Between, New, Old, Other};
    match (last, standing) {
        (_, Other) => Action::Refuse,
        (Step::Staged, Old) => Action::Install,
        (Step::Stopped | Step::Exchanging | Step::LettingGo, Old) => Action::LetGo,
        // The rename was made, its record was not.
        (Step::Exchanging, New) => Action::GoOn,
        (Step::SettingAside | Step::PuttingIn, Between) => Action::BringBack,
        (Step::InPlace | Step::Started | Step::Healthy, New) => Action::GoOn,
        (Step::Opened, New) => Action::Keep,
        (Step::Accepted, New) => Action::RemoveOld,
        (Step::ExchangingBack, _) => Action::BringBack,
        (Step::TakingOut | Step::PuttingBack, Between) => Action::BringBack,
        (Step::RolledBack, Old) => Action::KeepAside,
        // Trees stand where no step of ours has put them.
        _ => Action::Refuse,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANDINGS: [Standing; 4] =
        [Standing::Old, Standing::New, Standing::Between, Standing::Other];

    /// Guards that no rule loses a tree that somebody may want: the old one goes at `Accepted` and
    /// nowhere else, and the clone goes only where the old one stands or comes back.
    #[test]
    fn every_state_has_a_rule_that_loses_nothing() {
        for last in Step::ALL {
            for standing in STANDINGS {
                let action = decide(last, standing);
                let state = format!("{} {standing:?}: {action:?}", last.name());
                if action == Action::RemoveOld {
                    assert_eq!((last, standing), (Step::Accepted, Standing::New), "{state}");
                }
                if action == Action::Install {
                    assert_eq!((last, standing), (Step::Staged, Standing::Old), "{state}");
                }
                if action == Action::LetGo {
                    assert_eq!(standing, Standing::Old, "{state}");
                    assert!(last < Step::InPlace || last == Step::LettingGo, "{state}");
                }
                if action == Action::BringBack {
                    assert!(last != Step::Opened && last != Step::Accepted, "{state}");
                }
                if standing == Standing::Other {
                    assert_eq!(action, Action::Refuse, "{state}");
                }
                if standing == Standing::Between {
                    assert!(matches!(action, Action::BringBack | Action::Refuse), "{state}");
                }
            }
        }
    }
}
