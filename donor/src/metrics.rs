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

use crate::{api::Api, caps::Caps, lease::Leases};

/// Reads the leases when asked.
#[derive(Debug)]
pub struct DonorMetrics {
    leases: Arc<Leases>,
    sent_bytes: Arc<AtomicU64>,
    caps: Arc<Caps>,
}

impl DonorMetrics {
    /// Adds the donor's metrics.
    pub fn register(metrics: &Metrics, leases: &Arc<Leases>, api: &Api) {
        let (sent_bytes, caps) = (api.sent_bytes(), api.caps());
        let collector = Self { leases: Arc::clone(leases), sent_bytes, caps };
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
        )?)?;
        let throttled = ConstCounter::new(self.caps.throttled().as_secs_f64());
        let help = "Time that reading calls have waited for this donor's caps, all together";
        throttled.encode(encoder.encode_descriptor(
            "marcot_throttled",
            help,
            Some(&Unit::Seconds),
            throttled.metric_type(),
        )?)?;
        let (data, network) = self.caps.bytes_per_second();
        for (name, help, rate) in [
            ("marcot_data_bandwidth_limit", "Cap of data, bytes per second; 0: none", data),
            (
                "marcot_network_bandwidth_limit",
                "Cap of payload, bytes per second; 0: none",
                network,
            ),
        ] {
            let gauge = ConstGauge::new(i64::try_from(rate).unwrap_or(i64::MAX));
            let kind = gauge.metric_type();
            gauge.encode(encoder.encode_descriptor(name, help, None, kind)?)?;
        }
        Ok(())
    }
}
