//! What came of all faults.

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use marcot_proto::{
    common::v1::Stage,
    recipient::v1::{Clone, State},
};

use crate::kind::Kind;

/// When the fault strikes. RESTART and RECOVERY are struck by `make crash-matrix`.
pub(crate) const STAGES: [Stage; 4] =
    [Stage::FileCopy, Stage::PageCopy, Stage::RedoCopy, Stage::FileSync];

/// Least data of which re-sent bytes are held to their bound: with less of it a unit is more.
const BOUNDED_BYTES: u64 = 1 << 30;

/// Most bytes that one fault may cost.
const RESENT_MAX: u64 = 64 << 20;

/// Of so many faults, every stage must have had some, and four of five clones must be there.
const MANY: u64 = 40;

/// What came of one fault.
pub(crate) struct Outcome {
    /// Stage that ran when it struck.
    pub(crate) stage: &'static str,
    pub(crate) took: Duration,
    /// `None` where the run itself broke off.
    pub(crate) clone: Option<Clone>,
    pub(crate) resent: u64,
    /// Why it is wrong.
    pub(crate) wrong: Option<String>,
}

#[derive(Default)]
pub(crate) struct Outcomes {
    pub(crate) all: u64,
    right: u64,
    consistent: u64,
    pub(crate) stages: BTreeMap<&'static str, u64>,
    kinds: BTreeMap<Kind, (u64, u64)>,
    errors: BTreeMap<String, u64>,
    resent: Vec<u64>,
}

impl Outcomes {
    pub(crate) fn take(&mut self, number: u64, kind: Kind, outcome: &Outcome, bytes: u64) {
        self.all += 1;
        *self.stages.entry(outcome.stage).or_default() += 1;
        let state = outcome.clone.as_ref().map_or(State::Unspecified, Clone::state);
        if let Some(error) = outcome.clone.as_ref().and_then(|clone| clone.error.as_ref()) {
            *self.errors.entry(error.reason.clone()).or_default() += 1;
        }
        let mut wrong = outcome.wrong.clone();
        if state == State::Completed {
            self.resent.push(outcome.resent);
            if bytes >= BOUNDED_BYTES && outcome.resent > RESENT_MAX.min(bytes / 10) {
                wrong = wrong.or_else(|| Some(format!("{} bytes came again", outcome.resent)));
            }
            if wrong.is_none() {
                self.consistent += 1;
            }
        }
        let cell = self.kinds.entry(kind).or_default();
        cell.1 += 1;
        if wrong.is_none() {
            cell.0 += 1;
            self.right += 1;
        }
        println!(
            "{number:>5}  {:<15}  {:<9}  {:>7.1}  {:>11.1}  {}",
            format!("{kind:?}"),
            outcome.stage.trim_start_matches("STAGE_"),
            outcome.took.as_secs_f64(),
            outcome.resent as f64 / f64::from(1 << 20),
            wrong.map_or_else(|| state.as_str_name().to_owned(), |wrong| format!("WRONG: {wrong}")),
        );
    }

    /// A stage that no fault has struck in yet, when half of them are over.
    pub(crate) fn missing_stage(&self, count: u64, kind: Kind) -> Option<Stage> {
        if self.all * 2 < count {
            return None;
        }
        let missing = |stage: &Stage| !self.stages.contains_key(stage.as_str_name());
        STAGES.into_iter().filter(missing).find(|stage| kind.strikes_in(*stage))
    }

    pub(crate) fn print(&self, count: u64) -> ExitCode {
        println!("\nfault            right  what is expected");
        for (kind, (right, all)) in &self.kinds {
            let (expected, why) = kind.expectation();
            println!("{:<15}  {right:>2}/{all:<2}  {expected} ({why})", format!("{kind:?}"));
        }
        println!("\nerrors by reason: {:?}", self.errors);
        println!("faults by stage: {:?}; RESTART and RECOVERY: `make crash-matrix`", self.stages);
        let most = self.resent.iter().max().copied().unwrap_or(0) >> 20;
        let sum: u64 = self.resent.iter().sum::<u64>() >> 20;
        println!("re-sent: {most} MiB at the most, {sum} MiB in all");
        println!("consistent {} of {}", self.consistent, self.all);
        println!("right {}/{count}", self.right);
        let is_many = count < MANY
            || (self.stages.len() >= STAGES.len() && self.consistent * 5 >= self.all * 4);
        if self.right == count && is_many { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}
