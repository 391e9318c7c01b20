//! Log-ins and access over real sockets.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod support;

use std::{path::PathBuf, sync::Arc};

use marcot_common::{
    accounts::Accounts,
    connect::{ClientTls, ConnectOptions, DonorConnection, SslMode, connect},
    connection::{Identity, Privilege},
    failure::Failure,
    login::{CloneKey, log_in_with_key, log_in_with_password, server::KeyDirectory},
};
use marcot_proto::{
    auth::v1::{
        self as pb, auth_service_client::AuthServiceClient, log_in_request::Step as Request,
        log_in_response::Step as Response,
    },
    donor::v1::{GetServerInfoRequest, donor_service_client::DonorServiceClient},
};
use support::{Pki, Server};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use zeroize::Zeroizing;

const PASSWORD: &str = "correct horse battery staple";

struct Home {
    _directory: tempfile::TempDir,
    accounts: PathBuf,
}

fn accounts() -> Home {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("accounts.toml");
    let mut accounts = Accounts::open_or_create(&path).unwrap();
    accounts.add("clone", PASSWORD, &[Privilege::BackupAdmin]).unwrap();
    accounts.add("watch", PASSWORD, &[Privilege::Monitor]).unwrap();
    accounts.save().unwrap();
    Home { _directory: directory, accounts: path }
}

async fn plain(port: u16) -> DonorConnection {
    connect(&ConnectOptions::new("127.0.0.1", port, SslMode::Disabled)).await.unwrap()
}

async fn log_in(
    connection: &DonorConnection,
    user: &str,
    password: &str,
) -> Result<pb::LoggedIn, Failure> {
    let mut client = AuthServiceClient::new(connection.channel.clone());
    let password = Zeroizing::new(password.to_owned());
    log_in_with_password(&mut client, &connection.security, user, &password, None).await
}

/// Asks for something that needs BACKUP_ADMIN. The server has no donor service: a call that gets
/// past the access layer is UNIMPLEMENTED.
async fn ask(connection: &DonorConnection) -> Failure {
    let mut client = DonorServiceClient::new(connection.channel.clone());
    let status = client.get_server_info(GetServerInfoRequest {}).await.unwrap_err();
    Failure::from_status(&status)
}

const PASSED: tonic::Code = tonic::Code::Unimplemented;

/// Guards the access layer: made to let everything pass, the first and the last assertion fail.
#[tokio::test]
async fn a_log_in_opens_its_connection_and_no_other() {
    let home = accounts();
    let server = Server::start(None, Some(&home.accounts)).await;
    let connection = plain(server.port()).await;
    assert_eq!(ask(&connection).await.reason, "NOT_LOGGED_IN");
    let logged_in = log_in(&connection, "clone", PASSWORD).await.unwrap();
    assert_eq!(logged_in.privileges, ["BACKUP_ADMIN"]);
    assert_eq!(ask(&connection).await.code, PASSED);
    let other = plain(server.port()).await;
    assert_eq!(ask(&other).await.reason, "NOT_LOGGED_IN");
    let again = log_in(&connection, "clone", PASSWORD).await.unwrap_err();
    assert_eq!(again.reason, "ALREADY_LOGGED_IN");
}

#[tokio::test]
async fn a_missing_privilege_is_named() {
    let home = accounts();
    let server = Server::start(None, Some(&home.accounts)).await;
    let connection = plain(server.port()).await;
    log_in(&connection, "watch", PASSWORD).await.unwrap();
    let failure = ask(&connection).await;
    assert_eq!(failure.mysql_error, Some(1227));
    assert!(failure.message.contains("BACKUP_ADMIN"), "{failure}");
}

/// Guards against finding out who has an account: the answers are the same.
#[tokio::test]
async fn a_wrong_password_and_an_unknown_user_are_told_alike() {
    let home = accounts();
    let server = Server::start(None, Some(&home.accounts)).await;
    for (user, password) in [("clone", "wrong"), ("nobody", PASSWORD), ("clone", "")] {
        let connection = plain(server.port()).await;
        let failure = log_in(&connection, user, password).await.unwrap_err();
        assert_eq!(failure.mysql_error, Some(1045));
        assert_eq!(
            failure.message,
            format!("Access denied for user '{user}'; check user and password")
        );
        assert_eq!(ask(&connection).await.reason, "NOT_LOGGED_IN");
    }
}

#[tokio::test]
async fn a_server_without_accounts_asks_nobody() {
    let server = Server::start(None, None).await;
    let connection = plain(server.port()).await;
    assert_eq!(log_in(&connection, "x", "y").await.unwrap_err().reason, "NO_ACCOUNTS");
    assert_eq!(ask(&connection).await.code, PASSED);
}

/// A raw log-in, one message at a time.
struct Exchange {
    sender: mpsc::Sender<pb::LogInRequest>,
    answers: tonic::Streaming<pb::LogInResponse>,
}

impl Exchange {
    async fn begin(channel: &Channel, first: Request) -> Self {
        let (sender, receiver) = mpsc::channel(2);
        sender.send(pb::LogInRequest { step: Some(first) }).await.unwrap();
        let mut client = AuthServiceClient::new(channel.clone());
        let answers = client.log_in(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Self { sender, answers }
    }

    async fn answer(&mut self) -> Result<Response, Failure> {
        match self.answers.message().await {
            Ok(message) => Ok(message.unwrap().step.unwrap()),
            Err(status) => Err(Failure::from_status(&status)),
        }
    }

    async fn send(&self, step: Request) {
        self.sender.send(pb::LogInRequest { step: Some(step) }).await.unwrap();
    }
}

/// Guards against replay: a recorded exchange is of no use on another connection. The server's
/// fresh challenge is what makes it so.
#[tokio::test]
async fn a_recorded_log_in_cannot_be_replayed() {
    use opaque_ke::{ClientLogin, ClientLoginFinishParameters, CredentialResponse, Identifiers};
    let home = accounts();
    let server = Server::start(None, Some(&home.accounts)).await;
    // The client's own side, by hand, to record what it sends.
    struct Suite;
    impl opaque_ke::CipherSuite for Suite {
        type OprfCs = opaque_ke::Ristretto255;
        type KeyExchange = opaque_ke::TripleDh<opaque_ke::Ristretto255, sha2::Sha512>;
        type Ksf = argon2::Argon2<'static>;
    }
    let mut rng = rand::rngs::OsRng;
    let start = ClientLogin::<Suite>::start(&mut rng, PASSWORD.as_bytes()).unwrap();
    let first = Request::PasswordStart(pb::PasswordStart {
        user: "clone".to_owned(),
        credential_request: start.message.serialize().to_vec().into(),
        ..Default::default()
    });
    let connection = plain(server.port()).await;
    let mut exchange = Exchange::begin(&connection.channel, first.clone()).await;
    let Response::PasswordChallenge(challenge) = exchange.answer().await.unwrap() else { panic!() };
    let response =
        CredentialResponse::<Suite>::deserialize(&challenge.credential_response).unwrap();
    let parameters = ClientLoginFinishParameters::new(
        Some(b"marcot log-in v1\0"),
        Identifiers { client: None, server: None },
        None,
    );
    let finished = start.state.finish(&mut rng, PASSWORD.as_bytes(), response, parameters).unwrap();
    let last = Request::PasswordFinish(pb::PasswordFinish {
        credential_finalization: finished.message.serialize().to_vec().into(),
    });
    exchange.send(last.clone()).await;
    assert!(matches!(exchange.answer().await, Ok(Response::LoggedIn(_))));

    let thief = plain(server.port()).await;
    let mut replay = Exchange::begin(&thief.channel, first).await;
    replay.answer().await.unwrap();
    replay.send(last).await;
    assert_eq!(replay.answer().await.unwrap_err().reason, "ACCESS_DENIED");
    assert_eq!(ask(&thief).await.reason, "NOT_LOGGED_IN");
}

#[derive(Debug)]
struct OneKey([u8; 32]);

impl KeyDirectory for OneKey {
    fn find(&self, snapshot: &str) -> Option<([u8; 32], Identity)> {
        let identity = Identity {
            user: "clone".to_owned(),
            privileges: vec![Privilege::BackupAdmin],
            snapshot: None,
        };
        (snapshot == "snapshots/1").then_some((self.0, identity))
    }
}

/// Guards the proof of possession: with the signature's check made to say yes, the second and third
/// case log in.
#[tokio::test]
async fn a_clones_key_logs_in_for_its_own_snapshot_only() {
    let home = accounts();
    let key = CloneKey::generate().unwrap();
    let keys = Arc::new(OneKey(*key.public_key()));
    let pki = Pki::new();
    let tls = pki.server(&["127.0.0.1"]);
    let server = Server::start_with_keys(Some(tls), Some(&home.accounts), keys, false).await;
    let trusting = ClientTls { ca: Some(pki.ca()), ..ClientTls::default() };
    let other = CloneKey::generate().unwrap();
    for mode in [SslMode::Required, SslMode::Disabled] {
        for (snapshot, key, good) in [
            ("snapshots/1", &key, true),
            ("snapshots/1", &other, false),
            ("snapshots/2", &key, false),
        ] {
            let options = ConnectOptions::new("127.0.0.1", server.port(), mode);
            let connection = connect(&options.with_tls(trusting.clone())).await.unwrap();
            let mut client = AuthServiceClient::new(connection.channel.clone());
            let result = log_in_with_key(&mut client, &connection.security, snapshot, key).await;
            assert_eq!(result.is_ok(), good, "{mode:?} {snapshot}");
            let expected = if good { PASSED } else { tonic::Code::Unauthenticated };
            assert_eq!(ask(&connection).await.code, expected);
        }
    }
}

/// Guards a clone's key against who listens on plaintext: a proof that was recorded is of no use on another
/// connection, nor twice on one. The server's fresh nonce is what makes it so.
#[tokio::test]
async fn a_recorded_proof_of_a_clones_key_cannot_be_replayed() {
    let home = accounts();
    let key = CloneKey::generate().unwrap();
    let keys = Arc::new(OneKey(*key.public_key()));
    let server = Server::start_with_keys(None, Some(&home.accounts), keys, false).await;
    let first = Request::KeyStart(pb::KeyStart { snapshot: "snapshots/1".to_owned() });
    let connection = plain(server.port()).await;
    let mut exchange = Exchange::begin(&connection.channel, first.clone()).await;
    let Response::KeyChallenge(challenge) = exchange.answer().await.unwrap() else { panic!() };
    let nonce = <[u8; 32]>::try_from(&challenge.nonce[..]).unwrap();
    let message = [&b"marcot key log-in v1\0snapshots/1\0"[..], &nonce].concat();
    let pair = aws_lc_rs::signature::Ed25519KeyPair::from_seed_unchecked(key.seed()).unwrap();
    let signature = pair.sign(&message).as_ref().to_vec().into();
    let last = Request::KeyProof(pb::KeyProof { signature });
    exchange.send(last.clone()).await;
    assert!(matches!(exchange.answer().await, Ok(Response::LoggedIn(_))));

    let thief = plain(server.port()).await;
    for victim in [&thief, &connection] {
        let mut replay = Exchange::begin(&victim.channel, first.clone()).await;
        let Response::KeyChallenge(other) = replay.answer().await.unwrap() else { panic!() };
        assert_ne!(other.nonce, challenge.nonce);
        replay.send(last.clone()).await;
        assert_eq!(replay.answer().await.unwrap_err().reason, "ACCESS_DENIED");
    }
    assert_eq!(ask(&thief).await.reason, "NOT_LOGGED_IN");
}

/// Guards the channel binding: a proof that is made for one TLS connection is refused on another,
/// as when a middleman relays it. Without the binding in the signed message it is taken.
#[tokio::test]
async fn a_proof_for_another_tls_connection_is_refused() {
    let home = accounts();
    let key = CloneKey::generate().unwrap();
    let pki = Pki::new();
    let keys = Arc::new(OneKey(*key.public_key()));
    let tls = pki.server(&["127.0.0.1"]);
    let server = Server::start_with_keys(Some(tls), Some(&home.accounts), keys, false).await;
    let trusting = ClientTls { ca: Some(pki.ca()), ..ClientTls::default() };
    let options =
        ConnectOptions::new("127.0.0.1", server.port(), SslMode::Required).with_tls(trusting);
    let mine = connect(&options).await.unwrap();
    let relayed = connect(&options).await.unwrap();
    let mut client = AuthServiceClient::new(relayed.channel.clone());
    let result = log_in_with_key(&mut client, &mine.security, "snapshots/1", &key).await;
    assert_eq!(result.unwrap_err().reason, "ACCESS_DENIED");
}

/// Guards `--require-tls`: without its line in the policy, the plaintext call passes.
#[tokio::test]
async fn a_server_that_requires_tls_answers_plaintext_with_mysqls_number() {
    let pki = Pki::new();
    let tls = pki.server(&["127.0.0.1"]);
    let keys = Arc::new(OneKey([0; 32]));
    let server = Server::start_with_keys(Some(tls), None, keys, true).await;
    let connection = plain(server.port()).await;
    assert_eq!(ask(&connection).await.mysql_error, Some(3159));
    let trusting = ClientTls { ca: Some(pki.ca()), ..ClientTls::default() };
    let options = ConnectOptions::new("127.0.0.1", server.port(), SslMode::Required);
    let connection = connect(&options.with_tls(trusting)).await.unwrap();
    assert_eq!(ask(&connection).await.code, PASSED);
}

/// Guards the promise that a password never crosses the wire: all bytes of a plaintext log-in are
/// recorded, and neither the password nor its obvious encodings are among them.
#[tokio::test]
async fn a_password_is_not_among_the_bytes_of_a_plaintext_log_in() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let home = accounts();
    let server = Server::start(None, Some(&home.accounts)).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server_port = server.port();
    let tap = tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let upstream = tokio::net::TcpStream::connect(("127.0.0.1", server_port)).await.unwrap();
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = upstream.into_split();
        let up = async {
            let mut seen = Vec::new();
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = from_client.read(&mut buffer).await {
                seen.extend_from_slice(&buffer[..n]);
                to_server.write_all(&buffer[..n]).await.unwrap();
            }
            drop(to_server);
            seen
        };
        let down = async {
            let mut seen = Vec::new();
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
                seen.extend_from_slice(&buffer[..n]);
                if to_client.write_all(&buffer[..n]).await.is_err() {
                    break;
                }
            }
            seen
        };
        let (up, down) = tokio::join!(up, down);
        [up, down].concat()
    });
    let connection = plain(port).await;
    log_in(&connection, "clone", PASSWORD).await.unwrap();
    drop(connection);
    let seen = tap.await.unwrap();
    assert!(seen.windows(5).any(|w| w == b"clone"), "the tap has seen the exchange");
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, PASSWORD.as_bytes());
    for secret in [PASSWORD.as_bytes(), digest.as_ref()] {
        assert!(!seen.windows(secret.len()).any(|w| w == secret));
    }
}

/// Guards the channel binding in OPAQUE's context: the right password, relayed by a middleman from
/// one TLS connection onto another, logs nobody in. With `password_context` made to leave the
/// binding out, it does.
#[tokio::test]
async fn a_password_log_in_cannot_be_relayed_onto_another_tls_connection() {
    let home = accounts();
    let pki = Pki::new();
    let tls = pki.server(&["127.0.0.1"]);
    let server = Server::start(Some(tls), Some(&home.accounts)).await;
    let trusting = ClientTls { ca: Some(pki.ca()), ..ClientTls::default() };
    let options =
        ConnectOptions::new("127.0.0.1", server.port(), SslMode::Required).with_tls(trusting);
    let mine = connect(&options).await.unwrap();
    let relayed = connect(&options).await.unwrap();
    let mut client = AuthServiceClient::new(relayed.channel.clone());
    let password = Zeroizing::new(PASSWORD.to_owned());
    let result = log_in_with_password(&mut client, &mine.security, "clone", &password, None).await;
    assert_eq!(result.unwrap_err().reason, "ACCESS_DENIED");
    assert_eq!(ask(&relayed).await.reason, "NOT_LOGGED_IN");
    log_in(&mine, "clone", PASSWORD).await.unwrap();
}

fn key_start() -> Request {
    Request::KeyStart(pb::KeyStart { snapshot: "snapshots/1".to_owned() })
}

/// Guards the bound on log-ins under way. With 17 places instead of 16 the last one is let in.
#[tokio::test]
async fn a_log_in_too_many_is_told_when_to_come_again() {
    let home = accounts();
    let server = Server::start(None, Some(&home.accounts)).await;
    let connection = plain(server.port()).await;
    let other = plain(server.port()).await;
    let mut under_way = Vec::new();
    for _ in 0..16 {
        let mut exchange = Exchange::begin(&connection.channel, key_start()).await;
        // The challenge shows that the log-in has its place.
        exchange.answer().await.unwrap();
        under_way.push(exchange);
    }
    let failure = log_in(&other, "clone", PASSWORD).await.unwrap_err();
    assert_eq!(failure.code, tonic::Code::ResourceExhausted);
    assert_eq!(failure.reason, "TOO_MANY_LOG_INS");
    assert!(failure.retry_after.is_some());
    // A log-in that ends, if only by failing, gives its place back.
    let mut exchange = under_way.pop().unwrap();
    exchange.send(Request::KeyProof(pb::KeyProof { signature: vec![0; 64].into() })).await;
    assert_eq!(exchange.answer().await.unwrap_err().reason, "ACCESS_DENIED");
    log_in(&other, "clone", PASSWORD).await.unwrap();
}

/// Guards the bound on each step: a client that takes the challenge and falls silent is let go after
/// 10 s of a clock that the test turns, and its place with it.
#[tokio::test]
async fn a_log_in_that_falls_silent_is_ended() {
    let home = accounts();
    let server = Server::start(None, Some(&home.accounts)).await;
    let connection = plain(server.port()).await;
    let begin = tokio::time::Instant::now();
    let mut exchange = Exchange::begin(&connection.channel, key_start()).await;
    exchange.answer().await.unwrap();
    tokio::time::pause();
    let paused = tokio::time::Instant::now();
    let failure = exchange.answer().await.unwrap_err();
    assert_eq!(failure.code, tonic::Code::DeadlineExceeded, "{failure}");
    assert!(begin.elapsed().as_secs() >= 10, "{:?}", begin.elapsed());
    assert!(paused.elapsed().as_secs() < 15, "{:?}", paused.elapsed());
}

/// Messages out of turn and damaged ones are refused as such, and log nobody in.
#[tokio::test]
async fn messages_out_of_turn_are_refused() {
    let home = accounts();
    let server = Server::start(None, Some(&home.accounts)).await;
    let proof = Request::KeyProof(pb::KeyProof { signature: vec![0; 64].into() });
    let damaged = Request::PasswordStart(pb::PasswordStart {
        user: "clone".to_owned(),
        credential_request: vec![1; 7].into(),
        ..Default::default()
    });
    for first in [proof, damaged] {
        let connection = plain(server.port()).await;
        let mut exchange = Exchange::begin(&connection.channel, first).await;
        assert_eq!(exchange.answer().await.unwrap_err().code, tonic::Code::InvalidArgument);
        assert_eq!(ask(&connection).await.reason, "NOT_LOGGED_IN");
    }
}
