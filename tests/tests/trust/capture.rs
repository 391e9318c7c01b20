//! What an onlooker sees of a whole clone in plaintext.

use std::path::Path;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use marcot_proto::recipient::v1::{CloneStatementRequest, State};
use marcot_tests::{
    Donor, Proxy, Recipient, client::wait_for_end, new_directory, process, recipient, tree,
};

const PASSWORD: &str = "correct horse battery";

/// Guards the promise of REQUIRE NO SSL: of all bytes of a clone, log-ins of all its connections
/// among them, none are the password's, nor what it could be guessed by offline: plain digests of
/// it, and the verifier of the accounts file. With the password sent as it is, it is found.
#[tokio::test]
async fn neither_the_password_nor_what_it_could_be_guessed_by_crosses_the_wire_in_clear() {
    let home = new_directory();
    let data = home.path().join("data");
    std::fs::create_dir(&data).expect("writable");
    tree::make(&data);
    let accounts = home.path().join("accounts.toml");
    let mut file = marcot_common::accounts::Accounts::open_or_create(&accounts).expect("new");
    let privilege = marcot_common::access::Privilege::BackupAdmin;
    file.add("clone", PASSWORD, &[privilege]).expect("a name");
    file.save().expect("writable");
    let options = ["--accounts", &accounts.display().to_string()];
    let donor = Donor::start(home.path(), &data, &options);
    let proxy = Proxy::start(donor.0.address);
    proxy.record();
    let at = Recipient::start(home.path(), &[]);
    let mut client = recipient(&at).await;
    let statement = process::statement(proxy.port(), &home.path().join("copy"), "REQUIRE NO SSL");
    let statement = statement.replace("'secret'", &format!("'{PASSWORD}'"));
    let request = CloneStatementRequest { statement, ..Default::default() };
    let started = client.clone_statement(request).await.expect("accepted").into_inner();
    let clone = wait_for_end(&mut client, &started.clone.expect("a clone").name).await;
    assert_eq!((clone.state(), clone.encrypted), (State::Completed, Some(false)), "{clone:?}");
    let seen = proxy.recorded();
    let holds = |needle: &[u8]| seen.windows(needle.len()).any(|window| window == needle);
    assert!(holds(b"clone") && holds(b"snapshots/"), "the record is of the clone");
    assert!(proxy.counts().connections >= 2, "{:?}", proxy.counts());
    for secret in secrets(&accounts) {
        assert!(!holds(&secret), "seen: {}", secret.escape_ascii());
    }
    for log in [donor.0.log(), at.0.log()] {
        assert!(!log.contains(PASSWORD), "{log}");
    }
}

/// The password, its encodings and digests, and what the accounts file holds of it.
fn secrets(accounts: &Path) -> Vec<Vec<u8>> {
    let text = std::fs::read_to_string(accounts).expect("it is there");
    let verifier = text.split("verifier = \"").nth(1).and_then(|rest| rest.split('"').next());
    let verifier = BASE64.decode(verifier.expect("a verifier")).expect("base64");
    let mut secrets = forms(PASSWORD);
    // Its masking key, by which every guess could be checked, is behind the client's public key.
    secrets.push(verifier[32..96].to_vec());
    secrets.push(verifier);
    secrets
}

/// A password as it is, in base64, and the digests of it that databases keep.
pub(crate) fn forms(password: &str) -> Vec<Vec<u8>> {
    use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, SHA512, digest};
    // Without the end, which depends on what follows.
    let whole = &password.as_bytes()[..password.len() / 3 * 3];
    let mut forms = vec![password.as_bytes().to_vec(), BASE64.encode(whole).into_bytes()];
    for algorithm in [&SHA1_FOR_LEGACY_USE_ONLY, &SHA256, &SHA512] {
        let once = digest(algorithm, password.as_bytes());
        forms.push(once.as_ref().to_vec());
        forms.push(digest(algorithm, once.as_ref()).as_ref().to_vec());
    }
    forms
}
