//! The recipient's own metrics.

use std::{fmt, sync::Arc};

use marcot_common::telemetry::metrics::Metrics;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

use crate::job::registry::Clones;

/// Reads the clones when asked.
#[derive(Debug)]
pub struct RecipientMetrics {
    clones: Arc<Clones>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

impl RecipientMetrics {
    /// Adds the recipient's metrics.
    pub fn register(metrics: &Metrics, clones: &Arc<Clones>) {
        let collector = Self { clones: Arc::clone(clones) };
        metrics.register(|registry| registry.register_collector(Box::new(collector)));
    }
}

impl Collector for RecipientMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let counts = self.clones.counts();
        let started = ConstCounter::new(counts.started);
        let help = "Clones accepted";
        let name = "marcot_operations_started";
        started.encode(encoder.encode_descriptor(name, help, None, started.metric_type())?)?;
        let finished = ConstCounter::new(0u64);
        let name = "marcot_operations_finished";
        let mut family =
            encoder.encode_descriptor(name, "Clones ended", None, finished.metric_type())?;
        for (outcome, count) in [
            ("succeeded", counts.completed),
            ("failed", counts.failed),
            ("cancelled", counts.cancelled),
        ] {
            let labels = Outcome { outcome };
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
        let running = self.clones.running();
        let gauge = ConstGauge::new(i64::from(running.is_some()));
        let name = "marcot_operations_in_progress";
        gauge.encode(encoder.encode_descriptor(
            name,
            "Clones that run",
            None,
            gauge.metric_type(),
        )?)?;
        for (name, help, value) in [
            (
                "marcot_old_data_kept",
                "Clones whose old data are kept until they are accepted",
                i64::try_from(self.clones.kept()).unwrap_or(i64::MAX),
            ),
            (
                "marcot_old_data_low_space",
                "Whether the file system is nearly full while old data are kept",
                i64::from(self.clones.space_is_low()),
            ),
        ] {
            let gauge = ConstGauge::new(value);
            let kind = gauge.metric_type();
            gauge.encode(encoder.encode_descriptor(name, help, None, kind)?)?;
        }
        let throttled = ConstCounter::new(self.clones.throttled().as_secs_f64());
        throttled.encode(encoder.encode_descriptor(
            "marcot_throttled",
            "Time that streams have waited for their clone's limits, all together",
            Some(&Unit::Seconds),
            throttled.metric_type(),
        )?)?;
        let totals = self.clones.byte_totals();
        for (name, help, value) in [
            ("marcot_raw", "Data written to staging", totals.data),
            ("marcot_wire_received", "Bytes received from donors", totals.network),
        ] {
            let counter = ConstCounter::new(value);
            let kind = counter.metric_type();
            counter.encode(encoder.encode_descriptor(name, help, Some(&Unit::Bytes), kind)?)?;
        }
        Ok(())
    }
}
