//! What the server whose data are to be replaced says of itself.

use std::path::Path;

use marcot_common::failure::Failure;
use marcot_engine::{
    EngineConfig,
    innodb::health::{self, Replaceable},
};

use super::Findings;
use crate::{
    install::place::{Form, INNER_DIRECTORY},
    request::CloneRequest,
    source::blocking,
};

const CHECK: &str = "server";

/// Adds what the server says; a server that does not run, or that cannot be asked, is no failure.
pub(super) async fn check(
    request: &CloneRequest,
    engine: Option<&EngineConfig>,
    findings: &mut Findings,
) {
    let Some(form) = request.form else { return };
    let database = engine.map(|engine| engine.database.clone()).unwrap_or_default();
    if database.socket.is_none() && database.url.is_none() {
        findings.not_checked(CHECK, "no --database-socket to ask the server by");
        return;
    }
    let asked = blocking(move || health::ask_replaceable(&database)).await;
    let server = match asked {
        Ok(server) => server,
        Err(failure) => {
            findings.not_checked(CHECK, failure.message);
            return;
        }
    };
    findings.add(CHECK, in_no_cluster(&server));
    let ignored = server.ignored_directories.iter().any(|name| name == INNER_DIRECTORY);
    if form == Form::Move && !ignored {
        findings.warning(
            "ignore_db_dirs",
            format!(
                "the install works in {}, which MariaDB shows as a schema while it is there",
                request.target.join(INNER_DIRECTORY).display()
            ),
            format!("set ignore_db_dirs={INNER_DIRECTORY} in the server's configuration"),
        );
    }
    if let Some(binlog) = server.binlog_basename.filter(|path| is_outside(path, &request.target)) {
        findings.warning(
            "binlog_outside",
            format!("the server's binary log, {binlog}, is outside the data directory and stays"),
            "move it away before the server is opened on the clone: its positions are not those of \
             the new data"
                .to_owned(),
        );
    }
}

fn in_no_cluster(server: &Replaceable) -> Result<String, Failure> {
    let (reason, what) = if server.is_galera {
        ("GALERA", "on a node of a Galera cluster (wsrep_on=ON), which has its own state transfer")
    } else if server.is_in_group {
        (
            "GROUP_REPLICATION",
            "while Group Replication is running, which has its own distributed recovery",
        )
    } else {
        return Ok("the server can be asked, and is no node of a cluster".to_owned());
    };
    Err(Failure::precondition(
        reason,
        format!(
            "the clone operation cannot be executed {what}; take the server out of the cluster first"
        ),
    )
    .mysql(3875))
}

fn is_outside(path: &str, data_directory: &Path) -> bool {
    let path = Path::new(path);
    path.is_absolute() && !path.starts_with(data_directory)
}
