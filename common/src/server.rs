//! What both daemons do alike: options, log-in, access, TLS, reflection, health, admin port, drain.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use futures::StreamExt as _;
use tokio::net::TcpListener;
use tonic::{
    service::{Routes, RoutesBuilder},
    transport::Server,
};
use tracing::{error, info, warn};

use crate::{
    access::{AccessLayer, Policy, Rule},
    accounts::AccountsFile,
    admin::{self, Readiness, StatusPage, health_service, status_page},
    bounded_answer::BoundedAnswer,
    config::{ConfigOptions, VERSION_WITH_COMMIT, loopback_or_authenticated},
    durable::write_atomically,
    failure::chain,
    identities::IdentitiesFile,
    listen::{ListenAddress, parse_socket_mode},
    listener::Listener,
    login::{
        DatabaseAccounts, LOG_IN_MESSAGE_BYTES_MAX,
        server::{Database, KeyDirectory, LogInService},
    },
    network::Network,
    os,
    request_body::{OPEN_REQUEST_BYTES_MAX, RequestBodyLayer},
    service_manager,
    shutdown::Shutdown,
    telemetry::{self, LogOptions, Telemetry, metrics::Metrics, rpc::RpcLayer},
    tls::{
        Versions,
        server::{ReloadedTls, ServerTlsFiles},
    },
};

/// HTTP/2 frames as large as chunks.
const FRAME_BYTES: u32 = 1 << 20;

/// Most calls at one time on one connection.
const STREAMS_MAX: u32 = 128;

/// A dead client is found within two of these.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Most addresses and sockets to listen on: an address of each kind, and a socket.
const LISTEN_MAX: usize = 8;

/// How long calls that still run may take after the drain.
const LAST_CALLS_MAX: Duration = Duration::from_secs(2);

/// Options that both daemons have.
#[derive(Debug, Clone, clap::Args)]
pub struct ServerOptions {
    /// Where settings come from.
    #[command(flatten)]
    pub config: ConfigOptions,
    /// Accounts file (see `marcot account`); without it nobody has to log in.
    #[arg(long, value_name = "FILE", env = "MARCOT_ACCOUNTS")]
    pub accounts: Option<PathBuf>,
    /// Who is known by a client certificate or a token, and may do what; without it nobody is.
    #[arg(long, value_name = "FILE", env = "MARCOT_IDENTITIES")]
    pub identities: Option<PathBuf>,
    /// Certificate chain in PEM form; with it the port serves TLS as well as plaintext.
    #[arg(long, value_name = "FILE", env = "MARCOT_TLS_CERT", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of the certificate, in PEM form.
    #[arg(long, value_name = "FILE", env = "MARCOT_TLS_KEY", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// CA of client certificates; with it every TLS client must show one.
    #[arg(long, value_name = "FILE", env = "MARCOT_TLS_CLIENT_CA", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,
    /// Client certificates that were revoked: CRLs of their CAs, in PEM form.
    #[arg(long, value_name = "FILE", env = "MARCOT_TLS_CLIENT_CRL", requires = "tls_client_ca")]
    pub tls_client_crl: Option<PathBuf>,
    /// Oldest version of TLS that is spoken, 1.3 or 1.2.
    #[arg(long, value_name = "VERSION", default_value = "1.3", env = "MARCOT_TLS_MIN_VERSION")]
    pub tls_min_version: Versions,
    /// Refuse every call that comes in plaintext.
    #[arg(long, env = "MARCOT_REQUIRE_TLS", requires = "tls_cert")]
    pub require_tls: bool,
    /// Mode of a Unix socket that --listen names: 0600, or 0660 for its group as well.
    #[arg(long, value_name = "MODE", default_value = "0600", env = "MARCOT_SOCKET_MODE",
          value_parser = parse_socket_mode)]
    pub socket_mode: u32,
    /// Addresses and networks that callers may come from, as 10.0.0.0/8; may be repeated
    /// [default: from anywhere].
    #[arg(long, value_name = "NETWORK", env = "MARCOT_ALLOW_FROM", value_delimiter = ',')]
    pub allow_from: Vec<Network>,
    /// Port for probes, scrapes and browsers, in plaintext: /healthz, /readyz, /metrics,
    /// grpc.health.v1, and the status page at /.
    #[arg(long, value_name = "ADDR", env = "MARCOT_ADMIN_LISTEN")]
    pub admin_listen: Option<SocketAddr>,
    /// No status page on that port: it shows statements without their secrets, hosts, paths and users
    /// to whoever reaches the port.
    #[arg(long, env = "MARCOT_NO_STATUS_PAGE")]
    pub no_status_page: bool,
    /// Write a JSON file with the addresses in use once calls are taken.
    #[arg(long, value_name = "FILE", env = "MARCOT_READY_FILE")]
    pub ready_file: Option<PathBuf>,
    /// Seconds that running clones may take to end after SIGTERM.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, env = "MARCOT_DRAIN_SECONDS")]
    pub drain_seconds: u64,
    /// How logs are written.
    #[command(flatten)]
    pub logs: LogOptions,
}

/// What a daemon is.
#[derive(Debug, Clone, Copy)]
pub struct Role {
    /// "donor" or "recipient".
    pub name: &'static str,
    /// Full name of its service.
    pub service: &'static str,
    /// What its methods ask of their callers.
    pub rules: &'static [(&'static str, Rule)],
    /// Path prefixes and the bytes of their largest request.
    pub requests: &'static [(&'static str, usize)],
}

/// Files that the options name, read and checked.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// Certificate in use.
    pub tls: Option<Arc<ReloadedTls>>,
    /// Accounts in use.
    pub accounts: Option<Arc<AccountsFile>>,
    /// Accounts of the donor's database, instead.
    pub database: Option<Arc<dyn DatabaseAccounts>>,
    /// Who is known without a log-in.
    pub identities: Option<Arc<IdentitiesFile>>,
}

impl Prepared {
    /// Whether callers must be known.
    #[must_use]
    pub fn has_accounts(&self) -> bool {
        self.accounts.is_some() || self.database.is_some() || self.identities.is_some()
    }
}

impl ServerOptions {
    /// Reads all files that the options name, and tells all that is wrong with them; `database` are
    /// accounts that are in no file.
    pub fn prepare(
        &self,
        listen: &[ListenAddress],
        database: Option<Arc<dyn DatabaseAccounts>>,
    ) -> Result<Prepared, Vec<String>> {
        let mut problems = Vec::new();
        let mut note = |problem: String| problems.push(problem);
        let tls = self.tls_files().and_then(|files| {
            ReloadedTls::open(files).map(Arc::new).map_err(|e| note(e.to_string())).ok()
        });
        let accounts = self.accounts.as_deref().and_then(|path| {
            AccountsFile::open(path).map(Arc::new).map_err(|e| note(e.to_string())).ok()
        });
        let identities = self.identities.as_deref().and_then(|path| {
            IdentitiesFile::open(path).map(Arc::new).map_err(|e| note(e.to_string())).ok()
        });
        let names_certificates = identities
            .as_ref()
            .and_then(|file| file.current())
            .is_some_and(|i| i.names_certificates());
        if names_certificates && self.tls_client_ca.is_none() {
            note(
                "--identities names client certificates, which are asked for only with \
                 --tls-client-ca"
                    .to_owned(),
            );
        }
        let authenticates =
            self.accounts.is_some() || self.identities.is_some() || database.is_some();
        if listen.len() > LISTEN_MAX {
            note(format!("--listen is given {} times, at most {LISTEN_MAX} times", listen.len()));
        }
        for listen in listen {
            let ListenAddress::Tcp(listen) = listen else { continue };
            if let Err(problem) = loopback_or_authenticated(*listen, authenticates) {
                note(problem.to_string());
            }
        }
        if problems.is_empty() {
            Ok(Prepared { tls, accounts, database, identities })
        } else {
            Err(problems)
        }
    }

    fn tls_files(&self) -> Option<ServerTlsFiles> {
        let (certificate, key) = self.tls_cert.clone().zip(self.tls_key.clone())?;
        Some(ServerTlsFiles {
            certificate,
            key,
            client_ca: self.tls_client_ca.clone(),
            client_crl: self.tls_client_crl.clone(),
            versions: self.tls_min_version,
        })
    }

    /// Sets logs up.
    pub fn init_telemetry(&self, role: Role) -> Result<Telemetry, Problem> {
        telemetry::init(role.name, &self.logs).map_err(|e| Problem::Settings(vec![e.to_string()]))
    }
}

/// A daemon that is being put together.
#[derive(Debug)]
pub struct Daemon {
    /// What it is.
    pub role: Role,
    /// Its options.
    pub options: ServerOptions,
    /// Its files.
    pub prepared: Prepared,
    /// Its metrics.
    pub metrics: Arc<Metrics>,
    /// Its status page.
    pub page: Arc<dyn StatusPage>,
    /// Its end.
    pub shutdown: Shutdown,
}

impl Daemon {
    /// Listens, serves until drained, and returns when all calls have ended.
    ///
    /// `add` puts the daemon's own service among the routes; `drain` returns once nothing runs.
    pub async fn serve(
        self,
        listen: &[ListenAddress],
        keys: Arc<dyn KeyDirectory>,
        add: impl FnOnce(&mut RoutesBuilder),
        drain: impl Future<Output = ()>,
    ) -> Result<(), String> {
        let (listeners, addresses) = self.bind(listen).await?;
        if let Some(tls) = &self.prepared.tls {
            let (certificate, list) = (Arc::clone(tls), Arc::clone(tls));
            self.metrics.add_certificate("tls-cert", move || certificate.current().expiry());
            self.metrics
                .add_revocation_list("tls-client-crl", move || list.current().crl_next_update);
        }
        let readiness = Readiness::new();
        let routes = self.routes(keys, &readiness, add)?;
        let bodies = RequestBodyLayer::new(self.role.requests);
        let admin = self.serve_admin(&readiness).await?;
        let policy = Policy {
            accounts: self.prepared.has_accounts(),
            identities: self.prepared.identities.clone(),
            require_tls: self.options.require_tls,
            allow_from: self.options.allow_from.clone(),
            rules: self.role.rules,
        };
        let services = [self.role.service, "marcot.auth.v1.AuthService", "grpc.health.v1.Health"];
        let server = Server::builder()
            .max_frame_size(Some(FRAME_BYTES))
            .max_concurrent_streams(Some(STREAMS_MAX))
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .layer(RpcLayer::new(&self.metrics, &services))
            .layer(AccessLayer(Arc::new(policy)))
            .layer(bodies)
            .add_routes(routes);
        let stop = self.shutdown.stop.clone();
        let incoming =
            listeners.into_iter().map(|listener| listener.incoming(stop.clone()).boxed());
        let incoming = futures::stream::select_all(incoming);
        let stopped = stop.clone().cancelled_owned();
        let serving = tokio::spawn(server.serve_with_incoming_shutdown(incoming, stopped));
        readiness.set_ready();
        self.announce(&addresses, admin)?;
        self.shutdown.drain.cancelled().await;
        service_manager::stopping();
        readiness.set_draining();
        let bound = Duration::from_secs(self.options.drain_seconds);
        tokio::select! {
            () = drain => {}
            () = tokio::time::sleep(bound) => {
                warn!(seconds = self.options.drain_seconds, "clones still run; they are ended");
            }
            () = stop.cancelled() => {}
        }
        stop.cancel();
        match tokio::time::timeout(LAST_CALLS_MAX, serving).await {
            Ok(Ok(Err(e))) => Err(chain(&e)),
            Ok(Err(e)) => Err(e.to_string()),
            Ok(Ok(Ok(()))) | Err(_) => Ok(()),
        }
    }

    /// Listens everywhere, and says where: with the ports that the system chose.
    async fn bind(
        &self,
        listen: &[ListenAddress],
    ) -> Result<(Vec<Listener>, Vec<ListenAddress>), String> {
        let (mut listeners, mut addresses) = (Vec::new(), Vec::new());
        for listen in listen {
            let failed = |e: std::io::Error| format!("listen on {listen}: {e}");
            let listener = match listen {
                ListenAddress::Tcp(address) => {
                    let tls = self.prepared.tls.clone();
                    let listener = Listener::bind(*address, tls).await.map_err(failed)?;
                    let address = listener.local_address().map_err(failed)?;
                    addresses.push(ListenAddress::Tcp(address));
                    listener
                }
                ListenAddress::Unix(path) => {
                    addresses.push(listen.clone());
                    Listener::bind_unix(path, self.options.socket_mode).map_err(failed)?
                }
            };
            let listener = listener.with_identities(self.prepared.identities.clone());
            listeners.push(listener.counted_in(self.metrics.connections()));
        }
        Ok((listeners, addresses))
    }

    fn routes(
        &self,
        keys: Arc<dyn KeyDirectory>,
        readiness: &Readiness,
        add: impl FnOnce(&mut RoutesBuilder),
    ) -> Result<Routes, String> {
        use marcot_proto::auth::v1::auth_service_server::AuthServiceServer;
        let database = self.prepared.database.clone();
        let database = database.map(|accounts| Database::new(accounts, self.prepared.tls.clone()));
        let log_in =
            LogInService::new(self.prepared.accounts.clone(), keys).with_database(database);
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(marcot_proto::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .with_service_name(self.role.service)
                .with_service_name("marcot.auth.v1.AuthService")
                .with_service_name("grpc.health.v1.Health")
        };
        let v1 = reflection().build_v1().map_err(|e| e.to_string())?;
        let v1alpha = reflection().build_v1alpha().map_err(|e| e.to_string())?;
        let mut routes = RoutesBuilder::default();
        routes
            .add_service(health_service(readiness, &[self.role.service]))
            .add_service(
                AuthServiceServer::new(log_in).max_decoding_message_size(LOG_IN_MESSAGE_BYTES_MAX),
            )
            .add_service(BoundedAnswer(v1.max_decoding_message_size(OPEN_REQUEST_BYTES_MAX)))
            .add_service(BoundedAnswer(v1alpha.max_decoding_message_size(OPEN_REQUEST_BYTES_MAX)));
        add(&mut routes);
        Ok(routes.routes())
    }

    async fn serve_admin(&self, readiness: &Readiness) -> Result<Option<SocketAddr>, String> {
        let Some(listen) = self.options.admin_listen else { return Ok(None) };
        let failed = |e: std::io::Error| format!("listen on {listen} (--admin-listen): {e}");
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let metrics = Arc::clone(&self.metrics);
        // Who reaches the other port fills no room of this one.
        let bodies = RequestBodyLayer::new(&[]);
        let mut router = admin::router(metrics, readiness, &[self.role.service], &bodies);
        let stop = self.shutdown.stop.clone();
        if !self.options.no_status_page {
            let page = Arc::clone(&self.page);
            router = router.merge(status_page::router(self.role.name, page, readiness.clone()));
            tokio::spawn(status_page::sample(Arc::clone(&self.page), stop.clone()));
        }
        tokio::spawn(async move {
            if let Err(e) = admin::serve(listener, router, stop).await {
                error!(error = %e, "the admin port has stopped");
            }
        });
        Ok(Some(address))
    }

    /// Says where calls are taken: in the log, and in the ready file.
    fn announce(
        &self,
        addresses: &[ListenAddress],
        admin: Option<SocketAddr>,
    ) -> Result<(), String> {
        let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let is_tcp = |address: &&ListenAddress| matches!(address, ListenAddress::Tcp(_));
        let first = addresses.iter().find(is_tcp).or(addresses.first()).map(ToString::to_string);
        let fingerprint =
            self.prepared.tls.as_ref().map(|tls| tls.current().fingerprint.to_string());
        info!(
            version = VERSION_WITH_COMMIT,
            listen = %texts.join(", "),
            admin_listen = admin.map(tracing::field::display),
            fingerprint = fingerprint.as_deref(),
            accounts = self.prepared.has_accounts(),
            "marcot-{} takes calls",
            self.role.name
        );
        service_manager::ready(&texts.join(", "));
        let Some(path) = &self.options.ready_file else {
            return Ok(());
        };
        let text = serde_json::json!({
            "listen": first,
            "listen_all": texts,
            "admin_listen": admin.map(|address| address.to_string()),
            "fingerprint": fingerprint,
        });
        write_atomically(path, format!("{text}\n").as_bytes(), 0o644)
            .map_err(|e| format!("write --ready-file {}: {e}", path.display()))
    }
}

/// Where temporary files go unless told otherwise.
#[must_use]
pub fn default_spool_directory() -> PathBuf {
    std::env::var_os("TMPDIR").map_or_else(|| Path::new("/var/tmp").to_owned(), PathBuf::from)
}

/// Runs a daemon to its end, and maps that to an exit code: 0, or 1 with what is wrong, or 2 for wrong
/// settings.
#[must_use]
pub fn run_daemon(name: &str, work: impl Future<Output = Result<(), Problem>>) -> ExitCode {
    // Before the first thread: an arena that a thread has got stays.
    os::bound_memory();
    match tokio::runtime::Runtime::new() {
        Ok(runtime) => exit_code(name, runtime.block_on(work)),
        Err(e) => exit_code(name, Err(Problem::Running(format!("start a runtime: {e}")))),
    }
}

fn exit_code(name: &str, result: Result<(), Problem>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Problem::Settings(problems)) => {
            for problem in problems {
                eprintln!("{name}: {problem}");
            }
            ExitCode::from(2)
        }
        Err(Problem::Exit(code)) => ExitCode::from(code),
        Err(Problem::Running(problem)) => {
            eprintln!("{name}: {problem}");
            ExitCode::FAILURE
        }
    }
}

/// Why a daemon ended.
#[derive(Debug)]
pub enum Problem {
    /// Settings, or files that they name.
    Settings(Vec<String>),
    /// Anything later.
    Running(String),
    /// The exit code of what the daemon has run.
    Exit(u8),
}

impl From<String> for Problem {
    fn from(text: String) -> Self {
        Self::Running(text)
    }
}
