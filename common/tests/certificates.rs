//! Certificates that one side does not believe, held against the table in docs/security.md; and
//! certificates that change while a server runs.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod support;

use std::{
    collections::BTreeSet,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
};

use marcot_common::{
    accounts::Accounts,
    connect::{ClientTls, ConnectOptions, SslMode, connect},
    failure::Failure,
    tls::{
        Fingerprint,
        server::{ReloadedTls, ServerTls, ServerTlsFiles},
    },
};
use marcot_proto::donor::v1::{GetServerInfoRequest, donor_service_client::DonorServiceClient};
use support::{Pki, Server};
use tokio_rustls::TlsAcceptor;

const HOST: &[&str] = &["127.0.0.1"];

async fn try_to(port: u16, tls: ClientTls) -> Result<(), Failure> {
    let options = ConnectOptions::new("127.0.0.1", port, SslMode::Required).with_tls(tls);
    connect(&options).await.map(|_| ())
}

/// A text with `N` for each number, `FINGERPRINT` for each of those, and `HOST:PORT` for this host's.
fn general(text: &str) -> String {
    const LENGTH: usize = "SHA256".len() + 32 * ":00".len();
    let mut whole = text.to_owned();
    while let Some(at) = whole.find("SHA256:") {
        whole.replace_range(at..at + LENGTH, "FINGERPRINT");
    }
    let mut general = String::new();
    let mut last = ' ';
    for c in whole.chars() {
        match (c.is_ascii_digit(), last) {
            (true, 'N') => {}
            (true, _) => general.push('N'),
            (false, _) => general.push(c),
        }
        last = if c.is_ascii_digit() { 'N' } else { c };
    }
    general.replace("N.N.N.N:N", "HOST:PORT").replace("N.N.N.N", "HOST")
}

/// The texts of the page's table with that head: what stands in back quotes, names and options left out.
fn of_the_page(head: &str) -> BTreeSet<String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/security.md");
    let page = std::fs::read_to_string(page).unwrap();
    let (_, table) = page.split_once(&format!("\n{head}\n")).expect("the table is there");
    let rows = table.lines().take_while(|line| line.starts_with('|'));
    let quoted = rows.flat_map(|row| row.split('`').skip(1).step_by(2));
    quoted.filter(|text| text.contains(' ')).map(str::to_owned).collect()
}

/// Holds both against each other: a text that the page lacks, and a row that nothing says any more.
#[track_caller]
fn assert_as_the_page_says(texts: &[String], head: &str) {
    let told: BTreeSet<String> = texts.iter().map(|text| general(text)).collect();
    let page = of_the_page(head);
    let missing: Vec<_> = told.difference(&page).collect();
    let stale: Vec<_> = page.difference(&told).collect();
    assert!(missing.is_empty() && stale.is_empty(), "missing: {missing:#?}, stale: {stale:#?}");
}

/// Guards each check of a donor's certificate: taken out, its case connects. The texts are the
/// table's of the page.
#[tokio::test]
async fn a_donors_certificate_that_is_not_believed_is_told_as_the_page_says() {
    let pki = Pki::new();
    let right = pki.files(HOST, 2049);
    let revoked = pki.files(HOST, 2049);
    let list = pki.revoke(Some(&revoked.certificate), 2049);
    let other = Pki::new();
    let other_list = other.revoke(None, 2049);
    let old_list = pki.revoke(None, 2002);
    let by_ca =
        |crl: Option<PathBuf>| ClientTls { ca: Some(pki.ca()), crl, ..ClientTls::default() };
    let stranger = ClientTls { ca: Some(Pki::new().ca_kept()), ..ClientTls::default() };
    let print = ClientTls { fingerprint: Some(Fingerprint([7; 32])), ..ClientTls::default() };
    let pinned_revoked = ClientTls {
        fingerprint: Some(revoked.load().unwrap().fingerprint),
        ..by_ca(Some(list.clone()))
    };
    try_to(start(&right).await.port(), by_ca(Some(list.clone()))).await.unwrap();
    let mut texts = Vec::new();
    for (files, tls) in [
        (&pki.files(HOST, 2002), by_ca(None)),
        (&pki.files_to_come(HOST), by_ca(None)),
        (&pki.files(&["db.example"], 2049), by_ca(None)),
        (&right, stranger),
        (&revoked, by_ca(Some(list.clone()))),
        (&revoked, pinned_revoked),
        (&right, by_ca(Some(other_list))),
        (&right, by_ca(Some(old_list))),
        (&right, print),
    ] {
        let server = start(files).await;
        let failure = try_to(server.port(), tls).await.unwrap_err();
        assert_eq!(failure.reason, "CERTIFICATE_NOT_TRUSTED", "{failure}");
        assert_eq!(failure.metadata["donor_mysql_error"], "2026");
        texts.push(failure.message);
    }
    let missing = Server::start(None, None).await;
    let failure = try_to(missing.port(), by_ca(None)).await.unwrap_err();
    assert_eq!(failure.reason, "TLS_NOT_CONFIGURED");
    texts.push(failure.message);
    assert_as_the_page_says(&texts, "| certificate | text |");
}

async fn start(files: &ServerTlsFiles) -> Server {
    Server::start(Some(files.load().unwrap()), None).await
}

/// What a server's handshake with a client ends in, and what the client is told.
async fn refuse(files: &ServerTlsFiles, tls: ClientTls) -> (String, Failure) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = TlsAcceptor::from(files.load().unwrap().config);
    let server = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        acceptor.accept(stream).await.map(|_| ()).unwrap_err().to_string()
    });
    let failure = try_to(port, tls).await.unwrap_err();
    (server.await.unwrap(), failure)
}

/// Guards each check of a client's certificate: taken out, its case connects. Both sides' texts are
/// the table's of the page.
#[tokio::test]
async fn a_clients_certificate_that_is_not_believed_is_told_as_the_page_says() {
    let pki = Pki::new();
    let stranger = Pki::new();
    let revoked = pki.client();
    let list = pki.revoke(Some(&revoked.0), 2049);
    let old_list = pki.revoke(None, 2002);
    let demanding = |crl: Option<PathBuf>| ServerTlsFiles {
        client_ca: Some(pki.ca()),
        client_crl: crl,
        ..pki.files(HOST, 2049)
    };
    let showing = |certificate: Option<(PathBuf, PathBuf)>| ClientTls {
        ca: Some(pki.ca()),
        certificate,
        ..ClientTls::default()
    };
    let server = start(&demanding(Some(list.clone()))).await;
    try_to(server.port(), showing(Some(pki.client()))).await.unwrap();
    let mut texts = Vec::new();
    for (files, client) in [
        (demanding(None), None),
        (demanding(None), Some(pki.client_until(2002))),
        (demanding(None), Some(pki.client_to_come())),
        (demanding(None), Some(stranger.client())),
        (demanding(Some(list)), Some(revoked)),
        (demanding(Some(old_list)), Some(pki.client())),
    ] {
        let (logged, failure) = refuse(&files, showing(client)).await;
        assert_eq!(failure.reason, "TLS_REFUSED", "{failure}");
        texts.extend([failure.message, logged]);
    }
    texts.push(told_to_nobody(&pki).await);
    assert_as_the_page_says(&texts, "| certificate | recipient | donor's log |");
}

/// What a client hears whose certificate is believed, and is nobody's.
async fn told_to_nobody(pki: &Pki) -> String {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("accounts.toml");
    Accounts::open_or_create(&path).unwrap().save().unwrap();
    let server = Server::start(Some(pki.server_with_client_ca(HOST)), Some(&path)).await;
    let tls =
        ClientTls { ca: Some(pki.ca()), certificate: Some(pki.client()), ..ClientTls::default() };
    let options = ConnectOptions::new("127.0.0.1", server.port(), SslMode::Required).with_tls(tls);
    let mut client = DonorServiceClient::new(connect(&options).await.unwrap().channel);
    let status = client.get_server_info(GetServerInfoRequest::default()).await.unwrap_err();
    let failure = Failure::from_status(&status);
    assert_eq!(failure.reason, "NOT_LOGGED_IN");
    failure.message
}

fn reloaded(directory: &Path) -> ReloadedTls {
    let path = |name: &str| directory.join(name);
    ReloadedTls::open(ServerTlsFiles::new(path("tls.crt"), path("tls.key"))).unwrap()
}

/// Lays files as the kubelet does: a directory of their own, reached by a link that is exchanged.
fn publish(directory: &Path, version: &str, files: &ServerTlsFiles) {
    let own = directory.join(version);
    std::fs::create_dir(&own).unwrap();
    std::fs::copy(&files.certificate, own.join("tls.crt")).unwrap();
    std::fs::copy(&files.key, own.join("tls.key")).unwrap();
    symlink(version, directory.join("..data_tmp")).unwrap();
    rustix::fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
    for name in ["tls.crt", "tls.key"] {
        drop(symlink(Path::new("..data").join(name), directory.join(name)));
    }
}

/// Guards the reload: read once at start, the second connection sees the first certificate.
#[tokio::test]
async fn a_renewed_certificate_is_shown_to_the_next_connection_and_the_first_one_lives_on() {
    let pki = Pki::new();
    let home = tempfile::tempdir().unwrap();
    let (first, second) = (pki.files(HOST, 2048), pki.files(HOST, 2049));
    let print = |files: &ServerTlsFiles| Some(files.load().unwrap().fingerprint.0);
    publish(home.path(), "v1", &first);
    let tls = Arc::new(reloaded(home.path()));
    let server = Server::start_reloaded(Arc::clone(&tls)).await;
    let options = ConnectOptions::new("127.0.0.1", server.port(), SslMode::Required)
        .with_tls(ClientTls { ca: Some(pki.ca()), ..ClientTls::default() });
    let held = connect(&options).await.unwrap();
    assert_eq!(held.security.fingerprint, print(&first));
    let end_of_first = tls.current().expiry().unwrap();
    publish(home.path(), "v2", &second);
    let next = connect(&options.pinned(&held)).await.unwrap();
    assert_eq!(next.security.fingerprint, print(&second));
    assert!(tls.current().expiry().unwrap() > end_of_first);
    support::ask_health(&held).await.unwrap();
    // A certificate without its key, as in the middle of a change by hand.
    std::fs::remove_file(home.path().join("tls.crt")).unwrap();
    std::fs::copy(&first.certificate, home.path().join("tls.crt")).unwrap();
    let next = connect(&options).await.unwrap();
    assert_eq!(next.security.fingerprint, print(&second), "what was read last stays in use");
}

/// Guards against a certificate that is refused only once it is too late: the expiry is read from
/// the very certificate in use.
#[test]
fn a_certificates_end_is_known() {
    let tls: ServerTls = Pki::new().files(HOST, 2031).load().unwrap();
    let end = tls.expiry().unwrap().duration_since(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(end.as_secs(), 1_924_992_000, "2031-01-01T00:00:00Z");
}

/// Guards against an expiry that nobody sees coming: a certificate that was renewed without its key is not
/// in use, and the date that is told is that of the old one. A CA's file that is wrong keeps no new list of
/// what was revoked out. With dates of the files as they lie there, the first is told as renewed.
#[test]
fn a_clients_files_that_are_wrong_leave_what_was_right_last_and_are_told() {
    let (pki, home) = (Pki::new(), tempfile::tempdir().unwrap());
    let place = |from: &Path, name: &str| {
        let path = home.path().join(name);
        std::fs::copy(from, &path).unwrap();
        path
    };
    let (first, second) = (pki.client_until(2048), pki.client_until(2049));
    let (chain, key) = (place(&first.0, "tls.crt"), place(&first.1, "tls.key"));
    let crl = place(&pki.revoke(None, 2048), "ca.crl");
    let ca = place(&pki.ca(), "ca.pem");
    let tls = ClientTls {
        ca: Some(ca.clone()),
        crl: Some(crl),
        certificate: Some((chain.clone(), key)),
        ..ClientTls::default()
    };
    tls.load().unwrap();
    assert!(tls.wrong_files().is_empty());
    let (ends, runs_out) = (tls.expiry().unwrap(), tls.crl_next_update().unwrap());
    place(&second.0, "tls.crt");
    std::fs::write(&ca, "no certificate").unwrap();
    place(&pki.revoke(None, 2049), "ca.crl");
    tls.load().expect("what was right last is in use");
    assert_eq!(tls.expiry(), Some(ends), "the old pair is in use");
    assert!(tls.crl_next_update().unwrap() > runs_out, "the new list is");
    let wrong: Vec<_> = tls.wrong_files().iter().map(ToString::to_string).collect();
    let [of_ca, of_pair] = &wrong[..] else { panic!("{wrong:?}") };
    assert!(of_ca.contains(&ca.display().to_string()), "{of_ca}");
    assert!(of_pair.contains(&chain.display().to_string()), "{of_pair}");
    place(&second.1, "tls.key");
    place(&pki.ca(), "ca.pem");
    assert!(tls.wrong_files().is_empty());
    assert!(tls.expiry().unwrap() > ends);
}
