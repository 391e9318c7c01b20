//! What the server whose data are to be replaced says of itself.

use std::path::Path;

use marcot_common::failure::Failure;
use marcot_engine::{
    EngineConfig,
    innodb::{
        facts::{self, Surroundings},
        health::{self, Replaceable},
    },
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
    let of_surroundings = database.clone();
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
    if server.is_read_only {
        findings.warning(
            "read_only",
            "the server takes no writes now (read_only or super_read_only is on)".to_owned(),
            "the clone is installed all the same; its server starts as its configuration says: see \
             that read_only is set there"
                .to_owned(),
        );
    }
    match blocking(move || facts::ask_surroundings(&of_surroundings)).await {
        Ok(found) => surroundings(&found, findings),
        Err(failure) => findings.not_checked("replication", failure.message),
    }
}

/// What the server is part of, and what of it the new data leave behind.
fn surroundings(found: &Surroundings, findings: &mut Findings) {
    if !found.sources.is_empty() {
        findings.warning(
            "replication",
            format!("the server replicates from {}, which ends here", found.sources.join(", ")),
            "make it a replica again after the clone (--attach-replica, or the statement that the \
             clone ends with)"
                .to_owned(),
        );
    }
    if found.replicas > 0 {
        findings.warning(
            "replicas",
            format!("{} replicas read the server's binary log, which ends here", found.replicas),
            "make them replicas of another server, or clone them as well".to_owned(),
        );
    }
    if !found.outside.is_empty() {
        findings.warning(
            "tables_outside",
            format!(
                "tables of the old data lie outside the data directory: {}; a rollback needs them, \
                 and nothing removes them",
                found.outside.join(", ")
            ),
            "remove them once the clone is accepted".to_owned(),
        );
    }
    for not_told in &found.not_told {
        findings.not_checked("replication", format!("the account may not ask {not_told}"));
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

#[cfg(test)]
mod tests {
    use marcot_proto::recipient::v1::FindingStatus;

    use super::*;

    #[test]
    fn what_a_server_is_part_of_is_told() {
        let checked = |found: &Surroundings| {
            let mut findings = Findings::default();
            surroundings(found, &mut findings);
            findings.all().iter().map(|f| (f.check.clone(), f.status())).collect::<Vec<_>>()
        };
        assert_eq!(checked(&Surroundings::default()), []);
        let all = Surroundings {
            sources: vec!["db:3306".to_owned()],
            replicas: 2,
            outside: vec!["far.t in /far/t.ibd".to_owned()],
            not_told: vec!["whether it is a replica: denied".to_owned()],
        };
        let expected = [
            ("replication", FindingStatus::Warning),
            ("replicas", FindingStatus::Warning),
            ("tables_outside", FindingStatus::Warning),
            ("replication", FindingStatus::NotChecked),
        ];
        assert_eq!(checked(&all), expected.map(|(check, status)| (check.to_owned(), status)));
    }
}
