//! Servers and certificates for the tests of connections.

#![expect(unreachable_pub, reason = "a module of test programs")]
#![allow(dead_code, reason = "each test program uses its own part")]

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use marcot_common::{
    access::{AccessLayer, Policy, Rule},
    accounts::AccountsFile,
    connection::Privilege,
    listener::Listener,
    login::server::{KeyDirectory, LogInService, NoKeys},
    tls::{self, Fingerprint, Versions, server::ServerTls},
};
use marcot_proto::auth::v1::auth_service_server::AuthServiceServer;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd,
};
use rustls::{
    SupportedProtocolVersion,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server as TonicServer;

/// A server that has log-in, health, and a rule for every method of the donor.
pub struct Server {
    address: SocketAddr,
    pub fingerprint: Option<Fingerprint>,
    stop: CancellationToken,
}

pub const RULES: &[(&str, Rule)] =
    &[("/marcot.donor.v1.DonorService/", Rule::Needs(Privilege::BackupAdmin))];

impl Server {
    pub async fn start(tls: Option<ServerTls>, accounts: Option<&Path>) -> Self {
        Self::start_with_keys(tls, accounts, Arc::new(NoKeys), false).await
    }

    pub async fn start_with_keys(
        tls: Option<ServerTls>,
        accounts: Option<&Path>,
        keys: Arc<dyn KeyDirectory>,
        require_tls: bool,
    ) -> Self {
        let fingerprint = tls.as_ref().map(|tls| tls.fingerprint);
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), tls).await.unwrap();
        let address = listener.local_address().unwrap();
        let stop = CancellationToken::new();
        let file = accounts.map(|path| Arc::new(AccountsFile::open(path).unwrap()));
        let policy = Policy { accounts: file.is_some(), require_tls, rules: RULES };
        let (_, health) = tonic_health::server::health_reporter();
        let server = TonicServer::builder()
            .layer(AccessLayer(Arc::new(policy)))
            .add_service(health)
            .add_service(AuthServiceServer::new(LogInService::new(file, keys)));
        let incoming = listener.incoming(stop.clone());
        tokio::spawn(server.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned()));
        Self { address, fingerprint, stop }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A CA and what it signs, in files.
pub struct Pki {
    directory: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        let name = format!("test CA {}", uuid::Uuid::new_v4());
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { directory, issuer }
    }

    pub fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    pub fn ca_certificate(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_file(self.ca()).unwrap()
    }

    /// The CA's certificate, whose directory stays.
    pub fn ca_kept(self) -> PathBuf {
        self.directory.keep().join("ca.pem")
    }

    pub fn server(&self, names: &[&str]) -> ServerTls {
        let (certificate, key) = self.sign(names, 2049);
        tls::server::load(&certificate, &key, None).unwrap()
    }

    pub fn expired_server(&self, names: &[&str]) -> ServerTls {
        let (certificate, key) = self.sign(names, 2002);
        tls::server::load(&certificate, &key, None).unwrap()
    }

    pub fn server_with_client_ca(&self, names: &[&str]) -> ServerTls {
        let (certificate, key) = self.sign(names, 2049);
        tls::server::load(&certificate, &key, Some(&self.ca())).unwrap()
    }

    /// A server that takes the versions that are named.
    pub fn server_with(&self, names: &[&str], versions: Versions) -> ServerTls {
        let (certificate, key) = self.sign(names, 2049);
        tls::server::load_with(&certificate, &key, None, versions).unwrap()
    }

    /// A server that shows a certificate of whose key it knows nothing.
    pub fn impostor(&self, names: &[&str]) -> ServerTls {
        let (certificate, _) = self.sign(names, 2049);
        let (_, other_key) = self.sign(names, 2049);
        let fingerprint = tls::fingerprint_of(&certificate).unwrap();
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let key = PrivateKeyDer::from_pem_file(&other_key).unwrap();
        let key = provider.key_provider.load_private_key(key).unwrap();
        let chain = vec![CertificateDer::from_pem_file(&certificate).unwrap()];
        let shown =
            rustls::sign::SingleCertAndKey::from(rustls::sign::CertifiedKey::new(chain, key));
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(shown));
        config.alpn_protocols = vec![b"h2".to_vec()];
        ServerTls { config: Arc::new(config), fingerprint }
    }

    /// A server as other people configure theirs: one version, any protocols inside.
    pub fn foreign_server(
        &self,
        names: &[&str],
        version: &'static SupportedProtocolVersion,
        alpn: &[&str],
    ) -> ServerTls {
        let (certificate, key) = self.sign(names, 2049);
        let fingerprint = tls::fingerprint_of(&certificate).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let chain: Result<Vec<_>, _> =
            CertificateDer::pem_file_iter(&certificate).unwrap().collect();
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain.unwrap(), PrivateKeyDer::from_pem_file(&key).unwrap())
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        ServerTls { config: Arc::new(config), fingerprint }
    }

    pub fn client(&self) -> (PathBuf, PathBuf) {
        self.sign(&["client"], 2049)
    }

    fn sign(&self, names: &[&str], year: i32) -> (PathBuf, PathBuf) {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let label = uuid::Uuid::new_v4();
        let path = |end: &str| self.directory.path().join(format!("{label}.{end}"));
        std::fs::write(path("pem"), certificate.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        (path("pem"), path("key"))
    }
}
