//! Who may call what: a tower layer before every handler, and what handlers ask of a request.
//!
//! With accounts, a method that is not in the table is refused: deny by default.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Extensions, Request, Response};
use tonic::{Code, body::Body};
use tower::{Layer, Service};

pub use crate::connection::Privilege;
use crate::{
    connection::{Connection, ConnectionInfo, ConnectionNumber, Identity},
    failure::Failure,
    identities::IdentitiesFile,
    network::Network,
};

/// What a method asks of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Nothing: log-in itself, health, reflection.
    Anyone,
    /// A privilege.
    Needs(Privilege),
    /// One of these; the handler looks which.
    NeedsAny(&'static [Privilege]),
}

/// Methods by their full path prefix, first match counts; and the server's modes.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Whether callers must be known: by a log-in, a certificate or a token.
    pub accounts: bool,
    /// Who is who by a token.
    pub identities: Option<Arc<IdentitiesFile>>,
    /// Whether plaintext is refused.
    pub require_tls: bool,
    /// Where callers may come from; empty: from anywhere.
    pub allow_from: Vec<Network>,
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
    /// Where a call comes from, and by which way.
    fn check_connection(&self, connection: Option<&Connection>) -> Result<(), Failure> {
        let peer = connection.map(|connection| connection.peer.ip());
        let holds = |ip: IpAddr| self.allow_from.iter().any(|network| network.holds(ip));
        // Who comes by a Unix socket is on this host, and was let in by its file's mode.
        if connection.is_some_and(|connection| connection.is_local) {
            return Ok(());
        }
        if !self.allow_from.is_empty() && !peer.is_some_and(holds) {
            let from =
                peer.map_or_else(|| "nowhere".to_owned(), |ip| ip.to_canonical().to_string());
            return Err(Failure::new(
                Code::PermissionDenied,
                "ADDRESS_NOT_ALLOWED",
                format!(
                    "host {from} is not allowed to connect to this server; add it to its \
                     --allow-from"
                ),
            )
            .mysql(1130));
        }
        if self.require_tls && !connection.is_some_and(Connection::encrypted) {
            return Err(Failure::precondition(
                "TLS_REQUIRED",
                "connections using insecure transport are prohibited here; connect with TLS \
                 (REQUIRE SSL)",
            )
            .mysql(3159));
        }
        Ok(())
    }

    /// What the method asks of its caller.
    fn check_method(&self, path: &str, identity: Option<&Identity>) -> Result<(), Failure> {
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
            Some(Rule::Needs(privilege)) => needs(identity, &[privilege]),
            Some(Rule::NeedsAny(privileges)) => needs(identity, privileges),
            None => Err(Failure::unimplemented(path)),
        }
    }
}

/// Who calls by a token, which goes with each call.
#[derive(Debug, Clone)]
struct TokenIdentity(Arc<Identity>);

impl Policy {
    /// Whose token a call carries.
    fn token<B>(
        &self,
        request: &Request<B>,
        connection: Option<&Connection>,
    ) -> Result<Option<TokenIdentity>, Failure> {
        let Some(identities) = &self.identities else { return Ok(None) };
        let Some(header) = request.headers().get(http::header::AUTHORIZATION) else {
            return Ok(None);
        };
        if !connection.is_some_and(Connection::is_confidential) {
            return Err(secret_in_clear("a token"));
        }
        let token = header.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
        match token.and_then(|token| identities.of_token(token.trim())) {
            Some(identity) => Ok(Some(TokenIdentity(Arc::new(identity)))),
            None => Err(Failure::new(
                Code::Unauthenticated,
                "TOKEN_UNKNOWN",
                "the call's token is none that this server knows",
            )
            .mysql(1045)),
        }
    }
}

/// A secret has crossed a network in clear.
#[must_use]
pub fn secret_in_clear(what: &str) -> Failure {
    Failure::precondition(
        "SECRET_IN_CLEAR",
        format!(
            "{what} came over an unencrypted connection that is no loopback; change it, and \
             connect with TLS"
        ),
    )
    .mysql(3159)
}

fn logged_in(identity: Option<&Identity>) -> Result<&Identity, Failure> {
    identity.ok_or_else(|| {
        Failure::new(
            Code::Unauthenticated,
            "NOT_LOGGED_IN",
            "this server has accounts, and nobody has logged in on this connection",
        )
        .mysql(1045)
    })
}

fn needs(identity: Option<&Identity>, privileges: &[Privilege]) -> Result<(), Failure> {
    let identity = logged_in(identity)?;
    if privileges.iter().any(|privilege| identity.may(*privilege)) {
        return Ok(());
    }
    let privilege = privileges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
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
    /// The connection that it calls on.
    pub connection: Option<ConnectionNumber>,
    /// Whether that one has logged in.
    pub has_logged_in: bool,
}

/// The connection that a request came on.
#[must_use]
pub fn connection(extensions: &Extensions) -> Option<Arc<Connection>> {
    extensions.get::<ConnectionInfo>().map(|info| Arc::clone(&info.0))
}

/// Who a request is from: by its token, or by its connection.
fn identity(extensions: &Extensions) -> Option<Identity> {
    let token = extensions.get::<TokenIdentity>().map(|token| (*token.0).clone());
    token.or_else(|| connection(extensions)?.identity().cloned())
}

/// Who sent a request.
#[must_use]
pub fn caller<T>(request: &tonic::Request<T>) -> Caller {
    http_caller(request.extensions())
}

/// Who sent a request, by its extensions.
#[must_use]
pub fn http_caller(extensions: &Extensions) -> Caller {
    let (user, snapshot) =
        identity(extensions).map_or((None, None), |who| (Some(who.user), who.snapshot));
    let connection = connection(extensions);
    Caller {
        user,
        snapshot,
        peer: connection.as_ref().map(|connection| connection.peer),
        connection: connection.as_ref().map(|connection| connection.number),
        has_logged_in: connection.is_some_and(|connection| connection.has_logged_in()),
    }
}

/// Asks for a privilege that only the request's content calls for. Without a log-in, the layer has
/// let the call pass since the server has no accounts.
pub fn require<T>(request: &tonic::Request<T>, privilege: Privilege) -> Result<(), Failure> {
    match identity(request.extensions()) {
        Some(identity) => needs(Some(&identity), &[privilege]),
        None => Ok(()),
    }
}

/// Whether a secret may be taken from this request: it came encrypted, or never left the host.
#[must_use]
pub fn is_confidential<T>(request: &tonic::Request<T>) -> bool {
    connection(request.extensions()).is_some_and(|connection| connection.is_confidential())
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

impl<S> AccessService<S> {
    fn admit<B>(
        &self,
        request: &mut Request<B>,
        connection: Option<&Connection>,
    ) -> Result<(), Failure> {
        self.policy.check_connection(connection)?;
        if let Some(token) = self.policy.token(request, connection)? {
            request.extensions_mut().insert(token);
        }
        let identity = identity(request.extensions());
        self.policy.check_method(request.uri().path(), identity.as_ref())
    }
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

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let connection = connection(request.extensions());
        if let Some(connection) = &connection {
            connection.note_call();
        }
        match self.admit(&mut request, connection.as_deref()) {
            Ok(()) => Box::pin(self.inner.call(request)),
            Err(failure) => Box::pin(async move { Ok(failure.to_status().into_http()) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &[(&str, Rule)] = &[
        ("/marcot.donor.v1.DonorService/ListSnapshots", Rule::Needs(Privilege::Monitor)),
        ("/marcot.donor.v1.DonorService/", Rule::Needs(Privilege::BackupAdmin)),
    ];

    fn peer() -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], 4000))
    }

    fn check(policy: &Policy, path: &str, connection: Option<&Connection>) -> Result<(), Failure> {
        policy.check_connection(connection)?;
        policy.check_method(path, connection.and_then(Connection::identity))
    }

    fn logged_in_with(privileges: &[Privilege]) -> Connection {
        let connection = Connection::encrypted_with(peer(), "TLSv1.3".to_owned(), [1; 32]);
        let identity =
            Identity { user: "u".to_owned(), privileges: privileges.to_vec(), snapshot: None };
        assert!(connection.log_in(identity));
        connection
    }

    fn answer(policy: &Policy, path: &str, connection: &Connection) -> String {
        match check(policy, path, Some(connection)) {
            Ok(()) => "passed".to_owned(),
            Err(failure) => failure.reason.into_owned(),
        }
    }

    /// Guards the whole table: deny by default (with `None` made to pass, the unknown paths pass),
    /// the log-in, and each privilege (with `may` made to say true, MONITOR opens everything).
    #[test]
    fn each_method_asks_for_what_its_rule_says_and_unknown_ones_are_denied() {
        let policy = Policy {
            accounts: true,
            identities: None,
            require_tls: false,
            allow_from: vec![],
            rules: RULES,
        };
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
        let missing = check(&policy, "/grpc.health.v1.Health/Check", None);
        missing.expect("health needs no connection");
        let path = "/marcot.donor.v1.DonorService/ReadRanges";
        let failure = check(&policy, path, None).expect_err("no caller");
        assert_eq!(failure.reason, "NOT_LOGGED_IN");
    }

    /// Guards `--require-tls`: it comes before every rule, log-in and health among them.
    #[test]
    fn plaintext_is_refused_everywhere_where_tls_is_required() {
        let policy = Policy {
            accounts: true,
            identities: None,
            require_tls: true,
            allow_from: vec![],
            rules: RULES,
        };
        let plain = Connection::plain(peer());
        let encrypted = logged_in_with(&[Privilege::BackupAdmin]);
        for path in [
            "/marcot.auth.v1.AuthService/LogIn",
            "/grpc.health.v1.Health/Check",
            "/marcot.donor.v1.DonorService/ReadRanges",
        ] {
            let failure = check(&policy, path, Some(&plain)).expect_err(path);
            assert_eq!(
                (failure.reason.as_ref(), failure.mysql_error),
                ("TLS_REQUIRED", Some(3159))
            );
            assert_eq!(answer(&policy, path, &encrypted), "passed", "{path}");
        }
    }

    /// Guards secrets on a network: a token in clear is refused, and told to be changed, whether it
    /// is right or not. With `is_confidential` made to say true, it is looked up.
    #[test]
    fn a_token_is_taken_where_nobody_listens_and_nowhere_else() {
        let home = tempfile::tempdir().expect("a directory");
        let file = home.path().join("identities.toml");
        let token = "0123456789abcdef0123456789abcdef";
        let digest = crate::tls::Fingerprint(crate::tls::sha256(token.as_bytes()));
        let text = format!("[token.t]\nsha256 = \"{digest}\"\nprivileges = [\"MONITOR\"]\n");
        std::fs::write(&file, text).expect("writable");
        let identities = Some(Arc::new(IdentitiesFile::open(&file).expect("right")));
        let policy = Policy {
            accounts: true,
            identities,
            require_tls: false,
            allow_from: vec![],
            rules: RULES,
        };
        let ask = |connection: &Connection, header: &str| {
            let request = Request::builder().header("authorization", header).body(()).expect("one");
            match policy.token(&request, Some(connection)) {
                Ok(identity) => identity.expect("a token was sent").0.user.clone(),
                Err(failure) => failure.reason.into_owned(),
            }
        };
        let bearer = format!("Bearer {token}");
        let local = Connection::plain(SocketAddr::from(([127, 0, 0, 1], 4000)));
        let mapped = Connection::plain("[::ffff:127.0.0.1]:4000".parse().expect("an address"));
        let encrypted = Connection::encrypted_with(peer(), "TLSv1.3".to_owned(), [1; 32]);
        for (connection, header, expected) in [
            (&local, bearer.as_str(), "t"),
            (&mapped, &bearer, "t"),
            (&encrypted, &bearer, "t"),
            (&encrypted, "Bearer 0123456789abcdef0123456789abcdeg", "TOKEN_UNKNOWN"),
            (&encrypted, "Basic dTpw", "TOKEN_UNKNOWN"),
            (&Connection::plain(peer()), &bearer, "SECRET_IN_CLEAR"),
        ] {
            assert_eq!(ask(connection, header), expected, "{header}");
        }
    }

    /// Guards `--allow-from`: it comes before every rule, log-in and health among them.
    #[test]
    fn a_caller_from_elsewhere_is_refused_everywhere() {
        let refused = |allow_from: &[&str], path: &str| {
            let allow_from = allow_from.iter().map(|text| text.parse().expect(text)).collect();
            let policy = Policy {
                accounts: false,
                identities: None,
                require_tls: false,
                allow_from,
                rules: RULES,
            };
            let answer = check(&policy, path, Some(&Connection::plain(peer())));
            answer.err().map(|failure| (failure.reason.into_owned(), failure.mysql_error))
        };
        let told = Some(("ADDRESS_NOT_ALLOWED".to_owned(), Some(1130)));
        for path in ["/marcot.auth.v1.AuthService/LogIn", "/grpc.health.v1.Health/Check", "/x"] {
            assert_eq!(refused(&["10.0.0.0/8", "192.0.2.2"], path), told, "{path}");
            assert_eq!(refused(&["10.0.0.0/8", "192.0.2.0/24"], path), None, "{path}");
            assert_eq!(refused(&[], path), None, "{path}");
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
