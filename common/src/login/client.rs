//! The client's side of a log-in.

use std::time::Duration;

use bytes::Bytes;
use marcot_proto::auth::v1::{
    self as pb, auth_service_client::AuthServiceClient, log_in_request::Step as Asked,
    log_in_response::Step as Response,
};
use opaque_ke::{ClientLogin, ClientLoginFinishParameters, CredentialResponse};
use rand::rngs::OsRng;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming, transport::Channel};
use zeroize::Zeroizing;

use super::{
    CloneKey, Trust,
    database::{self, random},
    identifiers, key_message, password_context,
};
use crate::{
    accounts::Suite, connect::Security, failure::Failure, telemetry::propagation::inject_current,
};

/// Longest wait for each of the server's messages: one that asks its database waits for a place there, and
/// then for the answer, 20 s each.
const STEP_MAX: Duration = Duration::from_secs(45);

/// Logs a connection in by password. `NO_ACCOUNTS` means that the server asks nobody to log in.
/// With `trust` it may be the password of an account of the donor's database, which is given it; without,
/// a server that asks for the password itself gets nothing.
pub async fn log_in_with_password(
    client: &mut AuthServiceClient<Channel>,
    security: &Security,
    user: &str,
    password: &Zeroizing<String>,
    trust: Option<Trust<'_>>,
) -> Result<pb::LoggedIn, Failure> {
    let nonce = random()?;
    let start = ClientLogin::<Suite>::start(&mut OsRng, password.as_bytes())
        .map_err(|e| Failure::bug(format!("OPAQUE start: {e}")))?;
    let first = Asked::PasswordStart(pb::PasswordStart {
        user: user.to_owned(),
        credential_request: Bytes::copy_from_slice(&start.message.serialize()),
        nonce: Bytes::copy_from_slice(&nonce),
    });
    let (sender, mut answers) = begin(client, first).await?;
    let challenge = match next(&mut answers).await? {
        Response::PasswordChallenge(challenge) => challenge,
        Response::DatabaseChallenge(challenge) => {
            let trust = trust.ok_or_else(database::not_allowed)?;
            let last = database::answer(&challenge, user, password, &nonce, security, trust)?;
            return finish(sender, last, &mut answers).await;
        }
        _ => return Err(unexpected()),
    };
    let response = CredentialResponse::<Suite>::deserialize(&challenge.credential_response)
        .map_err(|_| unexpected())?;
    let context = password_context(security.channel_binding.as_ref());
    let password = password.clone();
    // Argon2id takes some 20 ms and 19 MiB on purpose: not on a thread that serves others.
    let finished = tokio::task::spawn_blocking(move || {
        let parameters = ClientLoginFinishParameters::new(Some(&context), identifiers(), None);
        start.state.finish(&mut OsRng, password.as_bytes(), response, parameters)
    })
    .await
    .map_err(|e| Failure::bug(format!("OPAQUE finish: {e}")))?;
    // The client finds a wrong password first; the server says the same of an unknown user.
    let finished = finished.map_err(|_| denied(user))?;
    let last = Asked::PasswordFinish(pb::PasswordFinish {
        credential_finalization: Bytes::copy_from_slice(&finished.message.serialize()),
    });
    finish(sender, last, &mut answers).await
}

/// Logs a connection in by a clone's key.
pub async fn log_in_with_key(
    client: &mut AuthServiceClient<Channel>,
    security: &Security,
    snapshot: &str,
    key: &CloneKey,
) -> Result<pb::LoggedIn, Failure> {
    let first = Asked::KeyStart(pb::KeyStart { snapshot: snapshot.to_owned() });
    let (sender, mut answers) = begin(client, first).await?;
    let Response::KeyChallenge(challenge) = next(&mut answers).await? else {
        return Err(unexpected());
    };
    let nonce = <[u8; 32]>::try_from(&challenge.nonce[..]).map_err(|_| unexpected())?;
    let message = key_message(snapshot, &nonce, security.channel_binding.as_ref());
    let last = Asked::KeyProof(pb::KeyProof { signature: key.sign(&message).into() });
    finish(sender, last, &mut answers).await
}

type Sender = mpsc::Sender<pb::LogInRequest>;

async fn begin(
    client: &mut AuthServiceClient<Channel>,
    first: Asked,
) -> Result<(Sender, Streaming<pb::LogInResponse>), Failure> {
    // Two messages in all; the second one must not wait for the first one to be read.
    let (sender, receiver) = mpsc::channel(2);
    send(&sender, first).await?;
    let mut request = Request::new(ReceiverStream::new(receiver));
    inject_current(request.metadata_mut());
    let answers = in_time(client.log_in(request)).await?;
    Ok((sender, answers.into_inner()))
}

/// An answer of the server, which may be silent for as long as it likes otherwise.
async fn in_time<T>(answer: impl Future<Output = Result<T, Status>>) -> Result<T, Failure> {
    match tokio::time::timeout(STEP_MAX, answer).await {
        Ok(answer) => answer.map_err(|status| Failure::from_status(&status)),
        Err(_) => {
            let text = format!("log-in: no answer for {} s", STEP_MAX.as_secs());
            Err(Failure::new(Code::DeadlineExceeded, "LOG_IN_TIMEOUT", text).mysql(1159))
        }
    }
}

async fn send(sender: &Sender, step: Asked) -> Result<(), Failure> {
    let sent = sender.send(pb::LogInRequest { step: Some(step) }).await;
    sent.map_err(|_| Failure::new(Code::Unavailable, "PEER_UNREACHABLE", "the log-in was cut off"))
}

async fn next(answers: &mut Streaming<pb::LogInResponse>) -> Result<Response, Failure> {
    let message = in_time(answers.message()).await?;
    message.and_then(|message| message.step).ok_or_else(unexpected)
}

async fn finish(
    sender: Sender,
    last: Asked,
    answers: &mut Streaming<pb::LogInResponse>,
) -> Result<pb::LoggedIn, Failure> {
    send(&sender, last).await?;
    match next(answers).await? {
        Response::LoggedIn(logged_in) => Ok(logged_in),
        _ => Err(unexpected()),
    }
}

fn unexpected() -> Failure {
    Failure::peer_misbehaved("log-in: the server sent another message than the one awaited")
}

/// MySQL's text for the same case.
fn denied(user: &str) -> Failure {
    Failure::new(
        Code::Unauthenticated,
        "ACCESS_DENIED",
        format!("Access denied for user '{user}'; check user and password"),
    )
    .mysql(1045)
}
