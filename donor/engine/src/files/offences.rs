//! What a clone cannot carry, gathered so that a person sees all of it at once.

use marcot_common::failure::{Failure, Violation};

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
}

impl Offence {
    fn reason(self) -> &'static str {
        match self {
            Self::LinkLeavesTree => "LINK_LEAVES_TREE",
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
    found: Vec<(Offence, String)>,
}

impl Offences {
    /// Notes one.
    pub(crate) fn add(&mut self, offence: Offence, path: &[u8]) {
        let shown = path[..path.len().min(SUBJECT_BYTES_MAX)].escape_ascii();
        self.found.push((offence, shown.to_string()));
    }

    /// Whether no more are wanted.
    pub(crate) fn is_full(&self) -> bool {
        self.found.len() >= OFFENCES_MAX
    }

    /// All of them as one failure.
    pub(crate) fn into_failure(self) -> Option<Failure> {
        let (first, path) = self.found.first()?;
        let count = self.found.len();
        let mut message = format!("`{path}` {}", first.text());
        if count > 1 {
            let or_more = if count >= OFFENCES_MAX { " or more" } else { "" };
            message = format!("{message}, and {}{or_more} others cannot be cloned", count - 1);
        }
        message += "; move them out of the data directory, or use an engine that knows them";
        let mut failure = Failure::precondition(first.reason(), message).with("path", path);
        failure.mysql_error = self.found.iter().find_map(|(o, _)| o.mysql_error());
        let mut bytes = 0;
        for (offence, subject) in self.found {
            let violation = Violation {
                check: offence.reason().to_owned(),
                subject,
                description: offence.text().to_owned(),
            };
            bytes += violation.check.len() + violation.subject.len() + violation.description.len();
            if bytes > TEXT_BYTES_MAX {
                break;
            }
            failure.violations.push(violation);
        }
        Some(failure.with("offenders", count))
    }
}
