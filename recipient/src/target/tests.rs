//! The path rules on real directories.

use std::os::unix::fs::{PermissionsExt as _, symlink};

use marcot_proto::recipient::v1::CloneLocalRequest;
use tempfile::TempDir;

use super::*;

/// A directory with `data`, the recipient's own data directory, in it.
struct Home {
    directory: TempDir,
    settings: Settings,
}

impl Home {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let settings =
            Settings { data_directory: Some(data), ..Settings::for_tests(directory.path()) };
        Self { directory, settings }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn check(&self, target: impl AsRef<Path>) -> Result<(), Failure> {
        let message = CloneLocalRequest {
            data_directory: bytes::Bytes::copy_from_slice(target.as_ref().as_os_str().as_bytes()),
            options: None,
        };
        check_first(&CloneRequest::from_local(message, &self.settings)?, &self.settings)
    }

    /// MySQL's number and the reason of the first broken rule.
    fn refused(&self, target: impl AsRef<Path>) -> (u32, String) {
        let failure = self.check(target).unwrap_err();
        (failure.mysql_error.unwrap(), failure.reason.into_owned())
    }

    #[track_caller]
    fn assert_refused(&self, target: impl AsRef<Path>, number: u32, reason: &str) {
        assert_eq!(self.refused(target), (number, reason.to_owned()));
    }
}

#[test]
fn a_new_name_beside_the_data_directory_is_allowed() {
    let home = Home::new();
    home.check(home.at("new")).unwrap();
    home.check(home.at("new/")).unwrap();
    home.check(home.at("./new")).unwrap();
}

#[test]
fn a_path_is_absolute_and_goes_straight() {
    let home = Home::new();
    for path in ["", "new", "./new", "../new", "/"] {
        home.assert_refused(path, 1525, "PATH_NOT_ABSOLUTE");
    }
    home.assert_refused(home.at("data/../new"), 1525, "PATH_NOT_ABSOLUTE");
}

#[test]
fn a_path_has_fewer_than_511_bytes() {
    let home = Home::new();
    let rest = 510 - home.at("").as_os_str().len();
    // 510 bytes pass this rule; no name has more than 255, so the next rule refuses it.
    let deep = |bytes: usize| home.at(&"a/".repeat(bytes / 2)[..bytes - 1]).join("b");
    let longest = deep(rest - 1);
    assert!((509..=510).contains(&longest.as_os_str().len()));
    home.assert_refused(longest, 1006, "PARENT_NOT_WRITABLE");
    home.assert_refused(deep(rest + 2), 1680, "PATH_TOO_LONG");
}

#[test]
fn nothing_may_be_there() {
    let home = Home::new();
    std::fs::create_dir(home.at("directory")).unwrap();
    std::fs::write(home.at("file"), "").unwrap();
    symlink("nowhere", home.at("dangling")).unwrap();
    for name in ["directory", "file", "dangling", "data"] {
        for written in [name.to_owned(), format!("{name}/"), format!("{name}/.")] {
            home.assert_refused(home.at(&written), 1007, "TARGET_EXISTS");
        }
    }
}

#[test]
fn no_path_leads_into_the_data_directory() {
    let home = Home::new();
    std::fs::create_dir(home.at("data/schema")).unwrap();
    symlink("data/schema", home.at("link")).unwrap();
    for name in ["data/new", "data/schema/new", "link/new", "data/missing/new"] {
        home.assert_refused(home.at(name), 3632, "PATH_IN_DATADIR");
    }
    // A name that only begins like the data directory's is another directory.
    home.check(home.at("data2")).unwrap();
}

#[test]
fn the_parent_is_a_directory_that_can_be_written() {
    let home = Home::new();
    std::fs::write(home.at("file"), "").unwrap();
    home.assert_refused(home.at("missing/new"), 1006, "PARENT_NOT_WRITABLE");
    home.assert_refused(home.at("file/new"), 1006, "PARENT_NOT_WRITABLE");
    let closed = home.at("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o555)).unwrap();
    if !rustix::process::geteuid().is_root() {
        home.assert_refused(closed.join("new"), 1006, "PARENT_NOT_WRITABLE");
    }
}

#[test]
fn a_path_lies_below_an_allowed_root() {
    let mut home = Home::new();
    let elsewhere = tempfile::tempdir().unwrap();
    home.assert_refused(elsewhere.path().join("new"), 1290, "PATH_NOT_ALLOWED");
    // A link out of the root leads out of the root.
    symlink(elsewhere.path(), home.at("out")).unwrap();
    home.assert_refused(home.at("out/new"), 1290, "PATH_NOT_ALLOWED");
    home.settings.allow_directories = vec![elsewhere.path().to_owned()];
    home.check(elsewhere.path().join("new")).unwrap();
    home.check(home.at("out/new")).unwrap();
    home.assert_refused(home.at("new"), 1290, "PATH_NOT_ALLOWED");
}

#[test]
fn a_relative_data_directory_has_a_place_too() {
    let mut home = Home::new();
    // Tests run in their package's directory.
    home.settings.data_directory = Some("src".into());
    home.check(std::env::current_dir().unwrap().join("no-such-copy")).unwrap();
}

#[test]
fn without_roots_the_option_is_named() {
    let mut home = Home::new();
    home.settings.data_directory = None;
    let failure = home.check(home.at("new")).unwrap_err();
    assert_eq!(failure.mysql_error, Some(1290));
    assert!(failure.message.contains("--allow-directory"), "{failure}");
}

#[test]
fn all_that_is_wrong_is_told_at_once() {
    let home = Home::new();
    let message = CloneLocalRequest { data_directory: "/nowhere/new".into(), options: None };
    let request = CloneRequest::from_local(message, &home.settings).unwrap();
    let mut findings = Findings::default();
    check(&request, &home.settings, &mut findings);
    let failure = findings.into_failure().unwrap();
    assert_eq!(failure.mysql_error, Some(1006), "the first in the plugin's order");
    let checks: Vec<&str> = failure.violations.iter().map(|v| v.check.as_str()).collect();
    assert_eq!(checks, ["path_parent", "path_allowed"]);
}
