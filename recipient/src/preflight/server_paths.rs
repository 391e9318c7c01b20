//! Whether the tree that is replaced is all of its server's: redo that lies elsewhere would stay,
//! and the clone would start on it (R9).

use std::{collections::BTreeMap, path::Path};

use marcot_common::failure::Failure;
use marcot_engine::{EngineConfig, innodb::paths};

use super::Findings;
use crate::{install::generation, request::CloneRequest, source::blocking};

const CHECK: &str = "server_paths";

/// Where redo is in a data directory: one file of MariaDB's, a directory of MySQL's.
const REDO: [&str; 2] = ["ib_logfile0", "#innodb_redo"];

/// Asks the server; one that cannot be asked is judged by the variables that its program would start
/// with, where those are known, and by what it has left in its data directory.
pub(crate) async fn check(
    request: &CloneRequest,
    engine: Option<&EngineConfig>,
    variables: &BTreeMap<String, String>,
    findings: &mut Findings,
) {
    if request.form.is_none() {
        return;
    }
    if request.discard_old_data_first && generation::was_discarded(&request.target) {
        // It was looked at before they went.
        return findings.passed(CHECK, "the old data have been discarded for this clone");
    }
    let database = engine.map(|engine| engine.database.clone()).unwrap_or_default();
    let target = request.target.clone();
    let asked = if database.socket.is_none() && database.url.is_none() {
        Err("there is no --database-socket".to_owned())
    } else {
        let asked = blocking(move || paths::check_replaceable(&database, &target)).await;
        match asked {
            Err(failure) if paths::is_refusal(&failure) => {
                return findings.failed(CHECK, failure);
            }
            other => other.map_err(|failure| failure.message),
        }
    };
    match asked {
        Ok(()) => findings.passed(CHECK, "all that the server has is in its data directory"),
        Err(why) => by_what_it_left(&why, variables, &request.target, findings),
    }
}

/// Without an answer nothing has passed: a server that is stopped may keep all of it elsewhere.
fn by_what_it_left(
    why: &str,
    variables: &BTreeMap<String, String>,
    data_directory: &Path,
    findings: &mut Findings,
) {
    let by_program = paths::check_variables(variables, data_directory);
    match by_program.and_then(|()| has_its_redo(data_directory)) {
        Ok(()) => findings.not_checked(
            CHECK,
            format!(
                "where the server keeps its files: {why}; see that innodb_log_group_home_dir and the \
                 like are the data directory, or have the server run and give --database-socket"
            ),
        ),
        Err(failure) => findings.failed(CHECK, failure),
    }
}

fn has_its_redo(data_directory: &Path) -> Result<(), Failure> {
    let is_there = |name: &str| data_directory.join(name).symlink_metadata().is_ok();
    if !is_there("ibdata1") || REDO.into_iter().any(is_there) {
        return Ok(());
    }
    Err(Failure::precondition(
        "PATH_OUTSIDE_DATA_DIRECTORY",
        format!(
            "{} holds ibdata1 and no redo log ({}): the server keeps it elsewhere \
             (innodb_log_group_home_dir), and the clone would start on it; have it in the data \
             directory, or move what is there away",
            data_directory.display(),
            REDO.join(", ")
        ),
    ))
}

#[cfg(test)]
mod tests {
    use marcot_proto::recipient::v1::FindingStatus;

    use super::*;

    /// Guards R9 where no server can be asked: what was not looked at is not said to be right, and redo that
    /// is not there is still noticed.
    #[test]
    fn where_no_server_can_be_asked_its_paths_are_not_checked() {
        let directory = tempfile::tempdir().unwrap();
        let told = || {
            let mut findings = Findings::default();
            by_what_it_left("it is stopped", &BTreeMap::new(), directory.path(), &mut findings);
            let [finding] = findings.all() else { panic!("{findings:?}") };
            (finding.status(), finding.message.clone())
        };
        let (status, message) = told();
        assert_eq!(status, FindingStatus::NotChecked, "{message}");
        assert!(message.contains("it is stopped") && message.contains("--database-socket"));
        std::fs::write(directory.path().join("ibdata1"), "x").unwrap();
        assert_eq!(told().0, FindingStatus::Failed);
    }

    #[test]
    fn a_data_directory_without_its_redo_is_noticed_while_no_server_runs() {
        let directory = tempfile::tempdir().unwrap();
        has_its_redo(directory.path()).unwrap();
        std::fs::write(directory.path().join("ibdata1"), "x").unwrap();
        let failure = has_its_redo(directory.path()).unwrap_err();
        assert_eq!(failure.reason, "PATH_OUTSIDE_DATA_DIRECTORY");
        std::fs::create_dir(directory.path().join(REDO[1])).unwrap();
        has_its_redo(directory.path()).unwrap();
    }
}
