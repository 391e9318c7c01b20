//! Extended attributes and POSIX ACLs of an open file or directory.

use std::os::fd::BorrowedFd;

use marcot_common::wire::{EXTENDED_ATTRIBUTE_BYTES_MAX, extended_attribute_travels};
use rustix::io::Errno;

/// The kernel's bound for a list of names (XATTR_LIST_MAX) and for one value (XATTR_SIZE_MAX).
const BUFFER_BYTES: usize = 64 << 10;

/// Why attributes cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    /// Over what an entry may carry.
    #[error("extended attributes take more than 64 KiB")]
    TooLarge,
    /// The system refused.
    #[error(transparent)]
    System(#[from] Errno),
}

/// Attributes by ascending name.
pub(crate) type Extended = Vec<(Box<[u8]>, Box<[u8]>)>;

/// Reads attributes; one for a whole walk.
#[derive(Debug)]
pub(crate) struct AttributeReader {
    names: Vec<u8>,
    value: Vec<u8>,
}

impl AttributeReader {
    pub(crate) fn new() -> Self {
        Self { names: vec![0; BUFFER_BYTES], value: vec![0; BUFFER_BYTES] }
    }

    /// Reads those that travel.
    pub(crate) fn read(&mut self, fd: BorrowedFd<'_>) -> Result<Extended, Error> {
        let length = match rustix::fs::flistxattr(fd, &mut self.names[..]) {
            Ok(length) => length,
            // The file system has none.
            Err(Errno::NOTSUP) => 0,
            Err(Errno::RANGE) => return Err(Error::TooLarge),
            Err(other) => return Err(other.into()),
        };
        let mut extended = Extended::new();
        let mut bytes = 0;
        for name in self.names[..length].split(|&b| b == 0) {
            if !extended_attribute_travels(name) {
                continue;
            }
            let length = match rustix::fs::fgetxattr(fd, name, &mut self.value[..]) {
                Ok(length) => length,
                // Taken away meanwhile: the changed ctime tells.
                Err(Errno::NODATA) => continue,
                Err(Errno::RANGE) => return Err(Error::TooLarge),
                Err(other) => return Err(other.into()),
            };
            bytes += name.len() + length;
            if bytes > EXTENDED_ATTRIBUTE_BYTES_MAX {
                return Err(Error::TooLarge);
            }
            extended.push((name.into(), self.value[..length].into()));
        }
        extended.sort_unstable();
        Ok(extended)
    }
}
