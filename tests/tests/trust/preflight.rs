//! The servers of both sides are compared before a byte moves; all that differs is told at once, and
//! what could not be compared is never taken for equal.

use std::{
    collections::HashMap,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use marcot_common::failure::Failure;
use marcot_proto::recipient::v1::{
    CloneInstanceRequest, CloneOptions, Finding, FindingStatus, ListClonesRequest, State,
    ValidateCloneRequest, recipient_service_client::RecipientServiceClient,
    validate_clone_request::Request as Asked,
};
use marcot_tests::{
    Recipient,
    client::wait_for_end,
    database::{Database, Options, Version, command_line, install_with, new_socket},
    live::Live,
    recipient, target_directory,
};
use tonic::transport::Channel;

type Client = RecipientServiceClient<Channel>;

/// The server of the recipient's side, and its recipient.
struct Own {
    server: Database,
    recipient: Recipient,
}

/// Starts a server with a data directory of its own, and a recipient that would replace it.
fn own(live: &Live, version: Version, arguments: &[&str]) -> Own {
    let arguments = arguments.iter().map(ToString::to_string).collect();
    let options = Options { version, arguments, ..Options::default() };
    let data = live.path("own");
    install_with(&data, &options);
    let server = Database::start_with(live.home.path(), &data, &options);
    let (data, socket) = (data.display().to_string(), server.socket().display().to_string());
    let options =
        ["--data-directory", &data, "--database-socket", &socket, "--database-user", "root"];
    let recipient = another_recipient(live, "own-home", &options);
    Own { server, recipient }
}

/// A recipient with a state directory of its own.
fn another_recipient(live: &Live, home: &str, options: &[&str]) -> Recipient {
    let (home, allowed) = (live.path(home), live.home.path().display().to_string());
    std::fs::create_dir(&home).expect("writable");
    Recipient::start(&home, &[&["--allow-directory", &allowed], options].concat())
}

/// A clone that replaces the recipient's own data, or makes new ones.
fn request(live: &Live, name: Option<&str>, options: CloneOptions) -> CloneInstanceRequest {
    let path = |name: &str| live.path(name).display().to_string().into_bytes().into();
    CloneInstanceRequest {
        host: "127.0.0.1".to_owned(),
        port: live.donor.port().into(),
        user: "clone".to_owned(),
        data_directory: name.map(path).unwrap_or_default(),
        options: Some(options),
        ..CloneInstanceRequest::default()
    }
}

async fn findings(client: &mut Client, asked: CloneInstanceRequest) -> Vec<Finding> {
    let request = ValidateCloneRequest { request: Some(Asked::CloneInstance(asked)) };
    client.validate_clone(request).await.expect("an answer").into_inner().findings
}

fn status_of(findings: &[Finding], check: &str) -> FindingStatus {
    let found = findings.iter().find(|f| f.check == check);
    found.unwrap_or_else(|| panic!("{check}: {findings:#?}")).status()
}

/// Staging directories, and what was made of them.
fn made(live: &Live) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(live.home.path()).expect("it is there");
    let paths = entries.map(|entry| entry.expect("readable").path());
    let is_staged = |path: &PathBuf| path.to_string_lossy().contains("/.marcot-");
    paths.filter(is_staged).collect()
}

/// Guards the comparison before the first byte: without it all of it is copied, and the server does
/// not start on it, or starts and shows other tables.
#[tokio::test(flavor = "multi_thread")]
async fn every_difference_between_two_servers_is_told_at_once_and_nothing_moves() {
    let arguments =
        ["--innodb-page-size=8k", "--lower-case-table-names=1", "--collation-server=latin1_bin"];
    let live = Live::start(Version::V10_11, &arguments, 1 << 20);
    let own = own(&live, Version::V11_8, &["--collation-server=utf8mb4_bin", "--server-id=7"]);
    drop(own.server.query(&format!(
        "SET GLOBAL read_only=1; CHANGE MASTER TO MASTER_HOST='127.0.0.1', MASTER_PORT={}, \
         MASTER_USER='nobody'; START SLAVE",
        live.server.port.expect("a primary has one")
    )));
    let mut client = recipient(&own.recipient).await;
    let started = client
        .clone_instance(request(&live, None, CloneOptions::default()))
        .await
        .expect("it is accepted");
    let name = started.into_inner().clone.expect("a clone").name;
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!(clone.state(), State::Failed, "{clone:?}");
    assert!(made(&live).is_empty(), "{:?}", made(&live));
    assert!(clone.stages.iter().all(|row| row.begin_time.is_none()), "{:?}", clone.stages);
    assert_eq!(own.server.query("SELECT 1").trim(), "1", "its server runs as before");

    let error = clone.error.expect("a failure");
    assert_eq!(error.error_number, 3864, "that of the first: {error:?}");
    for (check, texts) in [
        ("version", ["10.11.", "11.8.", "3864"]),
        ("innodb_page_size", ["Donor value: 8192", "Recipient value: 16384", "3868"]),
        ("lower_case_table_names", ["Donor value: 1", "Recipient value: 0", "3868"]),
        ("collation_server", ["Donor value: latin1_bin", "Recipient value: utf8mb4_bin", "3868"]),
        ("character_set_server", ["Donor value: latin1", "Recipient value: utf8mb4", "3868"]),
    ] {
        let violation = error.violations.iter().find(|v| v.check == check);
        let violation = violation.unwrap_or_else(|| panic!("{check}: {error:#?}"));
        for text in texts {
            assert!(violation.description.contains(text), "{text}: {violation:?}");
        }
    }
    for check in ["read_only", "replication"] {
        assert_eq!(status_of(&clone.findings, check), FindingStatus::Warning);
    }
    let is_passed = |finding: &&Finding| finding.status() == FindingStatus::Passed;
    assert_eq!(clone.findings.iter().find(is_passed), None, "what has passed is not shown");
}

/// Guards against a comparison that passes since there is nothing to compare with: where no server
/// stands, each rule is `not checked` until the server's program or the caller fills it in.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_server_tells_is_not_checked_until_its_program_or_the_caller_says_it() {
    let live = Live::start(Version::V10_11, &["--innodb-page-size=8k"], 1 << 20);
    let compared = [
        "version",
        "innodb_page_size",
        "lower_case_table_names",
        "collation_server",
        "collations",
        "innodb_data_file_path",
        "max_allowed_packet",
        "plugins",
        "storage_engines",
    ];
    let blind = another_recipient(&live, "blind", &[]);
    let mut client = recipient(&blind).await;
    let found = findings(&mut client, request(&live, Some("new"), CloneOptions::default())).await;
    for check in compared {
        assert_eq!(status_of(&found, check), FindingStatus::NotChecked, "{check}");
    }
    // It is told by the clone as well, which runs.
    let started = client
        .clone_instance(request(&live, Some("new"), CloneOptions::default()))
        .await
        .expect("it is accepted");
    let name = started.into_inner().clone.expect("a clone").name;
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(status_of(&clone.findings, "version"), FindingStatus::NotChecked);

    // Its program says what it would start with: pages of 16 KiB.
    let options = Options { version: Version::V10_11, ..Options::default() };
    let line = command_line(&live.path("other"), &options, &new_socket());
    let quoted: Vec<String> = line.iter().map(|word| format!("'{word}'")).collect();
    let program = live.path("mariadbd.sh");
    std::fs::write(&program, format!("#!/bin/sh\nexec {} \"$@\"\n", quoted.join(" ")))
        .expect("writable");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("ours");
    let program = program.display().to_string();
    let seeing = another_recipient(&live, "seeing", &["--server-binary", &program]);
    let mut client = recipient(&seeing).await;
    let asked = request(&live, Some("newer"), CloneOptions::default());
    let found = findings(&mut client, asked.clone()).await;
    assert_eq!(status_of(&found, "version"), FindingStatus::Passed);
    assert_eq!(status_of(&found, "innodb_page_size"), FindingStatus::Failed);
    assert_eq!(status_of(&found, "collations"), FindingStatus::NotChecked, "no program tells them");

    // validate_only: the call's own error, with its violations, and no clone.
    let only = |expected: &[(&str, &str)]| {
        let expected = expected.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
        let options = CloneOptions {
            validate_only: true,
            expected_server: expected.collect::<HashMap<_, _>>(),
            ..CloneOptions::default()
        };
        request(&live, Some("newer"), options)
    };
    let refused = client.clone_instance(only(&[])).await.expect_err("pages of another size");
    let failure = Failure::from_status(&refused);
    assert_eq!(failure.mysql_error, Some(3868), "{failure:?}");
    assert_eq!(failure.violations.len(), 1, "{failure:?}");
    // What the caller expects goes before what the program says.
    let valid = client.clone_instance(only(&[("innodb_page_size", "8192")])).await;
    let clone = valid.expect("it is valid").into_inner().clone.expect("as it would be");
    assert_eq!((clone.name.as_str(), clone.state()), ("", State::NotStarted));
    assert!(!clone.findings.is_empty());
    let unknown = client.clone_instance(only(&[("port", "1")])).await.expect_err("not compared");
    assert_eq!(Failure::from_status(&unknown).reason, "BAD_EXPECTED_SERVER");
    let list = client.list_clones(ListClonesRequest::default()).await.expect("a list");
    assert_eq!(list.into_inner().clones, []);
    assert!(!live.path("newer").exists());

    let recipient_address = seeing.0.address.to_string();
    let donor = format!("127.0.0.1:{}", live.donor.port());
    let target = live.path("newer").display().to_string();
    let output = Command::new(target_directory().join("marcot"))
        .args(["--recipient", &recipient_address, "preflight", "clone", "--donor", &donor])
        .args(["--donor-user", "clone", "--data-directory", &target])
        .env("MARCOT_DONOR_PASSWORD", "secret")
        .output()
        .expect("marcot is built");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    for line in ["FAILED       innodb_page_size", "not checked  collations", "passed       version"]
    {
        assert!(text.contains(line), "{line}: {text}");
    }
}

/// Keys of a MariaDB; returns the argument that names them.
fn keys_in(home: &Path) -> String {
    let keys = home.join("keys");
    std::fs::write(&keys, format!("1;{}\n", "ab".repeat(32))).expect("writable");
    format!("--file-key-management-filename={}", keys.display())
}

/// Guards against a clone that no server of the other side can read: Aria is asked for as well, whose
/// tables no list of InnoDB's has. With `aria_encrypt_tables` not asked for it is `not checked`.
#[tokio::test(flavor = "multi_thread")]
async fn encrypted_tables_of_aria_are_not_cloned_to_a_server_without_keys() {
    let home = marcot_tests::new_directory();
    let file = keys_in(home.path());
    let arguments = [
        "--plugin-load-add=file_key_management",
        &file,
        "--aria-encrypt-tables",
        "--encrypt-binlog",
    ];
    let live = Live::start(Version::V10_11, &arguments, 1 << 20);
    let own = own(&live, Version::V10_11, &[]);
    let mut client = recipient(&own.recipient).await;
    let found = findings(&mut client, request(&live, None, CloneOptions::default())).await;
    let keys = found.iter().find(|f| f.check == "encryption_keys").expect("it is checked");
    assert_eq!(keys.reason, "ENCRYPTION_KEYS", "{keys:?}");
    assert!(keys.message.contains("Aria tables (aria_encrypt_tables)"), "{keys:?}");
}

/// Guards against a clone that no server of the other side can read.
#[tokio::test(flavor = "multi_thread")]
async fn encrypted_tables_are_not_cloned_to_a_server_without_keys() {
    let home = marcot_tests::new_directory();
    let file = keys_in(home.path());
    let arguments = ["--plugin-load-add=file_key_management", file.as_str()];
    let live = Live::start(Version::V10_11, &arguments, 1 << 20);
    drop(live.server.query(
        "CREATE DATABASE secret; CREATE TABLE secret.t (id INT) ENGINE=InnoDB ENCRYPTED=YES",
    ));
    let own = own(&live, Version::V10_11, &[]);
    let mut client = recipient(&own.recipient).await;
    let found = findings(&mut client, request(&live, None, CloneOptions::default())).await;
    let keys = found.iter().find(|f| f.check == "encryption_keys").expect("it is checked");
    assert_eq!(keys.reason, "ENCRYPTION_KEYS", "{keys:?}");
    assert!(keys.message.contains("1 tablespaces (keys 1)"), "{keys:?}");
    // The library is in its plugin directory, from where the clone's own tables load it.
    assert_eq!(status_of(&found, "plugins"), FindingStatus::Passed);
    assert_eq!(status_of(&found, "version"), FindingStatus::Passed);
}
