//! Security labels (SELinux): what replaces a server's data has theirs, or the server may not read it
//! (R13).

use std::{fs::File, io, path::Path};

use rustix::{fs::XattrFlags, io::Errno};

/// The extended attribute that a label is.
const NAME: &str = "security.selinux";

/// Longest label that is taken: contexts have some dozens of bytes.
const BYTES_MAX: usize = 4096;

/// A label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label(Vec<u8>);

impl Label {
    /// Of a file or directory; `None` where there are no labels.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        let mut value = vec![0; BYTES_MAX];
        let length = rustix::fs::lgetxattr(path, NAME, &mut value[..]).ok()?;
        value.truncate(length);
        Some(Self(value))
    }

    /// Gives it to an open file that has another one, or none.
    pub fn give(&self, file: &File) -> io::Result<()> {
        let mut present = vec![0; BYTES_MAX];
        match rustix::fs::fgetxattr(file, NAME, &mut present[..]) {
            // What a directory hands down is right already, and setting it may be forbidden.
            Ok(length) if present[..length] == self.0 => return Ok(()),
            Ok(_) | Err(Errno::NODATA) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(rustix::fs::fsetxattr(file, NAME, &self.0, XattrFlags::empty())?)
    }
}
