//! Calls on a recipient under test.

use std::time::Duration;

use marcot_proto::{
    common::v1::Failure,
    recipient::v1::{
        Clone, CloneLimits, CloneOptions, CloneStatementRequest, State, VerifyCloneRequest,
        WatchCloneRequest, recipient_service_client::RecipientServiceClient,
    },
};
use tonic::transport::Channel;

use crate::Recipient;

/// Longest clone that is waited for: 4 GiB at 100 Mbit/s take six minutes.
const END_MAX: Duration = Duration::from_secs(10 * 60);

/// A client of a recipient, in plaintext on loopback.
pub async fn recipient(recipient: &Recipient) -> RecipientServiceClient<Channel> {
    RecipientServiceClient::connect(format!("http://{}", recipient.0.address))
        .await
        .expect("the recipient takes calls")
}

/// Options of a clone that is still at its first files when somebody comes in between.
#[must_use]
pub fn slowly() -> CloneOptions {
    let limits = CloneLimits { data_bytes_per_second_max: Some(8 << 20), ..Default::default() };
    CloneOptions { limits: Some(limits), ..Default::default() }
}

/// Starts a clone by its statement; its name.
pub async fn begin(client: &mut RecipientServiceClient<Channel>, statement: &str) -> String {
    let request = CloneStatementRequest { statement: statement.to_owned(), ..Default::default() };
    let started = client.clone_statement(request).await.expect("the clone is accepted");
    started.into_inner().clone.expect("a clone").name
}

/// Starts a clone by its statement and waits for its end.
pub async fn clone_and_wait(
    client: &mut RecipientServiceClient<Channel>,
    statement: &str,
) -> Clone {
    let name = begin(client, statement).await;
    wait_for_end(client, &name).await
}

/// Waits for the end of a clone.
pub async fn wait_for_end(client: &mut RecipientServiceClient<Channel>, name: &str) -> Clone {
    let request = WatchCloneRequest { name: name.to_owned(), ..Default::default() };
    let mut stream = client.watch_clone(request).await.expect("the clone exists").into_inner();
    let mut last = None;
    let watch = async {
        while let Some(message) = stream.message().await.expect("the watch goes on") {
            last = message.clone;
        }
    };
    let ended = tokio::time::timeout(END_MAX, watch).await;
    assert!(ended.is_ok(), "a clone has not ended in {END_MAX:?}: {last:?}");
    last.expect("a watch sends the clone")
}

/// Reads a clone again; it must be as its certificate says.
pub async fn assert_intact(client: &mut RecipientServiceClient<Channel>, name: &str) {
    let request = VerifyCloneRequest { name: name.to_owned() };
    let found = client.verify_clone(request).await.expect("a clone has a certificate").into_inner();
    assert!(found.intact, "{found:?}");
}

/// Starts a clone that must not complete, and returns its error, whether it was refused at once or
/// failed later.
pub async fn clone_error(client: &mut RecipientServiceClient<Channel>, statement: &str) -> Failure {
    let request = CloneStatementRequest { statement: statement.to_owned(), ..Default::default() };
    error_of(client, request).await
}

/// As `clone_error`, with options.
pub async fn error_of(
    client: &mut RecipientServiceClient<Channel>,
    request: CloneStatementRequest,
) -> Failure {
    let statement = request.statement.clone();
    match client.clone_statement(request).await {
        Err(status) => marcot_common::failure::Failure::from_status(&status).to_wire(),
        Ok(started) => {
            let name = started.into_inner().clone.expect("a clone").name;
            let end = wait_for_end(client, &name).await;
            assert_eq!(end.state(), State::Failed, "{statement}: {end:?}");
            end.error.expect("a failed clone says why")
        }
    }
}
