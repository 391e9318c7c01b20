//! What there is to say of a clone, in words: for the command line and the status page.

use std::time::Duration;

use marcot_common::{
    replication,
    shown::{self, bytes},
    time::duration_from_wire,
};
use marcot_proto::recipient::v1::{Clone, Finding, FindingStatus, Install, InstallStep, State};

/// A state as in performance_schema.clone_status.
#[must_use]
pub fn state(state: i32) -> String {
    match State::try_from(state) {
        Ok(state) => {
            let name = state.as_str_name().trim_start_matches("STATE_").to_lowercase();
            let words = name.split('_').map(|word| {
                let mut letters = word.chars();
                letters.next().map_or_else(String::new, |first| {
                    first.to_uppercase().chain(letters).collect::<String>()
                })
            });
            words.collect::<Vec<_>>().join(" ")
        }
        Err(_) => format!("state {state}"),
    }
}

/// A state in one lower-case word, as JSON and style sheets name it.
#[must_use]
pub fn state_key(state: i32) -> String {
    let state = State::try_from(state).unwrap_or_default();
    state.as_str_name().trim_start_matches("STATE_").to_lowercase()
}

/// An install's step, by its name.
#[must_use]
pub fn step(step: i32) -> String {
    let step = InstallStep::try_from(step).unwrap_or_default();
    step.as_str_name().trim_start_matches("INSTALL_STEP_").to_lowercase()
}

/// Statements that attach a server on the clone as a replica, and what they are for.
#[must_use]
pub fn coordinates(clone: &Clone) -> Vec<String> {
    let Some(at) = &clone.coordinates else { return Vec::new() };
    let host = clone.source.rsplit_once(':').map_or("", |(host, _)| host);
    replication::statements(at, host.trim_matches(['[', ']']))
}

/// A finding in one line.
#[must_use]
pub fn finding(finding: &Finding) -> String {
    let status = match finding.status() {
        FindingStatus::Passed => "passed",
        FindingStatus::Failed => "FAILED",
        FindingStatus::NotChecked => "not checked",
        FindingStatus::Warning => "warning",
        FindingStatus::Unspecified => "unknown",
    };
    let number = match finding.error_number {
        0 => String::new(),
        number => format!(" ({number} {})", finding.reason),
    };
    let action = match finding.action.as_str() {
        "" => String::new(),
        action => format!("; {action}"),
    };
    format!("{status:<12} {:<18} {}{action}{number}", finding.check, finding.message)
}

/// Warnings, and in one line for each reason what was not checked. What has failed is the error's.
#[must_use]
pub fn notable_findings(findings: &[Finding]) -> Vec<String> {
    let mut lines: Vec<String> = findings
        .iter()
        .filter(|finding| finding.status() == FindingStatus::Warning)
        .map(self::finding)
        .collect();
    let mut checks: Vec<&str> = findings
        .iter()
        .filter(|finding| finding.status() == FindingStatus::NotChecked)
        .map(|finding| finding.check.as_str())
        .collect();
    checks.dedup();
    if !checks.is_empty() {
        lines.push(format!("not checked: {} (`marcot preflight` says why)", checks.join(", ")));
    }
    lines
}

/// Where an install stands, and what there is to do.
#[must_use]
pub fn install(install: &Install) -> String {
    let step = step(install.step);
    let old = String::from_utf8_lossy(&install.old_directory);
    let kept = match (old.as_ref(), install.keep_until) {
        ("", _) => String::new(),
        (old, Some(until)) => format!(
            "; the old data are kept in {old} until {}, or `marcot accept` or `marcot rollback`",
            shown::time(until)
        ),
        (old, None) => {
            format!("; the old data are kept in {old} until `marcot accept` or `marcot rollback`")
        }
    };
    format!("install: {step}, generation {}{kept}", install.generation)
}

/// What was tried again, what came twice and what did not have to come; `None` when there is nothing
/// of it to tell.
#[must_use]
pub fn effort(clone: &Clone) -> Option<String> {
    let mut parts = Vec::new();
    if clone.retries > 0 {
        let (times, cause) = (clone.retries, &clone.last_retry_cause);
        parts.push(format!("tried again {times} times (last: {cause})"));
    }
    if clone.resent_bytes > 0 {
        parts.push(format!("{} sent again", bytes(clone.resent_bytes)));
    }
    if clone.reused_bytes > 0 {
        parts.push(format!("{} reused", bytes(clone.reused_bytes)));
    }
    if let Some(throttled) = clone.throttled_duration.and_then(|d| duration_from_wire(d).ok())
        && throttled >= Duration::from_secs(1)
    {
        parts.push(format!("held back by its limits for {} s", throttled.as_secs()));
    }
    if clone.resumes > 0 {
        parts.push(format!("gone on {} times", clone.resumes));
    }
    Some(parts.join(", ")).filter(|line| !line.is_empty())
}

/// What a clone has done, in one line.
#[must_use]
pub fn summary(clone: &Clone) -> String {
    let encrypted = match clone.encrypted {
        Some(true) => format!(", encrypted ({})", clone.cipher),
        Some(false) => ", not encrypted".to_owned(),
        None => String::new(),
    };
    let elapsed = match (clone.begin_time, clone.end_time) {
        (Some(begin), Some(end)) => shown::between(begin, end).as_secs_f64(),
        _ => 0.0,
    };
    let mut text = format!(
        "{}: {} files, {} verified",
        state(clone.state),
        clone.files_copied,
        bytes(clone.verified_bytes)
    );
    if elapsed > 0.0 {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "shown with two decimals"
        )]
        let rate = (clone.verified_bytes as f64 / elapsed) as u64;
        text.push_str(&format!(" in {elapsed:.1} s, {}/s", bytes(rate)));
    }
    if let Some(at) = &clone.coordinates {
        text.push_str(&format!(
            ", {}:{} {}",
            String::from_utf8_lossy(&at.binlog_file),
            at.binlog_position,
            at.gtid_executed
        ));
    }
    text + &encrypted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_tried_again_is_told_with_its_cause() {
        assert_eq!(effort(&Clone::default()), None);
        let clone = Clone {
            retries: 2,
            last_retry_cause: "donor: reset".to_owned(),
            resent_bytes: 3 << 20,
            reused_bytes: 5 << 20,
            resumes: 1,
            ..Clone::default()
        };
        let line = effort(&clone).unwrap();
        let told = "tried again 2 times (last: donor: reset), 3.00 MiB sent again, 5.00 MiB reused, \
                    gone on 1 times";
        assert_eq!(line, told);
    }
}
