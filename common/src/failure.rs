//! `Failure`: what went wrong as the other side is told, and the only mapping to and from
//! `tonic::Status`.
//!
//! Modules have their own error types where a caller tells cases apart; on the way out each
//! becomes a `Failure`, which carries a gRPC code, a stable reason, and MySQL's error number where
//! its clone plugin has one.

pub mod reasons;

use std::{borrow::Cow, collections::BTreeMap, fmt, io, path::Path, time::Duration};

use marcot_proto::common::v1 as pb;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::rights;

/// The ErrorInfo domain of all of Marcot's reasons.
pub const DOMAIN: &str = "marcot.dev";

/// Longest text taken over from a peer, bytes: it ends in logs and in the status.
const PEER_TEXT_BYTES_MAX: usize = 1024;

/// Most broken preconditions that one failure tells: more than there are checks.
const VIOLATIONS_MAX: usize = 64;

/// One broken precondition, for PreconditionFailure details.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Stable name of the check.
    pub check: String,
    /// What it looked at, e.g. a path.
    pub subject: String,
    /// For a person.
    pub description: String,
}

/// What went wrong, for a caller on the other side of a wire.
#[derive(Debug, Clone)]
pub struct Failure {
    /// gRPC's code.
    pub code: Code,
    /// Stable reason, UPPER_SNAKE_CASE.
    pub reason: Cow<'static, str>,
    /// For a person: the thing, both values, the next action. Lower case, no full stop.
    pub message: String,
    /// MySQL's error number, where it has one.
    pub mysql_error: Option<u32>,
    /// Facts for a program.
    pub metadata: BTreeMap<String, String>,
    /// When to try again.
    pub retry_after: Option<Duration>,
    /// All broken preconditions.
    pub violations: Vec<Violation>,
}

impl Failure {
    /// A failure with a code, a stable reason and a text.
    #[must_use]
    pub fn new(code: Code, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason: Cow::Borrowed(reason),
            message: message.into(),
            mysql_error: None,
            metadata: BTreeMap::new(),
            retry_after: None,
            violations: Vec::new(),
        }
    }

    /// The caller's request is wrong whatever the state.
    #[must_use]
    pub fn invalid(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, reason, message)
    }

    /// The request is right, the state is not.
    #[must_use]
    pub fn precondition(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(Code::FailedPrecondition, reason, message)
    }

    /// The peer sent what no right peer sends.
    #[must_use]
    pub fn peer_misbehaved(message: impl Into<String>) -> Self {
        Self::new(Code::DataLoss, "PEER_MISBEHAVED", message).mysql(3863)
    }

    /// This host's operating system refused something.
    #[must_use]
    pub fn io(action: &str, path: &Path, error: &io::Error) -> Self {
        let (code, reason) = match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => (Code::ResourceExhausted, "DISK_FULL"),
            Some(libc::EACCES | libc::EPERM) => (Code::FailedPrecondition, "FILE_ACCESS_DENIED"),
            Some(libc::EROFS) => (Code::FailedPrecondition, "READ_ONLY_FILE_SYSTEM"),
            Some(libc::EMFILE | libc::ENFILE) => (Code::ResourceExhausted, "TOO_MANY_OPEN_FILES"),
            _ => (Code::Internal, "IO_ERROR"),
        };
        let text = format!("{action} {}: {error}", path.display());
        if reason == "FILE_ACCESS_DENIED" && path.is_absolute() {
            return Self::new(code, reason, format!("{text}: {}", rights::describe(path)));
        }
        Self::new(code, reason, text)
    }

    /// A state that this program's own logic excludes.
    #[must_use]
    pub fn bug(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, "BUG", message)
    }

    /// Not available in this version.
    #[must_use]
    pub fn unimplemented(what: &str) -> Self {
        Self::new(
            Code::Unimplemented,
            "NOT_AVAILABLE",
            format!("{what} is not available in version {}", env!("CARGO_PKG_VERSION")),
        )
    }

    /// Adds MySQL's number.
    #[must_use]
    pub fn mysql(mut self, number: u32) -> Self {
        self.mysql_error = Some(number);
        self
    }

    /// Adds a fact.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl fmt::Display) -> Self {
        self.metadata.insert(key.to_owned(), value.to_string());
        self
    }

    /// Adds when to try again.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// All of several failures as one: the first one's code, reason and number, and a violation for
    /// each. `None` when there is none.
    #[must_use]
    pub fn all_of(failures: Vec<Self>) -> Option<Self> {
        let violations: Vec<Violation> = failures.iter().flat_map(Self::as_violations).collect();
        let mut first = failures.into_iter().next()?;
        if violations.len() > 1 {
            first.violations = violations;
        }
        Some(first)
    }

    /// Its violations, or itself as one.
    fn as_violations(&self) -> Vec<Violation> {
        if !self.violations.is_empty() {
            return self.violations.clone();
        }
        vec![Violation {
            check: self.reason.to_string(),
            subject: self.mysql_error.map(|number| number.to_string()).unwrap_or_default(),
            description: self.message.clone(),
        }]
    }

    /// Its reason as a label of metrics: one of a list that does not grow.
    #[must_use]
    pub fn label(&self) -> &'static str {
        reasons::label(&self.reason)
    }

    /// Whether the same call may succeed later without anyone's doing.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.code == Code::Unavailable
            || (self.code == Code::ResourceExhausted && self.retry_after.is_some())
    }

    /// Wraps a failure that the donor has told, as the plugin does with 3862.
    #[must_use]
    pub fn from_donor(mut self) -> Self {
        if let Some(inner) = self.mysql_error.filter(|&n| n != 3862 && n != 3863) {
            self.metadata.insert("donor_mysql_error".to_owned(), inner.to_string());
        }
        self.message = format!("donor: {}", self.message);
        self.mysql_error = Some(3862);
        self
    }

    /// Reads what a peer answered.
    #[must_use]
    pub fn from_status(status: &Status) -> Self {
        let details = status.get_error_details();
        let info = details.error_info();
        let ours = info.filter(|info| info.domain == DOMAIN);
        let reason = match ours {
            Some(info) => Cow::Owned(clip(&info.reason)),
            None => Cow::Borrowed(match status.code() {
                Code::Unavailable => "PEER_UNREACHABLE",
                Code::Unimplemented => "PEER_LACKS_METHOD",
                Code::Cancelled => "CANCELLED",
                Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
                _ => "PEER_ERROR",
            }),
        };
        let mut metadata: BTreeMap<String, String> = ours
            .map(|info| info.metadata.iter().take(32).map(|(k, v)| (clip(k), clip(v))).collect())
            .unwrap_or_default();
        let mysql_error = metadata.remove("mysql_error").and_then(|n| n.parse().ok());
        let retry_after = details.retry_info().and_then(|retry| retry.retry_delay);
        let violations = details
            .precondition_failure()
            .map(|failure| failure.violations.iter().take(VIOLATIONS_MAX))
            .into_iter()
            .flatten()
            .map(|v| Violation {
                check: clip(&v.r#type),
                subject: clip(&v.subject),
                description: clip(&v.description),
            })
            .collect();
        Self {
            code: status.code(),
            reason,
            message: clip(status.message()),
            mysql_error,
            metadata,
            retry_after,
            violations,
        }
    }

    /// What a caller is answered.
    #[must_use]
    pub fn to_status(&self) -> Status {
        let mut metadata = self.metadata.clone();
        if let Some(number) = self.mysql_error {
            metadata.insert("mysql_error".to_owned(), number.to_string());
        }
        let mut details = ErrorDetails::new();
        let metadata: std::collections::HashMap<_, _> = metadata.into_iter().collect();
        details.set_error_info(self.reason.as_ref(), DOMAIN, metadata);
        if let Some(wait) = self.retry_after {
            details.set_retry_info(Some(wait));
        }
        for v in &self.violations {
            details.add_precondition_failure_violation(&v.check, &v.subject, &v.description);
        }
        Status::with_error_details(self.code, &self.message, details)
    }

    /// What stands inside a message.
    #[must_use]
    pub fn to_wire(&self) -> pb::Failure {
        pb::Failure {
            error_number: self.mysql_error.unwrap_or(0),
            reason: self.reason.to_string(),
            message: self.message.clone(),
            code: self.code as i32,
            metadata: self.metadata.clone().into_iter().collect(),
            violations: self
                .violations
                .iter()
                .take(VIOLATIONS_MAX)
                .map(|v| pb::Violation {
                    check: v.check.clone(),
                    subject: v.subject.clone(),
                    description: v.description.clone(),
                })
                .collect(),
        }
    }

    /// Reads what stood inside a message.
    #[must_use]
    pub fn from_wire(failure: &pb::Failure) -> Self {
        Self {
            code: Code::from_i32(failure.code),
            reason: Cow::Owned(clip(&failure.reason)),
            message: clip(&failure.message),
            mysql_error: Some(failure.error_number).filter(|&n| n != 0),
            metadata: failure.metadata.iter().take(32).map(|(k, v)| (clip(k), clip(v))).collect(),
            retry_after: None,
            violations: failure
                .violations
                .iter()
                .take(VIOLATIONS_MAX)
                .map(|v| Violation {
                    check: clip(&v.check),
                    subject: clip(&v.subject),
                    description: clip(&v.description),
                })
                .collect(),
        }
    }
}

/// An error's text with those of its sources: transport errors say little by themselves.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        source = error.source();
    }
    text
}

/// Cuts a peer's text to a bound and takes control characters out: it ends in logs and terminals.
fn clip(text: &str) -> String {
    let mut end = text.len().min(PEER_TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        failure.to_status()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_carries_reason_number_facts_and_retry_both_ways() {
        let sent = Failure::precondition("PATH_IN_DATADIR", "no")
            .mysql(3632)
            .with("path", "/p")
            .retry_after(Duration::from_secs(3));
        let got = Failure::from_status(&sent.to_status());
        assert_eq!(got.code, Code::FailedPrecondition);
        assert_eq!(got.reason, "PATH_IN_DATADIR");
        assert_eq!(got.mysql_error, Some(3632));
        assert_eq!(got.metadata.get("path").map(String::as_str), Some("/p"));
        assert_eq!(got.retry_after, Some(Duration::from_secs(3)));
    }

    #[test]
    fn a_peers_text_is_cut_and_cleaned() {
        let status = Status::internal(format!("\x1b[31m{}", "é".repeat(2000)));
        let got = Failure::from_status(&status);
        assert!(got.message.len() <= PEER_TEXT_BYTES_MAX);
        assert!(!got.message.contains('\x1b'));
    }
}
