//! What the checks have found, all of it, and the one error that tells all that has failed.

use marcot_common::failure::{Failure, Violation};
use marcot_proto::recipient::v1 as pb;

/// All findings so far, and the first failure among them.
#[derive(Debug, Default)]
pub struct Findings {
    list: Vec<pb::Finding>,
    first: Option<Failure>,
}

impl Findings {
    /// A check that passed.
    pub fn passed(&mut self, check: &str, message: impl Into<String>) {
        self.push(check, pb::FindingStatus::Passed, message.into());
    }

    /// A check that could not be made.
    pub fn not_checked(&mut self, check: &str, why: impl Into<String>) {
        self.push(check, pb::FindingStatus::NotChecked, why.into());
    }

    /// A check whose result is worth a look.
    pub fn warning(&mut self, check: &str, message: String, action: String) {
        self.list.push(pb::Finding {
            check: check.to_owned(),
            status: pb::FindingStatus::Warning.into(),
            message,
            action,
            ..pb::Finding::default()
        });
    }

    /// A check that failed; one that tells of several violations is a finding for each.
    pub fn failed(&mut self, check: &str, failure: Failure) {
        if failure.violations.len() > 1 {
            self.list.extend(failure.violations.iter().map(|violation| pb::Finding {
                check: check.to_owned(),
                status: pb::FindingStatus::Failed.into(),
                error_number: failure.mysql_error.unwrap_or(0),
                reason: violation.check.clone(),
                message: violation.description.clone(),
                action: String::new(),
            }));
        } else {
            self.list.push(pb::Finding {
                check: check.to_owned(),
                status: pb::FindingStatus::Failed.into(),
                error_number: failure.mysql_error.unwrap_or(0),
                reason: failure.reason.to_string(),
                message: failure.message.clone(),
                action: action_of(&failure).to_owned(),
            });
        }
        self.first.get_or_insert(failure);
    }

    /// A check that passed or failed.
    pub fn add(&mut self, check: &str, result: Result<String, Failure>) {
        match result {
            Ok(message) => self.passed(check, message),
            Err(failure) => self.failed(check, failure),
        }
    }

    /// Whether none has failed.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.first.is_none()
    }

    /// All of them, in order.
    #[must_use]
    pub fn all(&self) -> &[pb::Finding] {
        &self.list
    }

    /// What a clone shows of them: all but what has passed.
    #[must_use]
    pub fn notable(&self) -> Vec<pb::Finding> {
        let passed = |finding: &&pb::Finding| finding.status() != pb::FindingStatus::Passed;
        self.list.iter().filter(passed).cloned().collect()
    }

    /// The first failure, with every failed check as a violation.
    #[must_use]
    pub fn into_failure(self) -> Option<Failure> {
        let mut failure = self.first?;
        let failed = self.list.iter().filter(|f| f.status() == pb::FindingStatus::Failed);
        failure.violations = failed.map(violation).collect();
        let action = action_of(&failure).to_owned();
        failure.message = with_action(&failure.message, &action);
        let more = failure.violations.len().saturating_sub(1);
        if more > 0 {
            failure.message.push_str(&format!(" (and {more} more, all are in the violations)"));
        }
        Some(failure)
    }

    fn push(&mut self, check: &str, status: pb::FindingStatus, message: String) {
        self.list.push(pb::Finding {
            check: check.to_owned(),
            status: status.into(),
            message,
            ..pb::Finding::default()
        });
    }
}

fn action_of(failure: &Failure) -> &str {
    failure.metadata.get("action").map_or("", String::as_str)
}

fn with_action(message: &str, action: &str) -> String {
    if action.is_empty() { message.to_owned() } else { format!("{message}; {action}") }
}

fn violation(finding: &pb::Finding) -> Violation {
    let mut description = with_action(&finding.message, &finding.action);
    if finding.error_number != 0 {
        description.push_str(&format!(" (MySQL error {})", finding.error_number));
    }
    Violation { check: finding.check.clone(), subject: finding.reason.clone(), description }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_failures_become_violations_and_the_first_one_the_error() {
        let mut findings = Findings::default();
        findings.passed("a", "fine");
        findings.failed("b", Failure::invalid("FIRST", "one").mysql(1525).with("action", "do it"));
        findings.not_checked("c", "no server");
        findings.failed("d", Failure::precondition("SECOND", "two"));
        assert_eq!(findings.notable().len(), 3);
        let failure = findings.into_failure().unwrap();
        assert_eq!((failure.reason.as_ref(), failure.mysql_error), ("FIRST", Some(1525)));
        assert!(failure.message.starts_with("one; do it (and 1 more"), "{failure}");
        let checks: Vec<_> = failure.violations.iter().map(|v| v.check.as_str()).collect();
        assert_eq!(checks, ["b", "d"]);
        assert_eq!(failure.violations[0].description, "one; do it (MySQL error 1525)");
    }

    #[test]
    fn a_failure_of_several_violations_is_a_finding_for_each() {
        let one = Failure::precondition("ONE", "1");
        let two = Failure::precondition("TWO", "2");
        let mut findings = Findings::default();
        findings.failed("donor", Failure::all_of(vec![one, two]).unwrap());
        let reasons: Vec<_> = findings.all().iter().map(|f| f.reason.as_str()).collect();
        assert_eq!(reasons, ["ONE", "TWO"]);
        assert_eq!(findings.into_failure().unwrap().violations.len(), 2);
    }
}
