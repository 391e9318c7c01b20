//! The donor, put together: settings, engine, leases, service, drain.

use std::{path::PathBuf, sync::Arc, time::Duration};

use marcot_common::{
    access::Rule,
    config::Loaded,
    connection::{Identity, Privilege},
    failure::Failure,
    listen::ListenAddress,
    login::{DatabaseAccounts, server::KeyDirectory},
    pace::parse_bandwidth,
    server::{Daemon, Problem, Role, ServerOptions},
    shutdown::Shutdown,
    telemetry::metrics::Metrics,
};
use marcot_engine::{EngineConfig, EngineOptions, innodb::accounts::ServerAccounts, open_engine};

use crate::{
    api::{self, Api},
    body::ZeroCopyService,
    caps::Caps,
    lease::Leases,
    metrics::DonorMetrics,
};

/// The donor's name, service and access rules.
pub const ROLE: Role = Role {
    name: "donor",
    service: "marcot.donor.v1.DonorService",
    rules: &[
        ("/marcot.donor.v1.DonorService/ListSnapshots", Rule::Needs(Privilege::Monitor)),
        ("/marcot.donor.v1.DonorService/", Rule::Needs(Privilege::BackupAdmin)),
    ],
};

/// Serves a live database's data directory to recipients.
///
/// Every option can be given in the environment (as --help shows) or in a TOML file (--config).
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "marcot-donor", version = marcot_common::config::VERSION_WITH_COMMIT)]
pub struct Settings {
    /// The data directory that is cloned.
    #[arg(long, value_name = "DIR", env = "MARCOT_DATA_DIRECTORY")]
    pub data_directory: PathBuf,
    /// Address to take calls on, or unix:/PATH of a socket; not loopback only with --accounts. May be
    /// repeated.
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:4407",
        env = "MARCOT_LISTEN",
        value_delimiter = ','
    )]
    pub listen: Vec<ListenAddress>,
    /// How it is read.
    #[command(flatten)]
    pub engine: EngineOptions,
    /// Most snapshots at one time; one more is refused, and told when to try again.
    #[arg(long, default_value_t = 8, env = "MARCOT_SNAPSHOTS_MAX",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub snapshots_max: u16,
    /// Most data that is read per second, by all clones together, from 64KiB; 0: no limit.
    #[arg(long, value_name = "BYTES", default_value = "0", env = "MARCOT_MAX_DATA_BANDWIDTH",
          value_parser = parse_bandwidth)]
    pub max_data_bandwidth: u64,
    /// Most payload that is sent per second, to all recipients together, from 64KiB; 0: no limit.
    #[arg(long, value_name = "BYTES", default_value = "0", env = "MARCOT_MAX_NETWORK_BANDWIDTH",
          value_parser = parse_bandwidth)]
    pub max_network_bandwidth: u64,
    /// Callers log in with accounts of the database that is cloned (engine innodb), and need the
    /// privileges there that a clone needs, instead of accounts of a file.
    #[arg(long, env = "MARCOT_DATABASE_ACCOUNTS", conflicts_with = "accounts")]
    pub database_accounts: bool,
    /// What both daemons have.
    #[command(flatten)]
    pub server: ServerOptions,
}

/// Runs a donor until it is told to end.
pub async fn run(loaded: Loaded<Settings>) -> Result<(), Problem> {
    let Loaded { args: settings, effective } = loaded;
    let wrong = |e: Failure| Problem::Settings(vec![e.message]);
    let config = settings.engine.config(settings.data_directory.clone()).map_err(wrong)?;
    let database = database_accounts(&settings, &config).map_err(wrong)?;
    let prepared =
        settings.server.prepare(&settings.listen, database).map_err(Problem::Settings)?;
    let engine = open_engine(&config).map_err(wrong)?;
    if settings.server.config.check_config {
        print!("{effective}");
        return Ok(());
    }
    let telemetry = settings.server.init_telemetry(ROLE)?;
    let shutdown = Shutdown::on_signals(None).map_err(|e| Problem::Running(e.to_string()))?;
    let leases = Arc::new(Leases::new(
        engine,
        settings.data_directory.clone(),
        settings.snapshots_max.into(),
    ));
    let identity = api::Identity { accounts: prepared.has_accounts(), tls: prepared.tls.is_some() };
    let caps = Caps::new(settings.max_data_bandwidth, settings.max_network_bandwidth);
    let api = Api::new(Arc::clone(&leases), identity, caps);
    let metrics = Arc::new(Metrics::new(ROLE.name));
    DonorMetrics::register(&metrics, &leases, &api);
    let expiry = tokio::spawn(Arc::clone(&leases).expire(shutdown.stop.clone()));
    let daemon = Daemon { role: ROLE, options: settings.server, prepared, metrics, shutdown };
    let drain = drain(&leases);
    let service = ZeroCopyService::new(api);
    let served = daemon
        .serve(
            &settings.listen,
            Arc::clone(&leases) as Arc<dyn KeyDirectory>,
            |routes| {
                routes.add_service(service);
            },
            drain,
        )
        .await;
    // Ends every snapshot, so that nothing is held when the process is gone.
    drop(expiry.await);
    telemetry.shutdown();
    Ok(served?)
}

fn database_accounts(
    settings: &Settings,
    config: &EngineConfig,
) -> Result<Option<Arc<dyn DatabaseAccounts>>, Failure> {
    if !settings.database_accounts {
        return Ok(None);
    }
    if config.engine != "innodb" {
        return Err(Failure::invalid(
            "NO_DATABASE",
            "--database-accounts logs in to the server that is cloned, which --engine innodb talks to",
        ));
    }
    Ok(Some(Arc::new(ServerAccounts::new(&config.database)?)))
}

/// Refuses new snapshots, and waits until those that are held have been closed.
async fn drain(leases: &Leases) {
    leases.drain();
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    while leases.is_busy() {
        tick.tick().await;
    }
}

impl KeyDirectory for Leases {
    fn find(&self, snapshot: &str) -> Option<([u8; 32], Identity)> {
        let held = self.all().into_iter().find(|held| held.name == snapshot)?;
        let user = held.request.caller.user.clone()?;
        let identity = Identity { user, privileges: vec![Privilege::BackupAdmin], snapshot: None };
        Some((held.request.public_key, identity))
    }
}
