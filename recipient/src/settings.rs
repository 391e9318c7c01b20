//! What the operator has set, checked once at start.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use marcot_common::{connect::ClientTls, donor_list::Donors, tls::Versions};
use marcot_engine::EngineConfig;

use crate::{
    certificate::signature::Signer, install::place::Form, limits::LimitDefaults,
    preflight::binary::ServerBinary,
};

/// Streams unless asked otherwise: one for each core, at most this many (the plugin's default of
/// 16 is for hosts with as many cores).
pub const CONCURRENCY_DEFAULT_MAX: usize = 8;

/// Most streams (clone_max_concurrency).
pub const CONCURRENCY_MAX: usize = 128;

/// Settings of a recipient.
#[derive(Debug)]
pub struct Settings {
    /// The recipient server's own data directory.
    pub data_directory: Option<PathBuf>,
    /// Roots below which a new data directory may lie.
    pub allow_directories: Vec<PathBuf>,
    /// Donors that may be cloned from (clone_valid_donor_list).
    pub donors: Arc<Donors>,
    /// TLS towards donors (clone_ssl_ca, clone_ssl_cert, clone_ssl_key).
    pub donor_tls: ClientTls,
    /// Versions of TLS that are spoken with them.
    pub donor_tls_versions: Versions,
    /// Whether donors whose accounts are those of their database are given the passwords of clones.
    pub allow_database_accounts: bool,
    /// Where the history of clones is.
    pub state_directory: PathBuf,
    /// Values of the server that is to run on clones, by the names of its variables.
    pub expected_server: BTreeMap<String, String>,
    /// Its program, which is asked where no server runs.
    pub server_binary: Option<ServerBinary>,
    /// Engine for CLONE LOCAL; `None` without a data directory.
    pub engine: Option<EngineConfig>,
    /// Limits of a clone that asks for none.
    pub limits: LimitDefaults,
    /// Most entries that a donor may list.
    pub entries_max: u64,
    /// How long a donor that is gone is waited for, and how long it keeps the snapshot meanwhile
    /// (clone_donor_timeout_after_network_failure); zero: not at all.
    pub donor_timeout: Duration,
    /// How long a place on a donor that has none free is waited for; zero: not at all.
    pub queue_wait: Duration,
    /// How long a donor may take to open a snapshot and list its files.
    pub open_timeout: Duration,
    /// How long a call to a donor may stand still before it is made anew.
    pub stall_timeout: Duration,
    /// How a clone replaces the server's own data.
    pub install: InstallSettings,
    /// Command (sh -c) that is run when a clone has ended, or waits for somebody.
    pub end_command: Option<String>,
    /// Who vouches for certificates.
    pub certificate_signer: Option<Signer>,
}

/// How a clone replaces the server's own data.
#[derive(Debug, Clone, Default)]
pub struct InstallSettings {
    /// How trees change places; `None`: as the data directory allows.
    pub form: Option<Form>,
    /// How long the old data are kept once the server runs on the new ones; `None`: until the clone
    /// is accepted.
    pub keep_old_data: Option<Duration>,
    /// How long the staged copy of a clone that failed is kept for `marcot resume`.
    pub keep_staging: Duration,
    /// Longest recovery of a server on a clone.
    pub recovery_timeout: Duration,
    /// Whether this recipient stops and starts the server.
    pub manages: bool,
}

impl Settings {
    /// Settings of a recipient that keeps its state in `directory`, and may do next to nothing.
    #[cfg(test)]
    pub(crate) fn for_tests(directory: &std::path::Path) -> Self {
        Self {
            donors: Arc::default(),
            data_directory: None,
            allow_directories: Vec::new(),
            donor_tls: ClientTls::default(),
            donor_tls_versions: Versions::default(),
            allow_database_accounts: false,
            engine: None,
            limits: LimitDefaults::default(),
            state_directory: directory.to_owned(),
            expected_server: BTreeMap::new(),
            server_binary: None,
            entries_max: 1,
            donor_timeout: Duration::ZERO,
            queue_wait: Duration::ZERO,
            open_timeout: Duration::ZERO,
            stall_timeout: Duration::ZERO,
            end_command: None,
            certificate_signer: None,
            install: InstallSettings::default(),
        }
    }

    /// Shares the settings.
    #[must_use]
    pub fn shared(self) -> Arc<Self> {
        Arc::new(self)
    }
}

/// Streams for this machine.
#[must_use]
pub fn default_concurrency() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).clamp(1, CONCURRENCY_DEFAULT_MAX)
}
