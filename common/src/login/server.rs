//! The server's side of a log-in.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use marcot_proto::auth::v1::{
    self as pb, auth_service_server::AuthService, log_in_request::Step as Request,
    log_in_response::Step as Response,
};
use opaque_ke::{CredentialFinalization, CredentialRequest, ServerLogin, ServerLoginParameters};
use rand::{RngCore as _, rngs::OsRng};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::{
    LOG_IN_MESSAGE_BYTES_MAX,
    database::{Challenge, DatabaseAccounts, PASSWORD_BYTES_MAX},
    guesses::{Attempt, Guesses},
    identifiers, key_message, password_context, signature_is_right,
};
use crate::{
    access,
    accounts::{AccountsFile, NAME_BYTES_MAX, Suite},
    connection::{Connection, Identity, Privilege},
    failure::Failure,
    tls::server::ReloadedTls,
};

/// Longest wait for each of the client's messages.
const STEP_MAX: Duration = Duration::from_secs(10);

/// Most log-ins at one time: each costs a core some 0.2 ms, and holds some KiB. One peer has no
/// more than 16 of them (`guesses`).
pub(crate) const LOG_INS_MAX: usize = 256;

/// Most database log-ins at one time: each is a connection to the donor's server and a thread.
const DATABASE_LOG_INS_MAX: usize = 16;

/// Longest database log-in; the server drops one that is not done in 10 s (connect_timeout).
const DATABASE_MAX: Duration = Duration::from_secs(20);

/// How long a failed log-in waits for its answer, so that guessing on one connection is slow.
const FAILURE_DELAY: Duration = Duration::from_millis(250);

/// Where the server finds the key that a snapshot is bound to.
pub trait KeyDirectory: std::fmt::Debug + Send + Sync {
    /// Whether there can be any.
    fn has_keys(&self) -> bool {
        true
    }

    /// The snapshot's key, and who opened it.
    fn find(&self, snapshot: &str) -> Option<([u8; 32], Identity)>;
}

/// A server without snapshots.
#[derive(Debug)]
pub struct NoKeys;

impl KeyDirectory for NoKeys {
    fn has_keys(&self) -> bool {
        false
    }

    fn find(&self, _: &str) -> Option<([u8; 32], Identity)> {
        None
    }
}

/// Serves log-ins.
#[derive(Debug, Clone)]
pub struct LogInService {
    accounts: Option<Arc<AccountsFile>>,
    database: Option<Database>,
    keys: Arc<dyn KeyDirectory>,
    places: Arc<Semaphore>,
    guesses: Guesses,
}

/// The accounts of the donor's database.
#[derive(Debug, Clone)]
pub struct Database {
    /// Where they are.
    pub accounts: Arc<dyn DatabaseAccounts>,
    /// Whose key signs for plaintext connections.
    pub tls: Option<Arc<ReloadedTls>>,
    places: Arc<Semaphore>,
}

impl Database {
    /// Accounts, and whose key signs for plaintext connections.
    #[must_use]
    pub fn new(accounts: Arc<dyn DatabaseAccounts>, tls: Option<Arc<ReloadedTls>>) -> Self {
        Self { accounts, tls, places: Arc::new(Semaphore::new(DATABASE_LOG_INS_MAX)) }
    }

    async fn log_in(
        &self,
        user: &str,
        password: Zeroizing<String>,
    ) -> Result<Vec<Privilege>, Failure> {
        let late = || {
            let text = "the donor's database has not answered a log-in in time";
            Failure::new(Code::Unavailable, "DATABASE_UNREACHABLE", text).mysql(2013)
        };
        let place = Arc::clone(&self.places).acquire_owned();
        let place = tokio::time::timeout(DATABASE_MAX, place).await.map_err(|_| late())?;
        let (accounts, user) = (Arc::clone(&self.accounts), user.to_owned());
        let checked = tokio::task::spawn_blocking(move || {
            let _place = place;
            accounts.log_in(&user, &password)
        });
        let checked = tokio::time::timeout(DATABASE_MAX, checked).await.map_err(|_| late())?;
        checked.map_err(|e| Failure::bug(format!("a database log-in stopped: {e}")))?
    }
}

impl LogInService {
    /// Without an accounts file nobody logs in by password.
    #[must_use]
    pub fn new(accounts: Option<Arc<AccountsFile>>, keys: Arc<dyn KeyDirectory>) -> Self {
        let places = Arc::new(Semaphore::new(LOG_INS_MAX));
        Self { accounts, database: None, keys, places, guesses: Guesses::default() }
    }

    /// The same, with accounts of the donor's database instead of a file's.
    #[must_use]
    pub fn with_database(self, database: Option<Database>) -> Self {
        Self { database, ..self }
    }

    fn takes_passwords(&self) -> bool {
        self.accounts.is_some() || self.database.is_some()
    }

    async fn log_in(
        &self,
        connection: &Connection,
        attempt: &Attempt,
        requests: &mut Streaming<pb::LogInRequest>,
        answers: &Answers,
    ) -> Result<pb::LoggedIn, Failure> {
        let identity = match next(requests).await? {
            Request::PasswordStart(start) => {
                if !self.takes_passwords() {
                    return Err(no_accounts());
                }
                attempt.check_password_allowed()?;
                let result = match &self.database {
                    Some(database) => {
                        by_database(database, connection, start, requests, answers).await
                    }
                    None => self.by_password(connection, start, requests, answers).await,
                };
                result.inspect_err(|failure| {
                    if !is_no_guess(failure) {
                        attempt.failed();
                    }
                })?
            }
            Request::KeyStart(start) => self.by_key(connection, start, requests, answers).await?,
            _ => return Err(unexpected()),
        };
        let logged_in = pb::LoggedIn {
            user: identity.user.clone(),
            privileges: identity.privileges.iter().map(ToString::to_string).collect(),
        };
        if !connection.log_in(identity) {
            return Err(Failure::precondition(
                "ALREADY_LOGGED_IN",
                "this connection has been logged in before; open another one",
            ));
        }
        Ok(logged_in)
    }

    async fn by_password(
        &self,
        connection: &Connection,
        start: pb::PasswordStart,
        requests: &mut Streaming<pb::LogInRequest>,
        answers: &Answers,
    ) -> Result<Identity, Failure> {
        let accounts = self.accounts.as_ref().ok_or_else(no_accounts)?;
        let user = checked_user(start.user)?;
        let accounts = accounts.current().map_err(|e| {
            warn!(error = %e, "the accounts file cannot be read; nobody can log in");
            Failure::new(Code::Unavailable, "ACCOUNTS_UNREADABLE", "nobody can log in at present")
        })?;
        let request = CredentialRequest::<Suite>::deserialize(&start.credential_request)
            .map_err(|_| unexpected())?;
        let context = password_context(connection.channel_binding.as_ref());
        let parameters =
            || ServerLoginParameters { context: Some(&context), identifiers: identifiers() };
        // Without a verifier OPAQUE answers as for a user that exists.
        let started = ServerLogin::<Suite>::start(
            &mut OsRng,
            accounts.setup(),
            accounts.verifier(&user),
            request,
            user.as_bytes(),
            parameters(),
        )
        .map_err(|_| unexpected())?;
        let challenge = pb::PasswordChallenge {
            credential_response: Bytes::copy_from_slice(&started.message.serialize()),
        };
        answers.send(Response::PasswordChallenge(challenge)).await?;
        let finish = match next(requests).await {
            Ok(Request::PasswordFinish(finish)) => finish,
            Ok(_) => return Err(unexpected()),
            // A client that finds its password wrong breaks off here.
            Err(failure) => {
                info!(user, peer = %connection.peer, "log-in failed");
                return Err(failure);
            }
        };
        let finalization =
            CredentialFinalization::<Suite>::deserialize(&finish.credential_finalization)
                .map_err(|_| denied(&user))?;
        started.state.finish(finalization, parameters()).map_err(|_| denied(&user))?;
        let privileges = accounts.privileges(&user).ok_or_else(|| denied(&user))?;
        Ok(Identity { user, privileges, snapshot: None })
    }

    async fn by_key(
        &self,
        connection: &Connection,
        start: pb::KeyStart,
        requests: &mut Streaming<pb::LogInRequest>,
        answers: &Answers,
    ) -> Result<Identity, Failure> {
        let mut nonce = [0; 32];
        OsRng.fill_bytes(&mut nonce);
        let challenge = pb::KeyChallenge { nonce: Bytes::copy_from_slice(&nonce) };
        answers.send(Response::KeyChallenge(challenge)).await?;
        let Request::KeyProof(proof) = next(requests).await? else {
            return Err(unexpected());
        };
        let message = key_message(&start.snapshot, &nonce, connection.channel_binding.as_ref());
        let found = self.keys.find(&start.snapshot);
        found
            .filter(|(key, _)| signature_is_right(key, &message, &proof.signature))
            .map(|(_, identity)| Identity { snapshot: Some(start.snapshot), ..identity })
            .ok_or_else(|| denied("the clone's key"))
    }
}

/// The password goes to the donor's database, which says whether it is right.
async fn by_database(
    database: &Database,
    connection: &Connection,
    start: pb::PasswordStart,
    requests: &mut Streaming<pb::LogInRequest>,
    answers: &Answers,
) -> Result<Identity, Failure> {
    let user = checked_user(start.user)?;
    let tls = database.tls.as_ref().filter(|_| !connection.encrypted()).map(|tls| tls.current());
    let certified = tls.as_ref().map(|tls| &*tls.certified);
    let mut challenge = Challenge::new(&user, &start.nonce, certified)?;
    let message = std::mem::take(&mut challenge.message);
    answers.send(Response::DatabaseChallenge(message)).await?;
    let Request::DatabasePassword(answer) = next(requests).await? else {
        return Err(unexpected());
    };
    let password = challenge.open(answer, connection.encrypted())?;
    // An account without a password lets everybody in.
    if password.is_empty() || password.len() > PASSWORD_BYTES_MAX || password.contains('\0') {
        return Err(denied(&user));
    }
    let privileges = database.log_in(&user, password).await?;
    Ok(Identity { user, privileges, snapshot: None })
}

fn checked_user(user: String) -> Result<String, Failure> {
    if user.is_empty() || user.len() > NAME_BYTES_MAX || user.chars().any(char::is_control) {
        return Err(Failure::invalid("BAD_USER", "the user's name is no account name"));
    }
    Ok(user)
}

/// What says nothing of a password that was wrong.
fn is_no_guess(failure: &Failure) -> bool {
    let reasons = [
        "ACCOUNTS_UNREADABLE",
        "ACCOUNT_LOCKED",
        "ACCOUNT_WITHOUT_PASSWORD",
        "BUG",
        "DATABASE_ERROR",
        "DATABASE_LOST",
        "DATABASE_UNREACHABLE",
        "PASSWORD_EXPIRED",
        "PRIVILEGE_REQUIRED",
    ];
    reasons.contains(&failure.reason.as_ref())
}

#[tonic::async_trait]
impl AuthService for LogInService {
    type LogInStream = ReceiverStream<Result<pb::LogInResponse, Status>>;

    async fn log_in(
        &self,
        request: tonic::Request<Streaming<pb::LogInRequest>>,
    ) -> Result<tonic::Response<Self::LogInStream>, Status> {
        if !self.takes_passwords() && !self.keys.has_keys() {
            return Err(no_accounts().into());
        }
        let connection = access::connection(request.extensions())
            .ok_or_else(|| Failure::bug("a call without its connection"))?;
        let attempt = self.guesses.begin(connection.peer.ip())?;
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            let text = format!("{LOG_INS_MAX} log-ins are under way");
            Failure::new(Code::ResourceExhausted, "TOO_MANY_LOG_INS", text)
                .retry_after(Duration::from_secs(1))
        })?;
        let mut requests = request.into_inner();
        let (sender, receiver) = mpsc::channel(2);
        let (service, answers) = (self.clone(), Answers(sender));
        tokio::spawn(async move {
            let _place: OwnedSemaphorePermit = place;
            match service.log_in(&connection, &attempt, &mut requests, &answers).await {
                Ok(logged_in) => {
                    info!(user = %logged_in.user, peer = %connection.peer, "logged in");
                    drop(answers.send(Response::LoggedIn(logged_in)).await);
                }
                // Every clone from a server without accounts hears this first.
                Err(failure) if failure.reason == "NO_ACCOUNTS" => {
                    drop(answers.0.send(Err(failure.to_status())).await);
                }
                Err(failure) => {
                    info!(peer = %connection.peer, reason = %failure.reason, "log-in refused");
                    tokio::time::sleep(FAILURE_DELAY).await;
                    drop(answers.0.send(Err(failure.to_status())).await);
                }
            }
        });
        Ok(tonic::Response::new(ReceiverStream::new(receiver)))
    }
}

struct Answers(mpsc::Sender<Result<pb::LogInResponse, Status>>);

impl Answers {
    async fn send(&self, step: Response) -> Result<(), Failure> {
        let sent = self.0.send(Ok(pb::LogInResponse { step: Some(step) })).await;
        sent.map_err(|_| Failure::new(Code::Cancelled, "CALLER_GONE", "the caller has gone"))
    }
}

async fn next(requests: &mut Streaming<pb::LogInRequest>) -> Result<Request, Failure> {
    let message = tokio::time::timeout(STEP_MAX, requests.message()).await.map_err(|_| {
        let text = format!("log-in: no message for {} s", STEP_MAX.as_secs());
        Failure::new(Code::DeadlineExceeded, "LOG_IN_TIMEOUT", text)
    })?;
    let message = message.map_err(|status| match status.code() {
        // So our own side calls what is larger than it may be.
        Code::OutOfRange => {
            let text = format!("log-in: a message of more than {LOG_IN_MESSAGE_BYTES_MAX} bytes");
            Failure::new(Code::ResourceExhausted, "REQUEST_TOO_LARGE", text)
        }
        _ => Failure::from_status(&status),
    })?;
    message.and_then(|message| message.step).ok_or_else(unexpected)
}

fn unexpected() -> Failure {
    Failure::invalid("BAD_LOG_IN", "log-in: another message than the one awaited, or a damaged one")
}

fn no_accounts() -> Failure {
    Failure::precondition("NO_ACCOUNTS", "this server has no accounts; nobody has to log in")
}

fn denied(user: &str) -> Failure {
    let text = format!("Access denied for user '{user}'; check user and password");
    Failure::new(Code::Unauthenticated, "ACCESS_DENIED", text).mysql(1045)
}
