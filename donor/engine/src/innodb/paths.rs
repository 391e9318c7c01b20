//! Where a server keeps its files: all that a tree is made of must be at the top of its data
//! directory (R9), of a donor to be copied, of a recipient to be replaced.

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

use marcot_common::failure::{Failure, Violation};
use tonic::Code;

use super::server::{DatabaseConfig, Server, Session};

/// Directories without which a data directory is not whole.
const DIRECTORIES: [&str; 5] = [
    "innodb_data_home_dir",
    "innodb_log_group_home_dir",
    "innodb_undo_directory",
    "innodb_doublewrite_dir",
    "aria_log_dir_path",
];

/// The variables among `variable` that name another place than the data directory, with their
/// values.
pub(super) fn elsewhere<'a>(variable: impl Fn(&str) -> &'a str) -> Vec<(&'static str, &'a str)> {
    let data = Path::new(variable("datadir"));
    let mut found: Vec<_> = DIRECTORIES
        .into_iter()
        .map(|name| (name, variable(name)))
        .filter(|(name, value)| {
            // What is in it serves the pages of one server alone, and a server makes it.
            let may_be_below = *name == "innodb_doublewrite_dir";
            inside(data, value).is_none_or(|path| !path.is_empty() && !may_be_below)
        })
        .collect();
    let files = variable("innodb_data_file_path");
    let is_path = |part: &str| {
        part.split(':').next().is_some_and(|name| name.contains('/')) || part.contains("raw")
    };
    if files.split(';').any(is_path) {
        found.push(("innodb_data_file_path", files));
    }
    found
}

/// `PATH_OUTSIDE_DATA_DIRECTORY`, with each variable as a violation; `consequence` ends each text.
pub(super) fn refuse(
    elsewhere: &[(&str, &str)],
    data: &Path,
    consequence: &str,
) -> Result<(), Failure> {
    if elsewhere.is_empty() {
        return Ok(());
    }
    let violation = |(name, value): &(&str, &str)| Violation {
        check: "PATH_OUTSIDE_DATA_DIRECTORY".to_owned(),
        subject: (*name).to_owned(),
        description: format!(
            "{name} is `{value}`, which is not the data directory {}: {consequence}",
            data.display()
        ),
    };
    let violations: Vec<_> = elsewhere.iter().map(violation).collect();
    let text = violations.iter().map(|v| v.description.as_str()).collect::<Vec<_>>();
    let mut failure =
        Failure::new(Code::FailedPrecondition, "PATH_OUTSIDE_DATA_DIRECTORY", text.join("; "));
    failure.violations = violations;
    Err(failure)
}

/// Asks a server on this host whether its tree is `data_directory`, all of it.
pub fn check_replaceable(config: &DatabaseConfig, data_directory: &Path) -> Result<(), Failure> {
    check(&mut Server::new(config)?.connect()?, data_directory)
}

/// As `check_replaceable`, by a connection.
pub(super) fn check(session: &mut Session, data_directory: &Path) -> Result<(), Failure> {
    let names: Vec<String> = DIRECTORIES
        .iter()
        .chain(&["datadir", "innodb_data_file_path"])
        .map(|name| format!("'{name}'"))
        .collect();
    let sql = format!("SHOW GLOBAL VARIABLES WHERE Variable_name IN ({})", names.join(","));
    let rows = session.rows(&sql).map_err(|e| e.failure("ask where the server's files are"))?;
    let variables: Vec<(String, String)> =
        rows.iter().map(|row| (row.text(0).to_ascii_lowercase(), row.text(1))).collect();
    let variable =
        |name: &str| variables.iter().find(|(n, _)| n == name).map_or("", |(_, value)| value);
    let own = Path::new(variable("datadir"));
    // A server in another container may name a path that is none here; its files are told apart by
    // their locks then.
    if let (Ok(own), Ok(expected)) = (own.canonicalize(), data_directory.canonicalize())
        && own != expected
        && !is_same(&own, &expected)
    {
        return Err(Failure::precondition(
            "OTHER_DATA_DIRECTORY",
            format!(
                "the server that answers has datadir {}, and --data-directory is {}: give the \
                 socket of the server on that directory",
                own.display(),
                expected.display()
            ),
        ));
    }
    refuse_own(variable, own)
}

/// As `check_replaceable`, by the variables that a server's program would start with: none stand for
/// a program that was not asked.
pub fn check_variables(
    variables: &BTreeMap<String, String>,
    data_directory: &Path,
) -> Result<(), Failure> {
    let variable = |name: &str| variables.get(name).map_or("", String::as_str);
    if variable("datadir").is_empty() {
        return Ok(());
    }
    let own = Path::new(variable("datadir"));
    if own != data_directory && !is_same(own, data_directory) {
        // Another instance's configuration says nothing of this one.
        return Ok(());
    }
    refuse_own(variable, own)
}

fn refuse_own<'a>(variable: impl Fn(&str) -> &'a str, own: &Path) -> Result<(), Failure> {
    let elsewhere: Vec<_> = elsewhere(variable)
        .into_iter()
        // The same directory by another name.
        .filter(|(_, value)| Path::new(value).is_relative() || !is_same(Path::new(value), own))
        .collect();
    let consequence = "those files would stay when the clone takes the directory's place, and the \
                       clone would start on them; have the server keep them in its data directory";
    refuse(&elsewhere, own, consequence)
}

/// Whether a server has answered, and it is its answer that does not do.
#[must_use]
pub fn is_refusal(failure: &Failure) -> bool {
    matches!(failure.reason.as_ref(), "PATH_OUTSIDE_DATA_DIRECTORY" | "OTHER_DATA_DIRECTORY")
}

fn is_same(one: &Path, other: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match (one.metadata(), other.metadata()) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

/// A path of the server below its data directory; `None` when it lies elsewhere.
pub(super) fn inside(data: &Path, value: &str) -> Option<Vec<u8>> {
    let path = if Path::new(value).is_absolute() {
        let data: PathBuf = data.components().collect();
        Path::new(value).strip_prefix(data).ok()?.to_owned()
    } else {
        PathBuf::from(value)
    };
    let mut parts = Vec::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::Normal(part) => parts.push(part.as_encoded_bytes().to_vec()),
            _ => return None,
        }
    }
    Some(parts.join(&b'/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(name: &'static str, value: &'static str) -> Vec<&'static str> {
        let variable = |asked: &str| match asked {
            "datadir" => "/data/",
            "innodb_data_file_path" if name != asked => "ibdata1:12M:autoextend",
            asked if asked == name => value,
            "aria_log_dir_path" => "/data/",
            "innodb_data_home_dir" => "",
            _ => "./",
        };
        elsewhere(variable).into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn every_variable_that_leaves_the_data_directory_is_named() {
        assert_eq!(found("", ""), Vec::<&str>::new());
        for name in DIRECTORIES {
            for value in ["/elsewhere", "../x"] {
                assert_eq!(found(name, value), [name], "{value}");
            }
            // A directory of doublewrite files may lie below: it goes with the old data.
            let below: &[&str] = if name == "innodb_doublewrite_dir" { &[] } else { &[name] };
            for value in ["/data/sub", "sub"] {
                assert_eq!(found(name, value), below, "{name} {value}");
            }
            for value in ["/data", "/data/.", "", "."] {
                assert_eq!(found(name, value), Vec::<&str>::new(), "{name} {value}");
            }
        }
        let name = "innodb_data_file_path";
        for value in ["/x/ibdata1:12M", "ibdata1:12M;../more:1G", "/dev/sdb:1Graw"] {
            assert_eq!(found(name, value), [name], "{value}");
        }
    }
}
