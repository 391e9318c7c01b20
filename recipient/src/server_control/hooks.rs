//! A server that commands of the operator stop and start.

use std::{
    io::Read as _,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use marcot_common::failure::Failure;
use tokio::process::Command;

use super::{FirstStart, Health, ServerControl, health::HealthCheck};
use crate::{install::locks::server_on, supervise::children};

/// Between two looks at a server that stops.
const LOOK_PAUSE: Duration = Duration::from_millis(200);

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
}

impl Hooks {
    async fn run(&self, command: &str, first: FirstStart) -> Result<(), Failure> {
        run_command(command, self.limit, |child| {
            child.env("MARCOT_DATA_DIRECTORY", &self.data_directory);
            child.env("MARCOT_START", first.name());
        })
        .await
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
        if server_on(&self.data_directory).is_none() {
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
        Ok(())
    }

    async fn start(&self, first: FirstStart) -> Result<(), Failure> {
        self.run(&self.start_command, first).await
    }

    async fn wait_healthy(&self, limit: Duration) -> Result<Health, Failure> {
        self.health.wait(limit, || None).await
    }

    async fn open(&self) -> Result<(), Failure> {
        self.stop().await?;
        self.start(FirstStart::Opened).await?;
        // What follows talks to it.
        self.wait_healthy(self.limit).await.map(drop)
    }

    fn manages(&self) -> bool {
        true
    }

    fn kind(&self) -> &'static str {
        "hooks"
    }
}
