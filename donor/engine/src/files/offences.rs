//! What a clone cannot carry, gathered so that a person sees all of it at once.

use std::path::Path;

use marcot_common::{
    failure::{Failure, Violation},
    rights,
};

/// Most offenders reported; the walk ends at that many.
const OFFENCES_MAX: usize = 100;

/// Most bytes of offenders' text that travel. They go out in HTTP/2 trailers, in base64, and
/// peers commonly refuse trailers over 16 KiB.
const TEXT_BYTES_MAX: usize = 6 << 10;

/// Longest name shown, bytes.
const SUBJECT_BYTES_MAX: usize = 256;

/// Why an entry is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offence {
    Fifo,
    Device,
    UnknownType,
    IslFile,
    LinkLeavesTree,
    LinkMalformed,
    PathTooLong,
    ExtendedAttributesTooLarge,
    Unreadable,
}

impl Offence {
    fn reason(self) -> &'static str {
        match self {
            Self::LinkLeavesTree => "LINK_LEAVES_TREE",
            Self::Unreadable => "FILE_ACCESS_DENIED",
            _ => "UNSUPPORTED_FILE",
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Fifo => "is a fifo",
            Self::Device => "is a device",
            Self::UnknownType => "is of a type that cannot be cloned",
            Self::IslFile => "points to a tablespace outside the directory",
            Self::LinkLeavesTree => "is a symbolic link that leaves the directory",
            Self::LinkMalformed => "is a symbolic link with a bad target",
            Self::PathTooLong => "has a path over 4095 bytes",
            Self::ExtendedAttributesTooLarge => "has over 64 KiB of extended attributes",
            Self::Unreadable => "may not be read",
        }
    }

    /// MySQL's number for a data file whose absolute path lies outside the data directory.
    fn mysql_error(self) -> Option<u32> {
        matches!(self, Self::IslFile | Self::LinkLeavesTree).then_some(1086)
    }
}

/// The offenders of one walk.
#[derive(Debug, Default)]
pub(crate) struct Offences {
    found: Vec<(Offence, String, String)>,
}

impl Offences {
    /// Notes one.
    pub(crate) fn add(&mut self, offence: Offence, path: &[u8]) {
        let shown = path[..path.len().min(SUBJECT_BYTES_MAX)].escape_ascii();
        self.found.push((offence, shown.to_string(), offence.text().to_owned()));
    }

    /// Notes one that this process may not read: whose it is, and which capability is missing.
    pub(crate) fn add_unreadable(&mut self, path: &Path) {
        let offence = Offence::Unreadable;
        let why = format!("{}: {}", offence.text(), rights::describe(path));
        self.found.push((offence, path.display().to_string(), why));
    }

    /// Whether no more are wanted.
    pub(crate) fn is_full(&self) -> bool {
        self.found.len() >= OFFENCES_MAX
    }

    /// All of them as one failure.
    pub(crate) fn into_failure(self) -> Option<Failure> {
        let (first, path, why) = self.found.first()?;
        let count = self.found.len();
        let mut message = format!("`{path}` {why}");
        if count > 1 {
            let or_more = if count >= OFFENCES_MAX { " or more" } else { "" };
            message = format!("{message}, and {}{or_more} others cannot be cloned", count - 1);
        }
        message += match first {
            Offence::Unreadable => {
                "; run this process as their owner, let it read them, or give it the capability"
            }
            _ => "; move them out of the data directory, or use an engine that knows them",
        };
        let mut failure = Failure::precondition(first.reason(), message).with("path", path);
        failure.mysql_error = self.found.iter().find_map(|(o, ..)| o.mysql_error());
        let mut bytes = 0;
        for (offence, subject, description) in self.found {
            let violation = Violation { check: offence.reason().to_owned(), subject, description };
            bytes += violation.check.len() + violation.subject.len() + violation.description.len();
            if bytes > TEXT_BYTES_MAX {
                break;
            }
            failure.violations.push(violation);
        }
        Some(failure.with("offenders", count))
    }
}
