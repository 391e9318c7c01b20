//! Results on standard output, as text or JSON; failures on standard error.

use marcot_common::{
    accounts::Account,
    failure::Failure,
    shown::{self, clean},
};
use marcot_proto::{
    donor::v1::Snapshot,
    recipient::v1::{Clone, Leftover, ValidateCloneResponse, VerifyCloneResponse},
};

use super::json;
use crate::{certificate::hexadecimal, told};

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
        let state = told::state(clone.state);
        let destination = shown::text(&clone.destination);
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
                shown::stage(row.stage),
                told::state(row.state),
                time(row.begin_time),
                seconds(row.begin_time, row.end_time),
                row.estimate_bytes,
                row.data_bytes,
                row.network_bytes,
            );
        }
        say!("  {}", told::summary(clone));
        if let Some(line) = told::effort(clone) {
            say!("  {}", clean(&line));
        }
        if let Some(install) = &clone.install {
            say!("  {}", clean(&told::install(install)));
        }
        for line in told::notable_findings(&clone.findings) {
            say!("  {}", clean(&line));
        }
        for (reason, count) in &clone.left_out {
            say!("  left out: {count} of kind {}", clean(reason));
        }
        for line in told::coordinates(clone) {
            say!("  {}", clean(&line));
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
                told::state(clone.state),
                time(clone.begin_time),
                clean(&clone.source),
                shown::text(&clone.destination),
            );
        }
    }

    pub(super) fn findings(self, answer: &ValidateCloneResponse) {
        if self.json {
            json::print(&json::findings(answer));
            return;
        }
        for finding in &answer.findings {
            say!("{}", clean(&told::finding(finding)));
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
            shown::bytes(found.bytes),
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
                shown::bytes(leftover.allocated_bytes),
                if leftover.removable { "yes" } else { "no" },
                clean(&leftover.content),
                shown::text(&leftover.path),
            );
        }
    }

    pub(super) fn snapshots(self, snapshots: &[Snapshot]) {
        if self.json {
            json::print(&json::snapshots(snapshots));
            return;
        }
        say!(
            "{:<46} {:<24} {:<24} {:<24} {:<4} {:<11} {:>5} {:>12} {:<24} {:<24} CLONE",
            "NAME",
            "OPENED",
            "LEASE ENDS",
            "ENDS IF UNREAD",
            "DDL",
            "STAGE",
            "ROUND",
            "SENT",
            "PEER",
            "USER"
        );
        for snapshot in snapshots {
            say!(
                "{:<46} {:<24} {:<24} {:<24} {:<4} {:<11} {:>5} {:>12} {:<24} {:<24} {}",
                clean(&snapshot.name),
                time(snapshot.create_time),
                time(snapshot.lease_expire_time),
                time(snapshot.read_deadline),
                if snapshot.blocks_ddl { "wait" } else { "" },
                shown::stage(snapshot.stage),
                snapshot.round,
                shown::bytes(snapshot.sent_bytes),
                clean(&snapshot.peer),
                clean(&snapshot.user),
                clean(&snapshot.clone),
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

fn time(timestamp: Option<prost_types::Timestamp>) -> String {
    timestamp.map(shown::time).unwrap_or_default()
}

fn seconds(begin: Option<prost_types::Timestamp>, end: Option<prost_types::Timestamp>) -> String {
    let (Some(begin), Some(end)) = (begin, end) else { return String::new() };
    format!("{:.3}", shown::between(begin, end).as_secs_f64())
}
