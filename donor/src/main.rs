//! The donor's program: reads settings, runs, maps the end to an exit code.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use marcot_common::{config::load_or_exit, server::run_daemon};
use marcot_donor::server::{Settings, run};

fn main() -> ExitCode {
    run_daemon("marcot-donor", async { run(load_or_exit::<Settings>()).await })
}
