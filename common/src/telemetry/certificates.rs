//! When the certificates in use end, asked for at each scrape.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _},
    metrics::gauge::ConstGauge,
    registry::Unit,
};

type Expiry = Box<dyn Fn() -> Option<SystemTime> + Send + Sync>;

/// Certificates by the option that names their file.
#[derive(Clone, Default)]
pub(super) struct CertificateCollector(Arc<Mutex<Vec<(&'static str, Expiry)>>>);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct File {
    file: &'static str,
}

impl CertificateCollector {
    pub(super) fn add(
        &self,
        file: &'static str,
        expiry: impl Fn() -> Option<SystemTime> + Send + Sync + 'static,
    ) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.push((file, Box::new(expiry)));
    }
}

impl fmt::Debug for CertificateCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CertificateCollector")
    }
}

impl Collector for CertificateCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ends = known.iter().filter_map(|(file, expiry)| {
            let end = expiry()?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
            Some((*file, i64::try_from(end.as_secs()).ok()?))
        });
        let ends: Vec<_> = ends.collect();
        if ends.is_empty() {
            return Ok(());
        }
        let mut family = encoder.encode_descriptor(
            "marcot_tls_certificate_expiry_timestamp",
            "When the certificate in use ends, seconds since 1970, by the option that names it",
            Some(&Unit::Seconds),
            prometheus_client::metrics::MetricType::Gauge,
        )?;
        for (file, end) in ends {
            ConstGauge::new(end).encode(family.encode_family(&File { file })?)?;
        }
        Ok(())
    }
}
