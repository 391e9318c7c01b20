//! TLS on both sides: rustls with one provider, aws-lc-rs, and TLS 1.3; TLS 1.2 if asked.

pub(crate) mod certificate;
pub mod client;
pub mod server;

use std::{fmt, path::Path, sync::Arc, time::SystemTime};

use rustls::{
    CipherSuite, SupportedProtocolVersion,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem::PemObject as _},
};

/// What went wrong with a certificate, a key or a CA file.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read as PEM.
    #[error("read {what} {path}: {why}")]
    Read {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: String,
        /// Why.
        why: String,
    },
    /// Certificate and key do not fit, or a verifier cannot be built.
    #[error("TLS configuration: {0}")]
    Configuration(String),
    /// A fingerprint is none.
    #[error("`{0}` is no SHA-256 fingerprint: write 64 hexadecimal digits, with or without colons")]
    Fingerprint(String),
}

/// Protocol versions that are offered or taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Versions {
    /// TLS 1.3 only.
    #[default]
    Tls13,
    /// TLS 1.2 as well, for networks that inspect TLS and know no better. It needs the extended
    /// master secret (RFC 7627): without it the channel binding would bind nothing.
    Tls12AndTls13,
}

impl std::str::FromStr for Versions {
    type Err = String;

    fn from_str(oldest: &str) -> Result<Self, String> {
        match oldest {
            "1.3" => Ok(Self::Tls13),
            "1.2" => Ok(Self::Tls12AndTls13),
            _ => {
                Err(format!("`{oldest}` is no version of TLS that is spoken here: 1.3 and 1.2 are"))
            }
        }
    }
}

static TLS13: [&SupportedProtocolVersion; 1] = [&rustls::version::TLS13];
static TLS12_AND_TLS13: [&SupportedProtocolVersion; 2] =
    [&rustls::version::TLS13, &rustls::version::TLS12];

impl Versions {
    fn supported(self) -> &'static [&'static SupportedProtocolVersion] {
        match self {
            Self::Tls13 => &TLS13,
            Self::Tls12AndTls13 => &TLS12_AND_TLS13,
        }
    }
}

/// Returns the fingerprint of the first certificate of a PEM file: the end entity's in a chain.
pub fn fingerprint_of(certificate: &Path) -> Result<Fingerprint, TlsError> {
    Ok(Fingerprint::of(&read_certificates("certificate", certificate)?[0]))
}

/// When the first of a PEM file's revocation lists runs out; `None` while it cannot be read.
pub(crate) fn next_update_of(path: &Path) -> Option<SystemTime> {
    let lists = read_revocations("CRL", path).ok()?;
    lists.iter().filter_map(certificate::next_update).min()
}

/// SHA-256 of a certificate in DER form.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Of a certificate.
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(sha256(certificate))
    }

    /// Reads `SHA256:aa:bb:...`; prefix and colons may be missing.
    pub fn parse(text: &str) -> Result<Self, TlsError> {
        let bad = || TlsError::Fingerprint(text.chars().take(120).collect());
        let digits = text.trim();
        let digits = match digits.split_at_checked(7) {
            Some((prefix, rest)) if prefix.eq_ignore_ascii_case("sha256:") => rest,
            _ => digits,
        };
        let digits: Vec<u8> = digits.bytes().filter(|&b| b != b':').collect();
        if digits.len() != 64 {
            return Err(bad());
        }
        let mut fingerprint = [0; 32];
        for (byte, pair) in fingerprint.iter_mut().zip(digits.chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
            if !pair.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
        }
        Ok(Self(fingerprint))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SHA256")?;
        self.0.iter().try_for_each(|byte| write!(f, ":{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ::aws_lc_rs::digest::digest(&::aws_lc_rs::digest::SHA256, bytes);
    let mut array = [0; 32];
    array.copy_from_slice(digest.as_ref());
    array
}

/// The provider, with AES-128-GCM first: it is a fifth cheaper than AES-256 on bulk data, and no
/// attack on either is known.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(|suite| match suite.suite() {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => 0,
        _ => 1,
    });
    Arc::new(provider)
}

fn read_error(what: &'static str, path: &Path, why: impl fmt::Display) -> TlsError {
    TlsError::Read { what, path: path.display().to_string(), why: why.to_string() }
}

fn read_certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(|e| read_error(what, path, e))?
        .collect::<Result<_, _>>()
        .map_err(|e| read_error(what, path, e))?;
    if certificates.is_empty() {
        return Err(read_error(what, path, "it holds no certificate in PEM form"));
    }
    Ok(certificates)
}

fn read_revocations(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let lists: Vec<_> = CertificateRevocationListDer::pem_file_iter(path)
        .map_err(|e| read_error(what, path, e))?
        .collect::<Result<_, _>>()
        .map_err(|e| read_error(what, path, e))?;
    if lists.is_empty() {
        return Err(read_error(what, path, "it holds no revocation list in PEM form"));
    }
    Ok(lists)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|e| read_error("private key", path, e))
}

/// Context of the exporter that binds a log-in to its TLS connection (RFC 9266).
pub(crate) const EXPORTER_LABEL: &[u8] = b"EXPORTER-Channel-Binding";

/// Protocol and cipher suite for the status, e.g. `TLSv1.3 AES_128_GCM_SHA256`.
pub(crate) fn cipher_text(common: &rustls::CommonState) -> String {
    let suite = common.negotiated_cipher_suite().map(|suite| format!("{:?}", suite.suite()));
    let suite = suite.unwrap_or_default();
    match suite.strip_prefix("TLS13_") {
        Some(suite) => format!("TLSv1.3 {suite}"),
        None => format!("TLSv1.2 {suite}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_read_as_it_is_printed_and_as_openssl_prints_it() {
        let fingerprint = Fingerprint([0xab; 32]);
        assert_eq!(Fingerprint::parse(&fingerprint.to_string()).unwrap(), fingerprint);
        assert_eq!(Fingerprint::parse(&"AB".repeat(32)).unwrap(), fingerprint);
        for bad in ["", "SHA256:ab", &"zz".repeat(32), &"+1".repeat(32)] {
            Fingerprint::parse(bad).unwrap_err();
        }
    }
}
