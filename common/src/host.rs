//! What tells one host and one directory from another.

use std::{
    io,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::Path,
};

use bytes::Bytes;

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
