//! A server that commands of the operator stop and start.

use std::{
    io::Read as _,
    path::PathBuf,
    process::Stdio,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use marcot_common::failure::Failure;
use tokio::process::Command;
use tracing::warn;

use super::{FirstStart, Health, OPENS_MIN, ServerControl, health::HealthCheck};
use crate::{
    install::{hold::hold, locks::server_on},
    source::blocking,
    supervise::{Output, children},
};

/// Between two looks at a server that stops.
const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// How long a server answers, at every look, until it is not on its way down: that one takes no connections.
const STANDS_AFTER: Duration = Duration::from_secs(3);

/// How long a server that has ended is waited for to be started again by whoever runs it, as a service
/// manager does.
const GONE_AFTER: Duration = Duration::from_secs(15);

/// As long for one that nobody has seen by its locks: it begins its log before it has the memory that it
/// asks for, which may take long, and takes them after that.
const NOT_SEEN_AFTER: Duration = Duration::from_secs(60);

/// Bytes of a command's output that its error tells.
const OUTPUT_BYTES_MAX: u64 = 2000;

/// Commands that the operator names, run by `sh -c`.
#[derive(Debug)]
pub struct Hooks {
    /// Stops the server; ends once it is stopped.
    pub stop_command: String,
    /// Starts the server; may end before it answers.
    pub start_command: String,
    /// The server's data directory.
    pub data_directory: PathBuf,
    /// How the server is asked for its health.
    pub health: HealthCheck,
    /// Longest life of one command.
    pub limit: Duration,
    /// The process that was asked to stop and has not, as far as anybody has seen; at first one that an
    /// earlier process of this recipient may have asked.
    pub stopping: Mutex<Option<i32>>,
    /// The server's error log, where that is known.
    pub output: Output,
}

/// Whether a server is there that was started.
#[derive(Debug, Default)]
struct Presence {
    was_there: bool,
    has_begun: bool,
    missed_since: Option<Instant>,
}

impl Hooks {
    async fn run(&self, command: &str, first: FirstStart) -> Result<(), Failure> {
        run_command(command, self.limit, |child| {
            child.env("MARCOT_DATA_DIRECTORY", &self.data_directory);
            child.env("MARCOT_START", first.name());
        })
        .await
    }

    fn stopping(&self) -> MutexGuard<'_, Option<i32>> {
        self.stopping.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the server that runs was asked to stop: only an answer shows that it stays.
    fn is_asked_to_stop(&self) -> bool {
        let asked = *self.stopping();
        asked.is_some() && asked == server_on(&self.data_directory)
    }

    /// Tells when a server that was there has gone for too long.
    fn has_gone(&self, presence: &Mutex<Presence>) -> Option<Failure> {
        let is_there = server_on(&self.data_directory).is_some();
        let mut presence = presence.lock().unwrap_or_else(PoisonError::into_inner);
        if is_there {
            *presence = Presence { was_there: true, ..Presence::default() };
            return None;
        }
        // One that ends soon after its start may be seen in its log alone.
        presence.has_begun |= presence.was_there || self.output.has_begun();
        if !presence.has_begun {
            return None;
        }
        let limit = if presence.was_there { GONE_AFTER } else { NOT_SEEN_AFTER };
        let missed = presence.missed_since.get_or_insert_with(Instant::now).elapsed();
        (missed >= limit).then(|| {
            Failure::precondition(
                "SERVER_NOT_HEALTHY",
                format!(
                    "the server on {} has ended, and no other one has come for {} s",
                    self.data_directory.display(),
                    limit.as_secs()
                ),
            )
        })
    }

    /// Waits until a server that was asked to stop has, or answers for long enough: its stop has come to
    /// nothing. Whether one runs then.
    async fn settled(&self) -> Result<bool, Failure> {
        let deadline = Instant::now() + self.limit;
        loop {
            let asked = *self.stopping();
            let Some(pid) = asked.filter(|_| asked == server_on(&self.data_directory)) else {
                *self.stopping() = None;
                return Ok(false);
            };
            if self.stands().await == Some(true) {
                *self.stopping() = None;
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Err(Failure::precondition(
                    "SERVER_RUNNING",
                    format!(
                        "process {pid} still runs on {} and has been asked to stop: it is started again \
                         once it has ended",
                        self.data_directory.display()
                    ),
                ));
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }
}

/// Runs a command of the operator to its end.
pub async fn run_command(
    command: &str,
    limit: Duration,
    prepare: impl FnOnce(&mut Command),
) -> Result<(), Failure> {
    let failed =
        |why: String| Failure::precondition("HOOK_FAILED", format!("command `{command}` {why}"));
    // A file, for a server that the command leaves running would hold a pipe open for ever.
    let mut output =
        tempfile_in_memory().map_err(|e| failed(format!("has no output file: {e}")))?;
    let copy = |file: &std::fs::File| file.try_clone().map_err(|e| failed(e.to_string()));
    let mut child = Command::new("sh");
    child.args(["-c", command]).stdin(Stdio::null()).kill_on_drop(true);
    child.stdout(copy(&output)?).stderr(copy(&output)?);
    prepare(&mut child);
    let (mut child, _own) =
        children::spawn(&mut child).map_err(|e| failed(format!("cannot be started: {e}")))?;
    let status = tokio::time::timeout(limit, child.wait())
        .await
        .map_err(|_| failed(format!("has not ended in {} s; it is killed", limit.as_secs())))?
        .map_err(|e| failed(e.to_string()))?;
    if status.success() {
        return Ok(());
    }
    let mut text = Vec::new();
    let read = std::io::Seek::rewind(&mut output)
        .and_then(|()| (&output).take(OUTPUT_BYTES_MAX).read_to_end(&mut text));
    let shown = match read {
        Ok(_) => String::from_utf8_lossy(&text).trim().to_owned(),
        Err(e) => format!("its output cannot be read: {e}"),
    };
    Err(failed(format!("ended with {status}: {shown}")))
}

fn tempfile_in_memory() -> std::io::Result<std::fs::File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    Ok(std::fs::File::from(rustix::fs::memfd_create("marcot-hook", flags)?))
}

#[tonic::async_trait]
impl ServerControl for Hooks {
    async fn stop(&self) -> Result<(), Failure> {
        let server = server_on(&self.data_directory);
        *self.stopping() = server;
        if server.is_none() {
            return Ok(());
        }
        self.run(&self.stop_command, FirstStart::No).await?;
        let deadline = Instant::now() + self.limit;
        while let Some(pid) = server_on(&self.data_directory) {
            if Instant::now() >= deadline {
                return Err(Failure::precondition(
                    "SERVER_RUNNING",
                    format!(
                        "process {pid} still holds its locks in {} {} s after `{}` has ended",
                        self.data_directory.display(),
                        self.limit.as_secs(),
                        self.stop_command
                    ),
                ));
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        *self.stopping() = None;
        Ok(())
    }

    async fn give_up(&self) -> Result<(), Failure> {
        if server_on(&self.data_directory).is_none() {
            // Whoever runs it may be about to start it again. One that is stopped may refuse this.
            drop(self.run(&self.stop_command, FirstStart::No).await);
        }
        self.stop().await
    }

    async fn start(&self, first: FirstStart) -> Result<(), Failure> {
        if self.settled().await? {
            warn!("the server has not stopped, and answers: it is not started again");
            return Ok(());
        }
        self.output.begin();
        match self.run(&self.start_command, first).await {
            // One that was given before a kill may have come first. Of a first start, which is closed to
            // everybody, the install decides.
            Err(failure)
                if first != FirstStart::Yes && server_on(&self.data_directory).is_some() =>
            {
                warn!(error = %failure, "a server runs all the same: its health decides");
                Ok(())
            }
            started => started,
        }
    }

    async fn wait_healthy(&self, limit: Duration) -> Result<Health, Failure> {
        let presence = Mutex::default();
        let healthy = self.health.wait(limit, || self.has_gone(&presence)).await;
        healthy.map_err(|failure| self.output.told(failure))
    }

    async fn answers(&self) -> Option<bool> {
        self.health.answers().await
    }

    async fn open(&self) -> Result<(), Failure> {
        self.stop().await?;
        blocking(|| {
            hold("opening");
            Ok(())
        })
        .await?;
        self.start(FirstStart::Opened).await
    }

    async fn wait_open(&self) -> Result<(), Failure> {
        self.wait_healthy(self.limit.max(OPENS_MIN)).await.map(drop)
    }

    fn is_independent(&self) -> bool {
        true
    }

    async fn stands(&self) -> Option<bool> {
        let begun = Instant::now();
        loop {
            let answers = self.health.answers().await;
            if answers.is_none() && self.is_asked_to_stop() {
                return Some(false);
            }
            if answers != Some(true) || begun.elapsed() >= STANDS_AFTER {
                return answers;
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }

    fn outlives_recipient(&self) -> bool {
        server_on(&self.data_directory).is_some()
    }

    fn manages(&self) -> bool {
        true
    }

    fn kind(&self) -> &'static str {
        "hooks"
    }
}

#[cfg(test)]
mod tests {
    use marcot_engine::DatabaseConfig;

    use super::*;
    use crate::install::locks::TreeLocks;

    /// Guards a server on its way down where only a command tells of its health: as long as that fails, the
    /// server does not stand, and is started again once it has ended.
    #[tokio::test]
    async fn a_server_that_was_asked_to_stop_does_not_stand_while_its_health_command_fails() {
        let directory = tempfile::tempdir().unwrap();
        let data_directory = directory.path().to_owned();
        std::fs::write(data_directory.join("ibdata1"), "x").unwrap();
        let _server = TreeLocks::take(&data_directory).unwrap();
        let health = HealthCheck {
            command: Some("exit 1".to_owned()),
            database: DatabaseConfig::default(),
            data_directory: data_directory.clone(),
        };
        let hooks = Hooks {
            stop_command: "true".to_owned(),
            start_command: "true".to_owned(),
            stopping: Mutex::new(server_on(&data_directory)),
            data_directory,
            health,
            limit: Duration::ZERO,
            output: Output::new(None),
        };
        assert_eq!(hooks.stands().await, Some(false));
        *hooks.stopping() = None;
        assert_eq!(hooks.stands().await, None);
    }
}
