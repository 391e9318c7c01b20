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
    connect::DonorConnection,
    connection::Privilege,
    listener::Listener,
    login::{
        DatabaseAccounts,
        server::{Database, KeyDirectory, LogInService, NoKeys},
    },
    tls::{
        self, Fingerprint, Versions,
        server::{ReloadedTls, ServerTls, ServerTlsFiles},
    },
};
use marcot_proto::auth::v1::auth_service_server::{AuthService, AuthServiceServer};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    IsCa, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber, date_time_ymd,
};
use rustls::{
    SupportedProtocolVersion,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server as TonicServer;
use x509_parser::prelude::{FromDer as _, X509Certificate};

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

    pub async fn start_reloaded(tls: Arc<ReloadedTls>) -> Self {
        Self::start_all(Some(tls), None, Arc::new(NoKeys), false).await
    }

    pub async fn start_with_keys(
        tls: Option<ServerTls>,
        accounts: Option<&Path>,
        keys: Arc<dyn KeyDirectory>,
        require_tls: bool,
    ) -> Self {
        let tls = tls.map(|tls| Arc::new(ReloadedTls::from(tls)));
        Self::start_all(tls, accounts, keys, require_tls).await
    }

    async fn start_all(
        tls: Option<Arc<ReloadedTls>>,
        accounts: Option<&Path>,
        keys: Arc<dyn KeyDirectory>,
        require_tls: bool,
    ) -> Self {
        let fingerprint = tls.as_ref().map(|tls| tls.current().fingerprint);
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), tls).await.unwrap();
        let address = listener.local_address().unwrap();
        let file = accounts.map(|path| Arc::new(AccountsFile::open(path).unwrap()));
        let policy = Policy {
            accounts: file.is_some(),
            identities: None,
            require_tls,
            allow_from: Vec::new(),
            rules: RULES,
        };
        let log_in = AuthServiceServer::new(LogInService::new(file, keys));
        Self::serve(listener, address, fingerprint, policy, log_in)
    }

    /// A server whose accounts are those of a database.
    pub async fn start_with_database(
        tls: Option<ServerTls>,
        accounts: Arc<dyn DatabaseAccounts>,
    ) -> Self {
        let fingerprint = tls.as_ref().map(|tls| tls.fingerprint);
        let tls = tls.map(|tls| Arc::new(ReloadedTls::from(tls)));
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), tls.clone()).await.unwrap();
        let address = listener.local_address().unwrap();
        let database = Some(Database::new(accounts, tls));
        let log_in = LogInService::new(None, Arc::new(NoKeys)).with_database(database);
        let log_in = AuthServiceServer::new(log_in);
        Self::serve(listener, address, fingerprint, open_policy(), log_in)
    }

    /// A server without TLS whose log-in is another's.
    pub async fn start_log_in<S: AuthService>(log_in: AuthServiceServer<S>) -> Self {
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), None).await.unwrap();
        let address = listener.local_address().unwrap();
        Self::serve(listener, address, None, open_policy(), log_in)
    }

    fn serve<S: AuthService>(
        listener: Listener,
        address: SocketAddr,
        fingerprint: Option<Fingerprint>,
        policy: Policy,
        log_in: AuthServiceServer<S>,
    ) -> Self {
        let stop = CancellationToken::new();
        let (_, health) = tonic_health::server::health_reporter();
        let server = TonicServer::builder()
            .layer(AccessLayer(Arc::new(policy)))
            .add_service(health)
            .add_service(log_in);
        let incoming = listener.incoming(stop.clone());
        tokio::spawn(server.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned()));
        Self { address, fingerprint, stop }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }
}

fn open_policy() -> Policy {
    Policy {
        accounts: false,
        identities: None,
        require_tls: false,
        allow_from: Vec::new(),
        rules: RULES,
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
        self.files(names, 2049).load().unwrap()
    }

    pub fn expired_server(&self, names: &[&str]) -> ServerTls {
        self.files(names, 2002).load().unwrap()
    }

    pub fn server_with_client_ca(&self, names: &[&str]) -> ServerTls {
        let files = self.files(names, 2049);
        ServerTlsFiles { client_ca: Some(self.ca()), ..files }.load().unwrap()
    }

    /// A server that takes the versions that are named.
    pub fn server_with(&self, names: &[&str], versions: Versions) -> ServerTls {
        ServerTlsFiles { versions, ..self.files(names, 2049) }.load().unwrap()
    }

    /// Chain and key of a server that ends in that year.
    pub fn files(&self, names: &[&str], year: i32) -> ServerTlsFiles {
        let (certificate, key) = self.sign(names, year);
        ServerTlsFiles::new(certificate, key)
    }

    /// Lists a certificate as revoked, or none; the list ends in that year.
    pub fn revoke(&self, certificate: Option<&Path>, year: i32) -> PathBuf {
        let serial = certificate.map(|path| {
            let der = CertificateDer::from_pem_file(path).unwrap();
            let (_, certificate) = X509Certificate::from_der(&der).unwrap();
            SerialNumber::from_slice(certificate.raw_serial())
        });
        let revoked = serial.map(|serial_number| RevokedCertParams {
            serial_number,
            revocation_time: date_time_ymd(2001, 2, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2001, 2, 1),
            next_update: date_time_ymd(year, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.into_iter().collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let path = self.directory.path().join(format!("{}.crl", uuid::Uuid::new_v4()));
        std::fs::write(&path, list.signed_by(&self.issuer).unwrap().pem().unwrap()).unwrap();
        path
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
        let certified = Arc::new(rustls::sign::CertifiedKey::new(chain, key));
        let shown = rustls::sign::SingleCertAndKey::from(Arc::clone(&certified));
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(shown));
        config.alpn_protocols = vec![b"h2".to_vec()];
        ServerTls { config: Arc::new(config), fingerprint, certified, crl_next_update: None }
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
        let chain = chain.unwrap();
        let secret = || PrivateKeyDer::from_pem_file(&key).unwrap();
        let certified = rustls::sign::CertifiedKey::from_der(chain.clone(), secret(), &provider);
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, secret())
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let certified = Arc::new(certified.unwrap());
        ServerTls { config: Arc::new(config), fingerprint, certified, crl_next_update: None }
    }

    pub fn client(&self) -> (PathBuf, PathBuf) {
        self.sign(&["client"], 2049)
    }

    /// A client that ends in that year.
    pub fn client_until(&self, year: i32) -> (PathBuf, PathBuf) {
        self.sign(&["client"], year)
    }

    /// A client that begins in 2048.
    pub fn client_to_come(&self) -> (PathBuf, PathBuf) {
        self.sign_from(&["client"], 2048, 2049)
    }

    /// Chain and key of a server that begins in 2048.
    pub fn files_to_come(&self, names: &[&str]) -> ServerTlsFiles {
        let (certificate, key) = self.sign_from(names, 2048, 2049);
        ServerTlsFiles::new(certificate, key)
    }

    fn sign(&self, names: &[&str], year: i32) -> (PathBuf, PathBuf) {
        self.sign_from(names, 2001, year)
    }

    fn sign_from(&self, names: &[&str], from: i32, year: i32) -> (PathBuf, PathBuf) {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.not_before = date_time_ymd(from, 1, 1);
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

/// Asks for a server's health on a connection.
pub async fn ask_health(connection: &DonorConnection) -> Result<(), tonic::Status> {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    let mut client = HealthClient::new(connection.channel.clone());
    client.check(HealthCheckRequest { service: String::new() }).await.map(|_| ())
}
