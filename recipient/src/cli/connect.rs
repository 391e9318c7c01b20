//! The connection to the recipient, made again when it is lost; and one to a donor.

use std::{net::IpAddr, path::Path, sync::Arc};

use marcot_common::{
    connect::{ClientTls, ConnectOptions, SslMode, connect},
    failure::Failure,
    host::host_and_port,
    login::log_in_with_password,
    tls::Fingerprint,
};
use marcot_proto::{
    auth::v1::auth_service_client::AuthServiceClient,
    donor::v1::donor_service_client::DonorServiceClient,
    recipient::v1::{
        Clone, recipient_service_client::RecipientServiceClient,
        validate_clone_request::Request as Asked,
    },
};
use tonic::{
    Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};
use zeroize::Zeroizing;

use super::{arguments::Arguments, request::HasSecret, secret};

pub(super) type Api = RecipientServiceClient<InterceptedService<Channel, Headers>>;
pub(super) type DonorApi = DonorServiceClient<InterceptedService<Channel, Headers>>;

/// What is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    Recipient,
    Donor,
}

impl Peer {
    fn name(self) -> &'static str {
        match self {
            Self::Recipient => "recipient",
            Self::Donor => "donor",
        }
    }
}

/// What goes with each call: a token, where the recipient knows this caller by one, and the caller's
/// trace.
#[derive(Clone, Default)]
pub(super) struct Headers {
    token: Option<MetadataValue<Ascii>>,
    trace: Vec<(&'static str, MetadataValue<Ascii>)>,
}

impl std::fmt::Debug for Headers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Headers").field("trace", &self.trace).finish_non_exhaustive()
    }
}

impl Headers {
    fn read(arguments: &Arguments) -> Result<Self, Failure> {
        let trace =
            [("traceparent", &arguments.traceparent), ("tracestate", &arguments.tracestate)];
        let trace = trace.into_iter().filter_map(|(name, value)| {
            let value = value.as_deref().map(str::trim).filter(|value| !value.is_empty())?;
            Some((name, value.parse::<MetadataValue<Ascii>>().ok()?))
        });
        let trace = trace.collect();
        let Some(file) = &arguments.token_file else { return Ok(Self { token: None, trace }) };
        let token = secret::read(Some(file), "", "")?;
        let mut value =
            format!("Bearer {}", token.trim()).parse::<MetadataValue<Ascii>>().map_err(|_| {
                Failure::invalid("BAD_TOKEN", format!("{} holds no token", file.display()))
            })?;
        value.set_sensitive(true);
        Ok(Self { token: Some(value), trace })
    }
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        if let Some(token) = &self.token {
            request.metadata_mut().insert("authorization", token.clone());
        }
        for (name, value) in &self.trace {
            request.metadata_mut().insert(*name, value.clone());
        }
        Ok(request)
    }
}

/// A client of the recipient.
#[derive(Debug)]
pub(super) struct Client {
    options: ConnectOptions,
    user: Option<(String, Zeroizing<String>)>,
    headers: Headers,
    api: Api,
    /// Encrypted, or never leaves this host.
    confidential: bool,
}

impl Client {
    /// Connects, and logs in where a user is named.
    pub(super) async fn connect(arguments: &Arguments) -> Result<Self, Failure> {
        let options = options(arguments, &arguments.recipient)?;
        let user = user(arguments, Peer::Recipient)?;
        let headers = Headers::read(arguments)?;
        let (api, confidential) = open_recipient(&options, user.as_ref(), &headers).await?;
        Ok(Self { options, user, headers, api, confidential })
    }

    /// Connects once more.
    pub(super) async fn reconnect(&mut self) -> Result<(), Failure> {
        (self.api, self.confidential) =
            open_recipient(&self.options, self.user.as_ref(), &self.headers).await?;
        Ok(())
    }

    /// The recipient's service.
    pub(super) fn api(&mut self) -> &mut Api {
        &mut self.api
    }

    /// Refuses to send a password in clear. The recipient does as well; but then it has crossed the
    /// network.
    pub(super) fn guard(&self, HasSecret(has_secret): HasSecret) -> Result<(), Failure> {
        if self.confidential || !has_secret {
            return Ok(());
        }
        Err(Failure::precondition(
            "SECRET_IN_CLEAR",
            "the connection to the recipient is not encrypted, and the donor's password would cross \
             the network in clear; give the recipient a certificate, or run this on its host",
        )
        .mysql(3159))
    }

    /// Starts the clone that is asked for.
    pub(super) async fn start(&mut self, asked: Asked) -> Result<Clone, Failure> {
        let started = match asked {
            Asked::CloneStatement(message) => {
                self.api.clone_statement(message).await.map(|answer| answer.into_inner().clone)
            }
            Asked::CloneInstance(message) => {
                self.api.clone_instance(message).await.map(|answer| answer.into_inner().clone)
            }
            Asked::CloneLocal(message) => {
                self.api.clone_local(message).await.map(|answer| answer.into_inner().clone)
            }
        };
        started
            .map_err(|status| Failure::from_status(&status))?
            .ok_or_else(|| Failure::peer_misbehaved("the recipient started a clone without one"))
    }
}

/// Connects to a donor at `address`; what the arguments say of log-in and TLS is meant for it.
pub(super) async fn donor(arguments: &Arguments, address: &str) -> Result<DonorApi, Failure> {
    let options = options(arguments, address)?;
    let user = user(arguments, Peer::Donor)?;
    let headers = Headers::read(arguments)?;
    let (channel, _) = open(&options, user.as_ref(), &headers, Peer::Donor).await?;
    Ok(DonorServiceClient::with_interceptor(channel, headers))
}

/// Account and password, where an account is named.
fn user(arguments: &Arguments, peer: Peer) -> Result<Option<(String, Zeroizing<String>)>, Failure> {
    let Some(user) = &arguments.user else { return Ok(None) };
    let prompt = format!("Password of '{user}' on the {}: ", peer.name());
    let file = arguments.password_file.as_deref();
    Ok(Some((user.clone(), secret::read(file, "MARCOT_PASSWORD", &prompt)?)))
}

fn options(arguments: &Arguments, address: &str) -> Result<ConnectOptions, Failure> {
    if let Some(path) = address.strip_prefix("unix:") {
        if arguments.tls || arguments.fingerprint.is_some() || arguments.ca_file.is_some() {
            let text = "unix: has no TLS, which --tls, --ca-file and --fingerprint require";
            return Err(Failure::invalid("BAD_ADDRESS", text));
        }
        return Ok(ConnectOptions::unix(Path::new(path)));
    }
    let (mode, address) = match address.split_once("://") {
        Some(("https", rest)) => (SslMode::Required, rest),
        Some(("http", rest)) => (SslMode::Disabled, rest),
        Some(_) => {
            let text = format!(
                "{address} does not begin with http://, https:// or unix:, and is no HOST:PORT"
            );
            return Err(Failure::invalid("BAD_ADDRESS", text));
        }
        None if arguments.tls => (SslMode::Required, address),
        None => (SslMode::Preferred, address),
    };
    let (host, port) = host_and_port(address.trim_end_matches('/'))?;
    let fingerprint = arguments.fingerprint.as_deref().map(Fingerprint::parse).transpose();
    let tls = ClientTls {
        ca: arguments.ca_file.clone(),
        crl: arguments.crl_file.clone(),
        certificate: arguments.cert.clone().zip(arguments.key.clone()),
        fingerprint: fingerprint
            .map_err(|e| Failure::invalid("BAD_FINGERPRINT", format!("--fingerprint: {e}")))?,
        last_right: Arc::default(),
    };
    if mode == SslMode::Disabled && (arguments.tls || tls.demands_tls()) {
        let text = "http:// forbids TLS, and --tls, --ca-file, --fingerprint and --cert require it";
        return Err(Failure::invalid("BAD_ADDRESS", text));
    }
    Ok(ConnectOptions::new(&host, port, mode).with_tls(tls))
}

async fn open_recipient(
    options: &ConnectOptions,
    user: Option<&(String, Zeroizing<String>)>,
    headers: &Headers,
) -> Result<(Api, bool), Failure> {
    let (channel, confidential) = open(options, user, headers, Peer::Recipient).await?;
    Ok((RecipientServiceClient::with_interceptor(channel, headers.clone()), confidential))
}

/// A channel that has logged in, and whether nobody listens on it.
async fn open(
    options: &ConnectOptions,
    user: Option<&(String, Zeroizing<String>)>,
    headers: &Headers,
    peer: Peer,
) -> Result<(Channel, bool), Failure> {
    let connection = connect(options).await.map_err(|failure| in_our_words(failure, peer))?;
    if let Some((user, password)) = user {
        let mut client = AuthServiceClient::new(connection.channel.clone());
        match log_in_with_password(&mut client, &connection.security, user, password, None).await {
            Ok(_) => {}
            Err(failure) if failure.reason == "NO_ACCOUNTS" => {}
            Err(failure) => return Err(failure),
        }
    }
    let confidential = is_confidential(connection.security.encrypted, connection.peer.ip());
    if headers.token.is_some() && !confidential {
        return Err(Failure::precondition(
            "SECRET_IN_CLEAR",
            format!(
                "the connection to the {peer} is not encrypted, and the token would cross the network \
                 in clear; give the {peer} a certificate, or run this on its host",
                peer = peer.name()
            ),
        )
        .mysql(3159));
    }
    Ok((connection.channel, confidential))
}

/// Whether nobody else listens.
const fn is_confidential(encrypted: bool, peer: IpAddr) -> bool {
    encrypted || peer.is_loopback()
}

/// `connect` speaks of a donor and of a recipient's options.
fn in_our_words(mut failure: Failure, peer: Peer) -> Failure {
    failure.message = replaced(
        &failure.message,
        &[
            ("or clone with REQUIRE NO SSL", "or write http:// before its address"),
            ("--ssl-crl", "--crl-file"),
            ("--ssl-ca", "--ca-file"),
            ("--ssl-cert", "--cert"),
            ("--ssl-key", "--key"),
            ("--donor-fingerprint", "--fingerprint"),
        ],
    );
    // What the donor says of its server is no answer to a statement here.
    let inner = failure.metadata.remove("donor_mysql_error");
    failure.mysql_error = inner.and_then(|number| number.parse().ok());
    if peer == Peer::Donor {
        return failure;
    }
    let text = failure.message.strip_prefix("donor: ").unwrap_or(&failure.message);
    let text = replaced(
        text,
        &[
            ("Marcot donor", "Marcot recipient"),
            ("which the donor prints", "which the recipient prints"),
            ("on the donor", "on the recipient"),
            ("to the donor by", "to the recipient by"),
            ("the donor needs", "the recipient needs"),
        ],
    );
    failure.message = format!("recipient: {text}");
    if failure.reason == "DONOR_UNREACHABLE" {
        failure.reason = "RECIPIENT_UNREACHABLE".into();
    }
    failure
}

fn replaced(text: &str, words: &[(&str, &str)]) -> String {
    words.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards passwords on a network, also where the host that runs this has none: an address of a network
    /// is confidential with TLS alone.
    #[test]
    fn nobody_listens_on_this_host_and_on_what_is_encrypted() {
        for (address, is_local) in [
            ("127.0.0.1", true),
            ("127.9.9.9", true),
            ("::1", true),
            ("192.0.2.1", false),
            ("10.0.0.1", false),
            ("0.0.0.0", false),
            ("::", false),
            ("fe80::1", false),
            ("2001:db8::1", false),
        ] {
            let address = address.parse().unwrap();
            assert_eq!(is_confidential(false, address), is_local, "{address}");
            assert!(is_confidential(true, address), "{address}");
        }
    }
}
