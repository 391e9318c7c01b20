//! The task that owns the child.

use std::{
    os::unix::process::ExitStatusExt as _,
    process::{ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
    time::{Duration, Instant},
};

use marcot_common::{failure::Failure, os::end_with_this_process};
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use tokio::{
    process::{Child, Command},
    sync::{mpsc, oneshot, watch},
};
use tonic::Code;
use tracing::{error, info, warn};

use super::{
    FIRST_ARGUMENTS, OPENED_ARGUMENTS, Options, Output, REPLICA_ARGUMENTS, Request, Status,
    back_off::RestartPolicy,
    children::{self, OwnChild},
};
use crate::{install::locks::server_on, server_control::FirstStart};

/// Between two looks whether a server that takes long to stop has stopped.
const LATE_PAUSE: Duration = Duration::from_millis(200);

/// A running child.
struct Running {
    child: Child,
    pid: u32,
    since: Instant,
    first: FirstStart,
    _own: OwnChild,
}

pub(super) struct Actor {
    options: Arc<Options>,
    output: Arc<Output>,
    policy: RestartPolicy,
    status: watch::Sender<Status>,
    running: Option<Running>,
    /// Who waits for the child's end; it is not started again then.
    stopping: Vec<oneshot::Sender<()>>,
    /// How it is started once it has ended: its stop took longer than anybody waits for.
    late: Option<FirstStart>,
    /// When it is started again, and how.
    restart: Option<(tokio::time::Instant, FirstStart)>,
    /// The process group of the last child; it outlives a child that was a script.
    group: Arc<AtomicI32>,
    /// The last child's exit code.
    last_code: u8,
    /// Whether this process ends: nothing is started any more.
    is_ending: bool,
}

impl Actor {
    pub(super) fn new(
        options: Arc<Options>,
        output: Arc<Output>,
        policy: RestartPolicy,
        status: watch::Sender<Status>,
        group: Arc<AtomicI32>,
    ) -> Self {
        Self {
            options,
            output,
            policy,
            status,
            running: None,
            stopping: Vec::new(),
            late: None,
            restart: None,
            group,
            last_code: 0,
            is_ending: false,
        }
    }

    pub(super) async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        loop {
            let at = self.restart.map(|(at, _)| at);
            tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => self.handle(request),
                    None => return,
                },
                status = wait(&mut self.running) => self.ended(status),
                () = sleep_until(at) => self.start_again(),
                () = tokio::time::sleep(LATE_PAUSE), if self.is_late() => self.start_late(),
            }
        }
    }

    fn handle(&mut self, request: Request) {
        match request {
            Request::Start(first, done) => {
                (self.restart, self.late) = (None, None);
                let result = match &self.running {
                    // It has let go of its files, and not ended.
                    Some(running) if !self.stopping.is_empty() => {
                        self.late = Some(first);
                        Err(Failure::precondition(
                            "SERVER_RUNNING",
                            format!(
                                "process {} has been asked to stop and has not ended: the server is \
                                 started again once it has",
                                running.pid
                            ),
                        ))
                    }
                    Some(running) => Err(Failure::bug(format!(
                        "the server runs already, as process {}",
                        running.pid
                    ))),
                    None if self.is_ending => Err(Failure::new(
                        Code::Unavailable,
                        "RECIPIENT_STOPS",
                        "the recipient stops, and its server with it: it is not started any more",
                    )),
                    None => self.spawn(first),
                };
                drop(done.send(result));
            }
            Request::StartLate(first) => self.late = Some(first).filter(|_| !self.is_ending),
            Request::Stop(done) => self.stop(done),
            Request::Close => {
                self.is_ending = true;
                if self.restart.take().is_some() {
                    self.set(Status::Stopped(self.last_code));
                }
            }
            Request::Signal(signal) => self.signal(signal),
            Request::SetMode(first) => {
                if let Some(running) = &mut self.running {
                    running.first = first;
                }
                if let Some((_, restart)) = &mut self.restart {
                    *restart = first;
                }
                if let Some(late) = &mut self.late {
                    *late = first;
                }
            }
        }
    }

    fn stop(&mut self, done: oneshot::Sender<()>) {
        (self.restart, self.late) = (None, None);
        self.stopping.push(done);
        if self.running.is_some() {
            self.signal(Signal::TERM);
        } else {
            self.set_stopped(self.last_code);
        }
    }

    /// To the whole group, also after the child has ended: a script may leave its server behind.
    fn signal(&self, signal: Signal) {
        let Some(group) = Pid::from_raw(self.group.load(Ordering::Relaxed)) else {
            return;
        };
        if self.running.is_none() && test_kill_process_group(group).is_err() {
            return;
        }
        info!(
            signal = signal.as_raw(),
            group = group.as_raw_nonzero().get(),
            "the server gets a signal"
        );
        if let Err(e) = kill_process_group(group, signal) {
            warn!(error = %e, "the signal did not reach the server");
        }
    }

    fn spawn(&mut self, first: FirstStart) -> Result<(), Failure> {
        let (program, arguments) = self.options.command.split_first().ok_or_else(|| {
            Failure::invalid("NO_COMMAND", "supervise: the server's command is missing")
        })?;
        let more: &[&str] = match first {
            FirstStart::Yes => &FIRST_ARGUMENTS,
            FirstStart::Opened => &OPENED_ARGUMENTS,
            FirstStart::Replica => &REPLICA_ARGUMENTS,
            FirstStart::No => &[],
        };
        self.output.begin();
        let mut command = Command::new(program);
        command.args(arguments).args(more).process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A server that nobody supervises would stand in the way of the next start. Not SIGTERM: a
        // MariaDB that gets it while it starts may hang for ever. (A child that changes its user loses
        // this; the next start then waits for it and names it.)
        end_with_this_process(&mut command);
        let (mut child, own) = children::spawn(&mut command).map_err(|e| {
            Failure::precondition(
                "SERVER_START",
                format!("start {}: {e}; check the command after `--`", program.display()),
            )
        })?;
        if let Some(stdout) = child.stdout.take() {
            let output = Arc::clone(&self.output);
            tokio::spawn(async move { output.follow(stdout).await });
        }
        if let Some(stderr) = child.stderr.take() {
            let output = Arc::clone(&self.output);
            tokio::spawn(async move { output.follow(stderr).await });
        }
        let pid = child.id().unwrap_or(0);
        self.group.store(i32::try_from(pid).unwrap_or(0), Ordering::Relaxed);
        info!(pid, start = first.name(), program = %program.display(), "the server is started");
        self.running = Some(Running { child, pid, since: Instant::now(), first, _own: own });
        self.set(Status::Running(pid));
        Ok(())
    }

    fn ended(&mut self, status: std::io::Result<ExitStatus>) {
        let Some(running) = self.running.take() else { return };
        let code = match status {
            Ok(status) => exit_code(status),
            Err(e) => {
                error!(error = %e, "the server cannot be waited for");
                1
            }
        };
        self.last_code = code;
        let ran = running.since.elapsed();
        info!(pid = running.pid, code, ran_seconds = ran.as_secs(), "the server has ended");
        if self.is_ending || !self.stopping.is_empty() {
            self.set_stopped(code);
            return;
        }
        // A clone that has not answered yet is given up by who has started it.
        if running.first == FirstStart::Yes {
            self.set(Status::Stopped(code));
            return;
        }
        match self.policy.after(code, ran) {
            Some(pause) => {
                warn!(code, pause_seconds = pause.as_secs(), "the server is started again");
                self.restart = Some((tokio::time::Instant::now() + pause, running.first));
                self.set(Status::Waiting);
            }
            None => self.set(Status::Ended(code)),
        }
    }

    /// Whether a server is to be started once nothing of the last one is left.
    fn is_late(&self) -> bool {
        self.late.is_some() && self.running.is_none() && !self.is_ending
    }

    fn start_late(&mut self) {
        // A script in between may have ended before the server.
        if server_on(&self.options.data_directory).is_none() {
            let now = tokio::time::Instant::now();
            self.restart = self.late.take().map(|first| (now, first));
            self.set(Status::Waiting);
        }
    }

    fn start_again(&mut self) {
        let Some((_, first)) = self.restart.take() else { return };
        if let Err(failure) = self.spawn(first) {
            error!(error = %failure, "the server could not be started again");
            match self.policy.after(1, Duration::ZERO) {
                Some(pause) => self.restart = Some((tokio::time::Instant::now() + pause, first)),
                None => self.set(Status::Ended(1)),
            }
        }
    }

    fn set_stopped(&mut self, code: u8) {
        self.set(Status::Stopped(code));
        for done in self.stopping.drain(..) {
            // Whoever asked may have stopped waiting.
            done.send(()).ok();
        }
    }

    fn set(&self, status: Status) {
        self.status.send_replace(status);
    }
}

/// The child's end; never, while there is none.
async fn wait(running: &mut Option<Running>) -> std::io::Result<ExitStatus> {
    match running {
        Some(running) => running.child.wait().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// As shells have it: 128 and the signal's number for a process that one has ended.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}
