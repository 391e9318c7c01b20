//! The client's side: whom to believe.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime},
    sign::{CertifiedKey, SingleCertAndKey},
};
use tracing::warn;

use super::{
    Fingerprint, TlsError, Versions, certificate, provider, read_certificates, read_error,
    read_key, read_revocations,
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
    /// What the files said when they were last right; clones share it.
    pub last_right: Arc<LastRight>,
}

/// What a client's files said when they were last right: files that are exchanged one after the other are
/// wrong for a moment, in which a clone that runs must be able to connect again.
#[derive(Debug, Default)]
pub struct LastRight {
    roots: Last<Arc<RootCertStore>>,
    lists: Last<Vec<CertificateRevocationListDer<'static>>>,
    chain: Last<Chain>,
    own: Last<Own>,
}

/// Roots and the lists of what was revoked, and when the first of those runs out.
type Chain = (Arc<WebPkiServerVerifier>, Option<SystemTime>);

/// The client's own certificate, and when it ends.
type Own = (Arc<SingleCertAndKey>, Option<SystemTime>);

/// One of them, and what was told last of what is wrong with it now.
#[derive(Debug)]
struct Last<T>(Mutex<(Option<T>, String)>);

impl<T> Default for Last<T> {
    fn default() -> Self {
        Self(Mutex::new((None, String::new())))
    }
}

impl<T: Clone> Last<T> {
    /// What was read, or what was read before.
    fn or(&self, read: Result<T, TlsError>) -> Result<T, TlsError> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match (read, &*last) {
            (Ok(value), _) => {
                *last = (Some(value.clone()), String::new());
                Ok(value)
            }
            (Err(error), (Some(value), told)) => {
                let (value, text) = (value.clone(), error.to_string());
                if *told != text {
                    warn!(%error, "TLS files have changed and are wrong; what was read before stays in use");
                    last.1 = text;
                }
                Ok(value)
            }
            (Err(error), (None, _)) => Err(error),
        }
    }
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

    /// Reads the files; what is wrong with one counts only where it was never right.
    pub fn load_with(&self, versions: Versions) -> Result<Arc<ClientConfig>, TlsError> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(versions.supported())
            .map_err(|e| TlsError::Configuration(e.to_string()))?;
        let builder = if self.fingerprint.is_none() && self.crl.is_none() {
            builder.with_root_certificates(self.last_right.roots.or(self.read_roots())?)
        } else {
            builder.dangerous().with_custom_certificate_verifier(self.verifier()?)
        };
        let mut config = match &self.certificate {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let (own, _) = self.last_right.own.or(read_own(certificate, key))?;
                builder.with_client_cert_resolver(own)
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.require_ems = true;
        Ok(Arc::new(config))
    }

    /// When the certificate that the next connection would show ends: of files that are wrong now, the one
    /// that was right last.
    #[must_use]
    pub fn expiry(&self) -> Option<SystemTime> {
        let (certificate, key) = self.certificate.as_ref()?;
        self.last_right.own.or(read_own(certificate, key)).ok()?.1
    }

    /// When the first of the lists that the next connection would go by runs out.
    #[must_use]
    pub fn crl_next_update(&self) -> Option<SystemTime> {
        self.crl.as_ref()?;
        self.chain().ok()?.1
    }

    /// What is wrong with the files now, whatever stays in use.
    #[must_use]
    pub fn wrong_files(&self) -> Vec<TlsError> {
        // As they are alone: nothing that was right before.
        let now = Self { last_right: Arc::default(), ..self.clone() };
        let own = now.certificate.as_ref().map(|(certificate, key)| read_own(certificate, key));
        let roots = now.ca.as_ref().and_then(|_| now.read_roots().err());
        let lists = now.crl.as_deref().and_then(|path| read_revocations("CRL", path).err());
        let each = [roots, lists, own.and_then(Result::err)];
        let mut wrong: Vec<_> = each.into_iter().flatten().collect();
        if wrong.is_empty() && now.crl.is_some() {
            wrong.extend(now.chain().err());
        }
        wrong
    }

    /// What decides whether a server's certificate is believed.
    pub(crate) fn verifier(&self) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
        match self.fingerprint {
            None => Ok(self.chain()?.0),
            // Whoever gives a list wants no revoked certificate, pinned or not.
            Some(fingerprint) => {
                let chain = self.crl.as_ref().map(|_| self.chain()).transpose()?;
                let chain = chain.map(|(verifier, _)| verifier);
                Ok(Arc::new(Pinned { fingerprint, chain, provider: provider() }))
            }
        }
    }

    fn chain(&self) -> Result<Chain, TlsError> {
        self.last_right.chain.or(self.read_chain())
    }

    /// CAs and lists are each what was right last: a wrong file of one keeps nothing new of the other out.
    fn read_chain(&self) -> Result<Chain, TlsError> {
        let roots = self.last_right.roots.or(self.read_roots())?;
        let mut next_update = None;
        let mut builder = WebPkiServerVerifier::builder_with_provider(roots, provider());
        if let Some(path) = &self.crl {
            // A list that has run out no longer says who was revoked since.
            let lists = self.last_right.lists.or(read_revocations("CRL", path))?;
            next_update = lists.iter().filter_map(certificate::next_update).min();
            builder = builder.with_crls(lists).enforce_revocation_expiration();
        }
        let verifier = builder.build().map_err(|e| TlsError::Configuration(e.to_string()))?;
        Ok((verifier, next_update))
    }

    fn read_roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        let Some(path) = &self.ca else {
            // A host may have no roots at all; then every donor needs a CA or a fingerprint,
            // and the failed handshake says so.
            for certificate in rustls_native_certs::load_native_certs().certs {
                drop(roots.add(certificate));
            }
            return Ok(Arc::new(roots));
        };
        for certificate in read_certificates("CA", path)? {
            roots.add(certificate).map_err(|e| read_error("CA", path, e))?;
        }
        Ok(Arc::new(roots))
    }
}

/// The client's own certificate, and the key that fits it.
fn read_own(chain: &Path, key: &Path) -> Result<Own, TlsError> {
    let certificates = read_certificates("client certificate", chain)?;
    let expiry = certificates.first().and_then(certificate::expiry);
    let own = CertifiedKey::from_der(certificates, read_key(key)?, &provider()).map_err(|e| {
        TlsError::Configuration(format!(
            "client certificate {} and key {}: {e}",
            chain.display(),
            key.display()
        ))
    })?;
    Ok((Arc::new(SingleCertAndKey::from(own)), expiry))
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
