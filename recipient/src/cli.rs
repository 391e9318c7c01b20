//! The command line `marcot`: a client of the recipient's API, made for a person.
//!
//! Exit codes: 0 done, 1 failed, 2 bad usage or statement, 130 cancelled. What was asked for goes
//! to standard output, everything else to standard error.

mod account;
mod arguments;
mod caret;
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

use tonic::Status;

use self::{
    arguments::{Arguments, Command, StartOptions, ValidateCommand},
    connect::Client,
    output::{Output, print_failure},
    request::HasSecret,
    wait::{Interrupt, Interrupts, Waited},
};

/// Runs the command line.
pub async fn run() -> ExitCode {
    let arguments = Arguments::parse();
    let output = Output { json: arguments.output == arguments::Format::Json };
    match execute(&arguments, output).await {
        Ok(End::Done) => ExitCode::SUCCESS,
        Ok(End::Failed) => ExitCode::FAILURE,
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
    /// The user has left before the end.
    Left,
}

async fn execute(arguments: &Arguments, output: Output) -> Result<End, Failure> {
    match &arguments.command {
        Command::Sql { statement, start } => {
            let text = request::read_statement(statement)?;
            let secret = request::check_statement(&text)?;
            let message = start.statement(text)?;
            let run = Run { client: Client::connect(arguments).await?, start, output };
            run.go(secret, |mut api| async move {
                Ok(api.clone_statement(message).await?.into_inner().clone)
            })
            .await
        }
        Command::Clone { donor, start } => {
            let message = donor.instance(start)?;
            let secret = HasSecret(!message.password.is_empty());
            let run = Run { client: Client::connect(arguments).await?, start, output };
            run.go(secret, |mut api| async move {
                Ok(api.clone_instance(message).await?.into_inner().clone)
            })
            .await
        }
        Command::Local { data_directory, start } => {
            let message = start.local(data_directory)?;
            let run = Run { client: Client::connect(arguments).await?, start, output };
            run.go(HasSecret(false), |mut api| async move {
                Ok(api.clone_local(message).await?.into_inner().clone)
            })
            .await
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
        Command::Account { what } => account::run(what, output).map(|()| End::Done),
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

/// A command that starts a clone.
struct Run<'a> {
    client: Client,
    start: &'a StartOptions,
    output: Output,
}

impl Run<'_> {
    /// Starts the clone and waits for it, unless it is to go on by itself.
    async fn go<F: Future<Output = Result<Option<Clone>, Status>>>(
        mut self,
        secret: HasSecret,
        call: impl FnOnce(connect::Api) -> F,
    ) -> Result<End, Failure> {
        self.client.guard(secret)?;
        let mut interrupts = Interrupts::new()?;
        let clone = tokio::select! {
            clone = self.client.started(call) => clone?,
            () = interrupts.next() => {
                eprintln!(
                    "marcot: left before the recipient's answer; it may have accepted the clone: \
                     see `marcot list`"
                );
                return Ok(End::Left);
            }
        };
        if self.start.detach {
            self.output.clone(&clone);
            return Ok(End::Done);
        }
        let client = &mut self.client;
        wait(client, &clone.name, Interrupt::Cancels, &mut interrupts, self.output).await
    }
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
    what: &ValidateCommand,
    output: Output,
) -> Result<End, Failure> {
    let mut secret = HasSecret(false);
    let request = match what {
        ValidateCommand::Sql { statement, start } => {
            let text = request::read_statement(statement)?;
            secret = request::check_statement(&text)?;
            let message: CloneStatementRequest = start.statement(text)?;
            Validated::CloneStatement(message)
        }
        ValidateCommand::Clone { donor, start } => {
            let message = donor.instance(start)?;
            secret = HasSecret(!message.password.is_empty());
            Validated::CloneInstance(message)
        }
        ValidateCommand::Local { data_directory, start } => {
            Validated::CloneLocal(start.local(data_directory)?)
        }
    };
    let mut client = Client::connect(arguments).await?;
    client.guard(secret)?;
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
