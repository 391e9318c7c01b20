//! Where a daemon takes calls: an address, or a Unix socket, whose file's mode says who may connect.

use std::{
    fmt,
    fs::Permissions,
    io,
    net::SocketAddr,
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    str::FromStr,
};

use tokio::net::UnixListener;

use crate::{config::parse_listen_address, host::file_identity};

/// Longest path of a socket, bytes: `sun_path` of Linux, without its last NUL.
const PATH_BYTES_MAX: usize = 107;

/// Name of a socket while it is made, in a directory of its own.
const NEW_NAME: &str = "s";

/// Where calls are taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddress {
    /// An address and a port.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(path) = text.strip_prefix("unix:") else {
            return parse_listen_address(text)
                .map(Self::Tcp)
                .map_err(|e| format!("{e}, or unix:/PATH"));
        };
        let path = PathBuf::from(path);
        let most = PATH_BYTES_MAX;
        match path.as_os_str().len() {
            _ if !path.is_absolute() || path.file_name().is_none() => {
                Err(format!("`{text}`: write unix:/PATH with an absolute path"))
            }
            length if length > most => {
                Err(format!("`{text}`: the path has {length} bytes, a socket's has {most} at most"))
            }
            _ => Ok(Self::Unix(path)),
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Reads the mode of a socket's file: its owner alone, or its group as well.
pub fn parse_socket_mode(text: &str) -> Result<u32, String> {
    match text.trim_start_matches('0') {
        "600" => Ok(0o600),
        "660" => Ok(0o660),
        _ => Err("a socket has mode 0600, or 0660 for its group as well".to_owned()),
    }
}

/// A Unix socket that is listened on; its file goes with it.
#[derive(Debug)]
pub struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
    identity: (u64, u64),
}

impl UnixSocket {
    /// Listens at `path`, in the place of a socket that nobody listens on any more.
    pub fn bind(path: &Path, mode: u32) -> io::Result<Self> {
        refuse_other(path)?;
        let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        // Made in a directory that is ours alone, so that nobody connects before it has its mode, and
        // put in its place by one rename, so that nobody finds half of it.
        let private = tempfile::Builder::new().prefix(".m").tempdir_in(parent)?;
        let new = private.path().join(NEW_NAME);
        if new.as_os_str().len() > PATH_BYTES_MAX {
            let text = format!(
                "the directory's path is too long: a socket is made as {}, which has more than \
                 {PATH_BYTES_MAX} bytes",
                new.display()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let listener = UnixListener::bind(&new)?;
        std::fs::set_permissions(&new, Permissions::from_mode(mode))?;
        rustix::fs::rename(&new, path)?;
        Ok(Self { listener, path: path.to_owned(), identity: file_identity(path)? })
    }

    /// The socket.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        // Another daemon may have put its own there.
        if file_identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            drop(std::fs::remove_file(&self.path));
        }
    }
}

/// Only a socket that nobody answers at makes way.
fn refuse_other(path: &Path) -> io::Result<()> {
    let metadata = match path.symlink_metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let refuse = |kind, text: &str| Err(io::Error::new(kind, text));
    if !metadata.file_type().is_socket() {
        return refuse(
            io::ErrorKind::AlreadyExists,
            "something that is no socket is there; move it away, or name another path",
        );
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(e) => Err(e),
        Ok(_) => refuse(
            io::ErrorKind::AddrInUse,
            "another process listens there; end it, or name another path",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_port_or_an_absolute_path() {
        assert_eq!(
            "unix:/run/m.sock".parse(),
            Ok(ListenAddress::Unix(PathBuf::from("/run/m.sock")))
        );
        assert!(matches!("127.0.0.1:1".parse(), Ok(ListenAddress::Tcp(_))));
        for bad in ["unix:", "unix:m.sock", "unix:/", "/run/m.sock", "host:1"] {
            bad.parse::<ListenAddress>().unwrap_err();
        }
        let long = format!("unix:/{}", "x".repeat(PATH_BYTES_MAX));
        assert!(long.parse::<ListenAddress>().unwrap_err().contains("108 bytes"));
        assert_eq!((parse_socket_mode("0600"), parse_socket_mode("660")), (Ok(0o600), Ok(0o660)));
        parse_socket_mode("0666").unwrap_err();
    }

    /// Guards against a socket that others reach, one that a killed daemon has left and that keeps the
    /// next from starting, and one that is taken from a daemon that lives.
    #[tokio::test]
    async fn a_socket_has_its_mode_replaces_a_stale_one_and_no_living_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.sock");
        let socket = UnixSocket::bind(&path, 0o660).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o660);
        let taken = UnixSocket::bind(&path, 0o600).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        drop(socket);
        assert!(!path.exists(), "it goes with its daemon");
        // As a kill leaves it.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let socket = UnixSocket::bind(&path, 0o600).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        drop(socket);
        std::fs::write(&path, "kept").unwrap();
        UnixSocket::bind(&path, 0o600).unwrap_err();
        assert_eq!(std::fs::read(&path).unwrap(), b"kept");
    }
}
