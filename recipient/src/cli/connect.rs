//! The connection to the recipient, made again when it is lost.

use std::path::Path;

use marcot_common::{
    connect::{ClientTls, ConnectOptions, SslMode, connect},
    failure::Failure,
    login::log_in_with_password,
    tls::Fingerprint,
};
use marcot_proto::{
    auth::v1::auth_service_client::AuthServiceClient,
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

use super::{
    arguments::Arguments,
    request::{HasSecret, host_and_port},
    secret,
};

pub(super) type Api = RecipientServiceClient<InterceptedService<Channel, Token>>;

/// Goes with each call, where the recipient knows this caller by one.
#[derive(Clone, Default)]
pub(super) struct Token(Option<MetadataValue<Ascii>>);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

impl Token {
    fn read(arguments: &Arguments) -> Result<Self, Failure> {
        let Some(file) = &arguments.token_file else { return Ok(Self::default()) };
        let token = secret::read(Some(file), "", "")?;
        let mut value =
            format!("Bearer {}", token.trim()).parse::<MetadataValue<Ascii>>().map_err(|_| {
                Failure::invalid("BAD_TOKEN", format!("{} holds no token", file.display()))
            })?;
        value.set_sensitive(true);
        Ok(Self(Some(value)))
    }
}

impl Interceptor for Token {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

/// A client of the recipient.
#[derive(Debug)]
pub(super) struct Client {
    options: ConnectOptions,
    user: Option<(String, Zeroizing<String>)>,
    token: Token,
    api: Api,
    /// Encrypted, or never leaves this host.
    confidential: bool,
}

impl Client {
    /// Connects, and logs in where a user is named.
    pub(super) async fn connect(arguments: &Arguments) -> Result<Self, Failure> {
        let options = options(arguments)?;
        let user = match &arguments.user {
            None => None,
            Some(user) => {
                let prompt = format!("Password of '{user}' on the recipient: ");
                let file = arguments.password_file.as_deref();
                Some((user.clone(), secret::read(file, "MARCOT_PASSWORD", &prompt)?))
            }
        };
        let token = Token::read(arguments)?;
        let (api, confidential) = open(&options, user.as_ref(), &token).await?;
        Ok(Self { options, user, token, api, confidential })
    }

    /// Connects once more.
    pub(super) async fn reconnect(&mut self) -> Result<(), Failure> {
        (self.api, self.confidential) =
            open(&self.options, self.user.as_ref(), &self.token).await?;
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

fn options(arguments: &Arguments) -> Result<ConnectOptions, Failure> {
    if let Some(path) = arguments.recipient.strip_prefix("unix:") {
        if arguments.tls || arguments.fingerprint.is_some() || arguments.ca_file.is_some() {
            let text = "unix: has no TLS, which --tls, --ca-file and --fingerprint require";
            return Err(Failure::invalid("BAD_ADDRESS", text));
        }
        return Ok(ConnectOptions::unix(Path::new(path)));
    }
    let (mode, address) = match arguments.recipient.split_once("://") {
        Some(("https", rest)) => (SslMode::Required, rest),
        Some(("http", rest)) => (SslMode::Disabled, rest),
        Some(_) => {
            let text = "--recipient begins with http://, https:// or unix:, or is HOST:PORT";
            return Err(Failure::invalid("BAD_ADDRESS", text));
        }
        None if arguments.tls => (SslMode::Required, arguments.recipient.as_str()),
        None => (SslMode::Preferred, arguments.recipient.as_str()),
    };
    let (host, port) = host_and_port(address.trim_end_matches('/'))?;
    let fingerprint = arguments.fingerprint.as_deref().map(Fingerprint::parse).transpose();
    let tls = ClientTls {
        ca: arguments.ca_file.clone(),
        crl: arguments.crl_file.clone(),
        certificate: arguments.cert.clone().zip(arguments.key.clone()),
        fingerprint: fingerprint
            .map_err(|e| Failure::invalid("BAD_FINGERPRINT", format!("--fingerprint: {e}")))?,
    };
    if mode == SslMode::Disabled && (arguments.tls || tls.demands_tls()) {
        let text = "http:// forbids TLS, and --tls, --ca-file, --fingerprint and --cert require it";
        return Err(Failure::invalid("BAD_ADDRESS", text));
    }
    Ok(ConnectOptions::new(&host, port, mode).with_tls(tls))
}

async fn open(
    options: &ConnectOptions,
    user: Option<&(String, Zeroizing<String>)>,
    token: &Token,
) -> Result<(Api, bool), Failure> {
    // The library speaks of donors; here the other end is a recipient.
    let connection = connect(options).await.map_err(of_recipient)?;
    if let Some((user, password)) = user {
        let mut client = AuthServiceClient::new(connection.channel.clone());
        match log_in_with_password(&mut client, &connection.security, user, password, None).await {
            Ok(_) => {}
            Err(failure) if failure.reason == "NO_ACCOUNTS" => {}
            Err(failure) => return Err(failure),
        }
    }
    let confidential = connection.security.encrypted || connection.peer.ip().is_loopback();
    if token.0.is_some() && !confidential {
        return Err(Failure::precondition(
            "SECRET_IN_CLEAR",
            "the connection to the recipient is not encrypted, and the token would cross the network \
             in clear; give the recipient a certificate, or run this on its host",
        )
        .mysql(3159));
    }
    Ok((RecipientServiceClient::with_interceptor(connection.channel, token.clone()), confidential))
}

/// `connect` speaks of a donor and its options.
fn of_recipient(mut failure: Failure) -> Failure {
    let text = failure.message.strip_prefix("donor: ").unwrap_or(&failure.message);
    let text = [
        ("or clone with REQUIRE NO SSL", "or write http:// before its address"),
        ("--ssl-crl", "--crl-file"),
        ("--ssl-ca", "--ca-file"),
        ("--ssl-cert", "--cert"),
        ("--ssl-key", "--key"),
        ("--donor-fingerprint", "--fingerprint"),
        ("Marcot donor", "Marcot recipient"),
        ("which the donor prints", "which the recipient prints"),
        ("on the donor", "on the recipient"),
        ("to the donor by", "to the recipient by"),
        ("the donor needs", "the recipient needs"),
    ]
    .into_iter()
    .fold(text.to_owned(), |text, (donors, recipients)| text.replace(donors, recipients));
    failure.message = format!("recipient: {text}");
    if failure.reason == "DONOR_UNREACHABLE" {
        failure.reason = "RECIPIENT_UNREACHABLE".into();
    }
    let inner = failure.metadata.remove("donor_mysql_error");
    failure.mysql_error = inner.and_then(|number| number.parse().ok());
    failure
}
