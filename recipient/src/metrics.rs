//! The recipient's own metrics: docs/metrics.md has all of them.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use marcot_common::{
    telemetry::{
        families::{Families, Label, number},
        metrics::Metrics,
    },
    time::{duration_from_wire, system_time},
};
use marcot_proto::{common::v1::Stage, recipient::v1 as pb};
use prometheus_client::{collector::Collector, encoding::DescriptorEncoder};

use crate::{
    counts::{Counts, duration, stage_label},
    job::registry::Clones,
};

/// Reads the clones when asked.
#[derive(Debug)]
pub struct RecipientMetrics {
    clones: Arc<Clones>,
}

impl RecipientMetrics {
    /// Adds the recipient's metrics.
    pub fn register(metrics: &Metrics, clones: &Arc<Clones>) {
        let collector = Self { clones: Arc::clone(clones) };
        metrics.register(|registry| registry.register_collector(Box::new(collector)));
    }

    fn counts(&self) -> &Counts {
        self.clones.counts()
    }

    fn operations(&self, families: &mut Families<'_>) -> fmt::Result {
        let counts = self.counts();
        families.metric("marcot_operations_started_total", "Clones accepted.", &counts.started)?;
        families.metric(
            "marcot_operations_finished_total",
            "Clones ended, by outcome and reason; one that was gone on with after it had failed \
             ends again.",
            &counts.finished,
        )?;
        let running = self.clones.running();
        let paused = running.as_ref().is_some_and(|clone| clone.state() == pb::State::Paused);
        families.gauge(
            "marcot_operations_in_progress",
            "Clones and installs that run, paused ones among them: 0 or 1.",
            flag(running.is_some()),
        )?;
        families.gauge(
            "marcot_operations_paused",
            "Clones that are paused: 0 or 1.",
            flag(paused),
        )?;
        let waiting = self.clones.waiting();
        families.gauges(
            "marcot_operations_waiting",
            "Clones that wait for a person: for a password, or for their server to be stopped.",
            waiting.map(|(what, count)| ([("awaits", what)], number(count as u64))),
        )?;
        families.metric(
            "marcot_operation_duration_seconds",
            "Time from a clone's begin to its end, by outcome.",
            &counts.durations,
        )?;
        let last = self.clones.last_success();
        families.gauge_if(
            "marcot_last_success_timestamp_seconds",
            "When the last clone completed, seconds since 1970; none if none has.",
            last.map(|last| unix(last.end)),
        )?;
        families.gauge_if(
            "marcot_last_success_duration_seconds",
            "How long the last clone took that completed.",
            last.map(|last| last.took.as_secs_f64()),
        )
    }

    fn totals(&self, families: &mut Families<'_>) -> fmt::Result {
        let counts = self.counts();
        for (name, help, counter) in [
            (
                "marcot_raw_bytes_total",
                "Data of clones: on a donor what its payload holds, on a recipient what it has staged.",
                &counts.data_bytes,
            ),
            ("marcot_wire_received_bytes_total", "Bytes from donors.", &counts.network_bytes),
            ("marcot_verified_bytes_total", "Data checked on arrival.", &counts.verified_bytes),
            ("marcot_reused_bytes_total", "Data from older copies.", &counts.reused_bytes),
            ("marcot_resent_bytes_total", "Bytes that had to come again.", &counts.resent_bytes),
            (
                "marcot_checksum_failures_total",
                "Chunks and messages that came with a wrong checksum.",
                &counts.checksum_failures,
            ),
            (
                "marcot_verification_failures_total",
                "Copies that were not what their list or certificate says.",
                &counts.verification_failures,
            ),
        ] {
            families.metric(name, help, counter)?;
        }
        families.metric(
            "marcot_retries_total",
            "Tries after a failure that was worth another, by its reason.",
            &counts.retries,
        )?;
        families.metric(
            "marcot_resumes_total",
            "Clones gone on with, by cause.",
            &counts.resumes,
        )?;
        families.counter(
            "marcot_throttled_seconds_total",
            "Time that streams have waited for limits, all together.",
            Duration::from_nanos(counts.throttled_nanoseconds.get()).as_secs_f64(),
        )
    }

    fn stages(&self, families: &mut Families<'_>) -> fmt::Result {
        let counts = self.counts();
        families.metric(
            "marcot_stage_raw_bytes_total",
            "Data staged, by stage.",
            &counts.stage_data_bytes,
        )?;
        families.metric(
            "marcot_stage_received_bytes_total",
            "Bytes from donors, by stage.",
            &counts.stage_network_bytes,
        )?;
        families.metric(
            "marcot_stage_duration_seconds",
            "How long a stage took that has come to its end, by stage.",
            &counts.stage_durations,
        )
    }

    fn installs(&self, families: &mut Families<'_>) -> fmt::Result {
        let counts = self.counts();
        families.metric(
            "marcot_install_steps_total",
            "Steps that installs have reached, by name.",
            &counts.install_steps,
        )?;
        families.metric(
            "marcot_install_step_duration_seconds",
            "How long an install stood at a step before the next, by name; waits for a person are \
             left out.",
            &counts.install_step_durations,
        )?;
        families.metric(
            "marcot_rollbacks_total",
            "Times that the data from before a clone were brought back, by reason.",
            &counts.rollbacks,
        )?;
        families.gauge(
            "marcot_old_data_kept",
            "Clones whose old data are kept until they are accepted.",
            number(self.clones.kept() as u64),
        )?;
        families.gauge(
            "marcot_old_data_low_space",
            "1 while less than 5 % of the file system is free and old data are kept.",
            flag(self.clones.space_is_low()),
        )
    }

    /// Of the clone that runs, or ran last: what its resource says.
    fn last_clone(&self, families: &mut Families<'_>) -> fmt::Result {
        let shown = self.clones.shown();
        let clone = shown.as_ref().map(|shown| &shown.clone);
        let runs = self.clones.running().is_some();
        let value = |read: &dyn Fn(&pb::Clone) -> Option<f64>| clone.and_then(read);
        let count = |read: fn(&pb::Clone) -> u64| value(&|clone| Some(number(read(clone))));
        for (name, help, value) in [
            (
                "marcot_clone_verified_bytes",
                "Data of the clone checked on arrival.",
                count(|clone| clone.verified_bytes),
            ),
            (
                "marcot_clone_reused_bytes",
                "Data of the clone from an older copy.",
                count(|clone| clone.reused_bytes),
            ),
            (
                "marcot_clone_resent_bytes",
                "Bytes of the clone that had to come again.",
                count(|clone| clone.resent_bytes),
            ),
            (
                "marcot_clone_files_expected",
                "Files of the first list.",
                count(|clone| clone.files_expected),
            ),
            (
                "marcot_clone_files_copied",
                "Files that are copied, first copies only.",
                count(|clone| clone.files_copied),
            ),
            (
                "marcot_clone_throttled_seconds",
                "Time that streams of the clone have waited for limits, all together.",
                value(&|clone| {
                    let waited = duration_from_wire(clone.throttled_duration?).ok()?;
                    Some(waited.as_secs_f64())
                }),
            ),
            (
                "marcot_clone_eta_seconds",
                "Time that is left of the stage, estimated; none while there is no basis for it.",
                value(&|clone| Some(duration_from_wire(clone.eta?).ok()?.as_secs_f64())),
            ),
            (
                "marcot_clone_encrypted",
                "1 when the connections to the donor are encrypted, 0 when not; none before there is \
                 one, and for CLONE LOCAL.",
                value(&|clone| clone.encrypted.map(flag)),
            ),
            (
                "marcot_clone_start_timestamp_seconds",
                "When the clone began, seconds since 1970.",
                value(&|clone| clone.begin_time.map(|time| unix(system_time(time)))),
            ),
            (
                "marcot_last_progress_timestamp_seconds",
                "When anything of the clone moved last, seconds since 1970: a byte, a look of the \
                 donor at an entry, a stage's begin.",
                shown.as_ref().map(|shown| unix(shown.last_progress)),
            ),
        ] {
            families.gauge_if(name, help, value)?;
        }
        let streams = shown.as_ref().filter(|_| runs).map_or(0, |shown| shown.streams);
        families.gauge(
            "marcot_streams_active",
            "Streams of clones at work: on a donor its ReadRanges calls.",
            number(streams),
        )?;
        self.clone_stages(families, clone, runs)
    }

    fn clone_stages(
        &self,
        families: &mut Families<'_>,
        clone: Option<&pb::Clone>,
        runs: bool,
    ) -> fmt::Result {
        let rows = clone.map_or(&[][..], |clone| &clone.stages);
        let now = Some(marcot_common::time::timestamp(SystemTime::now()));
        let samples = |read: &dyn Fn(&pb::StageProgress) -> f64| -> Vec<(Label, f64)> {
            let sample = |row: &pb::StageProgress| {
                Some((stage_label(Stage::try_from(row.stage).ok()?), read(row)))
            };
            rows.iter().filter_map(sample).collect()
        };
        families.gauges(
            "marcot_stage_in_progress",
            "1 for the stage that runs.",
            samples(&|row| flag(runs && row.state() == pb::State::InProgress)),
        )?;
        families.gauges(
            "marcot_clone_expected_bytes",
            "Data that the clone is expected to copy, by stage: an estimate while it grows.",
            samples(&|row| number(row.estimate_bytes)),
        )?;
        families.gauges(
            "marcot_clone_copied_bytes",
            "Data of the clone written to staging, by stage.",
            samples(&|row| number(row.data_bytes)),
        )?;
        families.gauges(
            "marcot_clone_received_bytes",
            "Bytes of the clone from the donor, by stage.",
            samples(&|row| number(row.network_bytes)),
        )?;
        families.gauges(
            "marcot_clone_stage_seconds",
            "How long a stage of the clone took, or has run; 0 before it begins.",
            samples(&|row| {
                let end = row.end_time.as_ref().or(now.as_ref());
                duration(row.begin_time.as_ref(), end).unwrap_or_default().as_secs_f64()
            }),
        )
    }

    /// Limits of the clone that runs, or those of the next one.
    fn limits(&self, families: &mut Families<'_>) -> fmt::Result {
        let limits = self.clones.running().and_then(|clone| clone.limits);
        let defaults = &self.clones.settings().limits;
        let (data, network) = match limits {
            Some(limits) => {
                (limits.data_bytes_per_second_max(), limits.network_bytes_per_second_max())
            }
            None => (defaults.data, defaults.network),
        };
        families.gauges(
            "marcot_rate_limit_bytes_per_second",
            "Limits in force, of data and of what crosses the network; 0 is none.",
            [([("resource", "data")], number(data)), ([("resource", "network")], number(network))],
        )?;
        let streams = limits.map(|limits| u64::from(limits.concurrency_max()));
        families.gauge(
            "marcot_streams_limit",
            "Most streams of a clone.",
            number(streams.unwrap_or(defaults.most(defaults.autotune) as u64)),
        )
    }

    fn space(&self, families: &mut Families<'_>) -> fmt::Result {
        let space = self.clones.space();
        let staged = self.clones.running().map_or(0, |clone| {
            let copied: u64 = clone.stages.iter().map(|row| row.data_bytes).sum();
            copied.saturating_add(clone.reused_bytes)
        });
        families.gauges(
            "marcot_staging_bytes",
            "What clones have staged: of the one that runs, and of those that left it behind.",
            [
                ([("state", "running")], number(staged)),
                ([("state", "kept")], number(space.staged_bytes())),
            ],
        )?;
        families.gauge_if(
            "marcot_staging_free_bytes",
            "Free on the file system where the clone that runs is staged; none without one.",
            space.free_bytes().map(number),
        )?;
        families.gauge(
            "marcot_old_data_bytes",
            "What is kept of the data from before clones.",
            number(space.old_data_bytes()),
        )
    }
}

impl Collector for RecipientMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut families = Families::new(encoder);
        self.operations(&mut families)?;
        self.last_clone(&mut families)?;
        self.stages(&mut families)?;
        self.totals(&mut families)?;
        self.limits(&mut families)?;
        self.installs(&mut families)?;
        self.space(&mut families)
    }
}

fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}

fn unix(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
