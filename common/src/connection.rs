//! What a server knows of one connection: its peer, its encryption, and who has logged in on it.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tokio_util::sync::CancellationToken;

/// What an account may do, named as in MySQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Privilege {
    /// Be cloned from; clone locally, or to a new data directory.
    BackupAdmin,
    /// Replace the recipient's own data.
    CloneAdmin,
    /// Look, and change nothing. The others include it.
    Monitor,
}

impl Privilege {
    /// All privileges.
    pub const ALL: [Self; 3] = [Self::BackupAdmin, Self::CloneAdmin, Self::Monitor];
}

impl fmt::Display for Privilege {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BackupAdmin => "BACKUP_ADMIN",
            Self::CloneAdmin => "CLONE_ADMIN",
            Self::Monitor => "MONITOR",
        })
    }
}

impl FromStr for Privilege {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|p| p.to_string().eq_ignore_ascii_case(text)).ok_or_else(|| {
            format!("`{text}` is no privilege: BACKUP_ADMIN, CLONE_ADMIN and MONITOR are")
        })
    }
}

/// Who has logged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Account.
    pub user: String,
    /// Its privileges at the log-in.
    pub privileges: Vec<Privilege>,
    /// A log-in by a clone's key is good for this snapshot only.
    pub snapshot: Option<String>,
}

impl Identity {
    /// Whether the account may do this.
    #[must_use]
    pub fn may(&self, privilege: Privilege) -> bool {
        self.privileges.contains(&privilege)
            || (privilege == Privilege::Monitor && !self.privileges.is_empty())
    }
}

/// The address of who comes by a Unix socket: this host's, without a port.
pub const LOCAL_PEER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// A connection's number: no other one of this process has it, also when it has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionNumber(u64);

impl ConnectionNumber {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    /// Which one it is.
    pub number: ConnectionNumber,
    /// The other end.
    pub peer: SocketAddr,
    /// Whether it came by a Unix socket.
    pub is_local: bool,
    /// Protocol and cipher suite, e.g. `TLSv1.3 AES_128_GCM_SHA256`; empty in plaintext.
    pub cipher: String,
    /// Of an encrypted connection: what binds a log-in to it (RFC 9266 tls-exporter).
    pub channel_binding: Option<[u8; 32]>,
    /// Whom the client's certificate, or its user on this host, makes it.
    certified: Option<Identity>,
    identity: OnceLock<Identity>,
    has_called: AtomicBool,
    /// Cancelled to close it.
    closing: CancellationToken,
}

impl Connection {
    /// A plaintext connection that nobody has logged in on.
    #[must_use]
    pub fn plain(peer: SocketAddr) -> Self {
        Self {
            number: ConnectionNumber::next(),
            peer,
            is_local: false,
            cipher: String::new(),
            channel_binding: None,
            certified: None,
            identity: OnceLock::new(),
            has_called: AtomicBool::new(false),
            closing: CancellationToken::new(),
        }
    }

    /// A connection by a Unix socket that nobody has logged in on.
    #[must_use]
    pub fn local() -> Self {
        Self { is_local: true, ..Self::plain(LOCAL_PEER) }
    }

    /// An encrypted connection that nobody has logged in on.
    #[must_use]
    pub fn encrypted_with(peer: SocketAddr, cipher: String, channel_binding: [u8; 32]) -> Self {
        let channel_binding = Some(channel_binding);
        Self { cipher, channel_binding, ..Self::plain(peer) }
    }

    /// The same, of a client whom its certificate, or its user on this host, makes somebody.
    #[must_use]
    pub fn certified_as(self, certified: Option<Identity>) -> Self {
        Self { certified, ..self }
    }

    /// Whether it is encrypted.
    #[must_use]
    pub fn encrypted(&self) -> bool {
        self.channel_binding.is_some()
    }

    /// Who has logged in, or else whom its certificate makes the client.
    #[must_use]
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.get().or(self.certified.as_ref())
    }

    /// Whether a secret may be taken from it: it is encrypted, or never leaves the host.
    #[must_use]
    pub fn is_confidential(&self) -> bool {
        self.encrypted() || self.peer.ip().to_canonical().is_loopback()
    }

    /// A call has come on it.
    pub(crate) fn note_call(&self) {
        self.has_called.store(true, Ordering::Relaxed);
    }

    /// Whether any call has come on it.
    pub(crate) fn has_called(&self) -> bool {
        self.has_called.load(Ordering::Relaxed)
    }

    /// Closes it, whatever runs on it: for a caller that takes nothing more, so that nothing can be
    /// told to it either.
    pub fn close(&self) {
        self.closing.cancel();
    }

    /// Cancelled once it is to be closed.
    pub(crate) fn closing(&self) -> &CancellationToken {
        &self.closing
    }

    /// Whether somebody has logged in on it, rather than being known by a certificate.
    #[must_use]
    pub fn has_logged_in(&self) -> bool {
        self.identity.get().is_some()
    }

    /// Logs in, once: false when somebody has before.
    pub(crate) fn log_in(&self, identity: Identity) -> bool {
        self.identity.set(identity).is_ok()
    }
}

/// The connection that a request came on, as an extension of the request.
#[derive(Debug, Clone)]
pub struct ConnectionInfo(pub Arc<Connection>);
