//! What handlers take of a connection that others may listen to.

use std::net::SocketAddr;

use marcot_common::connection::{Connection, ConnectionInfo};
use marcot_proto::recipient::v1::validate_clone_request::Request as Kind;

use super::*;
use crate::{server_control::Unmanaged, settings::Settings};

fn on<T>(connection: &Arc<Connection>, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(ConnectionInfo(Arc::clone(connection)));
    request
}

fn reason<T>(answer: Result<Response<T>, Status>) -> String {
    answer.map_or_else(
        |status| Failure::from_status(&status).reason.into_owned(),
        |_| "taken".to_owned(),
    )
}

fn with_attach_password(password: &str) -> Option<pb::CloneOptions> {
    let attach_replica = pb::AttachReplica { password: password.into(), ..Default::default() };
    Some(pb::CloneOptions { attach_replica: Some(attach_replica), ..Default::default() })
}

/// What becomes of each request that holds a password, and of the same ones without it.
async fn reasons(api: &Api, connection: &Arc<Connection>, password: &str) -> Vec<String> {
    let instance = pb::CloneInstanceRequest { password: password.into(), ..Default::default() };
    let attaching =
        pb::CloneInstanceRequest { options: with_attach_password(password), ..Default::default() };
    let local =
        pb::CloneLocalRequest { options: with_attach_password(password), ..Default::default() };
    let validated = pb::ValidateCloneRequest { request: Some(Kind::CloneLocal(local.clone())) };
    let name = "clones/none".to_owned();
    let resumed = pb::ResumeCloneRequest { password: password.into(), ..Default::default() };
    let resumed = pb::ResumeCloneRequest { name: name.clone(), ..resumed };
    let attached = pb::ResumeCloneRequest {
        name,
        attach_replica_password: password.into(),
        ..Default::default()
    };
    vec![
        reason(api.clone_instance(on(connection, instance)).await),
        reason(api.clone_instance(on(connection, attaching)).await),
        reason(api.clone_local(on(connection, local)).await),
        reason(api.validate_clone(on(connection, validated)).await),
        reason(api.resume_clone(on(connection, resumed)).await),
        reason(api.resume_clone(on(connection, attached)).await),
    ]
}

/// Guards passwords on a network: what holds one, or may hold one, is refused where others can have read it,
/// before anything else is looked at. With `refuse_bare_secret` left out all of them go on to their next check.
#[tokio::test]
async fn a_password_is_taken_where_nobody_listens_and_nowhere_else() {
    let home = tempfile::tempdir().unwrap();
    let settings = Settings::for_tests(home.path()).shared();
    let clones = Clones::open(settings, home.path(), Arc::new(Unmanaged)).await.unwrap();
    let api = Api::new(Arc::new(clones));
    let far = SocketAddr::from(([192, 0, 2, 1], 4000));
    let bare = Arc::new(Connection::plain(far));
    let encrypted = Arc::new(Connection::encrypted_with(far, "TLSv1.3".to_owned(), [1; 32]));
    let loopback = Arc::new(Connection::plain(SocketAddr::from(([127, 0, 0, 1], 4000))));
    assert_eq!(reasons(&api, &bare, "secret").await, ["SECRET_IN_CLEAR"; 6]);
    for (connection, password) in [(&bare, ""), (&encrypted, "secret"), (&loopback, "secret")] {
        let got = reasons(&api, connection, password).await;
        assert!(!got.iter().any(|reason| reason == "SECRET_IN_CLEAR"), "{password}: {got:?}");
    }
    // A statement, and an instance that is to be validated, may hold one wherever it is read.
    for (connection, is_refused) in [(&bare, true), (&encrypted, false), (&loopback, false)] {
        let statement = pb::CloneStatementRequest { statement: "x".into(), ..Default::default() };
        let kinds = [
            Some(Kind::CloneStatement(statement.clone())),
            Some(Kind::CloneInstance(pb::CloneInstanceRequest::default())),
        ];
        let mut got = vec![reason(api.clone_statement(on(connection, statement)).await)];
        for request in kinds {
            let validate = pb::ValidateCloneRequest { request };
            got.push(reason(api.validate_clone(on(connection, validate)).await));
        }
        for reason in &got {
            assert_eq!(reason == "SECRET_IN_CLEAR", is_refused, "{got:?}");
        }
    }
}
