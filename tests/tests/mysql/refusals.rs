//! What cannot be cloned right is refused before a byte moves, and named.

use marcot_proto::{
    donor::v1::{Encryption, GetServerInfoResponse},
    recipient::v1::{
        CloneInstanceRequest, Finding, FindingStatus, SslMode, State, ValidateCloneRequest,
        recipient_service_client::RecipientServiceClient, validate_clone_request::Request as Asked,
    },
};
use marcot_tests::{
    Recipient, clone_and_wait,
    database::{Database, Options, Version, install_with},
    first_page::assert_wrong_first_pages_fail,
    hostile::Behaviour,
    live::Live,
    new_directory, recipient,
};
use tonic::transport::Channel;

/// Each of these is a copy that would not be the donor's database, or not start.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_cloned_is_named() {
    let live = Live::start(Version::MySql9_7, &[], 1 << 20);
    let server = &live.server;
    for (privilege, object, word) in [
        ("BACKUP_ADMIN", "*.*", "BACKUP_ADMIN"),
        ("PROCESS", "*.*", "PROCESS"),
        ("RELOAD", "*.*", "RELOAD"),
        ("SELECT", "performance_schema.log_status", "log_status"),
    ] {
        drop(server.query(&format!("REVOKE {privilege} ON {object} FROM marcot@localhost")));
        let failure = live.refusal(&live.donor).await;
        assert_eq!(failure.reason, "DATABASE_PRIVILEGE_MISSING", "{failure:?}");
        assert!(failure.message.contains(word), "{failure:?}");
        drop(server.query(&format!("GRANT {privilege} ON {object} TO marcot@localhost")));
    }
    for engine in ["MyISAM", "CSV"] {
        drop(server.query(&format!("CREATE TABLE mix.other (id INT NOT NULL) ENGINE={engine}")));
        let failure = live.refusal(&live.donor).await;
        assert_eq!(failure.reason, "UNSUPPORTED_TABLE_ENGINE", "{failure:?}");
        assert!(failure.message.contains(&format!("({engine})")), "{failure:?}");
        drop(server.query("DROP TABLE mix.other"));
    }
    // A definition that says nothing may be that of any table.
    let sdi = live.path("data/mix/damaged_77.sdi");
    std::fs::write(&sdi, "{\"dd_object_type\":\"Ta").expect("writable");
    let failure = live.refusal(&live.donor).await;
    assert_eq!(failure.reason, "UNSUPPORTED_TABLE_ENGINE", "{failure:?}");
    assert!(failure.message.contains("mix/damaged_77.sdi"), "{failure:?}");
    std::fs::remove_file(&sdi).expect("our own");
    drop(server.query("ALTER INSTANCE DISABLE INNODB REDO_LOG"));
    let failure = live.refusal(&live.donor).await;
    assert_eq!(failure.reason, "REDO_LOG_DISABLED", "{failure:?}");
    drop(server.query("ALTER INSTANCE ENABLE INNODB REDO_LOG"));
}

/// Guards R9: on one host the clone would open the donor's own files.
#[tokio::test(flavor = "multi_thread")]
async fn tablespaces_elsewhere_are_named() {
    let live = Live::start(Version::MySql9_7, &["--innodb-directories={home}/elsewhere"], 1 << 20);
    std::fs::create_dir_all(live.path("elsewhere")).expect("a writable home");
    drop(live.server.query(&format!(
        "CREATE TABLE mix.far (id INT) DATA DIRECTORY='{}'",
        live.path("elsewhere").display()
    )));
    let failure = live.refusal(&live.donor).await;
    assert_eq!(failure.reason, "PATH_OUTSIDE_DATA_DIRECTORY", "{failure:?}");
    assert!(failure.message.contains("mix/far"), "{failure:?}");
}

/// Guards first pages, which say what a file is: one whose id has a flipped bit was copied unchecked.
/// Without `Known::check_found` the missing file is not noticed. A table whose tablespace was
/// discarded is listed by the server, and has none.
#[tokio::test(flavor = "multi_thread")]
async fn a_first_page_that_is_not_its_tables_fails_the_clone() {
    let live = Live::start(Version::MySql9_7, &[], 1 << 20);
    drop(live.server.query(
        "CREATE DATABASE shop; CREATE TABLE shop.t (id INT PRIMARY KEY); INSERT INTO shop.t VALUES \
         (1), (2); CREATE TABLE shop.v LIKE shop.t; FLUSH TABLES shop.t FOR EXPORT; UNLOCK TABLES",
    ));
    // The checksum leaves the id out.
    assert_wrong_first_pages_fail(&live, "shop/t", "says that it is of tablespace", &[]).await;
    drop(live.server.query("ALTER TABLE shop.v DISCARD TABLESPACE"));
    let mut client = recipient(&live.recipient).await;
    let clone = clone_and_wait(&mut client, &live.statement("clone", false)).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", live.donor.0.log());
    let told = clone.findings.iter().find(|finding| finding.check == "block_ddl");
    let told = told.expect("DDL waits though clone_block_ddl is off, which is told");
    assert!(told.message.contains("clone_block_ddl is off"), "{told:?}");
    let copy = live.start_clone("clone");
    assert_eq!(copy.query("SELECT COUNT(*) FROM shop.t").trim(), "2");
    copy.stop();
}

/// What a donor with an encrypted MySQL says of it.
fn encrypted(info: &mut GetServerInfoResponse) {
    info.engine = "innodb".to_owned();
    info.variables.insert("version".to_owned(), "9.7.0".to_owned());
    info.encryption = Some(Encryption { tablespaces: 2, ..Encryption::default() });
}

async fn keys(client: &mut RecipientServiceClient<Channel>, port: u16) -> Finding {
    let asked = CloneInstanceRequest {
        host: "127.0.0.1".to_owned(),
        port: port.into(),
        user: "clone".to_owned(),
        ssl_mode: SslMode::Disabled.into(),
        ..CloneInstanceRequest::default()
    };
    let request = ValidateCloneRequest { request: Some(Asked::CloneInstance(asked)) };
    let findings = client.validate_clone(request).await.expect("an answer").into_inner().findings;
    let keys = findings.iter().find(|finding| finding.check == "encryption_keys");
    keys.unwrap_or_else(|| panic!("it is checked: {findings:#?}")).clone()
}

/// Guards a server against a clone that it cannot read: a MySQL without a keyring is refused before a byte
/// moves. With `keyring_component` not asked it is `not checked`, as it is for an account that may not ask.
#[tokio::test(flavor = "multi_thread")]
async fn encrypted_tables_are_not_cloned_to_a_mysql_without_a_keyring() {
    let home = new_directory();
    let data = home.path().join("own");
    let options = Options { version: Version::MySql9_7, accounts: true, ..Options::default() };
    install_with(&data, &options);
    let server = Database::start_with(home.path(), &data, &options);
    drop(server.query("CREATE USER looker@localhost"));
    let donor = Behaviour { info: encrypted, ..Behaviour::honest() }.serve().await;
    let (data, socket) = (data.display().to_string(), server.socket().display().to_string());
    for (user, status) in [("root", FindingStatus::Failed), ("looker", FindingStatus::NotChecked)] {
        let own = home.path().join(user);
        std::fs::create_dir(&own).expect("writable");
        let options = ["--data-directory", &data, "--database-socket", &socket];
        let at = Recipient::start(&own, &[&options[..], &["--database-user", user]].concat());
        let finding = keys(&mut recipient(&at).await, donor.port()).await;
        assert_eq!(finding.status(), status, "{user}: {finding:?}");
        let told = match status {
            FindingStatus::Failed => "no keyring component that is active",
            _ => "performance_schema.keyring_component_status",
        };
        assert!(finding.message.contains(told), "{user}: {finding:?}");
    }
}
