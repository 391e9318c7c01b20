//! A recipient that does what a test tells it, and the program `marcot` against it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

use std::{
    net::{IpAddr, Ipv4Addr, UdpSocket},
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::StreamExt as _;
use marcot_common::failure::{Failure, Violation};
use marcot_proto::{
    common::v1::{self as pbc, Stage},
    recipient::v1::{
        self as pb, State,
        recipient_service_server::{RecipientService, RecipientServiceServer},
    },
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    net::TcpListener,
    process::{Child, ChildStderr, Command},
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status};

/// The name of every clone here.
pub(crate) const NAME: &str = "clones/0190-test";

/// The donor's password: must be seen nowhere.
pub(crate) const SECRET: &str = "hunter2";

/// Bound of every wait.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// What the recipient does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Script {
    /// The clone runs and completes.
    Completes,
    /// The clone runs and fails.
    Fails,
    /// The clone is refused, for two reasons.
    Refuses,
    /// The clone runs until it is cancelled.
    Runs,
    /// The clone runs, also when it is cancelled.
    IgnoresCancel,
    /// The first watch breaks off, the second one completes.
    BreaksOnce,
    /// Every watch is refused for a reason that does not pass.
    RefusesWatch,
}

/// What the recipient was asked.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    pub(crate) statements: Vec<pb::CloneStatementRequest>,
    pub(crate) instances: Vec<pb::CloneInstanceRequest>,
    pub(crate) locals: Vec<pb::CloneLocalRequest>,
    pub(crate) watches: Vec<pb::WatchCloneRequest>,
    pub(crate) cancels: usize,
}

struct Mock {
    script: Script,
    asked: Arc<Mutex<Asked>>,
    cancelled: watch::Sender<bool>,
}

/// A recipient on a port of its own; it ends with the test's runtime.
pub(crate) struct Recipient {
    pub(crate) address: String,
    pub(crate) asked: Arc<Mutex<Asked>>,
}

impl Recipient {
    pub(crate) async fn start(script: Script) -> Self {
        Self::start_at(script, Ipv4Addr::LOCALHOST.into()).await
    }

    pub(crate) async fn start_at(script: Script, address: IpAddr) -> Self {
        let listener = TcpListener::bind((address, 0)).await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Asked::default()));
        let mock = Mock { script, asked: Arc::clone(&asked), cancelled: watch::Sender::new(false) };
        let service = RecipientServiceServer::new(mock);
        let server = tonic::transport::Server::builder().add_service(service);
        // As Marcot's own listener does: the client speaks first.
        let incoming = TcpListenerStream::new(listener).then(|accepted| async {
            let stream = accepted?;
            stream.peek(&mut [0]).await?;
            Ok::<_, std::io::Error>(stream)
        });
        tokio::spawn(server.serve_with_incoming(incoming));
        Self { address, asked }
    }

    /// The program, told where this recipient is.
    pub(crate) fn marcot(&self, arguments: &[&str]) -> Command {
        let mut command = marcot(arguments);
        command.env("MARCOT_RECIPIENT", &self.address);
        command
    }
}

/// An address of this host that others could reach, if it has one: the one that a packet would leave from.
pub(crate) fn address_on_a_network() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    // Nothing is sent.
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|address| !address.is_loopback())
}

/// The program, without this environment's settings.
pub(crate) fn marcot(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_marcot"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for variable in ["PASSWORD", "DONOR_PASSWORD", "USER", "CA_FILE", "RECIPIENT"] {
        command.env_remove(format!("MARCOT_{variable}"));
    }
    command.kill_on_drop(true);
    command
}

/// What a program left behind.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs the program to its end. The secret must be in none of its words.
pub(crate) async fn run(mut command: Command) -> Ended {
    let output = tokio::time::timeout(WAIT_MAX, command.output()).await.unwrap().unwrap();
    let ended = Ended {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    };
    assert!(!format!("{ended:?}").contains(SECRET), "{ended:?}");
    ended
}

/// The same, with something to read.
pub(crate) async fn run_with_input(mut command: Command, input: &str) -> Ended {
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).await.unwrap();
    drop(stdin);
    let output = tokio::time::timeout(WAIT_MAX, child.wait_with_output()).await.unwrap().unwrap();
    Ended {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A running program whose remarks are read line by line.
pub(crate) struct Running {
    child: Child,
    stderr: Lines<BufReader<ChildStderr>>,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap()).lines();
        Self { child, stderr }
    }

    /// Waits for a line on standard error.
    pub(crate) async fn wait_for(&mut self, text: &str) {
        let found = async {
            while let Some(line) = self.stderr.next_line().await.unwrap() {
                if line.contains(text) {
                    return;
                }
            }
            panic!("the program ended without a word of `{text}`");
        };
        tokio::time::timeout(WAIT_MAX, found).await.unwrap();
    }

    pub(crate) fn interrupt(&self) {
        let pid = i32::try_from(self.child.id().unwrap()).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    }

    pub(crate) async fn end(mut self) -> Ended {
        let code = tokio::time::timeout(WAIT_MAX, self.child.wait()).await.unwrap().unwrap().code();
        let mut stdout = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut stdout).await.unwrap();
        let mut stderr = String::new();
        while let Some(line) = self.stderr.next_line().await.unwrap() {
            stderr.push_str(&line);
            stderr.push('\n');
        }
        Ended { code, stdout, stderr }
    }
}

fn row(stage: Stage, state: State, data_bytes: u64) -> pb::StageProgress {
    pb::StageProgress {
        stage: stage.into(),
        state: state.into(),
        begin_time: Some(prost_types::Timestamp { seconds: 1_795_000_000, nanos: 0 }),
        estimate_bytes: 4 << 20,
        data_bytes,
        data_speed: 1 << 20,
        ..pb::StageProgress::default()
    }
}

/// A clone that has copied `data_bytes` of 4 MiB.
pub(crate) fn clone(state: State, data_bytes: u64) -> pb::Clone {
    let ended = state != State::InProgress;
    pb::Clone {
        name: NAME.to_owned(),
        state: state.into(),
        begin_time: Some(prost_types::Timestamp { seconds: 1_795_000_000, nanos: 0 }),
        end_time: ended.then_some(prost_types::Timestamp { seconds: 1_795_000_002, nanos: 0 }),
        source: "db1:4405".to_owned(),
        destination: b"/srv/new\x1b[2J".as_slice().into(),
        statement: "CLONE INSTANCE FROM 'u'@'db1':4405 IDENTIFIED BY <secret>".to_owned(),
        stages: vec![row(Stage::FileCopy, state, data_bytes)],
        error: match state {
            State::Failed => Some(pbc::Failure {
                error_number: 3862,
                reason: "DONOR_UNREACHABLE".to_owned(),
                message: "donor: the donor is gone".to_owned(),
                code: 14,
                ..pbc::Failure::default()
            }),
            _ => None,
        },
        ..pb::Clone::default()
    }
}

impl Mock {
    fn accept(&self) -> Result<Option<pb::Clone>, Status> {
        if self.script != Script::Refuses {
            return Ok(Some(clone(State::InProgress, 0)));
        }
        let mut failure =
            Failure::precondition("PREFLIGHT_FAILED", "two checks failed").mysql(1006);
        for (check, description) in [("free_space", "no room"), ("path_parent", "no parent")] {
            failure.violations.push(Violation {
                check: check.to_owned(),
                subject: "/srv".to_owned(),
                description: description.to_owned(),
            });
        }
        Err(failure.into())
    }
}

type Stream<T> = ReceiverStream<Result<T, Status>>;
type Answer<T> = Result<Response<T>, Status>;

/// Plays a watch.
async fn play(
    script: Script,
    first: bool,
    mut cancelled: watch::Receiver<bool>,
    sender: mpsc::Sender<Result<pb::WatchCloneResponse, Status>>,
) {
    let send = async |clone: pb::Clone, token: &str| {
        let message = pb::WatchCloneResponse { clone: Some(clone), resume_token: token.to_owned() };
        drop(sender.send(Ok(message)).await);
    };
    send(clone(State::InProgress, 1 << 20), "t1").await;
    send(clone(State::InProgress, 4 << 20), "t2").await;
    match script {
        Script::BreaksOnce if first => {
            drop(sender.send(Err(Status::unavailable("the recipient drains"))).await);
        }
        Script::Fails => send(clone(State::Failed, 4 << 20), "t3").await,
        Script::Runs => {
            drop(cancelled.wait_for(|&cancelled| cancelled).await);
            send(clone(State::Cancelled, 4 << 20), "t3").await;
        }
        Script::IgnoresCancel => sender.closed().await,
        _ => send(clone(State::Completed, 4 << 20), "t3").await,
    }
}

#[tonic::async_trait]
impl RecipientService for Mock {
    type WatchCloneStream = Stream<pb::WatchCloneResponse>;

    async fn clone_instance(
        &self,
        request: Request<pb::CloneInstanceRequest>,
    ) -> Answer<pb::CloneInstanceResponse> {
        self.asked.lock().unwrap().instances.push(request.into_inner());
        Ok(Response::new(pb::CloneInstanceResponse { clone: self.accept()? }))
    }

    async fn clone_local(
        &self,
        request: Request<pb::CloneLocalRequest>,
    ) -> Answer<pb::CloneLocalResponse> {
        self.asked.lock().unwrap().locals.push(request.into_inner());
        Ok(Response::new(pb::CloneLocalResponse { clone: self.accept()? }))
    }

    async fn clone_statement(
        &self,
        request: Request<pb::CloneStatementRequest>,
    ) -> Answer<pb::CloneStatementResponse> {
        self.asked.lock().unwrap().statements.push(request.into_inner());
        Ok(Response::new(pb::CloneStatementResponse { clone: self.accept()? }))
    }

    async fn validate_clone(
        &self,
        _: Request<pb::ValidateCloneRequest>,
    ) -> Answer<pb::ValidateCloneResponse> {
        let valid = self.script != Script::Refuses;
        let status = if valid { pb::FindingStatus::Passed } else { pb::FindingStatus::Failed };
        let finding = pb::Finding {
            check: "path_free".to_owned(),
            status: status.into(),
            message: "nothing is there".to_owned(),
            ..pb::Finding::default()
        };
        Ok(Response::new(pb::ValidateCloneResponse { findings: vec![finding], valid }))
    }

    async fn get_clone(&self, _: Request<pb::GetCloneRequest>) -> Answer<pb::GetCloneResponse> {
        let clone = Some(clone(State::InProgress, 1 << 20));
        Ok(Response::new(pb::GetCloneResponse { clone }))
    }

    async fn list_clones(
        &self,
        request: Request<pb::ListClonesRequest>,
    ) -> Answer<pb::ListClonesResponse> {
        let count = usize::try_from(request.into_inner().page_size).unwrap();
        let clones = vec![clone(State::Completed, 4 << 20); count];
        Ok(Response::new(pb::ListClonesResponse { clones, next_page_token: String::new() }))
    }

    async fn watch_clone(
        &self,
        request: Request<pb::WatchCloneRequest>,
    ) -> Answer<Self::WatchCloneStream> {
        let first = {
            let mut asked = self.asked.lock().unwrap();
            asked.watches.push(request.into_inner());
            asked.watches.len() == 1
        };
        if self.script == Script::RefusesWatch {
            return Err(Status::unimplemented("no such method"));
        }
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(play(self.script, first, self.cancelled.subscribe(), sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn cancel_clone(
        &self,
        _: Request<pb::CancelCloneRequest>,
    ) -> Answer<pb::CancelCloneResponse> {
        self.asked.lock().unwrap().cancels += 1;
        self.cancelled.send_replace(true);
        let clone = Some(clone(State::InProgress, 4 << 20));
        Ok(Response::new(pb::CancelCloneResponse { clone }))
    }

    async fn pause_clone(
        &self,
        _: Request<pb::PauseCloneRequest>,
    ) -> Answer<pb::PauseCloneResponse> {
        Err(Failure::unimplemented("PauseClone").into())
    }

    async fn resume_clone(
        &self,
        _: Request<pb::ResumeCloneRequest>,
    ) -> Answer<pb::ResumeCloneResponse> {
        Err(Failure::unimplemented("ResumeClone").into())
    }

    async fn update_clone_limits(
        &self,
        _: Request<pb::UpdateCloneLimitsRequest>,
    ) -> Answer<pb::UpdateCloneLimitsResponse> {
        Err(Failure::unimplemented("UpdateCloneLimits").into())
    }

    async fn rollback_clone(
        &self,
        _: Request<pb::RollbackCloneRequest>,
    ) -> Answer<pb::RollbackCloneResponse> {
        Err(Failure::unimplemented("RollbackClone").into())
    }

    async fn accept_clone(
        &self,
        _: Request<pb::AcceptCloneRequest>,
    ) -> Answer<pb::AcceptCloneResponse> {
        Err(Failure::unimplemented("AcceptClone").into())
    }

    async fn install_clone(
        &self,
        _: Request<pb::InstallCloneRequest>,
    ) -> Answer<pb::InstallCloneResponse> {
        Err(Failure::unimplemented("InstallClone").into())
    }

    async fn list_leftovers(
        &self,
        _: Request<pb::ListLeftoversRequest>,
    ) -> Answer<pb::ListLeftoversResponse> {
        Err(Failure::unimplemented("ListLeftovers").into())
    }

    async fn delete_leftover(
        &self,
        _: Request<pb::DeleteLeftoverRequest>,
    ) -> Answer<pb::DeleteLeftoverResponse> {
        Err(Failure::unimplemented("DeleteLeftover").into())
    }

    async fn verify_clone(
        &self,
        _: Request<pb::VerifyCloneRequest>,
    ) -> Answer<pb::VerifyCloneResponse> {
        Err(Failure::unimplemented("VerifyClone").into())
    }
}
