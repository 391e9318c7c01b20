//! A path below the data directory that cannot leave it.

use std::{cmp::Ordering, ffi::OsStr, fmt, os::unix::ffi::OsStrExt, path::Path};

/// Longest path, bytes: Linux's PATH_MAX less the terminating NUL.
pub const PATH_BYTES_MAX: usize = 4095;

/// Longest component, bytes: Linux's NAME_MAX.
pub const NAME_BYTES_MAX: usize = 255;

/// A relative path of ordinary components: no `..`, no empty or `.` component, no NUL, not
/// absolute, not too long. Any other byte is allowed.
///
/// Ordered component by component, so a directory comes before what is in it, and everything in
/// it before the directory's next sibling.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RelativePath(Box<[u8]>);

/// Why bytes are no relative path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// Nothing is there.
    #[error("path is empty")]
    Empty,
    /// The path is longer than the system allows.
    #[error("path has {0} bytes, at most {PATH_BYTES_MAX} are allowed")]
    TooLong(usize),
    /// A component is longer than the system allows.
    #[error("path component has {0} bytes, at most {NAME_BYTES_MAX} are allowed")]
    NameTooLong(usize),
    /// The path starts with a slash.
    #[error("path is absolute")]
    Absolute,
    /// A component is empty, `.` or `..`.
    #[error("path has an empty, `.` or `..` component")]
    BadComponent,
    /// A NUL byte is in it.
    #[error("path holds a NUL byte")]
    Nul,
}

impl RelativePath {
    /// Checks `bytes` and takes them.
    pub fn new(bytes: &[u8]) -> Result<Self, PathError> {
        if bytes.is_empty() {
            return Err(PathError::Empty);
        }
        if bytes.len() > PATH_BYTES_MAX {
            return Err(PathError::TooLong(bytes.len()));
        }
        if bytes[0] == b'/' {
            return Err(PathError::Absolute);
        }
        for component in bytes.split(|&b| b == b'/') {
            if component.contains(&0) {
                return Err(PathError::Nul);
            }
            if component.len() > NAME_BYTES_MAX {
                return Err(PathError::NameTooLong(component.len()));
            }
            if matches!(component, b"" | b"." | b"..") {
                return Err(PathError::BadComponent);
            }
        }
        Ok(Self(bytes.into()))
    }

    /// The path's bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The path as the standard library wants it.
    #[must_use]
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    /// The directory that the path is in; `None` at the top of the tree.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        let slash = self.0.iter().rposition(|&b| b == b'/')?;
        Some(Self(self.0[..slash].into()))
    }

    /// The last component.
    #[must_use]
    pub fn name(&self) -> &[u8] {
        self.0.rsplit(|&b| b == b'/').next().unwrap_or_default()
    }

    /// Appends one component.
    pub fn join(&self, name: &[u8]) -> Result<Self, PathError> {
        Self::new(&[&self.0, &b"/"[..], name].concat())
    }

    /// Whether the path lies below `directory`.
    #[must_use]
    pub fn is_below(&self, directory: &Self) -> bool {
        self.0.len() > directory.0.len()
            && self.0.starts_with(&directory.0)
            && self.0[directory.0.len()] == b'/'
    }
}

impl Ord for RelativePath {
    fn cmp(&self, other: &Self) -> Ordering {
        // NUL occurs in no path, so a slash may stand for it: below every other byte.
        let key = |&b: &u8| if b == b'/' { 0 } else { b };
        self.0.iter().map(key).cmp(other.0.iter().map(key))
    }
}

impl PartialOrd for RelativePath {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Debug for RelativePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Shown quoted and escaped: a name may hold a newline, or bytes that are no UTF-8.
impl fmt::Display for RelativePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", self.0.escape_ascii())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(s: &str) -> RelativePath {
        RelativePath::new(s.as_bytes()).unwrap()
    }

    #[test]
    fn refuses_paths_that_could_leave_the_tree() {
        for (bytes, error) in [
            (&b""[..], PathError::Empty),
            (b"/etc", PathError::Absolute),
            (b"..", PathError::BadComponent),
            (b"a/../b", PathError::BadComponent),
            (b"a/./b", PathError::BadComponent),
            (b"a//b", PathError::BadComponent),
            (b"a/", PathError::BadComponent),
            (b"a\0b", PathError::Nul),
        ] {
            assert_eq!(RelativePath::new(bytes), Err(error), "{bytes:?}");
        }
        assert_eq!(RelativePath::new(&[b'a'; 256]), Err(PathError::NameTooLong(256)));
        let long = [b"abcdefg".as_slice(); 600].join(&b'/');
        assert_eq!(RelativePath::new(&long), Err(PathError::TooLong(long.len())));
    }

    #[test]
    fn a_directory_and_its_content_come_before_its_next_sibling() {
        let mut paths = ["a-b", "a/z", "a", "a.b", "a/b/c", "a/b", "b"].map(path);
        paths.sort();
        assert_eq!(paths, ["a", "a/b", "a/b/c", "a/z", "a-b", "a.b", "b"].map(path));
    }
}
