//! The server's side.

use std::{path::PathBuf, sync::Arc, time::SystemTime};

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::CertificateDer,
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
};
use tracing::{info, warn};

use super::{
    Fingerprint, TlsError, Versions, certificate, next_update_of, provider, read_certificates,
    read_error, read_key, read_revocations,
};
use crate::reloaded::{Changed, Reloaded};

/// The files of a server's TLS.
#[derive(Debug, Clone)]
pub struct ServerTlsFiles {
    /// Certificate chain.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// CA of client certificates: with it, every client must show one of it.
    pub client_ca: Option<PathBuf>,
    /// Client certificates that its CAs have revoked.
    pub client_crl: Option<PathBuf>,
    /// Protocol versions.
    pub versions: Versions,
}

/// A server's certificate in use.
#[derive(Debug, Clone)]
pub struct ServerTls {
    /// For rustls.
    pub config: Arc<ServerConfig>,
    /// Of the certificate that clients see.
    pub fingerprint: Fingerprint,
    /// The certificate chain and its key.
    pub certified: Arc<CertifiedKey>,
    /// When the first list of revoked client certificates runs out.
    pub crl_next_update: Option<SystemTime>,
}

impl ServerTlsFiles {
    /// Certificate and key, and TLS 1.3 only.
    #[must_use]
    pub fn new(certificate: PathBuf, key: PathBuf) -> Self {
        Self { certificate, key, client_ca: None, client_crl: None, versions: Versions::Tls13 }
    }

    /// Reads the files.
    pub fn load(&self) -> Result<ServerTls, TlsError> {
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(self.versions.supported())
            .map_err(|e| TlsError::Configuration(e.to_string()))?;
        let builder = match self.client_verifier()? {
            None => builder.with_no_client_auth(),
            Some(verifier) => builder.with_client_cert_verifier(verifier),
        };
        let certified = Arc::new(self.certified()?);
        let fingerprint = Fingerprint::of(&certified.cert[0]);
        let resolver = SingleCertAndKey::from(Arc::clone(&certified));
        let mut config = builder.with_cert_resolver(Arc::new(resolver));
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.require_ems = true;
        let crl_next_update = self.client_crl.as_deref().and_then(next_update_of);
        Ok(ServerTls { config: Arc::new(config), fingerprint, certified, crl_next_update })
    }

    fn certified(&self) -> Result<CertifiedKey, TlsError> {
        let chain = read_certificates("certificate", &self.certificate)?;
        let key = read_key(&self.key)?;
        CertifiedKey::from_der(chain, key, &provider()).map_err(|e| {
            TlsError::Configuration(format!(
                "certificate {} and key {}: {e}",
                self.certificate.display(),
                self.key.display()
            ))
        })
    }

    fn client_verifier(&self) -> Result<Option<Arc<dyn ClientCertVerifier>>, TlsError> {
        let Some(path) = &self.client_ca else { return Ok(None) };
        let mut roots = RootCertStore::empty();
        for certificate in read_certificates("client CA", path)? {
            roots.add(certificate).map_err(|e| read_error("client CA", path, e))?;
        }
        let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
        if let Some(path) = &self.client_crl {
            // A list that has run out no longer says who was revoked since.
            builder = builder
                .with_crls(read_revocations("client CRL", path)?)
                .enforce_revocation_expiration();
        }
        builder.build().map(Some).map_err(|e| TlsError::Configuration(e.to_string()))
    }

    fn paths(&self) -> Vec<PathBuf> {
        let more = [&self.client_ca, &self.client_crl].into_iter().flatten();
        [&self.certificate, &self.key].into_iter().chain(more).cloned().collect()
    }
}

impl ServerTls {
    /// The chain that clients are shown.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// When the certificate ends.
    #[must_use]
    pub fn expiry(&self) -> Option<SystemTime> {
        certificate::expiry(self.chain().first()?)
    }
}

/// A server's TLS whose files are read again when they have changed. While they are wrong, as in
/// the middle of a change by hand, what was read last stays in use.
#[derive(Debug)]
pub struct ReloadedTls(Reloaded<ServerTls, TlsError>);

impl ReloadedTls {
    /// Reads the files, which must be right at the start.
    pub fn open(files: ServerTlsFiles) -> Result<Self, TlsError> {
        Reloaded::open(files.paths(), move || files.load()).map(Self)
    }

    /// What is in use for the next connection.
    #[must_use]
    pub fn current(&self) -> Arc<ServerTls> {
        let (tls, changed) = self.0.last_right();
        match changed {
            Changed::No => {}
            Changed::Yes => info!(fingerprint = %tls.fingerprint, "TLS files have been read again"),
            Changed::Wrong(error) => {
                warn!(%error, "TLS files have changed and are wrong; what was read before stays in use");
            }
        }
        tls
    }
}

impl From<ServerTls> for ReloadedTls {
    /// One that never changes.
    fn from(tls: ServerTls) -> Self {
        Self(Reloaded::fixed(tls))
    }
}
