//! Who may call what: a tower layer before every handler, and what handlers ask of a request.
//!
//! With accounts, a method that is not in the table is refused: deny by default.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Extensions, Request, Response};
use tonic::{Code, body::Body};
use tower::{Layer, Service};

pub use crate::connection::Privilege;
use crate::{
    connection::{Connection, ConnectionInfo},
    failure::Failure,
};

/// What a method asks of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Nothing: log-in itself, health, reflection.
    Anyone,
    /// A log-in; the handler looks further.
    LoggedIn,
    /// A privilege.
    Needs(Privilege),
}

/// Methods by their full path prefix, first match counts; and the server's modes.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Whether callers must log in.
    pub accounts: bool,
    /// Whether plaintext is refused.
    pub require_tls: bool,
    /// Path prefixes and their rules.
    pub rules: &'static [(&'static str, Rule)],
}

/// Rules that every server has.
const COMMON_RULES: [(&str, Rule); 3] = [
    ("/marcot.auth.v1.AuthService/", Rule::Anyone),
    ("/grpc.health.v1.Health/", Rule::Anyone),
    ("/grpc.reflection.", Rule::Anyone),
];

impl Policy {
    fn check(&self, path: &str, connection: Option<&Connection>) -> Result<(), Failure> {
        let encrypted = connection.is_some_and(Connection::encrypted);
        if self.require_tls && !encrypted {
            return Err(Failure::precondition(
                "TLS_REQUIRED",
                "connections using insecure transport are prohibited here; connect with TLS \
                 (REQUIRE SSL)",
            )
            .mysql(3159));
        }
        if !self.accounts {
            return Ok(());
        }
        let rule = COMMON_RULES
            .iter()
            .chain(self.rules)
            .find(|(prefix, _)| path.starts_with(prefix))
            .map(|(_, rule)| *rule);
        match rule {
            Some(Rule::Anyone) => Ok(()),
            Some(Rule::LoggedIn) => logged_in(connection),
            Some(Rule::Needs(privilege)) => needs(connection, privilege),
            None => Err(Failure::unimplemented(path)),
        }
    }
}

fn logged_in(connection: Option<&Connection>) -> Result<(), Failure> {
    match connection.and_then(Connection::identity) {
        Some(_) => Ok(()),
        None => Err(Failure::new(
            Code::Unauthenticated,
            "NOT_LOGGED_IN",
            "this server has accounts, and nobody has logged in on this connection",
        )
        .mysql(1045)),
    }
}

fn needs(connection: Option<&Connection>, privilege: Privilege) -> Result<(), Failure> {
    logged_in(connection)?;
    let identity = connection.and_then(Connection::identity);
    if identity.is_some_and(|identity| identity.may(privilege)) {
        return Ok(());
    }
    Err(Failure::new(
        Code::PermissionDenied,
        "PRIVILEGE_REQUIRED",
        format!(
            "Access denied; you need (at least one of) the {privilege} privilege(s) for this \
             operation"
        ),
    )
    .mysql(1227)
    .with("privilege", privilege))
}

/// Who calls.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// Account; `None` without a log-in.
    pub user: Option<String>,
    /// The one snapshot that a log-in by key is good for.
    pub snapshot: Option<String>,
    /// Address.
    pub peer: Option<SocketAddr>,
}

/// The connection that a request came on.
#[must_use]
pub fn connection(extensions: &Extensions) -> Option<Arc<Connection>> {
    extensions.get::<ConnectionInfo>().map(|info| Arc::clone(&info.0))
}

/// Who sent a request.
#[must_use]
pub fn caller<T>(request: &tonic::Request<T>) -> Caller {
    http_caller(request.extensions())
}

/// Who sent a request, by its extensions.
#[must_use]
pub fn http_caller(extensions: &Extensions) -> Caller {
    let connection = connection(extensions);
    let identity = connection.as_ref().and_then(|connection| connection.identity());
    Caller {
        user: identity.map(|identity| identity.user.clone()),
        snapshot: identity.and_then(|identity| identity.snapshot.clone()),
        peer: connection.as_ref().map(|connection| connection.peer),
    }
}

/// Asks for a privilege that only the request's content calls for. Without a log-in, the layer has
/// let the call pass since the server has no accounts.
pub fn require<T>(request: &tonic::Request<T>, privilege: Privilege) -> Result<(), Failure> {
    let connection = connection(request.extensions());
    match connection.as_deref().and_then(Connection::identity) {
        Some(_) => needs(connection.as_deref(), privilege),
        None => Ok(()),
    }
}

/// Whether a secret may be taken from this request: it came encrypted, or never left the host.
#[must_use]
pub fn is_confidential<T>(request: &tonic::Request<T>) -> bool {
    connection(request.extensions())
        .is_some_and(|connection| connection.encrypted() || connection.peer.ip().is_loopback())
}

/// The layer.
#[derive(Debug, Clone)]
pub struct AccessLayer(pub Arc<Policy>);

impl<S> Layer<S> for AccessLayer {
    type Service = AccessService<S>;

    fn layer(&self, inner: S) -> AccessService<S> {
        AccessService { inner, policy: Arc::clone(&self.0) }
    }
}

/// The layer's service.
#[derive(Debug, Clone)]
pub struct AccessService<S> {
    inner: S,
    policy: Arc<Policy>,
}

impl<S> Service<Request<Body>> for AccessService<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let connection = connection(request.extensions());
        match self.policy.check(request.uri().path(), connection.as_deref()) {
            Ok(()) => Box::pin(self.inner.call(request)),
            Err(failure) => Box::pin(async move { Ok(failure.to_status().into_http()) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::Identity;

    const RULES: &[(&str, Rule)] = &[
        ("/marcot.donor.v1.DonorService/ListSnapshots", Rule::Needs(Privilege::Monitor)),
        ("/marcot.donor.v1.DonorService/", Rule::Needs(Privilege::BackupAdmin)),
    ];

    fn peer() -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], 4000))
    }

    fn logged_in_with(privileges: &[Privilege]) -> Connection {
        let connection = Connection::encrypted_with(peer(), "TLSv1.3".to_owned(), [1; 32]);
        let identity =
            Identity { user: "u".to_owned(), privileges: privileges.to_vec(), snapshot: None };
        assert!(connection.log_in(identity));
        connection
    }

    fn answer(policy: &Policy, path: &str, connection: &Connection) -> String {
        match policy.check(path, Some(connection)) {
            Ok(()) => "passed".to_owned(),
            Err(failure) => failure.reason.into_owned(),
        }
    }

    /// Guards the whole table: deny by default (with `None` made to pass, the unknown paths pass),
    /// the log-in, and each privilege (with `may` made to say true, MONITOR opens everything).
    #[test]
    fn each_method_asks_for_what_its_rule_says_and_unknown_ones_are_denied() {
        let policy = Policy { accounts: true, require_tls: false, rules: RULES };
        let nobody = Connection::plain(peer());
        let monitor = logged_in_with(&[Privilege::Monitor]);
        let backup = logged_in_with(&[Privilege::BackupAdmin]);
        let clone = logged_in_with(&[Privilege::CloneAdmin]);
        for (path, expected) in [
            ("/marcot.auth.v1.AuthService/LogIn", ["passed"; 4]),
            ("/grpc.health.v1.Health/Check", ["passed"; 4]),
            ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", ["passed"; 4]),
            (
                "/marcot.donor.v1.DonorService/ListSnapshots",
                ["NOT_LOGGED_IN", "passed", "passed", "passed"],
            ),
            (
                "/marcot.donor.v1.DonorService/ReadRanges",
                ["NOT_LOGGED_IN", "PRIVILEGE_REQUIRED", "passed", "PRIVILEGE_REQUIRED"],
            ),
            ("/marcot.other.v1.OtherService/Do", ["NOT_AVAILABLE"; 4]),
            ("/marcot.auth.v1.AuthServiceX/LogIn", ["NOT_AVAILABLE"; 4]),
            ("", ["NOT_AVAILABLE"; 4]),
        ] {
            let got =
                [&nobody, &monitor, &backup, &clone].map(|caller| answer(&policy, path, caller));
            assert_eq!(got, expected, "{path}");
        }
        let missing = policy.check("/grpc.health.v1.Health/Check", None);
        missing.expect("health needs no connection");
        let failure =
            policy.check("/marcot.donor.v1.DonorService/ReadRanges", None).expect_err("no caller");
        assert_eq!(failure.reason, "NOT_LOGGED_IN");
    }

    /// Guards `--require-tls`: it comes before every rule, log-in and health among them.
    #[test]
    fn plaintext_is_refused_everywhere_where_tls_is_required() {
        let policy = Policy { accounts: true, require_tls: true, rules: RULES };
        let plain = Connection::plain(peer());
        let encrypted = logged_in_with(&[Privilege::BackupAdmin]);
        for path in [
            "/marcot.auth.v1.AuthService/LogIn",
            "/grpc.health.v1.Health/Check",
            "/marcot.donor.v1.DonorService/ReadRanges",
        ] {
            let failure = policy.check(path, Some(&plain)).expect_err(path);
            assert_eq!(
                (failure.reason.as_ref(), failure.mysql_error),
                ("TLS_REQUIRED", Some(3159))
            );
            assert_eq!(answer(&policy, path, &encrypted), "passed", "{path}");
        }
    }

    #[test]
    fn the_larger_privileges_include_monitor_and_nothing_else() {
        for (held, may) in [
            (&[Privilege::Monitor][..], [false, false, true]),
            (&[Privilege::BackupAdmin], [true, false, true]),
            (&[Privilege::CloneAdmin], [false, true, true]),
            (&[], [false; 3]),
        ] {
            let connection = logged_in_with(held);
            let identity = connection.identity().expect("logged in");
            assert_eq!(Privilege::ALL.map(|privilege| identity.may(privilege)), may, "{held:?}");
        }
    }
}
