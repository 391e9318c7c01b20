//! What callers of the recipient may do: by account, by certificate, by token.

use std::{collections::BTreeMap, path::Path};

use marcot_common::{
    connect::{ClientTls, ConnectOptions, SslMode, connect},
    failure::Failure,
};
use marcot_proto::recipient::v1::{
    CancelCloneRequest, CloneInstanceRequest, CloneLocalRequest, CloneOptions, ListClonesRequest,
    State, WatchCloneRequest, recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{
    Recipient, certificates::Certificates, client::wait_for_end, new_directory, tree,
};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::{Request, Status, metadata::MetadataValue, transport::Channel};

const SERVICE: &str = "marcot.recipient.v1.RecipientService";

/// 32 characters for each privilege.
fn token(privilege: &str) -> String {
    format!("{privilege:x<32}")
}

fn sha256(text: &str) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes());
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An identities file with a token for each privilege, and what else is given.
fn identities(home: &Path, more: &str) -> String {
    let mut text = more.to_owned();
    for privilege in ["BACKUP_ADMIN", "CLONE_ADMIN", "MONITOR"] {
        let digest = sha256(&token(privilege));
        text.push_str(&format!(
            "[token.{privilege}]\nsha256 = \"{digest}\"\nprivileges = [\"{privilege}\"]\n"
        ));
    }
    let path = home.join("identities.toml");
    std::fs::write(&path, text).expect("writable");
    path.display().to_string()
}

fn with_token<T>(message: T, privilege: &str) -> Request<T> {
    let mut request = Request::new(message);
    if !privilege.is_empty() {
        let value: MetadataValue<_> =
            format!("Bearer {}", token(privilege)).parse().expect("plain characters");
        request.metadata_mut().insert("authorization", value);
    }
    request
}

async fn channel(at: &Recipient) -> Channel {
    Channel::from_shared(format!("http://{}", at.0.address))
        .expect("an address")
        .connect()
        .await
        .expect("the recipient takes calls")
}

/// Calls a method with an empty message.
async fn call(channel: &Channel, method: &str, privilege: &str) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.expect("a connection");
    let path = format!("/{SERVICE}/{method}").parse().expect("a path");
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    client.server_streaming(with_token((), privilege), path, codec).await.map(|_| ())
}

fn reason(result: Result<(), Status>) -> String {
    match result {
        Ok(()) => "passed".to_owned(),
        Err(status) => match Failure::from_status(&status).reason.as_ref() {
            refused @ ("PRIVILEGE_REQUIRED" | "NOT_LOGGED_IN" | "TOKEN_UNKNOWN") => {
                refused.to_owned()
            }
            // The handler's own: it was called.
            _ => "passed".to_owned(),
        },
    }
}

/// Guards the whole table of rules against the API: every method of the descriptor is here, with
/// what it asks for. A method without a rule is refused to all; one with a weaker rule passes.
#[tokio::test]
async fn every_method_of_the_recipient_asks_for_its_privilege() {
    const DENIED: &str = "PRIVILEGE_REQUIRED";
    let monitor = ["passed", "passed", "passed"];
    let by_clone = [DENIED, "passed", "passed"];
    let clone_admin = [DENIED, DENIED, "passed"];
    let expected: BTreeMap<&str, [&str; 3]> = [
        ("CloneInstance", by_clone),
        ("CloneLocal", by_clone),
        ("CloneStatement", by_clone),
        ("ValidateClone", by_clone),
        ("GetClone", monitor),
        ("ListClones", monitor),
        ("WatchClone", monitor),
        ("CancelClone", by_clone),
        ("PauseClone", by_clone),
        ("ResumeClone", by_clone),
        ("UpdateCloneLimits", by_clone),
        ("InstallClone", clone_admin),
        ("AcceptClone", clone_admin),
        ("RollbackClone", clone_admin),
        ("ListLeftovers", monitor),
        ("DeleteLeftover", clone_admin),
        ("VerifyClone", monitor),
    ]
    .into();
    let set = FileDescriptorSet::decode(marcot_proto::FILE_DESCRIPTOR_SET).expect("our own");
    let services = set.file.iter().flat_map(|file| &file.service);
    let service = services.clone().find(|s| s.name() == "RecipientService").expect("the service");
    let methods: Vec<&str> = service.method.iter().map(|method| method.name()).collect();
    let home = new_directory();
    let file = identities(home.path(), "");
    let at = Recipient::start(home.path(), &["--identities", &file]);
    let channel = channel(&at).await;
    assert_eq!(methods.len(), expected.len(), "{methods:?}");
    for method in methods {
        let mut got = Vec::new();
        for privilege in ["MONITOR", "BACKUP_ADMIN", "CLONE_ADMIN"] {
            got.push(reason(call(&channel, method, privilege).await));
        }
        assert_eq!(got, expected[method], "{method}");
        assert_eq!(reason(call(&channel, method, "").await), "NOT_LOGGED_IN", "{method}");
        assert_eq!(reason(call(&channel, method, "ROOT").await), "TOKEN_UNKNOWN", "{method}");
    }
    assert!(!at.0.log().contains(&token("MONITOR")), "a token is in the log");
}

/// Guards what a handler asks of a clone: CLONE_ADMIN to replace the server's own data, and nothing
/// more; BACKUP_ADMIN for a new directory. Cancelling asks for the same.
#[tokio::test]
async fn a_clone_asks_for_the_privilege_of_its_target() {
    let home = new_directory();
    let data = home.path().join("data");
    std::fs::create_dir(&data).expect("writable");
    tree::make(&data);
    let (file, own) = (identities(home.path(), ""), data.display().to_string());
    let at = Recipient::start(home.path(), &["--identities", &file, "--data-directory", &own]);
    let mut client = RecipientServiceClient::new(channel(&at).await);
    let instance = |directory: &str| CloneInstanceRequest {
        host: "127.0.0.1".to_owned(),
        port: 1,
        user: "clone".to_owned(),
        data_directory: directory.to_owned().into(),
        options: Some(CloneOptions::default()),
        ..Default::default()
    };
    let denied = |status: Status| {
        let failure = Failure::from_status(&status);
        (failure.reason.into_owned(), failure.metadata.get("privilege").cloned())
    };
    let needs = |privilege: &str| ("PRIVILEGE_REQUIRED".to_owned(), Some(privilege.to_owned()));
    let new = home.path().join("copy").display().to_string();
    for (directory, privilege, missing) in
        [("", "BACKUP_ADMIN", "CLONE_ADMIN"), (new.as_str(), "CLONE_ADMIN", "BACKUP_ADMIN")]
    {
        let asked = client.clone_instance(with_token(instance(directory), privilege)).await;
        assert_eq!(denied(asked.expect_err("it lacks a privilege")), needs(missing));
    }
    let local = CloneLocalRequest { data_directory: new.into(), ..Default::default() };
    let started = client.clone_local(with_token(local, "BACKUP_ADMIN")).await.expect("it may");
    let clone = started.into_inner().clone.expect("a clone");
    assert_eq!(clone.user, "BACKUP_ADMIN", "the token's name");
    let cancel = CancelCloneRequest { name: clone.name.clone() };
    let asked = client.cancel_clone(with_token(cancel, "CLONE_ADMIN")).await;
    assert_eq!(denied(asked.expect_err("it lacks a privilege")), needs("BACKUP_ADMIN"));
    // The file is read again as soon as it has changed: this token is nobody's from now on.
    std::fs::write(&file, "").expect("writable");
    let asked = client.list_clones(with_token(ListClonesRequest::default(), "MONITOR")).await;
    assert_eq!(denied(asked.expect_err("it is nobody's")).0, "TOKEN_UNKNOWN");
    identities(home.path(), "");
    let watch = WatchCloneRequest { name: clone.name, ..Default::default() };
    let watched = client.watch_clone(with_token(watch, "MONITOR")).await.expect("it may look");
    let (mut messages, mut last) = (watched.into_inner(), None);
    while let Some(message) = messages.message().await.expect("the watch goes on") {
        last = message.clone;
    }
    assert_eq!(last.expect("a watch sends the clone").state(), State::Completed);
}

/// Guards the mapping of client certificates: a certificate of the CA that nobody has named may do
/// nothing, and one that is named may do what the file says.
#[tokio::test]
async fn a_client_certificate_is_worth_the_privileges_of_its_uri_or_name() {
    let home = new_directory();
    let certificates = Certificates::create(&home.path().join("tls"));
    let (chain, key) = certificates.sign("recipient", &["127.0.0.1"]);
    let ca = certificates.ca();
    let file = identities(
        home.path(),
        "[certificate.\"spiffe://cluster.local/ns/db/sa/operator\"]\nprivileges = [\"CLONE_ADMIN\"]\n\
         [certificate.\"watcher.db\"]\nprivileges = [\"MONITOR\"]\n",
    );
    let options = ["--tls-cert", &chain, "--tls-key", &key, "--tls-client-ca", &ca];
    let at = Recipient::start(home.path(), &[&options[..], &["--identities", &file]].concat());
    for (names, accept, list) in [
        (&["x.db", "spiffe://cluster.local/ns/db/sa/operator"][..], "passed", "passed"),
        (&["watcher.db"], "PRIVILEGE_REQUIRED", "passed"),
        (&["spiffe://cluster.local/ns/db/sa/other"], "NOT_LOGGED_IN", "NOT_LOGGED_IN"),
    ] {
        let (certificate, key) = certificates.sign("client", names);
        let tls = ClientTls {
            ca: Some(ca.clone().into()),
            certificate: Some((certificate.into(), key.into())),
            ..ClientTls::default()
        };
        let port = at.0.address.port();
        let options = ConnectOptions::new("127.0.0.1", port, SslMode::Required).with_tls(tls);
        let connection = connect(&options).await.expect("its CA is known");
        let got = [
            reason(call(&connection.channel, "AcceptClone", "").await),
            reason(call(&connection.channel, "ListClones", "").await),
        ];
        assert_eq!(got, [accept, list], "{names:?}");
    }
}

/// A statement with a password in it, over the account's own connection on loopback, runs; what the
/// status shows of it has no secret.
#[tokio::test]
async fn the_status_shows_a_statement_without_its_secret() {
    let mut pair = marcot_tests::Pair::start(&[], &[]).await;
    let statement = pair.donor.statement(&pair.home().join("copy"), "");
    let clone = marcot_tests::client::clone_and_wait(&mut pair.client, &statement).await;
    assert_eq!(clone.state(), State::Completed);
    assert!(clone.statement.contains("IDENTIFIED BY <secret>"), "{}", clone.statement);
    drop(wait_for_end(&mut pair.client, &clone.name).await);
    for log in [pair.donor.0.log(), pair.recipient.0.log()] {
        assert!(!log.contains("'secret'"), "{log}");
    }
}
