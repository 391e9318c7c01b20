//! The command line `marcot`: a client of the recipient's API, made for a person.
//!
//! Exit codes: 0 done, 1 failed, 2 bad usage or statement, 130 cancelled. What was asked for goes
//! to standard output, everything else to standard error.

mod account;
mod arguments;
mod connect;
mod json;
mod output;
mod progress;
mod request;
mod secret;
mod wait;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use marcot_common::failure::Failure;
use marcot_proto::recipient::v1::{
    CancelCloneRequest, Clone, CloneStatementRequest, GetCloneRequest, ListClonesRequest,
    ValidateCloneRequest, validate_clone_request::Request as Validated,
};

use self::{
    arguments::{Arguments, Command, StartOptions, ValidateCommand},
    connect::Client,
    output::{Output, print_failure},
};

/// Runs the command line.
pub async fn run() -> ExitCode {
    let arguments = Arguments::parse();
    match execute(&arguments).await {
        Ok(End::Done) => ExitCode::SUCCESS,
        Ok(End::Failed) => ExitCode::FAILURE,
        Ok(End::Cancelled) => ExitCode::from(130),
        Err(failure) => {
            print_failure(&failure);
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
}

async fn execute(arguments: &Arguments) -> Result<End, Failure> {
    let output = Output { json: arguments.output == arguments::Format::Json };
    match &arguments.command {
        Command::Sql { statement, start } => {
            let text = request::read_statement(statement)?;
            request::check_statement(&text)?;
            let message = start.statement(text)?;
            let mut client = Client::connect(arguments).await?;
            let started = client.started(|mut api| async move {
                Ok(api.clone_statement(message).await?.into_inner().clone)
            });
            let clone = started.await?;
            follow(&mut client, clone, start, output).await
        }
        Command::Clone { donor, start } => {
            let message = donor.instance(start)?;
            let mut client = Client::connect(arguments).await?;
            let started = client.started(|mut api| async move {
                Ok(api.clone_instance(message).await?.into_inner().clone)
            });
            let clone = started.await?;
            follow(&mut client, clone, start, output).await
        }
        Command::Local { data_directory, start } => {
            let message = start.local(data_directory)?;
            let mut client = Client::connect(arguments).await?;
            let started = client.started(|mut api| async move {
                Ok(api.clone_local(message).await?.into_inner().clone)
            });
            let clone = started.await?;
            follow(&mut client, clone, start, output).await
        }
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
            let name = clone_name(name);
            let clone = wait::wait(&mut client, &name, wait::Interrupt::Leaves).await?;
            Ok(ended(&clone, output))
        }
        Command::Cancel { name } => {
            let mut client = Client::connect(arguments).await?;
            let request = CancelCloneRequest { name: clone_name(name) };
            client.api().cancel_clone(request).await.map_err(failed)?;
            let name = clone_name(name);
            let clone = wait::wait(&mut client, &name, wait::Interrupt::Leaves).await?;
            output.clone(&clone);
            Ok(End::Done)
        }
        Command::Account { what } => account::run(what, output).map(|()| End::Done),
        Command::Completions { shell } => {
            let mut command = Arguments::command();
            clap_complete::generate(*shell, &mut command, "marcot", &mut std::io::stdout());
            Ok(End::Done)
        }
        Command::Man { directory } => clap_mangen::generate_to(Arguments::command(), directory)
            .map(|()| End::Done)
            .map_err(|e| Failure::io("write man pages to", directory, &e)),
    }
}

/// Waits for a started clone, unless it is to go on by itself.
async fn follow(
    client: &mut Client,
    clone: Clone,
    start: &StartOptions,
    output: Output,
) -> Result<End, Failure> {
    if start.detach {
        output.clone(&clone);
        return Ok(End::Done);
    }
    let clone = wait::wait(client, &clone.name, wait::Interrupt::Cancels).await?;
    Ok(ended(&clone, output))
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
    what: &ValidateCommand,
    output: Output,
) -> Result<End, Failure> {
    let request = match what {
        ValidateCommand::Sql { statement, start } => {
            let text = request::read_statement(statement)?;
            request::check_statement(&text)?;
            let message: CloneStatementRequest = start.statement(text)?;
            Validated::CloneStatement(message)
        }
        ValidateCommand::Clone { donor, start } => Validated::CloneInstance(donor.instance(start)?),
        ValidateCommand::Local { data_directory, start } => {
            Validated::CloneLocal(start.local(data_directory)?)
        }
    };
    let mut client = Client::connect(arguments).await?;
    let request = ValidateCloneRequest { request: Some(request) };
    let answer = client.api().validate_clone(request).await.map_err(failed)?.into_inner();
    output.findings(&answer);
    Ok(if answer.valid { End::Done } else { End::Failed })
}

/// A clone's name may be given with its collection or without.
fn clone_name(name: &str) -> String {
    if name.starts_with("clones/") { name.to_owned() } else { format!("clones/{name}") }
}

#[expect(clippy::needless_pass_by_value, reason = "fits map_err")]
fn failed(status: tonic::Status) -> Failure {
    Failure::from_status(&status)
}
