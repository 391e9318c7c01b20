//! The recipient, put together: settings, clones, service, drain.

use std::{ffi::OsString, path::PathBuf, sync::Arc, time::Duration};

use marcot_common::{
    access::Rule,
    config::{Loaded, parse_duration},
    connect::ClientTls,
    connection::Privilege,
    donor_list::{DonorEntry, DonorMatch, Donors},
    failure::Failure,
    listen::ListenAddress,
    login::server::NoKeys,
    pace::parse_bandwidth,
    server::{Daemon, Problem, Role, ServerOptions},
    shutdown::Shutdown,
    telemetry::metrics::Metrics,
    tls::Fingerprint,
};
use marcot_engine::EngineOptions;
use marcot_proto::recipient::v1::recipient_service_server::RecipientServiceServer;
use tokio::task::JoinHandle;

use crate::{
    api::Api,
    certificate::signature::Signer,
    install_options::InstallOptions,
    job::registry::Clones,
    limits::LimitDefaults,
    metrics::RecipientMetrics,
    preflight::{binary::ServerBinary, own_server},
    retry::{DONOR_TIMEOUT_MAX, OPEN_TIMEOUT_MAX, STALL_TIMEOUT_MIN},
    seed::{SeedOptions, seed},
    settings::{self, CONCURRENCY_MAX},
    status_page::RecipientPage,
};

/// Largest request: a statement of 64 KiB and its options.
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// Which one depends on the clone: the handler asks for it.
const BY_CLONE: Rule = Rule::NeedsAny(&[Privilege::BackupAdmin, Privilege::CloneAdmin]);

const MONITOR: Rule = Rule::Needs(Privilege::Monitor);

const CLONE_ADMIN: Rule = Rule::Needs(Privilege::CloneAdmin);

/// The recipient's name, service and access rules. Each method has its own: one that is not here is
/// refused.
pub const ROLE: Role = Role {
    name: "recipient",
    service: "marcot.recipient.v1.RecipientService",
    rules: &[
        ("/marcot.recipient.v1.RecipientService/CloneInstance", BY_CLONE),
        ("/marcot.recipient.v1.RecipientService/CloneLocal", BY_CLONE),
        ("/marcot.recipient.v1.RecipientService/CloneStatement", BY_CLONE),
        ("/marcot.recipient.v1.RecipientService/ValidateClone", BY_CLONE),
        ("/marcot.recipient.v1.RecipientService/GetClone", MONITOR),
        ("/marcot.recipient.v1.RecipientService/ListClones", MONITOR),
        ("/marcot.recipient.v1.RecipientService/WatchClone", MONITOR),
        ("/marcot.recipient.v1.RecipientService/CancelClone", BY_CLONE),
        ("/marcot.recipient.v1.RecipientService/PauseClone", BY_CLONE),
        ("/marcot.recipient.v1.RecipientService/ResumeClone", BY_CLONE),
        ("/marcot.recipient.v1.RecipientService/UpdateCloneLimits", BY_CLONE),
        ("/marcot.recipient.v1.RecipientService/InstallClone", CLONE_ADMIN),
        ("/marcot.recipient.v1.RecipientService/AcceptClone", CLONE_ADMIN),
        ("/marcot.recipient.v1.RecipientService/RollbackClone", CLONE_ADMIN),
        ("/marcot.recipient.v1.RecipientService/ListLeftovers", MONITOR),
        ("/marcot.recipient.v1.RecipientService/DeleteLeftover", CLONE_ADMIN),
        ("/marcot.recipient.v1.RecipientService/VerifyClone", MONITOR),
    ],
    requests: &[("/marcot.recipient.v1.RecipientService/", REQUEST_BYTES_MAX)],
};

/// Clones a donor's data directory onto this host.
///
/// Every option can be given in the environment (as --help shows) or in a TOML file (--config).
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "marcot-recipient", version = marcot_common::config::VERSION_WITH_COMMIT)]
pub struct Settings {
    /// Address to take calls on, or unix:/PATH of a socket; not loopback only with --accounts or
    /// --identities. May be repeated.
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:4406",
        env = "MARCOT_LISTEN",
        value_delimiter = ','
    )]
    pub listen: Vec<ListenAddress>,
    /// Directory for the history of clones.
    #[arg(long, value_name = "DIR", env = "MARCOT_STATE_DIRECTORY")]
    pub state_directory: PathBuf,
    /// The recipient server's own data directory: what CLONE LOCAL copies, and what a CLONE
    /// INSTANCE without DATA DIRECTORY seeds or replaces.
    #[arg(long, value_name = "DIR", env = "MARCOT_DATA_DIRECTORY")]
    pub data_directory: Option<PathBuf>,
    /// Root below which a new data directory may lie; may be repeated
    /// [default: the directory that the data directory stands in].
    #[arg(long, value_name = "DIR", env = "MARCOT_ALLOW_DIRECTORY", value_delimiter = ':')]
    pub allow_directory: Vec<PathBuf>,
    /// How CLONE LOCAL reads the data directory.
    #[command(flatten)]
    pub engine: EngineOptions,
    /// Donors that may be cloned from (clone_valid_donor_list), HOST:PORT: the host is a name, of
    /// which a label may be *, an address, or a network as 10.0.0.0/8 or [fd00::/8]; the port may be
    /// * or a range. Without it there is no donor. May be repeated.
    #[arg(long, value_name = "HOST:PORT", env = "MARCOT_DONOR_LIST", value_delimiter = ',')]
    pub donor_list: Vec<DonorEntry>,
    /// More donors that may be cloned from, one a line or with commas between them; # begins a remark.
    /// Read again when it changes; a file that has become wrong leaves no donor at all.
    #[arg(long, value_name = "FILE", env = "MARCOT_DONOR_LIST_FILE")]
    pub donor_list_file: Option<PathBuf>,
    /// How a statement's host is compared with the list: `exact` as the plugin does, host and port
    /// as they are written, and nothing else.
    #[arg(long, value_enum, default_value = "address", env = "MARCOT_DONOR_MATCH")]
    pub donor_match: DonorMatch,
    /// CA of donors' certificates (clone_ssl_ca) [default: the system's roots].
    #[arg(long, value_name = "FILE", env = "MARCOT_SSL_CA")]
    pub ssl_ca: Option<PathBuf>,
    /// Donors' certificates that were revoked: CRLs of their CAs, in PEM form.
    #[arg(long, value_name = "FILE", env = "MARCOT_SSL_CRL", requires = "ssl_ca")]
    pub ssl_crl: Option<PathBuf>,
    /// Certificate that donors are shown (clone_ssl_cert).
    #[arg(long, value_name = "FILE", env = "MARCOT_SSL_CERT", requires = "ssl_key")]
    pub ssl_cert: Option<PathBuf>,
    /// Its private key (clone_ssl_key).
    #[arg(long, value_name = "FILE", env = "MARCOT_SSL_KEY", requires = "ssl_cert")]
    pub ssl_key: Option<PathBuf>,
    /// SHA-256 fingerprint of the one donor certificate that is believed.
    #[arg(long, value_name = "SHA256", env = "MARCOT_SSL_FINGERPRINT")]
    pub ssl_fingerprint: Option<String>,
    /// Clone also from donors whose accounts are those of their database (--database-accounts), which
    /// are given the password itself. Without it a password is sent to no donor.
    #[arg(long, env = "MARCOT_ALLOW_DATABASE_ACCOUNTS")]
    pub allow_database_accounts: bool,
    /// Ed25519 private key, PKCS#8 in PEM, that signs the certificates of clones.
    #[arg(long, value_name = "FILE", env = "MARCOT_CERTIFICATE_KEY")]
    pub certificate_key: Option<PathBuf>,
    /// Streams of a clone (clone_max_concurrency), 1 to 128 [default: one for each core, at most 8].
    #[arg(long, env = "MARCOT_MAX_CONCURRENCY",
          value_parser = clap::value_parser!(u16).range(1..=CONCURRENCY_MAX as i64))]
    pub max_concurrency: Option<u16>,
    /// Find the number of streams while a clone runs, up to --max-concurrency, 8 unless that is given: half
    /// as many more are kept where they bring a tenth more, one fewer where it brings as much
    /// (clone_autotune_concurrency).
    #[arg(long, env = "MARCOT_AUTOTUNE_CONCURRENCY")]
    pub autotune_concurrency: bool,
    /// Most data of a clone per second, from 64KiB; 0: no limit (clone_max_data_bandwidth, there in MiB).
    #[arg(long, value_name = "BYTES", default_value = "0", env = "MARCOT_MAX_DATA_BANDWIDTH",
          value_parser = parse_bandwidth)]
    pub max_data_bandwidth: u64,
    /// Most bytes of a clone on the network per second, from 64KiB; 0: no limit
    /// (clone_max_network_bandwidth, there in MiB).
    #[arg(long, value_name = "BYTES", default_value = "0", env = "MARCOT_MAX_NETWORK_BANDWIDTH",
          value_parser = parse_bandwidth)]
    pub max_network_bandwidth: u64,
    /// Most files and directories that a donor may list.
    #[arg(long, default_value_t = 50_000_000, env = "MARCOT_ENTRIES_MAX")]
    pub entries_max: u64,
    /// How long a donor that is gone is waited for, and how long it keeps the snapshot meanwhile
    /// (clone_donor_timeout_after_network_failure), 0 to 30 min; 0: a network error ends the clone.
    #[arg(long, value_name = "DURATION", default_value = "5min", env = "MARCOT_DONOR_TIMEOUT",
          value_parser = donor_timeout)]
    pub donor_timeout: Duration,
    /// How long a clone waits for a place on a donor that serves as many as it may, 0 to 24 h; 0: it
    /// fails at once, and is told when to try again.
    #[arg(long, value_name = "DURATION", default_value = "10min", env = "MARCOT_QUEUE_WAIT",
          value_parser = queue_wait)]
    pub queue_wait: Duration,
    /// How long a donor may take to open a snapshot, which is to list its files, 1 s to 24 h: nine million
    /// of them at 5,000 a second, as a slow disk does.
    #[arg(long, value_name = "DURATION", default_value = "30min", env = "MARCOT_OPEN_TIMEOUT",
          value_parser = open_timeout)]
    pub open_timeout: Duration,
    /// How long a call to a donor may stand still, with less than 64 KiB or without another entry looked
    /// at, before it is made anew, 1 s to 30 min.
    #[arg(long, value_name = "DURATION", default_value = "2min", env = "MARCOT_STALL_TIMEOUT",
          value_parser = stall_timeout)]
    pub stall_timeout: Duration,
    /// A value that the server that is to run on clones has, by the name of its variable, as
    /// innodb_page_size=16384: it is compared with the donor's, and goes before what a server says. May
    /// be repeated.
    #[arg(long, value_name = "NAME=VALUE", env = "MARCOT_EXPECT_SERVER", value_delimiter = ',',
          value_parser = expected)]
    pub expect_server: Vec<(String, String)>,
    /// The program of the server that is to run on clones, mariadbd or mysqld: where no server runs
    /// (--database-socket), what it prints for --verbose --help is compared with the donor's server.
    #[arg(long, value_name = "FILE", env = "MARCOT_SERVER_BINARY")]
    pub server_binary: Option<PathBuf>,
    /// An argument that the server is started with, as --defaults-file=/etc/mysql/my.cnf; may be
    /// repeated.
    #[arg(long, value_name = "ARGUMENT", requires = "server_binary", allow_hyphen_values = true)]
    pub server_argument: Vec<OsString>,
    /// Command (sh -c) that is run when a clone has ended, or waits for somebody: MARCOT_CLONE,
    /// MARCOT_CLONE_STATE and others in its environment say which, and how.
    #[arg(long, value_name = "COMMAND", env = "MARCOT_ON_END")]
    pub on_end: Option<String>,
    /// How a clone replaces the server's own data.
    #[command(flatten)]
    pub install: InstallOptions,
    /// What `seed` does.
    #[command(flatten)]
    pub seed: SeedOptions,
    /// `supervise`: run the command after `--` as the database server. `seed`: fill the data directory
    /// from --seed-from unless it holds data, and end.
    #[arg(value_name = "MODE", value_parser = ["supervise", "seed"])]
    pub mode: Option<String>,
    /// The database server's command.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
    /// What both daemons have.
    #[command(flatten)]
    pub server: ServerOptions,
}

impl Settings {
    /// Whether this recipient runs the server.
    pub(crate) fn supervises(&self) -> bool {
        self.mode.as_deref() == Some("supervise")
    }

    fn seeds(&self) -> bool {
        self.mode.as_deref() == Some("seed")
    }
}

fn expected(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write it as NAME=VALUE")?;
    own_server::check_expected(name, value)?;
    Ok((name.to_owned(), value.to_owned()))
}

fn donor_timeout(text: &str) -> Result<Duration, String> {
    let timeout = parse_duration(text).map_err(|e| e.to_string())?;
    if timeout > DONOR_TIMEOUT_MAX {
        return Err(format!("{timeout:?} is more than {DONOR_TIMEOUT_MAX:?}"));
    }
    Ok(timeout)
}

/// Longest wait for a place: a donor whose clones take longer needs more places.
const QUEUE_WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

fn queue_wait(text: &str) -> Result<Duration, String> {
    let wait = parse_duration(text).map_err(|e| e.to_string())?;
    if wait > QUEUE_WAIT_MAX {
        return Err(format!("{wait:?} is more than {QUEUE_WAIT_MAX:?}"));
    }
    Ok(wait)
}

fn stall_timeout(text: &str) -> Result<Duration, String> {
    let timeout = parse_duration(text).map_err(|e| e.to_string())?;
    if !(STALL_TIMEOUT_MIN..=DONOR_TIMEOUT_MAX).contains(&timeout) {
        return Err(format!("{timeout:?} is not {STALL_TIMEOUT_MIN:?} to {DONOR_TIMEOUT_MAX:?}"));
    }
    Ok(timeout)
}

fn open_timeout(text: &str) -> Result<Duration, String> {
    let timeout = parse_duration(text).map_err(|e| e.to_string())?;
    if !(STALL_TIMEOUT_MIN..=OPEN_TIMEOUT_MAX).contains(&timeout) {
        return Err(format!("{timeout:?} is not {STALL_TIMEOUT_MIN:?} to {OPEN_TIMEOUT_MAX:?}"));
    }
    Ok(timeout)
}

/// Runs a recipient until it is told to end.
pub async fn run(loaded: Loaded<Settings>) -> Result<(), Problem> {
    let Loaded { args: settings, effective } = loaded;
    let mut prepared = settings.server.prepare(&settings.listen, None);
    let checked = check(&settings);
    if let (Err(problems), Err(more)) = (&mut prepared, &checked) {
        problems.extend(more.iter().cloned());
    }
    let prepared = prepared.map_err(Problem::Settings)?;
    let checked = checked.map_err(Problem::Settings)?;
    if settings.server.config.check_config {
        print!("{effective}");
        return Ok(());
    }
    let telemetry = settings.server.init_telemetry(ROLE)?;
    let shutdown = Shutdown::on_signals(None).map_err(|e| Problem::Running(e.to_string()))?;
    let control = settings.install.control(&settings, &checked)?;
    let clones = Clones::open(checked.shared(), &settings.state_directory, control.shared())
        .await
        .map(Arc::new)
        .map_err(|e| Problem::Running(e.message))?;
    let start = clones.go_on();
    let supervised = control.begin(&shutdown, start).await?;
    let seeding = settings.seeds().then(|| begin_seed(&clones, &settings.seed, &shutdown));
    let metrics = Arc::new(Metrics::new(ROLE.name));
    RecipientMetrics::register(&metrics, &clones);
    let donor_tls = clones.settings().donor_tls.clone();
    if donor_tls.certificate.is_some() {
        let own = donor_tls.clone();
        metrics.add_certificate("ssl-cert", move || own.expiry());
    }
    if donor_tls.crl.is_some() {
        metrics.add_revocation_list("ssl-crl", move || donor_tls.crl_next_update());
    }
    let service = RecipientServiceServer::new(Api::new(Arc::clone(&clones)))
        .max_decoding_message_size(REQUEST_BYTES_MAX);
    let page = Arc::new(RecipientPage::new(Arc::clone(&clones)));
    let daemon = Daemon { role: ROLE, options: settings.server, prepared, metrics, page, shutdown };
    let drain = clones.drain();
    let add = |routes: &mut tonic::service::RoutesBuilder| {
        routes.add_service(service);
    };
    let served = daemon.serve(&settings.listen, Arc::new(NoKeys), add, drain).await;
    // Before the server ends: an install must not take that for the clone's fault.
    clones.leave().await;
    let ended = match supervised {
        Some(supervised) => supervised.end().await,
        None => Ok(()),
    };
    let seeded = match seeding {
        Some(seeding) => seeding.await.unwrap_or_else(|e| Err(Failure::bug(e.to_string()))),
        None => Ok(()),
    };
    telemetry.shutdown();
    served?;
    ended?;
    seeded.map_err(|failure| Problem::Running(failure.to_string()))
}

/// Seeds the data directory beside what is served; this process ends once that has ended.
fn begin_seed(
    clones: &Arc<Clones>,
    options: &SeedOptions,
    shutdown: &Shutdown,
) -> JoinHandle<Result<(), Failure>> {
    let (clones, options, shutdown) = (Arc::clone(clones), options.clone(), shutdown.clone());
    tokio::spawn(async move {
        let seeded = seed(&clones, &options).await;
        shutdown.begin_drain();
        seeded
    })
}

/// Checks what the settings name, and tells all that is wrong.
fn check(settings: &Settings) -> Result<settings::Settings, Vec<String>> {
    let mut problems = Vec::new();
    let fingerprint = settings.ssl_fingerprint.as_deref().map(Fingerprint::parse).transpose();
    let fingerprint = fingerprint.unwrap_or_else(|e| {
        problems.push(format!("--ssl-fingerprint: {e}"));
        None
    });
    let named = settings.donor_list.iter().cloned().chain(settings.seed.donor());
    let file = settings.donor_list_file.as_deref();
    let donors = Donors::open(named.collect(), file, settings.donor_match);
    let donors = donors.unwrap_or_else(|e| {
        problems.push(format!("--donor-list: {e}"));
        Donors::default()
    });
    let donor_tls = ClientTls {
        ca: settings.ssl_ca.clone(),
        crl: settings.ssl_crl.clone(),
        certificate: settings.ssl_cert.clone().zip(settings.ssl_key.clone()),
        fingerprint,
        last_right: Arc::default(),
    };
    if let Err(e) = donor_tls.load_with(settings.server.tls_min_version) {
        problems.push(e.to_string());
    }
    for directory in &settings.allow_directory {
        if !directory.is_absolute() || !directory.is_dir() {
            let shown = directory.display();
            problems.push(format!("--allow-directory {shown} is no absolute path of a directory"));
        }
    }
    if let Some(directory) = &settings.data_directory
        && !directory.is_absolute()
    {
        let shown = directory.display();
        problems.push(format!("--data-directory {shown} is no absolute path"));
    }
    if settings.data_directory.is_none() && settings.engine.names_a_server() {
        let text = "--database-socket and --database-url are of the server on --data-directory, which is \
                    not given; give it, or leave them out";
        problems.push(text.to_owned());
    }
    let engine = settings.data_directory.clone().map(|directory| settings.engine.config(directory));
    let engine = engine.transpose().unwrap_or_else(|failure| {
        problems.push(failure.message);
        None
    });
    problems.extend(settings.install.problems(settings));
    if settings.seeds() {
        problems.extend(settings.seed.problems(settings.data_directory.is_some()));
    }
    let certificate_signer = settings.certificate_key.as_deref().map(Signer::open).transpose();
    let certificate_signer = certificate_signer.unwrap_or_else(|failure| {
        problems.push(failure.message);
        None
    });
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok(settings::Settings {
        install: settings.install.settings(settings),
        data_directory: settings.data_directory.clone(),
        state_directory: settings.state_directory.clone(),
        expected_server: settings.expect_server.iter().cloned().collect(),
        server_binary: settings
            .server_binary
            .clone()
            .map(|path| ServerBinary { path, arguments: settings.server_argument.clone() }),
        allow_directories: settings.allow_directory.clone(),
        donors: Arc::new(donors),
        donor_tls,
        donor_tls_versions: settings.server.tls_min_version,
        allow_database_accounts: settings.allow_database_accounts,
        engine,
        limits: LimitDefaults {
            concurrency: settings.max_concurrency.map(usize::from),
            autotune: settings.autotune_concurrency,
            data: settings.max_data_bandwidth,
            network: settings.max_network_bandwidth,
        },
        entries_max: settings.entries_max,
        donor_timeout: settings.donor_timeout,
        queue_wait: settings.queue_wait,
        open_timeout: settings.open_timeout,
        stall_timeout: settings.stall_timeout,
        end_command: settings.on_end.clone(),
        certificate_signer,
    })
}
