//! What tells one host and one directory from another.

use std::{
    io,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::Path,
};

use bytes::Bytes;

use crate::failure::Failure;

/// The operating system, as MySQL's version_compile_os.
pub const OS: &str = "Linux";

/// A digest of this host's identity: equal for processes on one host since its boot, and of no
/// other use (the machine id itself is confidential, machine-id(5)).
#[must_use]
pub fn host_id() -> [u8; 32] {
    let mut text = b"marcot host id v1\0".to_vec();
    for file in ["/etc/machine-id", "/proc/sys/kernel/random/boot_id"] {
        text.extend(std::fs::read(file).unwrap_or_default());
        text.push(0);
    }
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &text);
    let mut id = [0; 32];
    id.copy_from_slice(digest.as_ref());
    id
}

/// Device and inode.
pub fn file_identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// A path as bytes.
#[must_use]
pub fn path_bytes(path: &Path) -> Bytes {
    Bytes::copy_from_slice(path.as_os_str().as_bytes())
}

/// Reads `HOST:PORT` or `[IPV6]:PORT`.
pub fn host_and_port(text: &str) -> Result<(String, u16), Failure> {
    let bad = || {
        let text = text.escape_debug();
        Failure::invalid("BAD_ADDRESS", format!("`{text}` is no HOST:PORT or [IPV6]:PORT"))
    };
    let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
    let literal = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host = literal.unwrap_or(host);
    if host.is_empty() || (literal.is_none() && host.contains(':')) {
        return Err(bad());
    }
    let port = port.parse().ok().filter(|&port: &u16| port != 0).ok_or_else(bad)?;
    Ok((host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_name_or_a_literal_with_a_port() {
        let good = |text: &str| host_and_port(text).unwrap();
        assert_eq!(good("db:1"), ("db".to_owned(), 1));
        assert_eq!(good("[::1]:65535"), ("::1".to_owned(), 65535));
        for bad in ["db", "db:", "db:0", "db:65536", "::1:5", ":5", "[::1]"] {
            host_and_port(bad).unwrap_err();
        }
    }
}
