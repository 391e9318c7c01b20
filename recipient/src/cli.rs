//! The command line `marcot`: a client of the recipient's API, made for a person.
//!
//! Exit codes: 0 done, 1 failed, 2 bad usage or statement, 3 (`verify`) modified by a server, 130
//! cancelled. What was asked for goes
//! to standard output, everything else to standard error.

mod account;
mod arguments;
mod caret;
mod connect;
mod json;
mod output;
mod programs;
mod progress;
mod request;
mod resume;
mod secret;
mod verify;
mod wait;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use marcot_common::failure::Failure;
use marcot_proto::{
    donor::v1::ListSnapshotsRequest,
    recipient::v1::{
        AcceptCloneRequest, CancelCloneRequest, Clone, DeleteLeftoverRequest, GetCloneRequest,
        InstallCloneRequest, ListClonesRequest, ListLeftoversRequest, PauseCloneRequest,
        RollbackCloneRequest, UpdateCloneLimitsRequest, ValidateCloneRequest,
    },
};

use self::{
    arguments::{Arguments, Command, DonorCommand, StartCommand},
    connect::Client,
    output::{Output, print_failure},
    wait::{Interrupt, Interrupts, Waited},
};

/// Most snapshots that are listed: a donor holds 1,024 at the most, and one that never ends its
/// list is no donor.
const SNAPSHOTS_MAX: usize = 1024;

/// Runs the command line.
pub async fn run() -> ExitCode {
    let arguments = Arguments::parse();
    let output = Output { json: arguments.output == arguments::Format::Json };
    match execute(&arguments, output).await {
        Ok(End::Done) => ExitCode::SUCCESS,
        Ok(End::Failed) => ExitCode::FAILURE,
        Ok(End::Modified) => ExitCode::from(3),
        Ok(End::Cancelled | End::Left) => ExitCode::from(130),
        Err(failure) => {
            output.failure(&failure);
            match failure.code {
                tonic::Code::InvalidArgument => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Done,
    Failed,
    Cancelled,
    /// A server has changed what was checked.
    Modified,
    /// The user has left before the end.
    Left,
}

async fn execute(arguments: &Arguments, output: Output) -> Result<End, Failure> {
    match &arguments.command {
        Command::Start(command) => start(arguments, command, output).await,
        Command::Validate { what } => validate(arguments, what, output).await,
        Command::List { count } => {
            let mut client = Client::connect(arguments).await?;
            let request = ListClonesRequest { page_size: *count, page_token: String::new() };
            let answer = client.api().list_clones(request).await.map_err(failed)?;
            output.list(&answer.into_inner().clones);
            Ok(End::Done)
        }
        Command::Get { name } => {
            let mut client = Client::connect(arguments).await?;
            let request = GetCloneRequest { name: clone_name(name) };
            let answer = client.api().get_clone(request).await.map_err(failed)?;
            let clone = answer.into_inner().clone.unwrap_or_default();
            output.clone(&clone);
            Ok(End::Done)
        }
        Command::Watch { name } => {
            let mut client = Client::connect(arguments).await?;
            let mut interrupts = Interrupts::new()?;
            wait(&mut client, &clone_name(name), Interrupt::Leaves, &mut interrupts, output).await
        }
        Command::Cancel { name } => {
            let mut client = Client::connect(arguments).await?;
            let request = CancelCloneRequest { name: clone_name(name) };
            client.api().cancel_clone(request).await.map_err(failed)?;
            let mut interrupts = Interrupts::new()?;
            let name = clone_name(name);
            let end = wait(&mut client, &name, Interrupt::Leaves, &mut interrupts, output).await?;
            // Cancelled is what was asked for.
            Ok(if end == End::Cancelled { End::Done } else { end })
        }
        Command::Pause { name } => {
            let mut client = Client::connect(arguments).await?;
            let request = PauseCloneRequest { name: clone_name(name) };
            let answer = client.api().pause_clone(request).await.map_err(failed)?;
            output.clone(&answer.into_inner().clone.unwrap_or_default());
            Ok(End::Done)
        }
        Command::Limit { name, limits } => {
            let limits = limits.to_wire().ok_or_else(|| {
                Failure::invalid(
                    "NO_LIMIT",
                    "no limit is given; give --concurrency, --autotune-concurrency, \
                     --max-data-bandwidth or --max-network-bandwidth",
                )
            })?;
            let mut client = Client::connect(arguments).await?;
            let request = UpdateCloneLimitsRequest { name: clone_name(name), limits: Some(limits) };
            let answer = client.api().update_clone_limits(request).await.map_err(failed)?;
            output.clone(&answer.into_inner().clone.unwrap_or_default());
            Ok(End::Done)
        }
        Command::Resume { name, donor_password_file, replication_password_file } => {
            let mut client = Client::connect(arguments).await?;
            let name = clone_name(name);
            let request = GetCloneRequest { name: name.clone() };
            let clone = client.api().get_clone(request).await.map_err(failed)?.into_inner();
            let files = [donor_password_file.as_deref(), replication_password_file.as_deref()];
            let request = resume::request(&clone.clone.unwrap_or_default(), files)?;
            let has_secret =
                !request.password.is_empty() || !request.attach_replica_password.is_empty();
            client.guard(request::HasSecret(has_secret))?;
            let answer = client.api().resume_clone(request).await.map_err(failed)?;
            output.clone(&answer.into_inner().clone.unwrap_or_default());
            Ok(End::Done)
        }
        Command::Verify { what, signer } => verify::verify(arguments, what, signer, output).await,
        Command::Install { name } => {
            let mut client = Client::connect(arguments).await?;
            let request = InstallCloneRequest { name: clone_name(name) };
            let answer = client.api().install_clone(request).await.map_err(failed)?;
            output.clone(&answer.into_inner().clone.unwrap_or_default());
            Ok(End::Done)
        }
        Command::Accept { name } => {
            let mut client = Client::connect(arguments).await?;
            let request = AcceptCloneRequest { name: clone_name(name) };
            let answer = client.api().accept_clone(request).await.map_err(failed)?;
            output.clone(&answer.into_inner().clone.unwrap_or_default());
            Ok(End::Done)
        }
        Command::Rollback { name, discard_writes } => {
            let mut client = Client::connect(arguments).await?;
            let request =
                RollbackCloneRequest { name: clone_name(name), discard_writes: *discard_writes };
            let answer = client.api().rollback_clone(request).await.map_err(failed)?;
            output.clone(&answer.into_inner().clone.unwrap_or_default());
            Ok(End::Done)
        }
        Command::Prune { remove, all } => prune(arguments, remove, *all, output).await,
        Command::Donor { what: DonorCommand::List { donor } } => {
            let mut api = connect::donor(arguments, donor).await?;
            let mut snapshots = Vec::new();
            let mut request = ListSnapshotsRequest::default();
            while snapshots.len() < SNAPSHOTS_MAX {
                let answer = api.list_snapshots(request).await.map_err(failed)?.into_inner();
                snapshots.extend(answer.snapshots);
                if answer.next_page_token.is_empty() {
                    break;
                }
                request = ListSnapshotsRequest {
                    page_token: answer.next_page_token,
                    ..Default::default()
                };
            }
            output.snapshots(&snapshots);
            Ok(End::Done)
        }
        Command::Account { what } => account::run(what, output).map(|()| End::Done),
        Command::CopyPrograms { directory } => programs::copy(directory).map(|()| End::Done),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Arguments::command(), "marcot", &mut script);
            output::say!("{}", String::from_utf8_lossy(&script).trim_end());
            Ok(End::Done)
        }
        Command::Man { directory } => clap_mangen::generate_to(Arguments::command(), directory)
            .map(|()| End::Done)
            .map_err(|e| Failure::io("write man pages to", directory, &e)),
    }
}

/// Starts a clone and waits for it, unless it is to go on by itself.
async fn start(
    arguments: &Arguments,
    command: &StartCommand,
    output: Output,
) -> Result<End, Failure> {
    let (request, secret) = command.request()?;
    let mut client = Client::connect(arguments).await?;
    client.guard(secret)?;
    let mut interrupts = Interrupts::new()?;
    let clone = tokio::select! {
        clone = client.start(request) => clone?,
        () = interrupts.next() => {
            eprintln!(
                "marcot: left before the recipient's answer; it may have accepted the clone: see \
                 `marcot list`"
            );
            return Ok(End::Left);
        }
    };
    if command.options().detach {
        output.clone(&clone);
        return Ok(End::Done);
    }
    wait(&mut client, &clone.name, Interrupt::Cancels, &mut interrupts, output).await
}

/// Waits for the end of a clone and prints it.
async fn wait(
    client: &mut Client,
    name: &str,
    interrupt: Interrupt,
    interrupts: &mut Interrupts,
    output: Output,
) -> Result<End, Failure> {
    match wait::wait(client, name, interrupt, interrupts).await? {
        Waited::Ended(clone) => Ok(ended(&clone, output)),
        Waited::Left => {
            eprintln!("marcot: left; `marcot watch {name}` shows the clone again");
            Ok(End::Left)
        }
    }
}

fn ended(clone: &Clone, output: Output) -> End {
    use marcot_proto::recipient::v1::State;
    output.clone(clone);
    match clone.state() {
        State::Completed => End::Done,
        State::Cancelled => End::Cancelled,
        _ => {
            if let Some(error) = &clone.error {
                print_failure(&Failure::from_wire(error));
            }
            End::Failed
        }
    }
}

async fn validate(
    arguments: &Arguments,
    what: &StartCommand,
    output: Output,
) -> Result<End, Failure> {
    let (request, secret) = what.request()?;
    let mut client = Client::connect(arguments).await?;
    client.guard(secret)?;
    let request = ValidateCloneRequest { request: Some(request) };
    let answer = client.api().validate_clone(request).await.map_err(failed)?.into_inner();
    output.findings(&answer);
    Ok(if answer.valid { End::Done } else { End::Failed })
}

/// Lists leftovers, after some have been removed if so asked.
async fn prune(
    arguments: &Arguments,
    remove: &[String],
    all: bool,
    output: Output,
) -> Result<End, Failure> {
    let mut client = Client::connect(arguments).await?;
    let list = ListLeftoversRequest {};
    let present = client.api().list_leftovers(list).await.map_err(failed)?.into_inner().leftovers;
    let names: Vec<String> = match all {
        true => present.iter().filter(|l| l.removable).map(|l| l.name.clone()).collect(),
        false => remove.iter().map(|name| leftover_name(name)).collect(),
    };
    for name in &names {
        let request = DeleteLeftoverRequest { name: name.clone() };
        client.api().delete_leftover(request).await.map_err(failed)?;
        eprintln!("marcot: removed {name}");
    }
    let left = client.api().list_leftovers(list).await.map_err(failed)?.into_inner().leftovers;
    output.leftovers(&left);
    Ok(End::Done)
}

fn leftover_name(name: &str) -> String {
    if name.starts_with("leftovers/") { name.to_owned() } else { format!("leftovers/{name}") }
}

/// A clone's name may be given with its collection or without.
fn clone_name(name: &str) -> String {
    if name.starts_with("clones/") { name.to_owned() } else { format!("clones/{name}") }
}

#[expect(clippy::needless_pass_by_value, reason = "fits map_err")]
fn failed(status: tonic::Status) -> Failure {
    Failure::from_status(&status)
}
