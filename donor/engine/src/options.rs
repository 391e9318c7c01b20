//! Command-line options of engines: the donor has them for what it serves, the recipient for CLONE
//! LOCAL.

use std::{path::PathBuf, time::Duration};

use marcot_common::{
    config::{UnitError, parse_bytes, parse_duration_within},
    failure::Failure,
    server::default_spool_directory,
};

use crate::{DatabaseConfig, ENGINE_NAMES, EngineConfig, Observer};

/// Which engine, and what it works with.
#[derive(Debug, Clone, clap::Args)]
pub struct EngineOptions {
    /// How the data directory is read: `innodb` for a running MariaDB or MySQL server, `files` for a
    /// directory that nobody writes.
    #[arg(long, default_value = "files", env = "MARCOT_ENGINE")]
    pub engine: String,
    /// Directory for lists, redo and other temporary files [default: $TMPDIR or /var/tmp].
    #[arg(long, value_name = "DIR", env = "MARCOT_SPOOL_DIRECTORY")]
    pub spool_directory: Option<PathBuf>,
    /// Most redo that is kept in the spool directory, for all clones together, and most that each of
    /// them has read under the server's locks. A clone that wants more redo reads its pages again (PAGE
    /// COPY), four times at the most.
    #[arg(long, value_name = "BYTES", default_value = "16GiB", env = "MARCOT_SPOOL_QUOTA",
          value_parser = parse_bytes)]
    pub spool_quota: u64,
    /// How long a clone around an IMPORT TABLESPACE waits for the server's next checkpoint (engine
    /// innodb), 1 s to 1 h: what was imported is in no redo log, so recovery must begin after it.
    #[arg(long, value_name = "DURATION", default_value = "2min", env = "MARCOT_CHECKPOINT_TIMEOUT",
          value_parser = checkpoint_timeout)]
    pub checkpoint_timeout: Duration,
    /// Socket of the database server (engine innodb).
    #[arg(long, value_name = "PATH", env = "MARCOT_DATABASE_SOCKET")]
    pub database_socket: Option<PathBuf>,
    /// Or its address, on this host: mysql://127.0.0.1:3306.
    #[arg(
        long,
        value_name = "URL",
        env = "MARCOT_DATABASE_URL",
        hide_env_values = true,
        conflicts_with = "database_socket"
    )]
    pub database_url: Option<String>,
    /// Account on the database server.
    #[arg(long, value_name = "NAME", env = "MARCOT_DATABASE_USER")]
    pub database_user: Option<String>,
    /// File that holds its password; none for an account that is known by its socket.
    #[arg(long, value_name = "FILE", env = "MARCOT_DATABASE_PASSWORD_FILE")]
    pub database_password_file: Option<PathBuf>,
    /// Clone a MySQL server of a version that no test has run: 8.0.30 and later.
    #[arg(long, env = "MARCOT_ALLOW_UNTESTED_VERSION")]
    pub allow_untested_version: bool,
}

impl EngineOptions {
    /// Whether a database server is named.
    #[must_use]
    pub fn names_a_server(&self) -> bool {
        self.database_socket.is_some() || self.database_url.is_some()
    }

    /// The configuration of an engine for `data_directory`.
    pub fn config(&self, data_directory: PathBuf) -> Result<EngineConfig, Failure> {
        if !ENGINE_NAMES.contains(&self.engine.as_str()) {
            let known = ENGINE_NAMES.join(", ");
            let text = format!("--engine {}: the engines are {known}", self.engine.escape_debug());
            return Err(Failure::invalid("UNKNOWN_ENGINE", text));
        }
        let password = match &self.database_password_file {
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|e| Failure::io("read --database-password-file", path, &e))?;
                Some(text.lines().next().unwrap_or_default().to_owned())
            }
            None => None,
        };
        Ok(EngineConfig {
            engine: self.engine.clone(),
            data_directory,
            spool_directory: self.spool_directory.clone().unwrap_or_else(default_spool_directory),
            spool_quota: self.spool_quota,
            checkpoint_timeout: self.checkpoint_timeout,
            database: DatabaseConfig {
                socket: self.database_socket.clone(),
                url: self.database_url.clone(),
                user: self.database_user.clone(),
                password,
                allow_untested_version: self.allow_untested_version,
            },
            observer: Observer::default(),
        })
    }
}

fn checkpoint_timeout(text: &str) -> Result<Duration, UnitError> {
    parse_duration_within(text, Duration::from_secs(1)..=Duration::from_secs(3600))
}
