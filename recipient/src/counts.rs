//! What this process has counted since its start, of all clones together. What a clone counts for
//! itself (`progress`) is counted here in the same moment, so that metrics and resource agree.

use std::{sync::Arc, time::Duration};

use marcot_common::{
    failure::{Failure, reasons},
    telemetry::families::{Counters, Histograms},
};
use marcot_proto::{common::v1::Stage, recipient::v1 as pb};
use prometheus_client::metrics::{counter::Counter, family::Family, histogram::Histogram};

use crate::install::step::Step;

/// The stages of a clone, in order.
pub const STAGES: [Stage; 6] = [
    Stage::FileCopy,
    Stage::PageCopy,
    Stage::RedoCopy,
    Stage::FileSync,
    Stage::Restart,
    Stage::Recovery,
];

/// From a small test's stage to a day: clones of terabytes take hours.
const LONG_BUCKETS: [f64; 13] =
    [0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0, 86400.0];

/// From one rename to a long recovery.
const STEP_BUCKETS: [f64; 12] =
    [0.001, 0.01, 0.05, 0.25, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0];

/// Why a clone was gone on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResumeCause {
    /// This service was started again.
    Restart,
    /// Somebody has asked for it.
    Request,
    /// Its snapshot was lost, and another one opened.
    Snapshot,
}

impl ResumeCause {
    const ALL: [Self; 3] = [Self::Restart, Self::Request, Self::Snapshot];

    fn label(self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::Request => "request",
            Self::Snapshot => "snapshot",
        }
    }
}

/// How a clone ended, with its reason: labels of `finished`.
pub type EndLabels = [(&'static str, &'static str); 2];

/// Counts; all that have an end to come are there from the start, at zero, so that their first
/// increase is seen as one.
#[derive(Debug)]
pub struct Counts {
    /// Data written to staging.
    pub data_bytes: Counter,
    /// Bytes received from donors.
    pub network_bytes: Counter,
    /// Data whose checksum was right.
    pub verified_bytes: Counter,
    /// Data taken from an older copy.
    pub reused_bytes: Counter,
    /// Bytes that had to come again.
    pub resent_bytes: Counter,
    /// Nanoseconds that streams have waited for limits.
    pub throttled_nanoseconds: Counter,
    /// Data written to staging, by stage.
    pub stage_data_bytes: Counters,
    /// Bytes received from donors, by stage.
    pub stage_network_bytes: Counters,
    /// How long a stage took, by stage.
    pub stage_durations: Histograms,
    /// Tries after a failure, by its reason.
    pub retries: Counters,
    /// Clones gone on with, by cause.
    pub resumes: Counters,
    /// Chunks and messages with a wrong checksum.
    pub checksum_failures: Counter,
    /// Copies that are not what they should be.
    pub verification_failures: Counter,
    /// Clones accepted.
    pub started: Counter,
    /// Clones ended, by outcome and reason.
    pub finished: Family<EndLabels, Counter>,
    /// How long a clone took, by outcome.
    pub durations: Histograms,
    /// Steps of installs, by name.
    pub install_steps: Counters,
    /// How long an install stood at a step, by name.
    pub install_step_durations: Histograms,
    /// Data from before a clone brought back, by reason.
    pub rollbacks: Counters,
}

impl Default for Counts {
    fn default() -> Self {
        let long = || Histograms::new_with_constructor(|| Histogram::new(LONG_BUCKETS));
        let counts = Self {
            data_bytes: Counter::default(),
            network_bytes: Counter::default(),
            verified_bytes: Counter::default(),
            reused_bytes: Counter::default(),
            resent_bytes: Counter::default(),
            throttled_nanoseconds: Counter::default(),
            stage_data_bytes: Counters::default(),
            stage_network_bytes: Counters::default(),
            stage_durations: long(),
            retries: Counters::default(),
            resumes: Counters::default(),
            checksum_failures: Counter::default(),
            verification_failures: Counter::default(),
            started: Counter::default(),
            finished: Family::default(),
            durations: long(),
            install_steps: Counters::default(),
            install_step_durations: Histograms::new_with_constructor(|| {
                Histogram::new(STEP_BUCKETS)
            }),
            rollbacks: Counters::default(),
        };
        for stage in STAGES.map(stage_label) {
            drop(counts.stage_data_bytes.get_or_create(&stage));
            drop(counts.stage_network_bytes.get_or_create(&stage));
            drop(counts.stage_durations.get_or_create(&stage));
        }
        for cause in ResumeCause::ALL {
            drop(counts.resumes.get_or_create(&[("cause", cause.label())]));
        }
        for outcome in ["succeeded", "failed", "cancelled"] {
            drop(counts.durations.get_or_create(&[("outcome", outcome)]));
        }
        for outcome in [("succeeded", "OK"), ("cancelled", "STOPPED")] {
            drop(counts.finished.get_or_create(&[("outcome", outcome.0), ("reason", outcome.1)]));
        }
        for step in Step::ALL {
            drop(counts.install_steps.get_or_create(&[("step", step.name())]));
        }
        counts
    }
}

impl Counts {
    /// A stage has ended that took so long.
    pub fn end_stage(&self, stage: Stage, took: Duration) {
        self.stage_durations.get_or_create(&stage_label(stage)).observe(took.as_secs_f64());
    }

    /// A stage has moved bytes.
    pub fn move_in_stage(&self, stage: Stage, data: u64, network: u64) {
        self.stage_data_bytes.get_or_create(&stage_label(stage)).inc_by(data);
        self.stage_network_bytes.get_or_create(&stage_label(stage)).inc_by(network);
    }

    /// Something failed, and is tried again, or is not.
    pub fn fail(&self, failure: &Failure) {
        if matches!(failure.reason.as_ref(), "CHUNK_CORRUPT" | "MESSAGE_CORRUPT") {
            self.checksum_failures.inc();
        }
    }

    /// Something is tried again, for a reason of the list.
    pub fn retry(&self, reason: &'static str) {
        self.retries.get_or_create(&[("reason", reason)]).inc();
    }

    /// A clone is gone on with.
    pub fn resume(&self, cause: ResumeCause) {
        self.resumes.get_or_create(&[("cause", cause.label())]).inc();
    }

    /// A clone has come to its end, which its resource tells.
    pub fn finish(&self, clone: &pb::Clone) {
        let reason = clone.error.as_ref().map(|error| reasons::label(&error.reason));
        let (outcome, reason) = match clone.state() {
            pb::State::Completed => ("succeeded", "OK"),
            pb::State::Cancelled => ("cancelled", "STOPPED"),
            _ => ("failed", reason.unwrap_or(reasons::OTHER)),
        };
        self.finished.get_or_create(&[("outcome", outcome), ("reason", reason)]).inc();
        if let Some(took) = duration(clone.begin_time.as_ref(), clone.end_time.as_ref()) {
            self.durations.get_or_create(&[("outcome", outcome)]).observe(took.as_secs_f64());
        }
    }

    /// An install has reached `step`, after it had stood at `before` for so long.
    pub fn reach(&self, step: Step, before: Option<(Step, Duration)>) {
        self.install_steps.get_or_create(&[("step", step.name())]).inc();
        if let Some((before, took)) = before {
            let durations = self.install_step_durations.get_or_create(&[("step", before.name())]);
            durations.observe(took.as_secs_f64());
        }
    }

    /// The data from before a clone are back.
    pub fn roll_back(&self, reason: &'static str) {
        self.rollbacks.get_or_create(&[("reason", reason)]).inc();
    }

    /// Shares the counts.
    #[must_use]
    pub fn shared(self) -> Arc<Self> {
        Arc::new(self)
    }
}

/// A stage as a label: its name in the API.
#[must_use]
pub fn stage_label(stage: Stage) -> [(&'static str, &'static str); 1] {
    [("stage", stage.as_str_name().trim_start_matches("STAGE_"))]
}

/// From one time of a resource to another; none when either is not set, or they are the wrong way
/// round.
#[must_use]
pub fn duration(
    from: Option<&prost_types::Timestamp>,
    to: Option<&prost_types::Timestamp>,
) -> Option<Duration> {
    let time = |at: &prost_types::Timestamp| marcot_common::time::system_time(*at);
    time(to?).duration_since(time(from?)).ok()
}
