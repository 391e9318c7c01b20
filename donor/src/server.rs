//! The donor, put together: settings, engine, leases, service, drain.

use std::{path::PathBuf, sync::Arc, time::Duration};

use marcot_common::{
    access::Rule,
    chunk::READ_REQUEST_BYTES_MAX,
    config::{Loaded, UnitError, parse_bytes, parse_duration_within},
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
    body::{READ_RANGES, REQUEST_BYTES_MAX, ZeroCopyService},
    caps::{Caps, follow::follow},
    counts::Counts,
    kindness::{GiveWay, Watch},
    lease::{Leases, SnapshotLimits},
    metrics::DonorMetrics,
    status_page::DonorPage,
    taken::LeastTaken,
};

/// The donor's name, service and access rules.
pub const ROLE: Role = Role {
    name: "donor",
    service: "marcot.donor.v1.DonorService",
    rules: &[
        ("/marcot.donor.v1.DonorService/ListSnapshots", Rule::Needs(Privilege::Monitor)),
        ("/marcot.donor.v1.DonorService/", Rule::Needs(Privilege::BackupAdmin)),
    ],
    requests: &[
        (READ_RANGES, READ_REQUEST_BYTES_MAX),
        ("/marcot.donor.v1.DonorService/", REQUEST_BYTES_MAX),
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
    /// Address to take calls on, or unix:/PATH of a socket; not loopback only with --accounts, --identities
    /// or --database-accounts. May be repeated.
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
    /// Most snapshots at one time; who comes next waits in a queue, for the recipient's --queue-wait.
    #[arg(long, default_value_t = 8, env = "MARCOT_SNAPSHOTS_MAX",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub snapshots_max: u16,
    /// Most of them for one address, for IPv6 its /64; half of --snapshots-max unless given.
    #[arg(long, env = "MARCOT_SNAPSHOTS_PER_PEER_MAX",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub snapshots_per_peer_max: Option<u16>,
    /// How long a snapshot may be held without a byte being read of it, or with too few
    /// (--snapshot-rate-min), whatever its lease, 5 s to 30 d.
    #[arg(long, value_name = "DURATION", default_value = "24h", env = "MARCOT_SNAPSHOT_IDLE_MAX",
          value_parser = snapshot_idle_max)]
    pub snapshot_idle_max: Duration,
    /// The same for a snapshot for which DDL waits on the server: of MySQL, and with --block-ddl; 5 s to
    /// 30 d. A paused clone for which DDL waits opens another one after it, and compares what is here.
    #[arg(long, value_name = "DURATION", default_value = "1h", env = "MARCOT_DDL_BLOCK_IDLE_MAX",
          value_parser = snapshot_idle_max)]
    pub ddl_block_idle_max: Duration,
    /// Least that is read of a snapshot per second, on an average over --snapshot-idle-max or
    /// --ddl-block-idle-max; 0: whatever is read will do. Bytes of a list count twice at most.
    #[arg(long, value_name = "BYTES", default_value = "4KiB", env = "MARCOT_SNAPSHOT_RATE_MIN",
          value_parser = parse_bytes)]
    pub snapshot_rate_min: u64,
    /// How long a caller may take nothing of what it has asked for before its connection is closed,
    /// 1 s to 1 h.
    #[arg(long, value_name = "DURATION", default_value = "5min", env = "MARCOT_CALLER_TIMEOUT",
          value_parser = caller_timeout)]
    pub caller_timeout: Duration,
    /// Most data that is read per second, by all clones together, from 64KiB; 0: no limit.
    #[arg(long, value_name = "BYTES", default_value = "0", env = "MARCOT_MAX_DATA_BANDWIDTH",
          value_parser = parse_bandwidth)]
    pub max_data_bandwidth: u64,
    /// Most payload that is sent per second, to all recipients together, from 64KiB; 0: no limit.
    #[arg(long, value_name = "BYTES", default_value = "0", env = "MARCOT_MAX_NETWORK_BANDWIDTH",
          value_parser = parse_bandwidth)]
    pub max_network_bandwidth: u64,
    /// When clones give way to the server's commits: `off`; `auto`: when commits take twice as long as
    /// without clones, and 5 ms more; or when they take longer than a duration, as 20ms. Engine innodb.
    #[arg(long, value_name = "WHEN", default_value = "off", env = "MARCOT_GIVE_WAY")]
    pub give_way: GiveWay,
    /// Callers log in with accounts of the database that is cloned (engine innodb), and need the
    /// privileges there that a clone needs, instead of accounts of a file.
    #[arg(long, env = "MARCOT_DATABASE_ACCOUNTS", conflicts_with = "accounts")]
    pub database_accounts: bool,
    /// What both daemons have.
    #[command(flatten)]
    pub server: ServerOptions,
}

impl Settings {
    fn snapshot_limits(&self) -> SnapshotLimits {
        let half = (self.snapshots_max / 2).max(1);
        SnapshotLimits {
            all: self.snapshots_max.into(),
            per_peer: self.snapshots_per_peer_max.unwrap_or(half).into(),
            least: LeastTaken {
                idle: self.snapshot_idle_max,
                ddl_idle: self.ddl_block_idle_max,
                rate: self.snapshot_rate_min,
            },
        }
    }
}

fn snapshot_idle_max(text: &str) -> Result<Duration, UnitError> {
    parse_duration_within(text, Duration::from_secs(5)..=Duration::from_secs(30 * 24 * 3600))
}

fn caller_timeout(text: &str) -> Result<Duration, UnitError> {
    parse_duration_within(text, Duration::from_secs(1)..=Duration::from_secs(3600))
}

/// Runs a donor until it is told to end.
pub async fn run(loaded: Loaded<Settings>) -> Result<(), Problem> {
    let Loaded { args: settings, effective } = loaded;
    let wrong = |e: Failure| Problem::Settings(vec![e.message]);
    let counts = Counts::default().shared();
    let config = settings.engine.config(settings.data_directory.clone()).map_err(wrong)?;
    let config = EngineConfig { observer: counts.observer(), ..config };
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
        settings.snapshot_limits(),
        counts,
    ));
    let identity = api::Identity { accounts: prepared.has_accounts(), tls: prepared.tls.is_some() };
    let caps = Caps::new(settings.max_data_bandwidth, settings.max_network_bandwidth);
    let api = Api::new(Arc::clone(&leases), identity, caps, settings.caller_timeout);
    let watch = Watch {
        give_way: settings.give_way,
        engine: Arc::clone(leases.engine()),
        leases: Arc::clone(&leases),
        caps: api.caps(),
        kindness: api.kindness(),
    };
    let watching = tokio::task::spawn_blocking({
        let stop = shutdown.stop.clone();
        move || watch.run(&stop)
    });
    let following = settings
        .server
        .config
        .config
        .clone()
        .map(|file| tokio::spawn(follow(api.caps(), file, shutdown.stop.clone())));
    let metrics = Arc::new(Metrics::new(ROLE.name));
    DonorMetrics::register(&metrics, &leases, &api);
    let expiry = tokio::spawn(Arc::clone(&leases).expire(shutdown.stop.clone()));
    let page = Arc::new(DonorPage::new(Arc::clone(&leases), &api));
    let daemon = Daemon { role: ROLE, options: settings.server, prepared, metrics, page, shutdown };
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
    drop(watching.await);
    if let Some(following) = following {
        drop(following.await);
    }
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
        // Without accounts nobody has a name.
        let user = held.request.caller.user.clone().unwrap_or_default();
        let identity = Identity { user, privileges: vec![Privilege::BackupAdmin], snapshot: None };
        Some((held.request.public_key, identity))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[test]
    fn a_peers_share_is_half_of_all_snapshots_unless_given() {
        let limits = |options: &[&str]| {
            let argv = [&["marcot-donor", "--data-directory", "/d"][..], options].concat();
            Settings::try_parse_from(argv).unwrap().snapshot_limits()
        };
        for (options, expected) in [
            (&[][..], (8, 4)),
            (&["--snapshots-max", "1"][..], (1, 1)),
            (&["--snapshots-per-peer-max", "7"][..], (8, 7)),
        ] {
            let SnapshotLimits { all, per_peer, .. } = limits(options);
            assert_eq!((all, per_peer), expected, "{options:?}");
        }
    }

    #[test]
    fn times_without_sense_are_refused() {
        caller_timeout("0s").unwrap_err();
        snapshot_idle_max("4s").unwrap_err();
        assert_eq!(caller_timeout("5min"), Ok(Duration::from_secs(300)));
    }
}
