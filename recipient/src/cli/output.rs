//! Results on standard output, as text or JSON; failures on standard error.

use std::time::Duration;

use marcot_common::{
    accounts::Account,
    failure::Failure,
    replication,
    time::{duration_from_wire, system_time},
};
use marcot_proto::{
    common::v1::Stage,
    recipient::v1::{
        Clone, Finding, FindingStatus, Install, Leftover, State, ValidateCloneResponse,
        VerifyCloneResponse,
    },
};

use super::json;
use crate::certificate::hexadecimal;

/// Prints a line. A reader that has gone away, as in `marcot list | head`, is no error.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        drop(writeln!(std::io::stdout(), $($text)*))
    }};
}
pub(super) use say;

/// How results are printed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output {
    pub(super) json: bool,
}

impl Output {
    /// An error that ends the command: for a person, and as the document for a program.
    pub(super) fn failure(self, failure: &Failure) {
        if self.json {
            json::print(&json::failed(failure));
        }
        print_failure(failure);
    }

    pub(super) fn clone(self, clone: &Clone) {
        if self.json {
            json::print(&json::clone(clone));
            return;
        }
        let state = state_name(clone.state);
        let destination = clean(&String::from_utf8_lossy(&clone.destination));
        say!("{}  {state}", clean(&clone.name));
        say!("  {} -> {destination}", clean(&clone.source));
        say!("  {}", clean(&clone.statement));
        say!(
            "  {:<11} {:<12} {:<24} {:>9} {:>12} {:>12} {:>12}",
            "STAGE",
            "STATE",
            "BEGIN",
            "SECONDS",
            "ESTIMATE",
            "DATA",
            "NETWORK"
        );
        for row in &clone.stages {
            say!(
                "  {:<11} {:<12} {:<24} {:>9} {:>12} {:>12} {:>12}",
                stage_name(row.stage),
                state_name(row.state),
                time(row.begin_time),
                seconds(row.begin_time, row.end_time),
                row.estimate_bytes,
                row.data_bytes,
                row.network_bytes,
            );
        }
        say!("  {}", summary(clone));
        if let Some(line) = effort_line(clone) {
            say!("  {}", clean(&line));
        }
        if let Some(install) = &clone.install {
            say!("  {}", clean(&install_line(install)));
        }
        for line in notable_lines(&clone.findings) {
            say!("  {}", clean(&line));
        }
        for (reason, count) in &clone.left_out {
            say!("  left out: {count} of kind {}", clean(reason));
        }
        if let Some(at) = &clone.coordinates {
            let host = clone.source.rsplit_once(':').map_or("", |(host, _)| host);
            for line in replication::statements(at, host.trim_matches(['[', ']'])) {
                say!("  {}", clean(&line));
            }
        }
    }

    pub(super) fn list(self, clones: &[Clone]) {
        if self.json {
            json::print(&json::clones(clones));
            return;
        }
        say!("{:<43} {:<12} {:<24} {:<24} DESTINATION", "NAME", "STATE", "BEGIN", "SOURCE");
        for clone in clones {
            say!(
                "{:<43} {:<12} {:<24} {:<24} {}",
                clean(&clone.name),
                state_name(clone.state),
                time(clone.begin_time),
                clean(&clone.source),
                clean(&String::from_utf8_lossy(&clone.destination)),
            );
        }
    }

    pub(super) fn findings(self, answer: &ValidateCloneResponse) {
        if self.json {
            json::print(&json::findings(answer));
            return;
        }
        for finding in &answer.findings {
            say!("{}", clean(&finding_line(finding)));
        }
        say!("{}", if answer.valid { "valid" } else { "not valid" });
    }

    pub(super) fn verification(self, found: &VerifyCloneResponse) {
        if self.json {
            json::print(&json::verification(found));
            return;
        }
        for difference in &found.differences {
            say!("  {}", clean(difference));
        }
        for evidence in &found.server_evidence {
            say!("  server: {}", clean(evidence));
        }
        let what = match (found.intact, found.modified_by_server) {
            (true, _) => "intact",
            (false, true) => "modified by a server since it was cloned, which is no damage",
            (false, false) => "DAMAGED",
        };
        let signed = match found.signer.as_str() {
            "" => "not signed".to_owned(),
            key => format!("signed by {}", clean(key)),
        };
        say!(
            "{what}: {} files, {} read; certificate {}, {signed}",
            found.files,
            human_bytes(found.bytes),
            hexadecimal(&found.certificate_digest)
        );
    }

    pub(super) fn leftovers(self, leftovers: &[Leftover]) {
        if self.json {
            json::print(&json::leftovers(leftovers));
            return;
        }
        say!("{:<47} {:>12} {:<10} {:<40} PATH", "NAME", "SIZE", "REMOVABLE", "CONTENT");
        for leftover in leftovers {
            say!(
                "{:<47} {:>12} {:<10} {:<40} {}",
                clean(&leftover.name),
                human_bytes(leftover.allocated_bytes),
                if leftover.removable { "yes" } else { "no" },
                clean(&leftover.content),
                clean(&String::from_utf8_lossy(&leftover.path)),
            );
        }
    }

    pub(super) fn accounts(self, accounts: &[Account]) {
        if self.json {
            json::print(&json::accounts(accounts));
            return;
        }
        say!("{:<32} {:<40} CREATED", "NAME", "PRIVILEGES");
        for account in accounts {
            let privileges: Vec<_> = account.privileges.iter().map(ToString::to_string).collect();
            say!("{:<32} {:<40} {}", account.name, privileges.join(","), account.created);
        }
    }
}

/// A peer's text without what would move a terminal's cursor.
pub(super) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Says what failed, with MySQL's number and every broken precondition.
pub(super) fn print_failure(failure: &Failure) {
    eprintln!("marcot: {}", failure.message);
    match failure.mysql_error {
        Some(number) => eprintln!("  MySQL error {number} ({})", failure.reason),
        None => eprintln!("  {}", failure.reason),
    }
    if failure.violations.len() > 1 {
        for violation in &failure.violations {
            eprintln!("  {}: {}", violation.check, violation.description);
        }
    }
}

fn finding_line(finding: &Finding) -> String {
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
fn notable_lines(findings: &[Finding]) -> Vec<String> {
    let mut lines: Vec<String> = findings
        .iter()
        .filter(|finding| finding.status() == FindingStatus::Warning)
        .map(finding_line)
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
fn install_line(install: &Install) -> String {
    let step = json::step(install.step);
    let old = String::from_utf8_lossy(&install.old_directory);
    let kept = match (old.as_ref(), install.keep_until) {
        ("", _) => String::new(),
        (old, Some(until)) => format!(
            "; the old data are kept in {old} until {}, or `marcot accept` or `marcot rollback`",
            json::time(until)
        ),
        (old, None) => {
            format!("; the old data are kept in {old} until `marcot accept` or `marcot rollback`")
        }
    };
    format!("install: {step}, generation {}{kept}", install.generation)
}

/// What was tried again, what came twice and what did not have to come; `None` when there is nothing
/// of it to tell.
pub(super) fn effort_line(clone: &Clone) -> Option<String> {
    let mut parts = Vec::new();
    if clone.retries > 0 {
        let (times, cause) = (clone.retries, &clone.last_retry_cause);
        parts.push(format!("tried again {times} times (last: {cause})"));
    }
    if clone.resent_bytes > 0 {
        parts.push(format!("{} sent again", human_bytes(clone.resent_bytes)));
    }
    if clone.reused_bytes > 0 {
        parts.push(format!("{} reused", human_bytes(clone.reused_bytes)));
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

fn summary(clone: &Clone) -> String {
    let encrypted = match clone.encrypted {
        Some(true) => format!(", encrypted ({})", clone.cipher),
        Some(false) => ", not encrypted".to_owned(),
        None => String::new(),
    };
    let elapsed = match (clone.begin_time, clone.end_time) {
        (Some(begin), Some(end)) => {
            system_time(end).duration_since(system_time(begin)).unwrap_or_default().as_secs_f64()
        }
        _ => 0.0,
    };
    let mut text = format!(
        "{}: {} files, {} verified",
        state_name(clone.state),
        clone.files_copied,
        human_bytes(clone.verified_bytes)
    );
    if elapsed > 0.0 {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "shown with two decimals"
        )]
        let rate = (clone.verified_bytes as f64 / elapsed) as u64;
        text.push_str(&format!(" in {elapsed:.1} s, {}/s", human_bytes(rate)));
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

/// A state as in performance_schema.clone_status.
pub(super) fn state_name(state: i32) -> String {
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

/// A stage as in performance_schema.clone_progress.
pub(super) fn stage_name(stage: i32) -> String {
    match Stage::try_from(stage) {
        Ok(stage) => stage.as_str_name().trim_start_matches("STAGE_").replace('_', " "),
        Err(_) => format!("stage {stage}"),
    }
}

fn time(timestamp: Option<prost_types::Timestamp>) -> String {
    timestamp.map(json::time).unwrap_or_default()
}

fn seconds(begin: Option<prost_types::Timestamp>, end: Option<prost_types::Timestamp>) -> String {
    let (Some(begin), Some(end)) = (begin, end) else { return String::new() };
    let took = system_time(end).duration_since(system_time(begin)).unwrap_or_default();
    format!("{:.3}", took.as_secs_f64())
}

/// Bytes with a binary unit.
pub(super) fn human_bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// Seconds as a person says them.
pub(super) fn human_seconds(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_tried_again_is_told_with_its_cause() {
        assert_eq!(effort_line(&Clone::default()), None);
        let clone = Clone {
            retries: 2,
            last_retry_cause: "donor: reset".to_owned(),
            resent_bytes: 3 << 20,
            reused_bytes: 5 << 20,
            resumes: 1,
            ..Clone::default()
        };
        let line = effort_line(&clone).unwrap();
        let told = "tried again 2 times (last: donor: reset), 3.00 MiB sent again, 5.00 MiB reused, \
                    gone on 1 times";
        assert_eq!(line, told);
    }
}
