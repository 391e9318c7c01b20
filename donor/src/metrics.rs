//! The donor's own metrics: docs/metrics.md has all of them.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use marcot_common::telemetry::{
    families::{Families, number},
    metrics::Metrics,
};
use prometheus_client::{collector::Collector, encoding::DescriptorEncoder};

use crate::{
    api::Api,
    caps::Caps,
    counts::Counts,
    kindness::Kindness,
    lease::{Held, Leases, READERS_MAX},
};

/// Reads leases, caps and counts when asked.
#[derive(Debug)]
pub struct DonorMetrics {
    leases: Arc<Leases>,
    sent_bytes: Arc<AtomicU64>,
    caps: Arc<Caps>,
    kindness: Arc<Kindness>,
    counts: Arc<Counts>,
}

impl DonorMetrics {
    /// Adds the donor's metrics.
    pub fn register(metrics: &Metrics, leases: &Arc<Leases>, api: &Api) {
        let (sent_bytes, caps, kindness) = (api.sent_bytes(), api.caps(), api.kindness());
        let (leases, counts) = (Arc::clone(leases), Arc::clone(leases.counts()));
        let collector = Self { leases, sent_bytes, caps, kindness, counts };
        metrics.register(|registry| registry.register_collector(Box::new(collector)));
    }

    fn leases(&self, families: &mut Families<'_>) -> fmt::Result {
        let all = self.leases.all();
        let now = SystemTime::now();
        let since = |time: SystemTime| now.duration_since(time).unwrap_or_default().as_secs_f64();
        let left = |held: &Arc<Held>| {
            held.expire_time().duration_since(now).unwrap_or(Duration::ZERO).as_secs_f64()
        };
        let count = |n: usize| number(n as u64);
        families.gauge(
            "marcot_donor_leases_active",
            "Snapshots that this donor holds under a lease.",
            count(all.len()),
        )?;
        families.gauge(
            "marcot_donor_queue_length",
            "Clones that wait for a place.",
            count(self.leases.queued()),
        )?;
        families.counter(
            "marcot_donor_leases_expired_total",
            "Snapshots whose lease ran out: their recipient was silent for as long.",
            number(self.leases.expired_total()),
        )?;
        families.gauge_if(
            "marcot_donor_lease_remaining_seconds",
            "Time until the first of the leases ends, if it is not renewed; none without leases.",
            all.iter().map(left).min_by(f64::total_cmp),
        )?;
        families.gauge(
            "marcot_donor_snapshot_age_seconds",
            "Age of the oldest snapshot that is held; 0 without any.",
            all.first().map_or(0.0, |held| since(held.create_time)),
        )?;
        let readers = all.iter().map(|held| READERS_MAX - held.readers.available_permits());
        families.gauge(
            "marcot_streams_active",
            "Streams of clones at work: on a donor its ReadRanges calls.",
            count(readers.sum()),
        )?;
        let counts = &self.counts;
        families.metric(
            "marcot_donor_snapshots_opened_total",
            "Snapshots opened.",
            &counts.opened,
        )?;
        families.metric(
            "marcot_donor_snapshots_finished_total",
            "Snapshots ended, by what their recipient said of its clone, expired or stopped.",
            &counts.finished,
        )
    }

    fn impact(&self, families: &mut Families<'_>) -> fmt::Result {
        families.counter(
            "marcot_throttled_seconds_total",
            "Time that streams have waited for limits, all together.",
            self.caps.throttled().as_secs_f64(),
        )?;
        let (data, network) = self.caps.bytes_per_second();
        families.gauges(
            "marcot_rate_limit_bytes_per_second",
            "Limits in force, of data and of what crosses the network; 0 is none.",
            [([("resource", "data")], number(data)), ([("resource", "network")], number(network))],
        )?;
        let told = self.kindness.told();
        families.gauge(
            "marcot_donor_give_way_bytes_per_second",
            "What clones may read while they give way to the server's commits; 0 when they need not.",
            number(told.limit.unwrap_or(0)),
        )?;
        families.gauge_if(
            "marcot_donor_commit_latency_seconds",
            "What the server's commits take, as probed while snapshots are held; none otherwise.",
            told.latency.map(|latency| latency.as_secs_f64()),
        )?;
        families.gauge_if(
            "marcot_donor_commit_latency_limit_seconds",
            "What they may take before clones give way; none while nobody probes.",
            told.bound.map(|bound| bound.as_secs_f64()),
        )?;
        families.metric(
            "marcot_commit_block_seconds",
            "How long commits waited for a snapshot's point, each time, from when their lock was \
             asked for.",
            &self.counts.commit_blocks,
        )?;
        families.metric(
            "marcot_ddl_block_seconds",
            "How long DDL waited for a snapshot, each time.",
            &self.counts.ddl_blocks,
        )
    }
}

impl Collector for DonorMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut families = Families::new(encoder);
        self.leases(&mut families)?;
        self.impact(&mut families)?;
        families.counter(
            "marcot_wire_sent_bytes_total",
            "Payload sent to recipients.",
            number(self.sent_bytes.load(Ordering::Relaxed)),
        )?;
        families.metric(
            "marcot_raw_bytes_total",
            "Data of clones: on a donor what its payload holds, on a recipient what it has staged.",
            &self.counts.raw_bytes,
        )
    }
}
