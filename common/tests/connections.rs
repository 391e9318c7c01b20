//! Connections between real sockets: every SSL mode against servers with and without TLS, peers
//! that are no Marcot, log-ins, and what an onlooker sees of them.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod support;

use std::{io::Write as _, net::TcpListener, sync::Arc, time::Duration};

use futures::StreamExt as _;

use marcot_common::{
    connect::{ClientTls, ConnectOptions, SslMode, connect},
    failure::Failure,
    listener::{Listener, NO_TLS_ANSWER},
    tls::{Fingerprint, Versions},
};
use support::{Pki, Server};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected as _;

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

/// Guards a clone's later snapshots: however it began, no clause lets it go on in plaintext, or to
/// another certificate.
#[tokio::test]
async fn what_a_clone_began_with_holds_for_its_later_snapshots() {
    let pki = Pki::new();
    let (first, other) = (
        Server::start(Some(pki.server(&["127.0.0.1"])), None).await,
        Server::start(Some(pki.server(&["127.0.0.1"])), None).await,
    );
    let plain = Server::start(None, None).await;
    let at = |server: &Server| options(server.port(), SslMode::Preferred);
    let trusting = ClientTls { ca: Some(pki.ca()), ..ClientTls::default() };
    let connection = connect(&at(&first).with_tls(trusting.clone())).await.unwrap();
    let fingerprint = connection.security.fingerprint;
    assert!(fingerprint.is_some());
    connect(&at(&first).pinned_as(true, fingerprint)).await.unwrap();
    let failure = refused(&at(&plain).pinned_as(true, fingerprint)).await;
    assert_eq!(failure.reason, "TLS_NOT_CONFIGURED");
    let failure = refused(&at(&other).with_tls(trusting).pinned_as(true, fingerprint)).await;
    assert_eq!(failure.reason, "CERTIFICATE_NOT_TRUSTED");
    let connection = connect(&at(&first).pinned_as(false, None)).await.unwrap();
    assert!(!connection.security.encrypted);
}

/// Guards a donor whose host got another address: it is found under its name, and by the connections
/// after that one at once. One whose name still has the old address is awaited there.
#[tokio::test]
async fn a_pinned_address_is_left_once_the_name_has_left_it() {
    let server = Server::start(None, None).await;
    let by_name = |port: u16| ConnectOptions::new("localhost", port, SslMode::Disabled);
    let gone = (std::net::Ipv4Addr::new(127, 0, 0, 9), server.port()).into();
    let pinned = by_name(server.port()).pinned_to(gone, false, None);
    let later = pinned.clone();
    let connection = connect(&pinned).await.unwrap();
    assert_ne!(connection.peer, gone);
    assert_eq!(later.pins().unwrap().0, connection.peer);
    // Nobody listens on this port, and nobody else gets it.
    let held = tokio::net::TcpSocket::new_v4().unwrap();
    held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let port = held.local_addr().unwrap().port();
    let down = (std::net::Ipv4Addr::LOCALHOST, port).into();
    let pinned = by_name(port).pinned_to(down, false, None);
    assert_eq!(refused(&pinned).await.reason, "DONOR_UNREACHABLE");
    assert_eq!(pinned.pins().unwrap().0, down);
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
            assert_eq!(connection.security.fingerprint, server.fingerprint.map(|f| f.0));
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
    let held = tokio::net::TcpSocket::new_v4().unwrap();
    held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let port = held.local_addr().unwrap().port();
    let failure = refused(&options(port, SslMode::Preferred)).await;
    assert_eq!(failure.metadata["donor_mysql_error"], "2003", "{failure}");
    let nowhere = ConnectOptions::new("no-such-host.invalid", 1, SslMode::Disabled);
    let failure = refused(&nowhere).await;
    assert_eq!(failure.metadata["donor_mysql_error"], "2005", "{failure}");
}

/// Passes each connection on to the next of these ports.
async fn relay(ports: Vec<u16>) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        for port in ports {
            let (mut near, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut far = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                // Either end may go first.
                drop(tokio::io::copy_bidirectional(&mut near, &mut far).await);
            });
        }
    });
    port
}

/// Guards the pin: the further connections of a clone go to the same donor, in the same mode. A
/// certificate that was renewed is believed as the first one was, and nothing else is: with
/// `pinned` made to leave CA and fingerprint out, the stranger is believed, too.
#[tokio::test]
async fn further_connections_are_pinned_to_the_first() {
    let pki = Pki::new();
    let first = Server::start(Some(pki.server(&["127.0.0.1"])), None).await;
    let renewed = Server::start(Some(pki.server(&["127.0.0.1"])), None).await;
    let other = Server::start(Some(pki.server(&["db.example"])), None).await;
    let stranger = Server::start(Some(Pki::new().server(&["127.0.0.1"])), None).await;
    let without_tls = Server::start(None, None).await;
    let by_ca = ClientTls { ca: Some(pki.ca()), ..ClientTls::default() };
    let servers = [&first, &first, &renewed, &other, &stranger, &without_tls];
    let port = relay(servers.map(Server::port).to_vec()).await;
    let options = options(port, SslMode::Preferred).with_tls(by_ca);
    let connection = connect(&options).await.unwrap();
    let pinned = options.pinned(&connection);
    assert_eq!(pinned.ssl_mode, SslMode::Required);
    connect(&pinned).await.unwrap();
    let connection = connect(&pinned).await.unwrap();
    assert_eq!(connection.security.fingerprint, renewed.fingerprint.map(|f| f.0));
    for _ in [&other, &stranger] {
        let failure = refused(&pinned).await;
        assert_eq!(failure.reason, "CERTIFICATE_NOT_TRUSTED", "{failure}");
    }
    assert_eq!(refused(&pinned).await.reason, "TLS_NOT_CONFIGURED");

    let by_print = ClientTls { fingerprint: first.fingerprint, ..ClientTls::default() };
    let port = relay(vec![first.port(), renewed.port()]).await;
    let options = ConnectOptions::new("127.0.0.1", port, SslMode::Required).with_tls(by_print);
    let connection = connect(&options).await.unwrap();
    let failure = refused(&options.pinned(&connection)).await;
    assert_eq!(failure.reason, "CERTIFICATE_NOT_TRUSTED", "{failure}");

    let port = relay(vec![without_tls.port(); 2]).await;
    let options = ConnectOptions::new("127.0.0.1", port, SslMode::Preferred);
    let connection = connect(&options).await.unwrap();
    assert_eq!(options.pinned(&connection).ssl_mode, SslMode::Disabled);
}

/// Guards the proof of the server's key under a pinned fingerprint: a certificate is public, and
/// whoever shows it must hold its key. With `verify_tls13_signature` made to assert, the impostor
/// is believed.
#[tokio::test]
async fn a_pinned_certificate_shown_without_its_key_is_refused() {
    let pki = Pki::new();
    let impostor = Server::start(Some(pki.impostor(&["127.0.0.1"])), None).await;
    let pinned = ClientTls { fingerprint: impostor.fingerprint, ..ClientTls::default() };
    let options = options(impostor.port(), SslMode::Required).with_tls(pinned);
    let failure = refused(&options).await;
    assert_eq!(failure.reason, "CERTIFICATE_NOT_TRUSTED", "{failure}");
    assert!(failure.message.contains("BadSignature"), "{failure}");
}

/// Guards against a downgrade by silence: a middlebox that swallows the TLS hello gets no second
/// connection and no plaintext. The same silence is told as such in every mode, in bounded time.
#[tokio::test]
async fn silence_ends_in_an_error_and_never_in_plaintext() {
    for (mode, expected) in [
        (SslMode::Preferred, "did not answer a TLS hello"),
        (SslMode::Required, "did not answer a TLS hello"),
        (SslMode::Disabled, "accepts connections and says nothing"),
    ] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let options = options(port, mode).with_timeout(Duration::from_secs(3));
        let (failure, first) = tokio::join!(refused(&options), async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let first = stream.read_u8().await.unwrap();
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.unwrap();
            first
        });
        assert!(failure.message.contains(expected), "{mode:?}: {failure}");
        assert_eq!(failure.mysql_error, Some(3862));
        assert_eq!(first == 0x16, mode != SslMode::Disabled, "{mode:?} sent {first:#x}");
        let second = tokio::time::timeout(Duration::from_millis(100), listener.accept()).await;
        assert!(second.is_err(), "{mode:?} tried again");
    }
}

/// A TLS server that is no Marcot: one that offers other protocols only, and one that knows nothing
/// of ALPN, whom HTTP/2 must not be spoken to.
#[tokio::test]
async fn a_tls_server_without_http2_is_told_as_such() {
    let pki = Pki::new();
    for alpn in [&["http/1.1"][..], &[]] {
        let tls = pki.foreign_server(&["127.0.0.1"], &rustls::version::TLS13, alpn);
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::clone(&tls.config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut inside = Vec::new();
            if let Ok(mut stream) = acceptor.accept(stream).await {
                // Ends without a TLS close; what came before it counts.
                drop(stream.read_to_end(&mut inside).await);
            }
            inside
        });
        let trusting = ClientTls { ca: Some(pki.ca()), ..ClientTls::default() };
        let failure = refused(&options(port, SslMode::Required).with_tls(trusting)).await;
        assert_eq!(failure.reason, "NO_HTTP2_PEER", "{alpn:?}: {failure}");
        assert_eq!(failure.metadata["donor_mysql_error"], "2026");
        assert_eq!(server.await.unwrap(), b"", "{alpn:?}");
    }
}

/// Guards the default of TLS 1.3 only, on both sides: TLS 1.2 comes about only where it was asked
/// for. With `Versions::Tls13` made to name both, the refused cases connect.
#[tokio::test]
async fn tls_1_2_is_spoken_only_when_asked_for() {
    let pki = Pki::new();
    let trusting = ClientTls { ca: Some(pki.ca()), ..ClientTls::default() };
    let old = pki.foreign_server(&["127.0.0.1"], &rustls::version::TLS12, &["h2"]);
    let old = Server::start(Some(old), None).await;
    let by_default = options(old.port(), SslMode::Required).with_tls(trusting.clone());
    assert_eq!(refused(&by_default).await.metadata["donor_mysql_error"], "2026");
    let both = by_default.with_tls_versions(Versions::Tls12AndTls13);
    let security = connect(&both).await.unwrap().security;
    assert!(security.cipher.starts_with("TLSv1.2 "), "{}", security.cipher);
    assert!(security.channel_binding.is_some());

    for (versions, taken) in [(Versions::Tls13, false), (Versions::Tls12AndTls13, true)] {
        let tls = pki.server_with(&["127.0.0.1"], versions);
        let server = Server::start(Some(tls), None).await;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(pki.ca_certificate()).unwrap();
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS12])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = tokio::net::TcpStream::connect(("127.0.0.1", server.port())).await.unwrap();
        let name = "127.0.0.1".try_into().unwrap();
        let handshake = tokio_rustls::TlsConnector::from(Arc::new(client)).connect(name, stream);
        assert_eq!(handshake.await.is_ok(), taken, "{versions:?}");
    }
}

#[tokio::test]
async fn a_fingerprint_file_reads_as_the_server_shows_it() {
    let pki = Pki::new();
    let (certificate, key) = pki.client();
    let server = marcot_common::tls::server::ServerTlsFiles::new(certificate.clone(), key.clone());
    let server = server.load().unwrap();
    assert_eq!(marcot_common::tls::fingerprint_of(&certificate).unwrap(), server.fingerprint);
    let error = marcot_common::tls::fingerprint_of(&key).unwrap_err().to_string();
    assert!(error.contains(&key.display().to_string()), "{error}");
}

/// Guards the rule that a channel is one connection: a lost one must not come back without its
/// log-in. With a connector that dials again, the second connection arrives.
#[tokio::test]
async fn a_lost_connection_stays_lost() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    let server = Server::start(None, None).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let options = options(port, SslMode::Disabled);
    let cut = CancellationToken::new();
    let (until_cut, server_port) = (cut.clone(), server.port());
    let forward = tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let far = tokio::net::TcpStream::connect(("127.0.0.1", server_port)).await;
        let mut far = far.unwrap();
        let forward = tokio::io::copy_bidirectional(&mut near, &mut far);
        drop(until_cut.run_until_cancelled(forward).await);
        listener
    });
    let mut client = HealthClient::new(connect(&options).await.unwrap().channel);
    let ask = || HealthCheckRequest { service: String::new() };
    client.check(ask()).await.unwrap();
    cut.cancel();
    let listener = forward.await.unwrap();
    for _ in 0..3 {
        client.check(ask()).await.unwrap_err();
    }
    let second = tokio::time::timeout(Duration::from_millis(200), listener.accept()).await;
    assert!(second.is_err(), "it dialled again");
}

/// Guards the one defined answer against a reset, which may overtake it on a real network: the
/// server goes on taking what the client still sends, until the client has closed. Without the
/// drain its socket is closed with bytes unread, and the write after the answer fails.
#[tokio::test]
async fn the_answer_of_a_server_without_tls_is_not_lost_to_a_reset() {
    let server = Server::start(None, None).await;
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", server.port())).await.unwrap();
    stream.write_all(&[0x16; 16 << 10]).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, NO_TLS_ANSWER);
    stream.write_all(&[0; 16 << 10]).await.unwrap();
}

#[tokio::test]
async fn what_is_neither_tls_nor_http2_is_closed_without_a_word() {
    let pki = Pki::new();
    for tls in [None, Some(pki.server(&["127.0.0.1"]))] {
        let server = Server::start(tls, None).await;
        for first in [0, b'G', 0x15, 0xff] {
            let address = ("127.0.0.1", server.port());
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            stream.write_u8(first).await.unwrap();
            let mut answer = Vec::new();
            // A reset is as good an end as a close: there is nothing to be lost.
            drop(stream.read_to_end(&mut answer).await);
            assert_eq!(answer, b"", "{first:#x}");
        }
    }
}

/// Guards the bound on a handshake: a client that says nothing, and one that stops in its hello, are
/// closed after 10 s of a clock that the test turns. Without the bound the wait of 60 s runs out.
#[tokio::test(start_paused = true)]
async fn a_client_that_stops_in_its_handshake_is_closed() {
    let pki = Pki::new();
    let server = Server::start(Some(pki.server(&["127.0.0.1"])), None).await;
    for said in [&b""[..], b"\x16\x03\x01"] {
        let begin = tokio::time::Instant::now();
        let mut stream =
            tokio::net::TcpStream::connect(("127.0.0.1", server.port())).await.unwrap();
        stream.write_all(said).await.unwrap();
        let mut answer = Vec::new();
        let closed = stream.read_to_end(&mut answer);
        let closed = tokio::time::timeout(Duration::from_secs(60), closed).await;
        assert!(closed.is_ok(), "still open: {said:?}");
        assert!(begin.elapsed() >= Duration::from_secs(10), "{:?}", begin.elapsed());
    }
}

#[tokio::test]
async fn a_server_knows_how_each_of_its_connections_is_protected() {
    let pki = Pki::new();
    let tls = Some(Arc::new(pki.server(&["127.0.0.1"]).into()));
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), tls).await.unwrap();
    let port = listener.local_address().unwrap().port();
    let stop = CancellationToken::new();
    let mut incoming = Box::pin(listener.incoming(stop.clone()));
    for (mode, cipher) in
        [(SslMode::Required, "TLSv1.3 AES_128_GCM_SHA256"), (SslMode::Disabled, "")]
    {
        let trusting = ClientTls { ca: Some(pki.ca()), ..ClientTls::default() };
        let client = tokio::spawn(async move {
            // Nobody serves the connection; it is the server's end that is looked at.
            drop(connect(&options(port, mode).with_tls(trusting)).await);
        });
        let connection = incoming.next().await.unwrap().unwrap().connect_info().0;
        assert_eq!(connection.cipher, cipher);
        assert_eq!(connection.encrypted(), mode == SslMode::Required);
        assert_eq!(connection.channel_binding.is_some(), connection.encrypted());
        client.await.unwrap();
    }
    stop.cancel();
}
