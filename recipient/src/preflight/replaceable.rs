//! What the server whose data are to be replaced says of itself.

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
        return not_asked(form, "no --database-socket to ask the server by", findings);
    }
    let of_surroundings = database.clone();
    let asked = blocking(move || health::ask_replaceable(&database)).await;
    let server = match asked {
        Ok(server) => server,
        Err(failure) => return not_asked(form, &failure.message, findings),
    };
    findings.add(CHECK, in_no_cluster(&server));
    // MySQL has no such setting, and takes no directory for a schema.
    let directories = server.ignored_directories.as_deref();
    let is_shown =
        directories.is_some_and(|names| names.iter().all(|name| name != INNER_DIRECTORY));
    if form == Form::Move && is_shown {
        findings.warning(
            "ignore_db_dirs",
            format!(
                "the install works in {}, which MariaDB shows as a schema while it is there",
                request.target.join(INNER_DIRECTORY).display()
            ),
            format!("set ignore_db_dirs={INNER_DIRECTORY} in the server's configuration"),
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
        Err(failure) => not_told(&SURROUNDINGS, &failure.message, findings),
    }
}

/// A check, what it looks at, and what a person does where nobody tells it.
type Asked = (&'static str, &'static str, &'static str);

/// What a server is asked of what it is part of.
const SURROUNDINGS: [Asked; 3] = [
    (
        "replication",
        "whether the server is a replica",
        "if it is one, make it a replica again after the clone",
    ),
    (
        "replicas",
        "whether replicas read the server's binary log",
        "if any do, make them replicas of another server, or clone them as well",
    ),
    (
        "tables_outside",
        "whether tables of the old data lie outside the data directory",
        "if any do, remove them once the clone is accepted",
    ),
];

/// What is asked of the server itself.
const OWN: [Asked; 2] = [
    (
        CHECK,
        "whether the server is a node of a cluster (Galera, Group Replication)",
        "if it is one, take it out of the cluster first",
    ),
    ("read_only", "whether the server takes writes", "see that its configuration says so"),
];

/// What is asked of it where the install works inside its data directory.
const MOVED: Asked = (
    "ignore_db_dirs",
    "whether a MariaDB would show the install's directory .marcot-install as a schema",
    "set ignore_db_dirs=.marcot-install in its configuration",
);

/// Names all that a server would have been asked.
fn not_asked(form: Form, why: &str, findings: &mut Findings) {
    not_told(&OWN, why, findings);
    if form == Form::Move {
        not_told(&[MOVED], why, findings);
    }
    not_told(&SURROUNDINGS, why, findings);
}

fn not_told(checks: &[Asked], why: &str, findings: &mut Findings) {
    for (check, what, action) in checks {
        findings.not_checked(check, format!("{what}: {why}; {action}"));
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

#[cfg(test)]
mod tests {
    use marcot_proto::recipient::v1::FindingStatus;

    use super::*;

    /// Guards against rules that are left out without a word where the server is stopped.
    #[test]
    fn all_that_a_server_could_not_be_asked_is_named() {
        let surroundings = ["replication", "replicas", "tables_outside"];
        for (form, own) in [
            (Form::Exchange, &["server", "read_only"][..]),
            (Form::Move, &["server", "read_only", "ignore_db_dirs"]),
        ] {
            let mut findings = Findings::default();
            not_asked(form, "it is stopped", &mut findings);
            let told: Vec<_> = findings.all().iter().map(|f| (&*f.check, f.status())).collect();
            let expected = own.iter().chain(&surroundings);
            let expected: Vec<_> = expected.map(|&c| (c, FindingStatus::NotChecked)).collect();
            assert_eq!(told, expected);
            let of_server = &findings.all()[0].message;
            assert!(of_server.contains("Galera") && of_server.contains("stopped"), "{of_server}");
        }
        assert!(MOVED.1.contains(INNER_DIRECTORY) && MOVED.2.contains(INNER_DIRECTORY));
    }

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
