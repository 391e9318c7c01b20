//! The server's side.

use std::{path::Path, sync::Arc};

use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier};

use super::{Fingerprint, TlsError, Versions, provider, read_certificates, read_error, read_key};

/// A server's certificate in use.
#[derive(Debug, Clone)]
pub struct ServerTls {
    /// For rustls.
    pub config: Arc<ServerConfig>,
    /// Of the certificate that clients see.
    pub fingerprint: Fingerprint,
}

/// Reads certificate chain and key, for TLS 1.3 only; with a client CA, every client must show a
/// certificate of it.
pub fn load(
    certificate: &Path,
    key: &Path,
    client_ca: Option<&Path>,
) -> Result<ServerTls, TlsError> {
    load_with(certificate, key, client_ca, Versions::Tls13)
}

/// The same as `load`, with a word on the protocol versions.
pub fn load_with(
    certificate: &Path,
    key: &Path,
    client_ca: Option<&Path>,
    versions: Versions,
) -> Result<ServerTls, TlsError> {
    let chain = read_certificates("certificate", certificate)?;
    let fingerprint = Fingerprint::of(&chain[0]);
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(versions.supported())
        .map_err(|e| TlsError::Configuration(e.to_string()))?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in read_certificates("client CA", path)? {
                roots.add(certificate).map_err(|e| read_error("client CA", path, e))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
                .build()
                .map_err(|e| TlsError::Configuration(e.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(chain, read_key(key)?).map_err(|e| {
        TlsError::Configuration(format!(
            "certificate {} and key {}: {e}",
            certificate.display(),
            key.display()
        ))
    })?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.require_ems = true;
    Ok(ServerTls { config: Arc::new(config), fingerprint })
}
