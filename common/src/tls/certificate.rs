//! What a certificate says: its names, and when it ends; and until when a revocation list holds.

use std::time::{Duration, SystemTime};

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use x509_parser::{
    extensions::GeneralName,
    prelude::{ASN1Time, CertificateRevocationList, FromDer as _, X509Certificate},
};

/// URIs, then DNS names, as they stand in the certificate; none of one that cannot be read.
pub(crate) fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return Vec::new() };
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    let names = &names.value.general_names;
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    };
    let dns = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    };
    names.iter().filter_map(uri).chain(names.iter().filter_map(dns)).collect()
}

/// When a certificate ends.
pub(crate) fn expiry(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    system_time(certificate.validity().not_after)
}

/// By when a list must have been followed by the next one.
pub(crate) fn next_update(list: &CertificateRevocationListDer<'_>) -> Option<SystemTime> {
    let (_, list) = CertificateRevocationList::from_der(list).ok()?;
    system_time(list.next_update()?)
}

fn system_time(time: ASN1Time) -> Option<SystemTime> {
    let seconds = u64::try_from(time.timestamp()).ok()?;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}
