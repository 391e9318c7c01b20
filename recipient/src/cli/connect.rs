//! The connection to the recipient, made again when it is lost.

use marcot_common::{
    connect::{ClientTls, ConnectOptions, SslMode, connect},
    failure::Failure,
    login::log_in_with_password,
    tls::Fingerprint,
};
use marcot_proto::{
    auth::v1::auth_service_client::AuthServiceClient,
    recipient::v1::{Clone, recipient_service_client::RecipientServiceClient},
};
use tonic::{Status, transport::Channel};
use zeroize::Zeroizing;

use super::{arguments::Arguments, request::host_and_port, secret};

type Api = RecipientServiceClient<Channel>;

/// A client of the recipient.
#[derive(Debug)]
pub(super) struct Client {
    options: ConnectOptions,
    user: Option<(String, Zeroizing<String>)>,
    api: Api,
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
        let api = open(&options, user.as_ref()).await?;
        Ok(Self { options, user, api })
    }

    /// Connects once more.
    pub(super) async fn reconnect(&mut self) -> Result<(), Failure> {
        self.api = open(&self.options, self.user.as_ref()).await?;
        Ok(())
    }

    /// The recipient's service.
    pub(super) fn api(&mut self) -> &mut Api {
        &mut self.api
    }

    /// Makes a call that starts a clone.
    pub(super) async fn started<F: Future<Output = Result<Option<Clone>, Status>>>(
        &mut self,
        call: impl FnOnce(Api) -> F,
    ) -> Result<Clone, Failure> {
        let clone = call(self.api.clone()).await.map_err(|status| Failure::from_status(&status))?;
        clone.ok_or_else(|| Failure::peer_misbehaved("the recipient started a clone without one"))
    }
}

fn options(arguments: &Arguments) -> Result<ConnectOptions, Failure> {
    let (mode, address) = match arguments.recipient.split_once("://") {
        Some(("https", rest)) => (SslMode::Required, rest),
        Some(("http", rest)) => (SslMode::Disabled, rest),
        Some(_) => {
            let text = "--recipient begins with http:// or https://, or is HOST:PORT";
            return Err(Failure::invalid("BAD_ADDRESS", text));
        }
        None => (SslMode::Preferred, arguments.recipient.as_str()),
    };
    let (host, port) = host_and_port(address.trim_end_matches('/'))?;
    let fingerprint = arguments.fingerprint.as_deref().map(Fingerprint::parse).transpose();
    let tls = ClientTls {
        ca: arguments.ca_file.clone(),
        certificate: arguments.cert.clone().zip(arguments.key.clone()),
        fingerprint: fingerprint
            .map_err(|e| Failure::invalid("BAD_FINGERPRINT", format!("--fingerprint: {e}")))?,
    };
    Ok(ConnectOptions::new(&host, port, mode).with_tls(tls))
}

async fn open(
    options: &ConnectOptions,
    user: Option<&(String, Zeroizing<String>)>,
) -> Result<Api, Failure> {
    // The library speaks of donors; here the other end is a recipient.
    let connection = connect(options).await.map_err(of_recipient)?;
    if let Some((user, password)) = user {
        let mut client = AuthServiceClient::new(connection.channel.clone());
        match log_in_with_password(&mut client, &connection.security, user, password).await {
            Ok(_) => {}
            Err(failure) if failure.reason == "NO_ACCOUNTS" => {}
            Err(failure) => return Err(of_recipient(failure)),
        }
    }
    Ok(Api::new(connection.channel))
}

fn of_recipient(mut failure: Failure) -> Failure {
    let text = failure.message.strip_prefix("donor: ").unwrap_or(&failure.message);
    failure.message = format!("recipient: {}", text.replace("Marcot donor", "Marcot recipient"));
    if let Some(number) = failure.metadata.get("donor_mysql_error").and_then(|n| n.parse().ok()) {
        failure.mysql_error = Some(number);
    }
    failure
}
