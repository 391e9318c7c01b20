//! Connections between real sockets: every SSL mode against servers with and without TLS, peers
//! that are no Marcot, log-ins, and what an onlooker sees of them.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod support;

use std::{io::Write as _, net::TcpListener, time::Duration};

use marcot_common::{
    connect::{ClientTls, ConnectOptions, SslMode, connect},
    failure::Failure,
    tls::Fingerprint,
};
use support::{Pki, Server};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

fn options(port: u16, mode: SslMode) -> ConnectOptions {
    ConnectOptions::new("127.0.0.1", port, mode)
}

async fn refused(options: &ConnectOptions) -> Failure {
    match connect(options).await {
        Ok(connection) => panic!("connected: {:?}", connection.security),
        Err(failure) => failure,
    }
}

/// A peer that says `greeting` to whoever connects, or answers with it once something has come.
fn fake_peer(greeting: &'static [u8], speaks_first: bool) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().take(4) {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                if !speaks_first {
                    drop(std::io::Read::read(&mut stream, &mut buffer));
                }
                drop(stream.write_all(greeting));
                // Until the client has gone.
                while std::io::Read::read(&mut stream, &mut buffer).is_ok_and(|n| n > 0) {}
            });
        }
    });
    port
}

#[tokio::test]
async fn each_mode_gets_what_it_asks_for_from_a_server_with_tls() {
    let pki = Pki::new();
    let server = Server::start(Some(pki.server(&["127.0.0.1"])), None).await;
    let trusting = ClientTls { ca: Some(pki.ca()), ..ClientTls::default() };
    for (mode, encrypted) in
        [(SslMode::Required, true), (SslMode::Preferred, true), (SslMode::Disabled, false)]
    {
        let options = options(server.port(), mode).with_tls(trusting.clone());
        let connection = connect(&options).await.unwrap();
        assert_eq!(connection.security.encrypted, encrypted, "{mode:?}");
        assert_eq!(connection.security.channel_binding.is_some(), encrypted);
        if encrypted {
            assert_eq!(connection.security.fingerprint, Some(server.fingerprint.unwrap().0));
            assert_eq!(connection.security.cipher, "TLSv1.3 AES_128_GCM_SHA256");
        }
    }
}

/// Guards the rule for the no-clause mode: only the server's own answer leads to plaintext, and a
/// CA, a fingerprint or a client certificate rules it out. With `demands_tls` made to say false,
/// the middle case connects in plaintext.
#[tokio::test]
async fn a_server_without_tls_is_reached_in_plaintext_only_when_nothing_asks_for_more() {
    let pki = Pki::new();
    let server = Server::start(None, None).await;
    let connection = connect(&options(server.port(), SslMode::Preferred)).await.unwrap();
    assert!(!connection.security.encrypted);
    let (certificate, key) = pki.client();
    for tls in [
        ClientTls { ca: Some(pki.ca()), ..ClientTls::default() },
        ClientTls { fingerprint: Some(Fingerprint([7; 32])), ..ClientTls::default() },
        ClientTls { certificate: Some((certificate, key)), ..ClientTls::default() },
    ] {
        let options = options(server.port(), SslMode::Preferred).with_tls(tls);
        assert_eq!(refused(&options).await.reason, "TLS_NOT_CONFIGURED");
    }
    let failure = refused(&options(server.port(), SslMode::Required)).await;
    assert_eq!(failure.reason, "TLS_NOT_CONFIGURED");
    assert_eq!(failure.metadata["donor_mysql_error"], "2026");
    assert!(failure.message.contains("REQUIRE NO SSL"), "{failure}");
}

/// Guards against a downgrade: a middlebox that resets, closes, garbles or swallows the TLS hello
/// never gets plaintext. Made to fall back on any error, `connect` sends HTTP/2's preface here.
#[tokio::test]
async fn a_middlebox_that_breaks_the_hello_never_gets_plaintext() {
    for answer in [&b""[..], b"garbage", b"MARCOT/1 TLS IS", b"\x15\x03\x03\x00\x02\x02\x28"] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let middlebox = tokio::spawn(async move {
            let mut connections = 0;
            loop {
                let accepted =
                    tokio::time::timeout(Duration::from_secs(1), listener.accept()).await;
                let Ok(Ok((mut stream, _))) = accepted else { return connections };
                connections += 1;
                let mut first = [0; 3];
                stream.read_exact(&mut first).await.unwrap();
                assert_eq!(first[0], 0x16, "only TLS hellos may come");
                stream.write_all(answer).await.unwrap();
                drop(stream);
            }
        });
        let failure = refused(&options(port, SslMode::Preferred)).await;
        assert_ne!(failure.reason, "TLS_NOT_CONFIGURED", "{answer:?}");
        assert_eq!(middlebox.await.unwrap(), 1, "one connection, no second try: {answer:?}");
    }
}

#[tokio::test]
async fn a_certificate_is_believed_by_its_ca_and_name_or_by_its_fingerprint() {
    let pki = Pki::new();
    let server = Server::start(Some(pki.server(&["127.0.0.1"])), None).await;
    let other_name = Server::start(Some(pki.server(&["db.example"])), None).await;
    let expired = Server::start(Some(pki.expired_server(&["127.0.0.1"])), None).await;
    let by_ca = ClientTls { ca: Some(pki.ca()), ..ClientTls::default() };
    let stranger = ClientTls { ca: Some(Pki::new().ca_kept()), ..ClientTls::default() };
    let pinned = ClientTls { fingerprint: server.fingerprint, ..ClientTls::default() };
    let wrong = ClientTls { fingerprint: other_name.fingerprint, ..ClientTls::default() };
    let required =
        |port: u16, tls: &ClientTls| options(port, SslMode::Required).with_tls(tls.clone());
    connect(&required(server.port(), &by_ca)).await.unwrap();
    connect(&required(server.port(), &pinned)).await.unwrap();
    for (port, tls, text) in [
        (other_name.port(), &by_ca, "not valid for name"),
        (expired.port(), &by_ca, "expired"),
        (server.port(), &stranger, "UnknownIssuer"),
        (server.port(), &ClientTls::default(), "--ssl-ca"),
        (server.port(), &wrong, "has fingerprint SHA256:"),
    ] {
        let failure = refused(&required(port, tls)).await;
        assert_eq!(failure.reason, "CERTIFICATE_NOT_TRUSTED", "{failure}");
        assert!(failure.message.contains(text), "{text}: {failure}");
    }
}

#[tokio::test]
async fn a_server_with_a_client_ca_takes_only_its_clients() {
    let pki = Pki::new();
    let server = Server::start(Some(pki.server_with_client_ca(&["127.0.0.1"])), None).await;
    let without = ClientTls { ca: Some(pki.ca()), ..ClientTls::default() };
    let failure =
        refused(&options(server.port(), SslMode::Required).with_tls(without.clone())).await;
    assert_eq!(failure.metadata["donor_mysql_error"], "2026", "{failure}");
    let with = ClientTls { certificate: Some(pki.client()), ..without };
    connect(&options(server.port(), SslMode::Required).with_tls(with)).await.unwrap();
}

#[tokio::test]
async fn peers_that_are_no_marcot_are_told_as_what_they_are() {
    let mysql = b"\x5b\x00\x00\x00\x0a9.7.4\x00\x08\x00\x00\x00abcdefgh\x00";
    let x_protocol = b"\x05\x00\x00\x00\x0b\x08\x05\x1a\x00";
    let http = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
    for mode in [SslMode::Disabled, SslMode::Preferred, SslMode::Required] {
        for (greeting, speaks_first, expected) in [
            (&mysql[..], true, "MySQL or MariaDB server (9.7.4)"),
            (x_protocol, true, "X Protocol"),
            (http, false, "HTTP server"),
        ] {
            let port = fake_peer(greeting, speaks_first);
            let failure = refused(&options(port, mode)).await;
            assert!(failure.message.contains(expected), "{mode:?}: {failure}");
            assert_eq!(failure.mysql_error, Some(3862));
        }
    }
}

#[tokio::test]
async fn nothing_listening_and_no_such_host_have_mysqls_numbers() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let failure = refused(&options(port, SslMode::Preferred)).await;
    assert_eq!(failure.metadata["donor_mysql_error"], "2003", "{failure}");
    let nowhere = ConnectOptions::new("no-such-host.invalid", 1, SslMode::Disabled);
    let failure = refused(&nowhere).await;
    assert_eq!(failure.metadata["donor_mysql_error"], "2005", "{failure}");
}

/// Guards the pin: the further connections of a clone go to the same certificate, in the same mode.
/// Without it the second server, which the CA has signed as well, is believed.
#[tokio::test]
async fn further_connections_are_pinned_to_the_first() {
    let pki = Pki::new();
    let server = Server::start(Some(pki.server(&["127.0.0.1"])), None).await;
    let by_ca = ClientTls { ca: Some(pki.ca()), ..ClientTls::default() };
    let options = options(server.port(), SslMode::Preferred).with_tls(by_ca);
    let first = connect(&options).await.unwrap();
    let mut pinned = options.pinned(&first);
    connect(&pinned).await.unwrap();
    assert_eq!(pinned.ssl_mode, SslMode::Required);
    pinned.tls.fingerprint = Some(Fingerprint([1; 32]));
    assert_eq!(refused(&pinned).await.reason, "CERTIFICATE_NOT_TRUSTED");
}
