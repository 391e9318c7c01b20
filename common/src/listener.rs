//! One port, both modes: TLS and plaintext, told apart by the first byte.
//!
//! A donor without TLS gives a TLS hello one defined answer, so that a client in the no-clause mode
//! can tell it from a broken or hostile network, and goes on in plaintext only then. A Unix socket
//! takes plaintext, which never leaves the host; the kernel says whose process it is.

mod places;

use std::{
    io,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::Stream;
use rustix::net::RecvFlags;
use tokio::{
    io::{
        AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader, Interest, ReadBuf,
    },
    net::{TcpListener, TcpStream, UnixStream},
    sync::mpsc,
    time::Sleep,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;
use tracing::{debug, info, warn};

use self::places::{HANDSHAKES_MAX, Place, Places};
use crate::{
    connection::{Connection, ConnectionInfo, LOCAL_PEER},
    identities::IdentitiesFile,
    listen::UnixSocket,
    telemetry::connections::{CountedConnection, OpenConnections, Protection},
    tls::{EXPORTER_LABEL, cipher_text, server::ReloadedTls},
};

/// What a server without TLS answers to a TLS hello. No TLS record begins like this.
pub const NO_TLS_ANSWER: &[u8] = b"MARCOT/1 TLS IS NOT CONFIGURED ON THIS PORT\r\n";

/// Longest time from the first byte's wait to the end of the handshake: a slow link needs a few
/// round trips, a silent one gets no more.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// Longest time from a connection's handshake to its first call: whoever has something to say says it at
/// once, and afterwards pings find out whether it is still there.
const QUIET_MAX: Duration = Duration::from_secs(60);

/// Bytes read from the socket at once under TLS: records of 16 KiB one by one cost eight times as
/// many system calls.
const READ_BUFFER_BYTES: usize = 256 << 10;

/// Bytes of a refused client that are read off, so that the answer is not lost to a reset.
const DRAIN_BYTES_MAX: u64 = 64 << 10;

/// First byte of a TLS record that holds a handshake message.
const TLS_HANDSHAKE: u8 = 0x16;

/// First byte of HTTP/2's preface, `PRI * HTTP/2.0`.
const HTTP2_PREFACE: u8 = b'P';

/// A listening port or socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    tls: Option<Arc<ReloadedTls>>,
    identities: Option<Arc<IdentitiesFile>>,
    open: OpenConnections,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixSocket),
}

/// What was accepted.
enum Accepted {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl Socket {
    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => {
                listener.accept().await.map(|(stream, peer)| Accepted::Tcp(stream, peer))
            }
            Self::Unix(socket) => {
                socket.listener().accept().await.map(|(stream, _)| Accepted::Unix(stream))
            }
        }
    }
}

impl Listener {
    /// Listens; with TLS, both modes are served.
    pub async fn bind(address: SocketAddr, tls: Option<Arc<ReloadedTls>>) -> io::Result<Self> {
        let socket = Socket::Tcp(TcpListener::bind(address).await?);
        Ok(Self { socket, tls, identities: None, open: OpenConnections::default() })
    }

    /// Listens on a Unix socket, whose file gets this mode.
    pub fn bind_unix(path: &Path, mode: u32) -> io::Result<Self> {
        let socket = Socket::Unix(UnixSocket::bind(path, mode)?);
        Ok(Self { socket, tls: None, identities: None, open: OpenConnections::default() })
    }

    /// The same, with a word on who is who by his certificate.
    #[must_use]
    pub fn with_identities(self, identities: Option<Arc<IdentitiesFile>>) -> Self {
        Self { identities, ..self }
    }

    /// The same, counting its connections there.
    #[must_use]
    pub fn counted_in(self, open: OpenConnections) -> Self {
        Self { open, ..self }
    }

    /// The address, with the port that the system chose for port 0; a Unix socket has none.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        match &self.socket {
            Socket::Tcp(listener) => listener.local_addr(),
            Socket::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Accepts connections until `stop`, for tonic's `serve_with_incoming`.
    pub fn incoming(
        self,
        stop: CancellationToken,
    ) -> impl Stream<Item = io::Result<ServerStream>> + Send {
        let (sender, receiver) = mpsc::channel(HANDSHAKES_MAX);
        tokio::spawn(async move {
            stop.run_until_cancelled(self.accept(sender)).await;
        });
        ReceiverStream::new(receiver)
    }

    async fn accept(self, sender: mpsc::Sender<io::Result<ServerStream>>) {
        let places = Places::default();
        loop {
            let Some(place) = places.any().await else { return };
            let accepted = match self.socket.accept().await {
                Ok(accepted) => accepted,
                Err(e) => {
                    // Most often the process has no descriptor left; others are being closed.
                    warn!(error = %e, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let place = match &accepted {
                Accepted::Tcp(_, peer) => match place.of(peer.ip()) {
                    Some(place) => place,
                    None => {
                        debug!(%peer, "an address has too many connections; one more was closed");
                        continue;
                    }
                },
                // Who comes by a Unix socket was let in by its file's mode.
                Accepted::Unix(_) => place,
            };
            let (tls, identities, sender) =
                (self.tls.clone(), self.identities.clone(), sender.clone());
            let (places, counters) = (places.clone(), self.open.clone());
            tokio::spawn(async move {
                let turn = tokio::time::timeout(HANDSHAKE_MAX, places.handshake(&place)).await;
                let Ok(Some(turn)) = turn else { return };
                let (tls, identities) = (tls.as_deref(), identities.as_deref());
                let peer = match &accepted {
                    Accepted::Tcp(_, peer) => *peer,
                    Accepted::Unix(_) => LOCAL_PEER,
                };
                let opened = async {
                    match accepted {
                        Accepted::Tcp(stream, peer) => {
                            open(stream, peer, tls, identities, place, &counters).await
                        }
                        Accepted::Unix(stream) => {
                            open_local(stream, identities, place, &counters).await
                        }
                    }
                };
                match tokio::time::timeout(HANDSHAKE_MAX, opened).await {
                    // The receiver is gone when the server stops.
                    Ok(Ok(Some(stream))) => drop(sender.send(Ok(stream)).await),
                    Ok(Ok(None)) => {}
                    Ok(Err(e)) if is_certificate_error(&e) => {
                        info!(%peer, error = %e, "a client's certificate was refused");
                    }
                    Ok(Err(e)) => debug!(%peer, error = %e, "a connection was refused"),
                    Err(_) => debug!(%peer, "a connection said nothing in time"),
                }
                drop(turn);
            });
        }
    }
}

/// A connection by a Unix socket, once it has begun to speak HTTP/2.
async fn open_local(
    stream: UnixStream,
    identities: Option<&IdentitiesFile>,
    place: Place,
    counters: &OpenConnections,
) -> io::Result<Option<ServerStream>> {
    let mut first = [0];
    let count = stream
        .async_io(Interest::READABLE, || {
            let (count, _) = rustix::net::recv(&stream, &mut first[..], RecvFlags::PEEK)?;
            Ok(count)
        })
        .await?;
    if count == 0 || first[0] != HTTP2_PREFACE {
        debug!(first_byte = first[0], "a local connection does not speak HTTP/2");
        return Ok(None);
    }
    let uid = stream.peer_cred()?.uid();
    let known = identities.and_then(|identities| identities.of_user(uid));
    let connection = Connection::local().certified_as(known);
    Ok(Some(ServerStream::new(Io::Local(stream), connection, place, counters)))
}

async fn open(
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<&ReloadedTls>,
    identities: Option<&IdentitiesFile>,
    place: Place,
    counters: &OpenConnections,
) -> io::Result<Option<ServerStream>> {
    stream.set_nodelay(true)?;
    let mut first = [0];
    if stream.peek(&mut first).await? == 0 {
        return Ok(None);
    }
    let (io, connection) = match (first[0], tls) {
        (TLS_HANDSHAKE, Some(tls)) => {
            let stream = BufReader::with_capacity(READ_BUFFER_BYTES, stream);
            let acceptor = TlsAcceptor::from(Arc::clone(&tls.current().config));
            let stream = acceptor.accept(stream).await?;
            let session = stream.get_ref().1;
            let cipher = cipher_text(session);
            let binding = session
                .export_keying_material([0; 32], EXPORTER_LABEL, None)
                .map_err(io::Error::other)?;
            let certificate = session.peer_certificates().and_then(<[_]>::first);
            let certified = identities.zip(certificate).and_then(|(i, c)| i.of_certificate(c));
            let connection =
                Connection::encrypted_with(peer, cipher, binding).certified_as(certified);
            (Io::Tls(Box::new(stream)), connection)
        }
        (TLS_HANDSHAKE, None) => {
            refuse_tls(stream).await?;
            return Ok(None);
        }
        (HTTP2_PREFACE, _) => (Io::Plain(stream), Connection::plain(peer)),
        (other, _) => {
            debug!(%peer, first_byte = other, "a connection speaks neither TLS nor HTTP/2");
            return Ok(None);
        }
    };
    Ok(Some(ServerStream::new(io, connection, place, counters)))
}

/// Whether a handshake has failed since the client's certificate is missing or not believed.
fn is_certificate_error(error: &io::Error) -> bool {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(
        tls,
        Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented)
    )
}

/// Says that there is no TLS here, and makes sure that it is heard: closing a socket with unread
/// bytes would send a reset, which may overtake the answer.
async fn refuse_tls(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(NO_TLS_ANSWER).await?;
    stream.shutdown().await?;
    let mut rest = stream.take(DRAIN_BYTES_MAX);
    tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
    Ok(())
}

/// An accepted connection.
#[derive(Debug)]
pub struct ServerStream {
    io: Io,
    connection: ConnectionInfo,
    closing: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Ends a connection without a call; `None` once there was one.
    quiet: Option<Pin<Box<Sleep>>>,
    _counted: CountedConnection,
    _place: Place,
}

impl ServerStream {
    fn new(io: Io, connection: Connection, place: Place, open: &OpenConnections) -> Self {
        let protection = match &io {
            Io::Plain(_) => Protection::Plaintext,
            Io::Local(_) => Protection::Local,
            Io::Tls(_) => Protection::Tls,
        };
        let counted = open.count(protection);
        let closing = Box::pin(connection.closing().clone().cancelled_owned());
        let quiet = Some(Box::pin(tokio::time::sleep(QUIET_MAX)));
        let connection = ConnectionInfo(Arc::new(connection));
        Self { io, connection, closing, quiet, _counted: counted, _place: place }
    }

    /// An error once the connection is to be closed: asked by everything that may wait for the peer.
    fn check_open(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if self.closing.as_mut().poll(context).is_ready() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let Some(quiet) = &mut self.quiet else { return Ok(()) };
        if self.connection.0.has_called() {
            self.quiet = None;
        } else if quiet.as_mut().poll(context).is_ready() {
            debug!(peer = %self.connection.0.peer, "a connection without a call is closed");
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }
}

#[derive(Debug)]
enum Io {
    Plain(TcpStream),
    Local(UnixStream),
    Tls(Box<TlsStream<BufReader<TcpStream>>>),
}

impl Connected for ServerStream {
    type ConnectInfo = ConnectionInfo;

    fn connect_info(&self) -> ConnectionInfo {
        self.connection.clone()
    }
}

macro_rules! on_io {
    ($self:ident, $context:ident, $io:ident => $call:expr) => {{
        let stream = $self.get_mut();
        if let Err(closed) = stream.check_open($context) {
            return Poll::Ready(Err(closed));
        }
        match &mut stream.io {
            Io::Plain($io) => {
                let $io = Pin::new($io);
                $call
            }
            Io::Local($io) => {
                let $io = Pin::new($io);
                $call
            }
            Io::Tls($io) => {
                let $io = Pin::new($io.as_mut());
                $call
            }
        }
    }};
}

impl AsyncRead for ServerStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        on_io!(self, context, io => io.poll_read(context, buffer))
    }
}

impl AsyncWrite for ServerStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        on_io!(self, context, io => io.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        on_io!(self, context, io => io.poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(io) => io.is_write_vectored(),
            Io::Local(io) => io.is_write_vectored(),
            Io::Tls(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_io!(self, context, io => io.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_io!(self, context, io => io.poll_shutdown(context))
    }
}
