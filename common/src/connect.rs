//! The client's way to a server of Marcot: one TCP connection in the mode that was asked for, and a
//! clear word on what the other end is when it is no Marcot.
//!
//! Invariants:
//! * REQUIRE SSL never ends in plaintext.
//! * Without a clause, plaintext follows only on the server's one defined answer to a TLS hello,
//!   and never when a CA, a fingerprint or a client certificate is set.
//! * With a donor list, only addresses that it allows are connected to, pinned ones included.
//! * A channel is one connection: it does not reconnect by itself, for it would not be logged in.

mod advice;
mod peer;
mod stream;

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::{
    io::BufReader,
    net::{TcpStream, UnixStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    Code,
    transport::{Channel, Endpoint, Uri},
};

use self::stream::{Io, Recorder, Seen};
pub use crate::tls::client::ClientTls;
use crate::{
    connection::LOCAL_PEER,
    donor_list::DonorList,
    failure::{Failure, chain},
    listener::NO_TLS_ANSWER,
    telemetry::propagation::TraceInterceptor,
    tls::{EXPORTER_LABEL, Fingerprint, Versions, cipher_text},
};

/// Longest wait for each step of a connection, unless told otherwise: a lost SYN is sent again after
/// 1, 3 and 7 s.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// How long a plaintext peer may take to speak first: a MySQL server does at once, a Marcot server
/// never does.
const GREETING_WAIT: Duration = Duration::from_millis(300);

/// Most addresses of a name that are tried.
const ADDRESSES_MAX: usize = 8;

/// HTTP/2 frames and windows: frames as large as chunks, and windows that hold enough of them to
/// keep a link of 1 GiB/s and 4 ms busy. Fixed ones are faster than hyper's adaptive ones.
const FRAME_BYTES: u32 = 1 << 20;
const WINDOW_BYTES: u32 = 4 << 20;

/// Largest window that HTTP/2 knows (RFC 9113, 6.9.1).
const WINDOW_BYTES_MAX: u32 = (1 << 31) - 1;

/// A dead connection is found within two of these.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Bytes read from the socket at once under TLS.
const READ_BUFFER_BYTES: usize = 256 << 10;

/// The REQUIRE clause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    /// No clause.
    Preferred,
    /// REQUIRE SSL.
    Required,
    /// REQUIRE NO SSL.
    Disabled,
}

/// Whom to connect to, and how.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// Name, or literal without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
    /// A Unix socket of this host, instead of host and port.
    socket: Option<PathBuf>,
    /// Mode.
    pub ssl_mode: SslMode,
    /// Whom to believe.
    pub tls: ClientTls,
    /// Which addresses may be connected to; `None`: all.
    donors: Option<Arc<DonorList>>,
    /// The address that the last connection of this clone found: further ones go there.
    address: Option<Arc<Mutex<SocketAddr>>>,
    /// Longest wait for each step: TCP, TLS, the first answer.
    timeout: Duration,
    /// Streams at one time on the connection.
    streams: u32,
    /// Protocol versions of TLS.
    versions: Versions,
}

/// How a connection is protected.
#[derive(Debug, Clone, Default)]
pub struct Security {
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Protocol and cipher suite; empty in plaintext.
    pub cipher: String,
    /// Of the server's certificate.
    pub fingerprint: Option<[u8; 32]>,
    /// What binds a log-in to this connection.
    pub channel_binding: Option<[u8; 32]>,
}

/// A connection to a server.
#[derive(Debug)]
pub struct DonorConnection {
    /// For generated clients. One connection: once it is lost, so is the channel.
    pub channel: Channel,
    /// How it is protected.
    pub security: Security,
    /// The other end.
    pub peer: SocketAddr,
}

impl ConnectOptions {
    /// Options without CA, certificate or fingerprint.
    #[must_use]
    pub fn new(host: &str, port: u16, ssl_mode: SslMode) -> Self {
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        Self {
            host: host.to_owned(),
            port,
            socket: None,
            ssl_mode,
            tls: ClientTls::default(),
            donors: None,
            address: None,
            timeout: CONNECT_MAX,
            streams: 1,
            versions: Versions::Tls13,
        }
    }

    /// To a Unix socket of this host.
    #[must_use]
    pub fn unix(path: &Path) -> Self {
        Self { socket: Some(path.to_owned()), ..Self::new("localhost", 0, SslMode::Disabled) }
    }

    /// The same, with a word on whom to believe.
    #[must_use]
    pub fn with_tls(self, tls: ClientTls) -> Self {
        Self { tls, ..self }
    }

    /// The same, to addresses that `donors` allow and no others.
    #[must_use]
    pub fn with_donors(self, donors: Arc<DonorList>) -> Self {
        Self { donors: Some(donors), ..self }
    }

    /// The same, with another bound than 10 s on each step of the way: TCP, TLS, the first answer.
    /// All of them together take at most twice as long.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// The same, for so many streams at one time instead of 1: the connection's window is theirs
    /// together, 8 MiB each, 2 GiB at the most.
    #[must_use]
    pub fn with_streams(self, streams: u32) -> Self {
        Self { streams: streams.max(1), ..self }
    }

    /// The same, with other protocol versions than TLS 1.3.
    #[must_use]
    pub fn with_tls_versions(self, versions: Versions) -> Self {
        Self { versions, ..self }
    }

    fn connection_window_bytes(&self) -> u32 {
        WINDOW_BYTES.saturating_mul(self.streams).min(WINDOW_BYTES_MAX)
    }

    /// For the further connections of the same clone: the same address and mode, and a certificate
    /// that is believed for the same reason as the first: by its fingerprint, or by its CA and the
    /// donor's name, so that it may be renewed while the clone runs.
    #[must_use]
    pub fn pinned(&self, connection: &DonorConnection) -> Self {
        let fingerprint = self.tls.fingerprint.map(|fingerprint| fingerprint.0);
        self.pinned_to(connection.peer, connection.security.encrypted, fingerprint)
    }

    /// As `pinned`, to what `pins` said of them.
    #[must_use]
    pub fn pinned_to(
        &self,
        address: SocketAddr,
        encrypted: bool,
        fingerprint: Option<[u8; 32]>,
    ) -> Self {
        let address = Some(Arc::new(Mutex::new(address)));
        Self { address, ..self.pinned_as(encrypted, fingerprint) }
    }

    /// For another connection of the same clone to wherever its name leads now: the same mode and
    /// certificate.
    #[must_use]
    pub fn pinned_as(&self, encrypted: bool, fingerprint: Option<[u8; 32]>) -> Self {
        Self {
            ssl_mode: if encrypted { SslMode::Required } else { SslMode::Disabled },
            tls: self.tls.with_fingerprint(fingerprint),
            ..self.clone()
        }
    }

    /// Address, whether it is encrypted, and fingerprint of the one certificate that is believed, of a clone's further connections; `None`
    /// before there was a first one.
    #[must_use]
    pub fn pins(&self) -> Option<(SocketAddr, bool, Option<[u8; 32]>)> {
        let encrypted = self.ssl_mode == SslMode::Required;
        let fingerprint = self.tls.fingerprint.map(|fingerprint| fingerprint.0);
        Some((self.pinned_address()?, encrypted, fingerprint))
    }

    fn pinned_address(&self) -> Option<SocketAddr> {
        let pinned = self.address.as_ref()?;
        Some(*pinned.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Further connections go where this one went: the host may have another address by now.
    fn follow(&self, peer: SocketAddr) {
        if let Some(pinned) = &self.address {
            *pinned.lock().unwrap_or_else(PoisonError::into_inner) = peer;
        }
    }

    fn name(&self) -> String {
        if let Some(socket) = &self.socket {
            return format!("unix:{}", socket.display());
        }
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// Connects.
pub async fn connect(options: &ConnectOptions) -> Result<DonorConnection, Failure> {
    let connected = async {
        if let Some(socket) = &options.socket {
            return connect_unix(options, socket).await;
        }
        match options.ssl_mode {
            SslMode::Disabled => connect_plain(options).await,
            SslMode::Required => connect_tls(options).await.map_err(|refusal| refusal.failure),
            SslMode::Preferred => match connect_tls(options).await {
                Err(refusal) if refusal.no_tls && !options.tls.demands_tls() => {
                    connect_plain(options).await
                }
                other => other.map_err(|refusal| refusal.failure),
            },
        }
    };
    let connected = tokio::time::timeout(options.timeout * 2, connected).await;
    let connection = connected.unwrap_or_else(|_| {
        Err(unreachable(2013, format!("{} did not finish connecting in time", options.name())))
    })?;
    options.follow(connection.peer);
    Ok(connection)
}

/// Why TLS did not come about.
struct Refusal {
    failure: Failure,
    /// The server gave the one answer that says that it has no TLS.
    no_tls: bool,
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self { failure, no_tls: false }
    }
}

async fn connect_plain(options: &ConnectOptions) -> Result<DonorConnection, Failure> {
    let (stream, peer) = connect_tcp(options).await?;
    // One peek: a server that speaks first, and not HTTP/2, is no server of Marcot. What a pinned
    // address is, is known.
    let wait = if options.address.is_some() { Duration::ZERO } else { GREETING_WAIT };
    let mut greeting = [0; 64];
    if let Ok(seen) = tokio::time::timeout(wait, stream.peek(&mut greeting)).await {
        let greeting = &greeting[..seen.unwrap_or(0)];
        if !peer::is_http2(greeting) {
            let text = format!("{} {}", options.name(), peer::describe(greeting));
            return Err(unreachable(2007, text));
        }
    }
    let seen = Seen::default();
    let io = Recorder { io: stream, seen: seen.clone() };
    let channel = open_channel(options, Io::Plain(io), &seen).await?;
    Ok(DonorConnection { channel, security: Security::default(), peer })
}

async fn connect_unix(options: &ConnectOptions, path: &Path) -> Result<DonorConnection, Failure> {
    let stream = UnixStream::connect(path).await.map_err(|e| {
        let text = format!(
            "cannot connect to {}: {e}; is a Marcot donor listening there, and may this user write \
             to its socket?",
            options.name()
        );
        unreachable(2002, text)
    })?;
    let channel = open_channel(options, Io::Local(stream), &Seen::default()).await?;
    Ok(DonorConnection { channel, security: Security::default(), peer: LOCAL_PEER })
}

async fn connect_tls(options: &ConnectOptions) -> Result<DonorConnection, Refusal> {
    let config = options.tls.load_with(options.versions).map_err(|e| {
        Failure::precondition("TLS_CONFIGURATION", e.to_string()).mysql(2026).from_donor()
    })?;
    let name = ServerName::try_from(options.host.clone()).map_err(|_| {
        let text = format!("`{}` is neither a host name nor an address", options.host);
        Failure::invalid("BAD_DONOR", text)
    })?;
    let (stream, peer) = connect_tcp(options).await?;
    let seen = Seen::default();
    let io = Recorder { io: stream, seen: seen.clone() };
    let io = BufReader::with_capacity(READ_BUFFER_BYTES, io);
    let handshake = TlsConnector::from(config).connect(name, io);
    let stream = match tokio::time::timeout(options.timeout, handshake).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            let bytes = seen.bytes();
            let no_tls = bytes.starts_with(&NO_TLS_ANSWER[..NO_TLS_ANSWER.len().min(bytes.len())])
                && bytes.len() >= NO_TLS_ANSWER.len();
            return Err(Refusal { failure: tls_failure(options, &error, &bytes, no_tls), no_tls });
        }
        Err(_) => {
            let text = format!(
                "{} did not answer a TLS hello within {:?}",
                options.name(),
                options.timeout
            );
            return Err(unreachable(2026, text).into());
        }
    };
    if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
        // Checked by name first: only a server that was believed gets this far.
        return Err(no_http2(options).into());
    }
    let security = security_of(&stream)?;
    // The first bytes are TLS; they tell nothing of what is inside.
    let channel = open_channel(options, Io::Tls(Box::new(stream)), &Seen::default()).await?;
    Ok(DonorConnection { channel, security, peer })
}

/// A TLS server that either offers other protocols only or knows nothing of ALPN.
fn no_http2(options: &ConnectOptions) -> Failure {
    let text =
        format!("{} speaks TLS, but not HTTP/2 in it; it is no Marcot donor", options.name());
    Failure::new(Code::FailedPrecondition, "NO_HTTP2_PEER", text).mysql(2026).from_donor()
}

fn security_of(stream: &TlsStream<BufReader<Recorder>>) -> Result<Security, Failure> {
    let connection = stream.get_ref().1;
    let binding = connection
        .export_keying_material([0; 32], EXPORTER_LABEL, None)
        .map_err(|e| Failure::bug(format!("TLS exporter: {e}")))?;
    let certificate = connection.peer_certificates().and_then(<[_]>::first);
    Ok(Security {
        encrypted: true,
        cipher: cipher_text(connection),
        fingerprint: certificate.map(|certificate| Fingerprint::of(certificate).0),
        channel_binding: Some(binding),
    })
}

fn tls_failure(options: &ConnectOptions, error: &io::Error, seen: &[u8], no_tls: bool) -> Failure {
    let name = options.name();
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let (reason, text) = match tls {
        _ if no_tls => (
            "TLS_NOT_CONFIGURED",
            format!(
                "{name} has no TLS configured; start it with --tls-cert and --tls-key, or clone \
                 with REQUIRE NO SSL"
            ),
        ),
        Some(rustls::Error::InvalidCertificate(why)) => (
            "CERTIFICATE_NOT_TRUSTED",
            format!("the certificate of {name} is not trusted: {why}; {}", advice::on(why)),
        ),
        Some(rustls::Error::General(why)) => ("CERTIFICATE_NOT_TRUSTED", format!("{name}: {why}")),
        Some(rustls::Error::AlertReceived(rustls::AlertDescription::NoApplicationProtocol)) => {
            return no_http2(options);
        }
        Some(rustls::Error::AlertReceived(alert)) => {
            let alert = format!("{alert:?}");
            let advice = advice::on_alert(&alert);
            ("TLS_REFUSED", format!("{name} refused TLS with alert {alert}: {advice}"))
        }
        Some(_) if !seen.is_empty() && !matches!(seen[0], 0x15 | 0x16) => {
            ("NO_TLS_PEER", format!("{name} {}", peer::describe(seen)))
        }
        Some(other) => ("TLS_FAILED", format!("TLS with {name}: {other}")),
        None => (
            "TLS_FAILED",
            format!("{name} broke the connection off during the TLS handshake: {error}"),
        ),
    };
    let code = if tls.is_some() || no_tls { Code::FailedPrecondition } else { Code::Unavailable };
    Failure::new(code, reason, text).mysql(2026).from_donor()
}

async fn connect_tcp(options: &ConnectOptions) -> Result<(TcpStream, SocketAddr), Failure> {
    let Some(pinned) = options.pinned_address() else {
        return connect_any(options, &look_up(options).await?).await;
    };
    let failure = match connect_any(options, &[pinned]).await {
        Err(failure) => failure,
        connected => return connected,
    };
    // A donor that was moved to another host of a cluster has another address under the same name.
    // One whose name still has the old address is down, and awaited there: the others are not it.
    match look_up(options).await {
        Ok(addresses) if !addresses.contains(&pinned) => connect_any(options, &addresses).await,
        _ => Err(failure),
    }
}

async fn look_up(options: &ConnectOptions) -> Result<Vec<SocketAddr>, Failure> {
    let found = tokio::net::lookup_host((options.host.as_str(), options.port)).await;
    let found =
        found.map_err(|e| unreachable(2005, format!("unknown host `{}`: {e}", options.host)));
    Ok(found?.take(ADDRESSES_MAX).collect())
}

async fn connect_any(
    options: &ConnectOptions,
    addresses: &[SocketAddr],
) -> Result<(TcpStream, SocketAddr), Failure> {
    // What was looked up here is matched, and connected to: nothing looks the name up again.
    let addresses = match &options.donors {
        Some(donors) => donors.allowed(&options.host, addresses)?,
        None => addresses.to_vec(),
    };
    let mut last = io::Error::other("the name has no address");
    for address in addresses {
        match tokio::time::timeout(options.timeout, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true).map_err(|e| Failure::bug(e.to_string()))?;
                return Ok((stream, address));
            }
            Ok(Err(e)) => last = e,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(unreachable(
        2003,
        format!("cannot connect to {}: {last}; is a Marcot donor listening there?", options.name()),
    ))
}

/// Puts HTTP/2 on a connection, and has it answer once.
async fn open_channel(options: &ConnectOptions, io: Io, seen: &Seen) -> Result<Channel, Failure> {
    let slot = Arc::new(Mutex::new(Some(io)));
    let connector =
        tower::service_fn(move |_: Uri| {
            let io = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
            std::future::ready(io.map(TokioIo::new).ok_or_else(|| {
                io::Error::new(io::ErrorKind::NotConnected, "the connection was lost")
            }))
        });
    let endpoint = Endpoint::from_static("http://donor")
        .tcp_nodelay(true)
        .max_frame_size(Some(FRAME_BYTES))
        .initial_stream_window_size(Some(WINDOW_BYTES))
        .initial_connection_window_size(Some(options.connection_window_bytes()))
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true);
    let channel = endpoint
        .connect_with_connector(connector)
        .await
        .map_err(|e| not_opened(options, &chain(&e)))?;
    probe(options, channel.clone(), seen).await?;
    Ok(channel)
}

/// Asks for the health of the server: any gRPC answer will do. What speaks no HTTP/2 shows here.
async fn probe(options: &ConnectOptions, channel: Channel, seen: &Seen) -> Result<(), Failure> {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    let mut client = HealthClient::with_interceptor(channel, TraceInterceptor);
    let asked = client.check(HealthCheckRequest { service: String::new() });
    let Ok(answer) = tokio::time::timeout(options.timeout, asked).await else {
        // Some greetings are the head of a frame, whose rest is waited for.
        let seen = Some(seen.bytes()).filter(|seen| !peer::is_http2(seen));
        let what = seen.and_then(|seen| peer::describe_if_known(&seen));
        let what = what.unwrap_or_else(|| "accepts connections and says nothing".to_owned());
        return Err(unreachable(2013, format!("{} {what}", options.name())));
    };
    let Err(status) = answer else { return Ok(()) };
    let ours = crate::failure::Failure::from_status(&status);
    let speaks_grpc = !matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal)
        || !ours.reason.starts_with("PEER_");
    if speaks_grpc {
        return Ok(());
    }
    let seen = Some(seen.bytes()).filter(|seen| !peer::is_http2(seen));
    match seen.and_then(|seen| peer::describe_if_known(&seen)) {
        Some(what) => Err(unreachable(2013, format!("{} {what}", options.name()))),
        None => Err(not_opened(options, &chain(&status))),
    }
}

/// A connection that broke before its first answer. Under TLS 1.3 a server that wants a client
/// certificate says so only after the client's handshake has ended.
fn not_opened(options: &ConnectOptions, why: &str) -> Failure {
    let name = options.name();
    match why.split_once("received fatal alert: ") {
        Some((_, rest)) => {
            // What follows is how the layers above show it.
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
            let alert = &rest[..end];
            Failure::new(
                Code::FailedPrecondition,
                "TLS_REFUSED",
                format!("{name} refused TLS with alert {alert}: {}", advice::on_alert(alert)),
            )
            .mysql(2026)
            .from_donor()
        }
        None => unreachable(2013, format!("{name} is no Marcot donor: {why}")),
    }
}

fn unreachable(number: u32, text: String) -> Failure {
    Failure::new(Code::Unavailable, "DONOR_UNREACHABLE", format!("{text} ({number})"))
        .mysql(number)
        .from_donor()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::donor_list::DonorMatch;

    /// Guards against a name that leads to another address at a second look (DNS rebinding): what was looked
    /// up once is matched, and that very address is connected to. This name leads nowhere, so that any
    /// other look at it fails; an address that the list does not hold is not tried.
    #[tokio::test]
    async fn the_very_address_that_was_matched_is_connected_to() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let listed = listener.local_addr().unwrap();
        let other = tokio::net::TcpListener::bind(("127.0.0.2", listed.port())).await.unwrap();
        let entry = format!("127.0.0.1:{}", listed.port()).parse().unwrap();
        let donors = DonorList::new(vec![entry], DonorMatch::Address).unwrap();
        let options = ConnectOptions::new("rebinds.invalid", listed.port(), SslMode::Disabled);
        let options = options.with_donors(Arc::new(donors));
        look_up(&options).await.unwrap_err();
        let addresses = [other.local_addr().unwrap(), listed];
        let (stream, address) = connect_any(&options, &addresses).await.unwrap();
        assert_eq!((stream.peer_addr().unwrap(), address), (listed, listed));
        let failure = connect_any(&options, &addresses[..1]).await.unwrap_err();
        assert_eq!(failure.reason, "DONOR_NOT_LISTED", "{failure}");
        // Further connections of a clone go where the first one went, matched once more.
        let pinned = options.clone().pinned_to(listed, false, None);
        let (stream, _) = connect_tcp(&pinned).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), listed);
        let elsewhere = options.pinned_to(addresses[0], false, None);
        let failure = connect_tcp(&elsewhere).await.unwrap_err();
        assert_eq!(failure.reason, "DONOR_NOT_LISTED", "{failure}");
    }
}
