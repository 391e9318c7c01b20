//! Log-in to accounts of the donor's database: what the donor is given, and by which way.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod support;

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use marcot_common::{
    connect::{ClientTls, ConnectOptions, DonorConnection, SslMode, connect},
    connection::Privilege,
    failure::Failure,
    login::{DatabaseAccounts, Trust, log_in_with_password},
    tls::{Fingerprint, server::ServerTls},
};
use marcot_proto::auth::v1::{
    self as pb,
    auth_service_client::AuthServiceClient,
    auth_service_server::{AuthService, AuthServiceServer},
    database_password::Form,
    log_in_request::Step as Request,
    log_in_response::Step as Response,
};
use support::{Pki, Server};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use zeroize::Zeroizing;

const HOST: &str = "127.0.0.1";

/// A database that knows one user, and remembers what it was asked.
#[derive(Debug, Default)]
struct OneUser(Mutex<Vec<(String, String)>>);

impl OneUser {
    fn asked(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

impl DatabaseAccounts for OneUser {
    fn log_in(&self, user: &str, password: &str) -> Result<Vec<Privilege>, Failure> {
        self.0.lock().unwrap().push((user.to_owned(), password.to_owned()));
        if (user, password) == ("u", "pässword") {
            return Ok(vec![Privilege::BackupAdmin]);
        }
        let text = format!("Access denied for user '{user}'");
        Err(Failure::new(tonic::Code::Unauthenticated, "ACCESS_DENIED", text).mysql(1045))
    }
}

async fn start(tls: Option<ServerTls>) -> (Server, Arc<OneUser>) {
    let database = Arc::new(OneUser::default());
    let accounts = Arc::clone(&database) as Arc<dyn DatabaseAccounts>;
    (Server::start_with_database(tls, accounts).await, database)
}

async fn open(port: u16, mode: SslMode, tls: &ClientTls) -> DonorConnection {
    connect(&ConnectOptions::new(HOST, port, mode).with_tls(tls.clone())).await.unwrap()
}

async fn log_in(
    connection: &DonorConnection,
    tls: &ClientTls,
    password: &str,
) -> Result<pb::LoggedIn, Failure> {
    let mut client = AuthServiceClient::new(connection.channel.clone());
    let password = Zeroizing::new(password.to_owned());
    let trust = Some(Trust { host: HOST, tls });
    log_in_with_password(&mut client, &connection.security, "u", &password, trust).await
}

fn by_ca(pki: &Pki) -> ClientTls {
    ClientTls { ca: Some(pki.ca()), ..ClientTls::default() }
}

#[tokio::test]
async fn the_password_arrives_over_tls_and_sealed_on_plaintext() {
    let pki = Pki::new();
    let tls = pki.server(&[HOST]);
    let pinned = ClientTls { fingerprint: Some(tls.fingerprint), ..ClientTls::default() };
    let (server, database) = start(Some(tls)).await;
    for mode in [SslMode::Required, SslMode::Disabled] {
        for trust in [&by_ca(&pki), &pinned] {
            let connection = open(server.port(), mode, trust).await;
            let logged_in = log_in(&connection, trust, "pässword").await.unwrap();
            assert_eq!(logged_in.privileges, ["BACKUP_ADMIN"]);
            let again = open(server.port(), mode, trust).await;
            let failure = log_in(&again, trust, "wrong").await.unwrap_err();
            assert_eq!(
                (failure.reason.as_ref(), failure.mysql_error),
                ("ACCESS_DENIED", Some(1045))
            );
        }
    }
    assert_eq!(database.asked(), 8);
}

/// Guards the password against a donor that was taken over: it chooses how its callers log in, and
/// without `not_allowed` it need only ask. Over TLS, by a certificate that is believed, and sealed.
#[tokio::test]
async fn a_donor_that_asks_for_the_password_itself_gets_nothing_unless_that_is_allowed() {
    let pki = Pki::new();
    let (server, database) = start(Some(pki.server(&[HOST]))).await;
    let believes = by_ca(&pki);
    let plaintext = open(server.port(), SslMode::Disabled, &believes).await;
    let challenge = Exchange::begin(&plaintext).await.challenge;
    let attacker = Attacker::new(Script::Shows(challenge));
    let got = Arc::clone(&attacker.got);
    let middle = Server::start_log_in(AuthServiceServer::new(attacker)).await;
    for (port, mode) in [
        (server.port(), SslMode::Required),
        (server.port(), SslMode::Disabled),
        (middle.port(), SslMode::Disabled),
    ] {
        let connection = open(port, mode, &believes).await;
        let mut client = AuthServiceClient::new(connection.channel.clone());
        let password = Zeroizing::new("pässword".to_owned());
        let refused =
            log_in_with_password(&mut client, &connection.security, "u", &password, None).await;
        let failure = refused.unwrap_err();
        assert_eq!(failure.reason, "DATABASE_ACCOUNTS_NOT_ALLOWED", "{failure}");
        assert!(failure.message.contains("--allow-database-accounts"), "{failure}");
    }
    assert_eq!(database.asked(), 0);
    assert_eq!(*got.lock().unwrap(), None);
}

/// Guards the key that a password is sealed to: unknown, of another CA, name or fingerprint, or
/// none, and the password does not leave. With `verify` made to say yes, the strangers get it.
#[tokio::test]
async fn the_password_goes_to_no_key_that_is_not_believed() {
    let pki = Pki::new();
    let (server, database) = start(Some(pki.server(&[HOST]))).await;
    let (other_name, other_database) = start(Some(pki.server(&["db.example"]))).await;
    let (expired, expired_database) = start(Some(pki.expired_server(&[HOST]))).await;
    let (without, without_database) = start(None).await;
    let stranger = ClientTls { ca: Some(Pki::new().ca_kept()), ..ClientTls::default() };
    let print = ClientTls { fingerprint: Some(Fingerprint([7; 32])), ..ClientTls::default() };
    for (server, trust, reason) in [
        (&server, &ClientTls::default(), "PASSWORD_NOT_SENT"),
        (&server, &stranger, "CERTIFICATE_NOT_TRUSTED"),
        (&server, &print, "CERTIFICATE_NOT_TRUSTED"),
        (&other_name, &by_ca(&pki), "CERTIFICATE_NOT_TRUSTED"),
        (&expired, &by_ca(&pki), "CERTIFICATE_NOT_TRUSTED"),
        (&without, &by_ca(&pki), "PASSWORD_NOT_SENT"),
    ] {
        let connection = open(server.port(), SslMode::Disabled, trust).await;
        let failure = log_in(&connection, trust, "pässword").await.unwrap_err();
        assert_eq!(failure.reason, reason, "{failure}");
    }
    for database in [database, other_database, expired_database, without_database] {
        assert_eq!(database.asked(), 0);
    }
}

/// A caller on a plaintext connection that is free in what it sends.
struct Exchange {
    sender: mpsc::Sender<pb::LogInRequest>,
    answers: tonic::Streaming<pb::LogInResponse>,
    challenge: pb::DatabaseChallenge,
}

impl Exchange {
    async fn begin(connection: &DonorConnection) -> Self {
        let start = Request::PasswordStart(pb::PasswordStart {
            user: "u".to_owned(),
            credential_request: Bytes::new(),
            nonce: vec![7; 32].into(),
        });
        Self::begin_with(connection, pb::LogInRequest { step: Some(start) }).await
    }

    async fn begin_with(connection: &DonorConnection, first: pb::LogInRequest) -> Self {
        let (sender, receiver) = mpsc::channel(2);
        sender.send(first).await.unwrap();
        let mut client = AuthServiceClient::new(connection.channel.clone());
        let answers = client.log_in(ReceiverStream::new(receiver)).await.unwrap();
        let mut answers = answers.into_inner();
        let first = answers.message().await.unwrap().unwrap();
        let Some(Response::DatabaseChallenge(challenge)) = first.step else {
            panic!("{first:?}");
        };
        Self { sender, answers, challenge }
    }

    async fn answer(mut self, form: Form) -> Failure {
        let password = Request::DatabasePassword(pb::DatabasePassword { form: Some(form) });
        self.sender.send(pb::LogInRequest { step: Some(password) }).await.unwrap();
        Failure::from_status(&self.answers.message().await.unwrap_err())
    }
}

/// A server of an attacker between client and donor.
#[derive(Debug, Clone)]
struct Attacker {
    script: Script,
    /// What the client has answered.
    got: Arc<Mutex<Option<Form>>>,
}

#[derive(Debug, Clone)]
enum Script {
    /// Shows a challenge that was recorded.
    Shows(pb::DatabaseChallenge),
    /// Has the donor on that port make one, and passes all on.
    Relays(u16),
}

impl Attacker {
    fn new(script: Script) -> Self {
        Self { script, got: Arc::default() }
    }
}

type Answers = ReceiverStream<Result<pb::LogInResponse, tonic::Status>>;

#[tonic::async_trait]
impl AuthService for Attacker {
    type LogInStream = Answers;

    async fn log_in(
        &self,
        request: tonic::Request<tonic::Streaming<pb::LogInRequest>>,
    ) -> Result<tonic::Response<Answers>, tonic::Status> {
        let (sender, receiver) = mpsc::channel(2);
        let (this, mut requests) = (self.clone(), request.into_inner());
        tokio::spawn(async move {
            let first = requests.message().await.unwrap().unwrap();
            let (challenge, mut donor) = match this.script {
                Script::Shows(challenge) => (challenge, None),
                Script::Relays(port) => {
                    let connection = open(port, SslMode::Disabled, &ClientTls::default()).await;
                    let exchange = Exchange::begin_with(&connection, first).await;
                    (exchange.challenge.clone(), Some((exchange, connection)))
                }
            };
            let step = Some(Response::DatabaseChallenge(challenge));
            sender.send(Ok(pb::LogInResponse { step })).await.unwrap();
            let Ok(Some(message)) = requests.message().await else { return };
            let Some(Request::DatabasePassword(password)) = message.step else { return };
            this.got.lock().unwrap().clone_from(&password.form);
            if let Some((exchange, _)) = &mut donor {
                let step = Some(Request::DatabasePassword(password));
                exchange.sender.send(pb::LogInRequest { step }).await.unwrap();
                let answer = exchange.answers.message().await.unwrap().unwrap();
                sender.send(Ok(answer)).await.unwrap();
            }
        });
        Ok(tonic::Response::new(ReceiverStream::new(receiver)))
    }
}

/// Guards the signature over both nonces and the key: a challenge that was recorded, with the donor's
/// own key or with the attacker's in its place, gets no password from another client.
#[tokio::test]
async fn a_recorded_challenge_gets_nothing_from_another_log_in() {
    let pki = Pki::new();
    let (server, _) = start(Some(pki.server(&[HOST]))).await;
    let connection = open(server.port(), SslMode::Disabled, &by_ca(&pki)).await;
    let recorded = Exchange::begin(&connection).await.challenge;
    let changed = pb::DatabaseChallenge { public_key: vec![9; 32].into(), ..recorded.clone() };
    for challenge in [recorded, changed] {
        let attacker = Attacker::new(Script::Shows(challenge));
        let got = Arc::clone(&attacker.got);
        let middle = Server::start_log_in(AuthServiceServer::new(attacker)).await;
        let connection = open(middle.port(), SslMode::Disabled, &by_ca(&pki)).await;
        let failure = log_in(&connection, &by_ca(&pki), "pässword").await.unwrap_err();
        assert_eq!(failure.reason, "CERTIFICATE_NOT_TRUSTED", "{failure}");
        assert!(failure.message.contains("its signature is wrong"), "{failure}");
        assert_eq!(*got.lock().unwrap(), None);
    }
}

/// Guards against a replay: a sealed password that was recorded opens nothing in another log-in,
/// for its key is gone. The database is not asked.
#[tokio::test]
async fn a_recorded_password_opens_nothing_and_one_in_clear_is_not_used() {
    let pki = Pki::new();
    let (server, database) = start(Some(pki.server(&[HOST]))).await;
    let attacker = Attacker::new(Script::Relays(server.port()));
    let got = Arc::clone(&attacker.got);
    let middle = Server::start_log_in(AuthServiceServer::new(attacker)).await;
    let connection = open(middle.port(), SslMode::Disabled, &by_ca(&pki)).await;
    // Without TLS a middleman can have the log-in for himself, but not the password.
    log_in(&connection, &by_ca(&pki), "pässword").await.unwrap();
    let asked = database.asked();
    let Some(Form::Sealed(recorded)) = got.lock().unwrap().clone() else { panic!("it is sealed") };
    assert_eq!(recorded.ciphertext.len(), 514 + 16, "one length for all passwords");
    let connection = open(server.port(), SslMode::Disabled, &by_ca(&pki)).await;
    let exchange = Exchange::begin(&connection).await;
    assert_eq!(exchange.answer(Form::Sealed(recorded)).await.reason, "BAD_LOG_IN");
    let connection = open(server.port(), SslMode::Disabled, &by_ca(&pki)).await;
    let exchange = Exchange::begin(&connection).await;
    let failure = exchange.answer(Form::Password("pässword".to_owned())).await;
    assert_eq!(failure.reason, "SECRET_IN_CLEAR", "{failure}");
    assert_eq!(database.asked(), asked);
}
