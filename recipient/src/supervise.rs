//! Runs a database server as its child: `marcot-recipient supervise -- mariadbd ...`.
//!
//! ```text
//! stopped -- start --> running -- stop, SIGTERM --> stopping --> stopped
//!                         |
//!                         `-- ends by itself --> waiting (back-off) --> running, or the end
//! ```
//! One task owns the child (`actor`); everything else sends it requests. The child has a process
//! group of its own, so that a signal reaches the server behind an entrypoint script as well. One that
//! is still starting is waited for before it gets SIGTERM (`starting`).

mod actor;
mod back_off;
pub mod children;
mod output;
pub mod reaper;
mod starting;

use std::{
    ffi::OsString,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
    time::{Duration, Instant},
};

use marcot_common::failure::Failure;
use rustix::process::{Pid, Signal, kill_process, test_kill_process_group};
use tokio::sync::{mpsc, oneshot, watch};

pub use self::output::Output;
use self::{actor::Actor, back_off::RestartPolicy, starting::Phase};
use crate::{
    install::locks::server_on,
    server_control::{FirstStart, Health, OPENS_MIN, ServerControl, health::HealthCheck},
};

/// Arguments of a first start: nobody reaches the server over the network, and it does nothing by
/// itself (R12, R13). MariaDB and MySQL know them all.
const FIRST_ARGUMENTS: [&str; 3] =
    ["--skip-networking", "--skip-slave-start", "--event-scheduler=OFF"];

/// Arguments of a start on a clone that has answered and is not accepted (R13).
const OPENED_ARGUMENTS: [&str; 2] = ["--skip-slave-start", "--event-scheduler=OFF"];

/// Arguments of a start on such a clone once it is a replica (R13).
const REPLICA_ARGUMENTS: [&str; 1] = ["--event-scheduler=OFF"];

/// Requests that may wait for the task that owns the child: one caller at a time sends any.
const REQUESTS_MAX: usize = 8;

/// Between two looks at them.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// From SIGTERM to SIGKILL for a server that was still starting, or is on a clone that is given up. It
/// has served nobody, or nothing of it is wanted: its end takes moments, or never comes.
const UNSERVED_STOP_MAX: Duration = Duration::from_secs(20);

/// What becomes of a server that ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Restart {
    /// It is started again, whatever its exit code.
    Always,
    /// It is started again after a signal or an exit code other than 0.
    OnFailure,
    /// This process ends with its exit code.
    Never,
}

/// Settings of a supervisor.
#[derive(Debug, Clone)]
pub struct Options {
    /// The server's program and arguments.
    pub command: Vec<OsString>,
    /// Its data directory.
    pub data_directory: PathBuf,
    /// What becomes of a server that ends by itself.
    pub restart: Restart,
    /// Starts in a row, without a time of quiet, after which it is given up; `None`: never.
    pub restart_limit: Option<u32>,
    /// Before a start, how long a server that somebody else has started may take to end.
    pub server_wait: Duration,
    /// Longest clean stop for an install.
    pub stop_timeout: Duration,
    /// The server's error log, when it does not write to standard error.
    pub error_log: Option<PathBuf>,
    /// How it is asked for its health.
    pub health: HealthCheck,
}

/// How a child stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// None runs: it was asked to stop, or a clone's first start has failed. The last exit code.
    Stopped(u8),
    /// It runs, with this process id.
    Running(u32),
    /// It has ended by itself, and is started again soon.
    Waiting,
    /// It has ended by itself, with this exit code, and is not started again.
    Ended(u8),
}

/// What the task that owns the child is asked.
#[derive(Debug)]
enum Request {
    Start(FirstStart, oneshot::Sender<Result<(), Failure>>),
    /// As `Start`, once the child that is being stopped has ended.
    StartLate(FirstStart),
    Stop(oneshot::Sender<()>),
    /// Nothing is started any more: this process ends.
    Close,
    Signal(Signal),
    SetMode(FirstStart),
}

/// A handle on the supervised server.
#[derive(Debug, Clone)]
pub struct Supervisor {
    options: Arc<Options>,
    requests: mpsc::Sender<Request>,
    status: watch::Receiver<Status>,
    output: Arc<Output>,
    /// The process group of the last child; 0 before the first.
    group: Arc<AtomicI32>,
}

impl Supervisor {
    /// A supervisor of a server that does not run yet.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let options = Arc::new(options);
        let output = Arc::new(Output::new(options.error_log.clone()));
        let (requests, receiver) = mpsc::channel(REQUESTS_MAX);
        let (sender, status) = watch::channel(Status::Stopped(0));
        let policy = RestartPolicy::new(options.restart, options.restart_limit);
        let group = Arc::new(AtomicI32::new(0));
        let actor = Actor::new(
            Arc::clone(&options),
            Arc::clone(&output),
            policy,
            sender,
            Arc::clone(&group),
        );
        tokio::spawn(actor.run(receiver));
        Self { options, requests, status, output, group }
    }

    /// How the child stands, and what tells of its changes.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Sends the child a signal, if one runs.
    pub async fn signal(&self, signal: Signal) {
        drop(self.requests.send(Request::Signal(signal)).await);
    }

    /// Ends the server for good: SIGTERM, and SIGKILL once `grace` is over. Returns its exit code.
    ///
    /// A script may end before the server that it has started: that is waited for as well.
    pub async fn end(&self, grace: Duration) -> u8 {
        drop(self.requests.send(Request::Close).await);
        let ended = async {
            // The other half is for its end. One that says nothing of its start is not waited for.
            let starts = async {
                if matches!(self.phase().await, Phase::Starting | Phase::Ready) {
                    self.wait_until_started(grace / 2).await;
                }
            };
            drop(tokio::time::timeout(grace / 2, starts).await);
            self.ask(Request::Stop).await;
            while self.is_somebody_left() {
                tokio::time::sleep(LOOK_PAUSE).await;
            }
        };
        if tokio::time::timeout(grace, ended).await.is_err() {
            tracing::warn!(
                grace_seconds = grace.as_secs(),
                "the server has not ended, it is killed"
            );
            // Only a process that waits for a dead disk outlives that.
            drop(tokio::time::timeout(UNSERVED_STOP_MAX, self.kill()).await);
        }
        match *self.status.borrow() {
            Status::Ended(code) | Status::Stopped(code) => code,
            Status::Running(_) | Status::Waiting => 1,
        }
    }

    /// Kills the server, also one that has left the group and whose parent has ended.
    async fn kill(&self) {
        self.signal(Signal::KILL).await;
        self.ask(Request::Stop).await;
        if let Some(pid) = server_on(&self.options.data_directory).and_then(Pid::from_raw)
            && children::is_child_of_this_process(pid)
        {
            // It may have ended by itself meanwhile.
            kill_process(pid, Signal::KILL).ok();
        }
    }

    /// SIGTERM, until no process of the server is left.
    async fn stop_within(&self, limit: Duration) -> Result<(), Failure> {
        let too_long = |what: &str| {
            Failure::precondition(
                "SERVER_RUNNING",
                format!("{what} {} s after it was asked to stop (--stop-timeout)", limit.as_secs()),
            )
        };
        let begun = Instant::now();
        tokio::time::timeout(limit, self.ask(Request::Stop))
            .await
            .map_err(|_| too_long("the server still runs"))?;
        // A script in between may have ended before the server.
        while let Some(pid) = server_on(&self.options.data_directory) {
            if begun.elapsed() >= limit {
                return Err(too_long(&format!("process {pid} still holds the server's locks")));
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        Ok(())
    }

    /// As `stop_within`, for a server that may be killed.
    async fn stop_or_kill(&self, why: &str) -> Result<(), Failure> {
        let limit = self.options.stop_timeout;
        let first = UNSERVED_STOP_MAX.min(limit);
        if self.stop_within(first).await.is_ok() {
            return Ok(());
        }
        tracing::warn!(
            seconds = first.as_secs(),
            why,
            "the server has not ended after SIGTERM, it is killed"
        );
        // Only a process that waits for a dead disk outlives that.
        drop(tokio::time::timeout(limit, self.kill()).await);
        self.stop_within(limit).await
    }

    /// Whether a process of the server is left: one of its group, or who holds its locks.
    fn is_somebody_left(&self) -> bool {
        self.group.load(Ordering::Relaxed) != 0 && self.group_lives()
            || server_on(&self.options.data_directory).is_some()
    }

    fn group_lives(&self) -> bool {
        let group = Pid::from_raw(self.group.load(Ordering::Relaxed));
        group.is_some_and(|group| test_kill_process_group(group).is_ok())
    }

    /// Sends a request and waits until it is done.
    async fn ask(&self, request: impl FnOnce(oneshot::Sender<()>) -> Request) {
        let (done, ended) = oneshot::channel();
        if self.requests.send(request(done)).await.is_ok() {
            // The task that owns the child ends with this process only.
            drop(ended.await);
        }
    }

    async fn start_child(&self, first: FirstStart) -> Result<(), Failure> {
        let (done, started) = oneshot::channel();
        let gone = || Failure::bug("the supervisor has stopped");
        self.requests.send(Request::Start(first, done)).await.map_err(|_| gone())?;
        started.await.map_err(|_| gone())?
    }

    fn ended(&self) -> Option<Failure> {
        let code = match *self.status.borrow() {
            Status::Running(_) | Status::Waiting => return None,
            Status::Ended(code) | Status::Stopped(code) => code,
        };
        Some(Failure::precondition(
            "SERVER_NOT_HEALTHY",
            format!(
                "the server on {} has ended with exit code {code}",
                self.options.data_directory.display()
            ),
        ))
    }
}

#[tonic::async_trait]
impl ServerControl for Supervisor {
    async fn stop(&self) -> Result<(), Failure> {
        let limit = self.options.stop_timeout;
        match self.wait_until_started(limit).await {
            // InnoDB and Aria recover from a kill at any moment, MyISAM and the like have not been
            // written to by a server that has taken no connection, and SIGTERM may have made it hang.
            Phase::Starting => self.stop_or_kill("it was still starting").await,
            Phase::Over | Phase::Ready | Phase::Unseen => self.stop_within(limit).await,
        }
    }

    async fn give_up(&self) -> Result<(), Failure> {
        self.stop_or_kill("its clone is given up").await
    }

    async fn start(&self, first: FirstStart) -> Result<(), Failure> {
        // One whose supervisor was killed is on its way down.
        let begun = Instant::now();
        while let Some(pid) = server_on(&self.options.data_directory) {
            if begun.elapsed() >= self.options.server_wait {
                let directory = self.options.data_directory.display();
                let text = if matches!(*self.status.borrow(), Status::Running(_)) {
                    format!(
                        "process {pid} still runs on {directory} and has been asked to stop: it is \
                         started again once it has ended"
                    )
                } else {
                    format!("process {pid} runs a server on {directory} already; stop it")
                };
                drop(self.requests.send(Request::StartLate(first)).await);
                return Err(Failure::precondition("SERVER_RUNNING", text));
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        self.start_child(first).await
    }

    async fn wait_healthy(&self, limit: Duration) -> Result<Health, Failure> {
        let result = self.options.health.wait(limit, || self.ended()).await;
        result.map_err(|failure| self.output.told(failure))
    }

    async fn answers(&self) -> Option<bool> {
        self.options.health.answers().await
    }

    async fn open(&self) -> Result<(), Failure> {
        if let Err(failure) = self.stop().await {
            // It may be on its way down all the same.
            drop(self.requests.send(Request::StartLate(FirstStart::Opened)).await);
            return Err(failure);
        }
        self.start(FirstStart::Opened).await?;
        self.wait_healthy(self.options.stop_timeout.max(OPENS_MIN)).await.map(drop)
    }

    async fn set_mode(&self, first: FirstStart) {
        drop(self.requests.send(Request::SetMode(first)).await);
    }

    fn manages(&self) -> bool {
        true
    }

    fn kind(&self) -> &'static str {
        "supervise"
    }
}
