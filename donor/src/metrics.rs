//! The donor's own metrics.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use marcot_common::telemetry::metrics::Metrics;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

use crate::{api::Api, lease::Leases};

/// Reads the leases when asked.
#[derive(Debug)]
pub struct DonorMetrics {
    leases: Arc<Leases>,
    sent_bytes: Arc<AtomicU64>,
}

impl DonorMetrics {
    /// Adds the donor's metrics.
    pub fn register(metrics: &Metrics, leases: &Arc<Leases>, api: &Api) {
        let collector = Self { leases: Arc::clone(leases), sent_bytes: api.sent_bytes() };
        metrics.register(|registry| registry.register_collector(Box::new(collector)));
    }
}

impl Collector for DonorMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let active = i64::try_from(self.leases.all().len()).unwrap_or(i64::MAX);
        let gauge = ConstGauge::new(active);
        let help = "Snapshots that this donor holds under a lease";
        gauge.encode(encoder.encode_descriptor(
            "marcot_donor_leases_active",
            help,
            None,
            gauge.metric_type(),
        )?)?;
        let expired = ConstCounter::new(self.leases.expired_total());
        let help = "Snapshots whose lease ran out";
        expired.encode(encoder.encode_descriptor(
            "marcot_donor_lease_expired",
            help,
            None,
            expired.metric_type(),
        )?)?;
        let sent = ConstCounter::new(self.sent_bytes.load(Ordering::Relaxed));
        let help = "Payload sent to recipients";
        sent.encode(encoder.encode_descriptor(
            "marcot_wire_sent",
            help,
            Some(&Unit::Bytes),
            sent.metric_type(),
        )?)
    }
}
