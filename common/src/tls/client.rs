//! The client's side: whom to believe.

use std::{path::PathBuf, sync::Arc};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};

use super::{
    Fingerprint, TlsError, Versions, provider, read_certificates, read_error, read_key,
    read_revocations,
};

/// What a client believes and shows. Without CA and fingerprint: the system's roots.
#[derive(Debug, Clone, Default)]
pub struct ClientTls {
    /// File with the CA certificates that are believed.
    pub ca: Option<PathBuf>,
    /// File with the lists of certificates that CAs have revoked.
    pub crl: Option<PathBuf>,
    /// Files with the client's own certificate chain and key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// The one certificate that is believed, whoever has signed it.
    pub fingerprint: Option<Fingerprint>,
}

impl ClientTls {
    /// The same, but for one certificate only, if one is given.
    #[must_use]
    pub fn with_fingerprint(&self, fingerprint: Option<[u8; 32]>) -> Self {
        Self { fingerprint: fingerprint.map(Fingerprint).or(self.fingerprint), ..self.clone() }
    }

    /// Whether something is set that makes plaintext out of the question.
    #[must_use]
    pub fn demands_tls(&self) -> bool {
        self.ca.is_some()
            || self.crl.is_some()
            || self.certificate.is_some()
            || self.fingerprint.is_some()
    }

    /// Reads the files, for TLS 1.3 only.
    pub fn load(&self) -> Result<Arc<ClientConfig>, TlsError> {
        self.load_with(Versions::Tls13)
    }

    /// Reads the files.
    pub fn load_with(&self, versions: Versions) -> Result<Arc<ClientConfig>, TlsError> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(versions.supported())
            .map_err(|e| TlsError::Configuration(e.to_string()))?;
        let builder = if self.fingerprint.is_none() && self.crl.is_none() {
            builder.with_root_certificates(self.roots()?)
        } else {
            builder.dangerous().with_custom_certificate_verifier(self.verifier()?)
        };
        let mut config = match &self.certificate {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => builder
                .with_client_auth_cert(
                    read_certificates("client certificate", certificate)?,
                    read_key(key)?,
                )
                .map_err(|e| TlsError::Configuration(format!("client certificate: {e}")))?,
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.require_ems = true;
        Ok(Arc::new(config))
    }

    /// What decides whether a server's certificate is believed.
    pub(crate) fn verifier(&self) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
        let by_chain = || -> Result<Arc<WebPkiServerVerifier>, TlsError> {
            let roots = Arc::new(self.roots()?);
            let mut builder = WebPkiServerVerifier::builder_with_provider(roots, provider());
            if let Some(path) = &self.crl {
                // A list that has run out no longer says who was revoked since.
                builder = builder
                    .with_crls(read_revocations("CRL", path)?)
                    .enforce_revocation_expiration();
            }
            builder.build().map_err(|e| TlsError::Configuration(e.to_string()))
        };
        match self.fingerprint {
            None => Ok(by_chain()?),
            // Whoever gives a list wants no revoked certificate, pinned or not.
            Some(fingerprint) => {
                let chain = self.crl.as_ref().map(|_| by_chain()).transpose()?;
                Ok(Arc::new(Pinned { fingerprint, chain, provider: provider() }))
            }
        }
    }

    fn roots(&self) -> Result<RootCertStore, TlsError> {
        let mut roots = RootCertStore::empty();
        match &self.ca {
            Some(path) => {
                for certificate in read_certificates("CA", path)? {
                    roots.add(certificate).map_err(|e| read_error("CA", path, e))?;
                }
            }
            None => {
                // A host may have no roots at all; then every donor needs a CA or a fingerprint,
                // and the failed handshake says so.
                for certificate in rustls_native_certs::load_native_certs().certs {
                    drop(roots.add(certificate));
                }
            }
        }
        Ok(roots)
    }
}

/// Believes one certificate, and still has the server prove that it holds its key.
#[derive(Debug)]
struct Pinned {
    fingerprint: Fingerprint,
    /// Where a revocation list is given: it must be right by its chain as well.
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let seen = Fingerprint::of(end_entity);
        if seen == self.fingerprint {
            if let Some(chain) = &self.chain {
                chain.verify_server_cert(
                    end_entity,
                    intermediates,
                    server_name,
                    ocsp_response,
                    now,
                )?;
            }
            return Ok(ServerCertVerified::assertion());
        }
        Err(rustls::Error::General(format!(
            "the server's certificate has fingerprint {seen}, {} is expected",
            self.fingerprint
        )))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
