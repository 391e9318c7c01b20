//! Families of metrics whose values are asked for at each scrape, written by their full names.

use std::fmt;

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::ConstGauge,
        histogram::Histogram,
    },
    registry::Unit,
};

/// One label of a metric, and its value: both from lists that do not grow.
pub type Label = [(&'static str, &'static str); 1];

/// Counters by one label.
pub type Counters = Family<Label, Counter>;

/// Histograms by one label.
pub type Histograms = Family<Label, Histogram, fn() -> Histogram>;

/// Writes families. Names are whole, as on the page: unit and `_total` are taken from their ends.
/// Helps end with a full stop.
#[derive(Debug)]
pub struct Families<'a>(DescriptorEncoder<'a>);

impl<'a> Families<'a> {
    /// Writes to a scrape's answer.
    #[must_use]
    pub fn new(encoder: DescriptorEncoder<'a>) -> Self {
        Self(encoder)
    }

    /// A value that goes up and down.
    pub fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        self.gauge_if(name, help, Some(value))
    }

    /// The same; without a value there is no sample.
    pub fn gauge_if(&mut self, name: &str, help: &str, value: Option<f64>) -> fmt::Result {
        let (base, unit) = parts(name);
        let encoder = self.0.encode_descriptor(base, help, unit.as_ref(), MetricType::Gauge)?;
        value.map_or(Ok(()), |value| encode_gauge(value, encoder))
    }

    /// Values by one label.
    pub fn gauges(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Label, f64)>,
    ) -> fmt::Result {
        let (base, unit) = parts(name);
        let kind = MetricType::Gauge;
        let mut family = self.0.encode_descriptor(base, help, unit.as_ref(), kind)?;
        for (label, value) in samples {
            encode_gauge(value, family.encode_family(&label)?)?;
        }
        Ok(())
    }

    /// A value that only grows.
    pub fn counter(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        match whole(value) {
            Some(value) => self.metric(name, help, &ConstCounter::new(value)),
            None => self.metric(name, help, &ConstCounter::new(value)),
        }
    }

    /// A metric that counts by itself.
    pub fn metric(&mut self, name: &str, help: &str, metric: &impl EncodeMetric) -> fmt::Result {
        let (base, unit) = parts(name);
        let kind = metric.metric_type();
        metric.encode(self.0.encode_descriptor(base, help, unit.as_ref(), kind)?)
    }
}

fn encode_gauge(value: f64, encoder: MetricEncoder<'_>) -> fmt::Result {
    match whole(value).and_then(|value| i64::try_from(value).ok()) {
        Some(value) => ConstGauge::new(value).encode(encoder),
        None => ConstGauge::new(value).encode(encoder),
    }
}

/// A value that is a whole number reads better without a fraction.
fn whole(value: f64) -> Option<u64> {
    let is_whole = value.fract() == 0.0 && (0.0..9.0e15).contains(&value);
    is_whole.then_some(value as u64)
}

/// A name without its ending and unit, and the unit.
fn parts(name: &str) -> (&str, Option<Unit>) {
    let name = name.strip_suffix("_total").unwrap_or(name);
    let units = [
        ("bytes_per_second", Unit::Other("bytes_per_second".to_owned())),
        ("seconds", Unit::Seconds),
        ("bytes", Unit::Bytes),
    ];
    for (word, unit) in units {
        if let Some(base) = name.strip_suffix(word).and_then(|rest| rest.strip_suffix('_')) {
            return (base, Some(unit));
        }
    }
    (name, None)
}

/// A count as a sample's value: exact below 2^53.
#[must_use]
pub fn number(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use prometheus_client::{collector::Collector, encoding::text::encode, registry::Registry};

    use super::*;

    #[derive(Debug)]
    struct Some3;

    impl Collector for Some3 {
        fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
            let mut families = Families::new(encoder);
            families.counter("marcot_sent_bytes_total", "Bytes.", 7.0)?;
            families.gauge("marcot_age_seconds", "Age.", 1.5)?;
            families.gauge_if("marcot_eta_seconds", "Time left.", None)?;
            let limits = [([("resource", "data")], 3.0)];
            families.gauges("marcot_limit_bytes_per_second", "Limits.", limits)
        }
    }

    #[test]
    fn names_are_written_as_they_are_given() {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Some3));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for line in [
            "# TYPE marcot_sent_bytes counter",
            "# UNIT marcot_sent_bytes bytes",
            "marcot_sent_bytes_total 7",
            "marcot_age_seconds 1.5",
            "# TYPE marcot_eta_seconds gauge",
            "# UNIT marcot_limit_bytes_per_second bytes_per_second",
            "marcot_limit_bytes_per_second{resource=\"data\"} 3",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in {text}");
        }
        assert!(!text.contains("\nmarcot_eta_seconds "), "{text}");
    }
}
