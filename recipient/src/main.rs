//! The recipient's program: reads settings, runs, maps the end to an exit code.

use std::process::ExitCode;

use marcot_common::{config, server::exit_code};
use marcot_recipient::server::{Settings, run};

#[tokio::main]
async fn main() -> ExitCode {
    exit_code("marcot-recipient", run(config::load_or_exit::<Settings>()).await)
}
