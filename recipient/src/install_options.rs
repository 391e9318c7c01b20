//! Settings of installs, and of the server that they stop and start.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use marcot_common::{config::parse_duration, server::Problem, shutdown::Shutdown};
use marcot_engine::DatabaseConfig;
use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};
use tracing::error;

use crate::{
    install::{locks::server_on, place::Form},
    server::Settings,
    server_control::{FirstStart, ServerControl, Unmanaged, health::HealthCheck, hooks::Hooks},
    settings::{self, InstallSettings},
    supervise::{Options, Output, Restart, Status, Supervisor, reaper},
};

/// How a clone replaces the server's own data.
#[derive(Debug, Clone, clap::Args)]
pub struct InstallOptions {
    /// How the old data and the clone change places [default: by one rename where the data
    /// directory allows it, else entry by entry].
    #[arg(long, value_enum, env = "MARCOT_INSTALL_FORM")]
    pub install_form: Option<Form>,
    /// How long the old data are kept once the server runs on a clone; `until-accepted`: until
    /// `marcot accept` or `marcot rollback`.
    #[arg(long, value_name = "DURATION", default_value = "24h", env = "MARCOT_KEEP_OLD_DATA",
          value_parser = keep_old_data)]
    pub keep_old_data: Keep,
    /// How long what a clone that failed has staged is kept for `marcot resume`.
    #[arg(long, value_name = "DURATION", default_value = "168h", env = "MARCOT_KEEP_STAGING",
          value_parser = parse_duration)]
    pub keep_staging: Duration,
    /// Longest recovery of a server on a clone; then the old data come back.
    #[arg(long, value_name = "DURATION", default_value = "1h", env = "MARCOT_RECOVERY_TIMEOUT",
          value_parser = parse_duration)]
    pub recovery_timeout: Duration,
    /// Command (sh -c) that stops the server; it ends once the server has stopped.
    #[arg(long, value_name = "COMMAND", env = "MARCOT_STOP_COMMAND", requires = "start_command")]
    pub stop_command: Option<String>,
    /// Command (sh -c) that starts the server. MARCOT_START is `first` for a start on a clone that
    /// must stay closed (--skip-networking), `opened` for the next one, `replica` for a later one of a
    /// clone that was made a replica, and `own` for old data.
    #[arg(long, value_name = "COMMAND", env = "MARCOT_START_COMMAND", requires = "stop_command")]
    pub start_command: Option<String>,
    /// Command (sh -c) that ends with 0 once the server is healthy [default: the database is asked
    /// (--database-socket): all schemas are there, one row of each table is read].
    #[arg(long, value_name = "COMMAND", env = "MARCOT_HEALTH_COMMAND")]
    pub health_command: Option<String>,
    /// Longest clean stop of the server for an install, and longest life of a command. supervise: one
    /// that is still starting is given as long before it is stopped.
    #[arg(long, value_name = "DURATION", default_value = "10min", env = "MARCOT_STOP_TIMEOUT",
          value_parser = parse_duration)]
    pub stop_timeout: Duration,
    /// supervise: how long another server on the data directory, such as that of a recipient that was
    /// killed, is waited for to end before a start.
    #[arg(long, value_name = "DURATION", default_value = "60s", env = "MARCOT_SERVER_WAIT",
          value_parser = parse_duration)]
    pub server_wait: Duration,
    /// supervise: how long the server may take to end after SIGTERM, before SIGKILL.
    #[arg(long, value_name = "DURATION", default_value = "60s", env = "MARCOT_STOP_GRACE",
          value_parser = parse_duration)]
    pub stop_grace: Duration,
    /// supervise: whether a server that ends by itself is started again.
    #[arg(long, value_enum, default_value = "on-failure", env = "MARCOT_RESTART")]
    pub restart: Restart,
    /// supervise: starts in a row, less than a minute apart, after which it is given up
    /// [default: never].
    #[arg(long, value_name = "N", env = "MARCOT_RESTART_LIMIT")]
    pub restart_limit: Option<u32>,
    /// The server's error log, whose lines an error tells; supervise: if it does not write to standard
    /// error.
    #[arg(long, value_name = "FILE", env = "MARCOT_SERVER_ERROR_LOG")]
    pub server_error_log: Option<std::path::PathBuf>,
}

/// How long old data are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// For this long.
    For(Duration),
    /// Until a person says otherwise.
    UntilAccepted,
}

fn keep_old_data(text: &str) -> Result<Keep, String> {
    if text == "until-accepted" {
        return Ok(Keep::UntilAccepted);
    }
    parse_duration(text).map(Keep::For).map_err(|e| format!("{e}, or `until-accepted`"))
}

impl InstallOptions {
    /// What is wrong with them.
    pub(crate) fn problems(&self, settings: &Settings) -> Vec<String> {
        let mut problems = Vec::new();
        let supervises = settings.supervises();
        if supervises && settings.command.is_empty() {
            problems.push("supervise: the server's command is missing after `--`".to_owned());
        }
        if !supervises && !settings.command.is_empty() {
            problems.push("a command after `--` needs `supervise` before it".to_owned());
        }
        if supervises && self.stop_command.is_some() {
            problems.push("supervise stops and starts the server: no --stop-command".to_owned());
        }
        let manages = supervises || self.stop_command.is_some();
        if manages && settings.data_directory.is_none() {
            problems.push("--data-directory is missing: the server's own".to_owned());
        }
        if manages && self.health_command.is_none() && settings.engine.database_socket.is_none() {
            problems.push(
                "--database-socket or --health-command is missing: a server on a clone is asked for \
                 its health before anyone reaches it over the network"
                    .to_owned(),
            );
        }
        problems
    }

    /// What installs go by.
    pub(crate) fn settings(&self, settings: &Settings) -> InstallSettings {
        InstallSettings {
            manages: settings.supervises() || self.stop_command.is_some(),
            form: self.install_form,
            keep_old_data: match self.keep_old_data {
                Keep::For(keep) => Some(keep),
                Keep::UntilAccepted => None,
            },
            keep_staging: self.keep_staging,
            recovery_timeout: self.recovery_timeout,
        }
    }

    /// What stops and starts the server.
    pub(crate) fn control(
        &self,
        settings: &Settings,
        checked: &settings::Settings,
    ) -> Result<Control, Problem> {
        let Some(data_directory) = checked.data_directory.clone() else {
            return Ok(Control::Other(Arc::new(Unmanaged)));
        };
        let database =
            checked.engine.as_ref().map_or_else(DatabaseConfig::default, |e| e.database.clone());
        let health = HealthCheck {
            command: self.health_command.clone(),
            database,
            data_directory: data_directory.clone(),
        };
        if settings.supervises() {
            reaper::start().map_err(|e| Problem::Running(format!("take orphans on: {e}")))?;
            return Ok(Control::Supervised(
                Supervisor::new(Options {
                    command: settings.command.clone(),
                    data_directory,
                    restart: self.restart,
                    restart_limit: self.restart_limit,
                    server_wait: self.server_wait,
                    stop_timeout: self.stop_timeout,
                    error_log: self.server_error_log.clone(),
                    health,
                }),
                self.stop_grace,
            ));
        }
        Ok(Control::Other(match (&self.stop_command, &self.start_command) {
            (Some(stop), Some(start)) => Arc::new(Hooks {
                stop_command: stop.clone(),
                start_command: start.clone(),
                health,
                limit: self.stop_timeout,
                stopping: Mutex::new(server_on(&data_directory)),
                output: Output::new(self.server_error_log.clone()),
                data_directory,
            }),
            _ => Arc::new(Unmanaged),
        }))
    }
}

/// What stops and starts the server, before anything runs.
pub(crate) enum Control {
    Supervised(Supervisor, Duration),
    Other(Arc<dyn ServerControl>),
}

impl Control {
    pub(crate) fn shared(&self) -> Arc<dyn ServerControl> {
        match self {
            Self::Supervised(supervisor, _) => Arc::new(supervisor.clone()),
            Self::Other(other) => Arc::clone(other),
        }
    }

    /// Starts a supervised server, unless an install that goes on does so, and follows it: when it
    /// has ended for good, so does this process.
    pub(crate) async fn begin(
        self,
        shutdown: &Shutdown,
        start: Option<FirstStart>,
    ) -> Result<Option<Supervised>, Problem> {
        let Self::Supervised(supervisor, grace) = self else {
            return Ok(None);
        };
        let mut status = supervisor.status();
        let drain = shutdown.clone();
        tokio::spawn(async move {
            let ended = status.wait_for(|status| matches!(status, Status::Ended(_))).await;
            if ended.is_ok() {
                drain.begin_drain();
            }
        });
        for forwarded in [
            (SignalKind::hangup(), Signal::HUP),
            (SignalKind::quit(), Signal::QUIT),
            (SignalKind::user_defined1(), Signal::USR1),
            (SignalKind::user_defined2(), Signal::USR2),
            (SignalKind::window_change(), Signal::WINCH),
        ] {
            let supervisor = supervisor.clone();
            let (kind, to) = forwarded;
            match signal(kind) {
                Ok(mut signals) => {
                    tokio::spawn(async move {
                        while signals.recv().await.is_some() {
                            supervisor.signal(to).await;
                        }
                    });
                }
                Err(e) => error!(error = %e, signal = to.as_raw(), "a signal cannot be passed on"),
            }
        }
        // After the signals: one that comes while a server is started is no reason to end.
        if let Some(first) = start {
            let started = supervisor.start(first).await;
            started.map_err(|failure| Problem::Running(failure.message))?;
        }
        Ok(Some(Supervised { supervisor, grace }))
    }
}

/// A supervised server, until this process ends.
pub(crate) struct Supervised {
    supervisor: Supervisor,
    grace: Duration,
}

impl Supervised {
    /// Ends the server; its exit code becomes this process's.
    pub(crate) async fn end(self) -> Result<(), Problem> {
        match self.supervisor.end(self.grace).await {
            0 => Ok(()),
            code => Err(Problem::Exit(code)),
        }
    }
}
