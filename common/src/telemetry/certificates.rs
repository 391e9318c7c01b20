//! When the certificates and revocation lists in use end, asked for at each scrape.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use prometheus_client::{collector::Collector, encoding::DescriptorEncoder};

use super::families::{Families, number};

type Expiry = Box<dyn Fn() -> Option<SystemTime> + Send + Sync>;

/// What ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A certificate.
    Certificate,
    /// Lists of revoked ones, by when their next ones must be there.
    RevocationList,
}

/// What ends, by the option that names its file.
#[derive(Clone, Default)]
pub(super) struct CertificateCollector(Arc<Mutex<Vec<(Kind, &'static str, Expiry)>>>);

impl CertificateCollector {
    pub(super) fn add(
        &self,
        kind: Kind,
        file: &'static str,
        expiry: impl Fn() -> Option<SystemTime> + Send + Sync + 'static,
    ) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.push((kind, file, Box::new(expiry)));
    }
}

impl fmt::Debug for CertificateCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CertificateCollector")
    }
}

impl Collector for CertificateCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ends = |kind: Kind| {
            known.iter().filter(move |(known, ..)| *known == kind).filter_map(
                |(_, file, expiry)| {
                    let end = expiry()?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
                    Some(([("file", *file)], number(end.as_secs())))
                },
            )
        };
        let mut families = Families::new(encoder);
        families.gauges(
            "marcot_tls_certificate_expiry_timestamp_seconds",
            "When the certificate in use ends, seconds since 1970, by the option that names it.",
            ends(Kind::Certificate),
        )?;
        families.gauges(
            "marcot_tls_crl_next_update_timestamp_seconds",
            "When the first revocation list in use runs out, seconds since 1970, by the option that \
             names it.",
            ends(Kind::RevocationList),
        )
    }
}
