//! Results as JSON: names as in the .proto files, times as in RFC 3339, paths as text.

use marcot_common::{
    accounts::Account,
    failure::{Failure, Violation},
    shown::{self, time},
    time::duration_from_wire,
};
use marcot_proto::{
    donor::v1::Snapshot,
    recipient::v1::{
        Clone, Finding, FindingStatus, Leftover, StageProgress, ValidateCloneResponse,
        VerifyCloneResponse,
    },
};
use serde_json::{Value, json};

use super::output::say;
use crate::{
    certificate::hexadecimal,
    told::{state_key, step},
};

pub(super) fn print(value: &Value) {
    say!("{value:#}");
}

pub(super) fn clones(clones: &[Clone]) -> Value {
    json!({ "clones": clones.iter().map(clone).collect::<Vec<_>>() })
}

fn violation(violation: &Violation) -> Value {
    json!({
        "check": violation.check,
        "subject": violation.subject,
        "description": violation.description,
    })
}

/// A command that failed.
pub(super) fn failed(failure: &Failure) -> Value {
    json!({ "error": {
        "error_number": failure.mysql_error.unwrap_or(0),
        "reason": failure.reason,
        "message": failure.message,
        "metadata": failure.metadata,
        "violations": failure.violations.iter().map(violation).collect::<Vec<_>>(),
    }})
}

pub(super) fn clone(clone: &Clone) -> Value {
    json!({
        "name": clone.name,
        "state": state_key(clone.state),
        "begin_time": clone.begin_time.map(time),
        "end_time": clone.end_time.map(time),
        "source": clone.source,
        "destination": String::from_utf8_lossy(&clone.destination),
        "statement": clone.statement,
        "request_id": clone.request_id,
        "user": clone.user,
        "error": clone.error.as_ref().map(|error| json!({
            "error_number": error.error_number,
            "reason": error.reason,
            "message": error.message,
            "metadata": error.metadata,
            "violations": Failure::from_wire(error).violations.iter().map(violation).collect::<Vec<_>>(),
        })),
        "consistency_level": clone
            .consistency_level()
            .as_str_name()
            .trim_start_matches("CONSISTENCY_LEVEL_")
            .to_lowercase(),
        "coordinates": clone.coordinates.as_ref().map(|at| json!({
            "binlog_file": String::from_utf8_lossy(&at.binlog_file),
            "binlog_position": at.binlog_position,
            "gtid_executed": at.gtid_executed,
            "lsn": at.lsn,
            "binlog_lacks_replicated": at.binlog_lacks_replicated,
        })),
        "stages": clone.stages.iter().map(stage).collect::<Vec<_>>(),
        "encrypted": clone.encrypted,
        "cipher": clone.cipher,
        "donor_fingerprint": hexadecimal(&clone.donor_fingerprint),
        "donor_version": clone.donor_version,
        "eta_seconds": clone.eta.map(|eta| eta.seconds),
        "stall_reason": clone.stall_reason,
        "held_back_reason": clone.held_back_reason,
        "files_expected": clone.files_expected,
        "files_copied": clone.files_copied,
        "verified_bytes": clone.verified_bytes,
        "resent_bytes": clone.resent_bytes,
        "reused_bytes": clone.reused_bytes,
        "retries": clone.retries,
        "last_retry_cause": clone.last_retry_cause,
        "install": clone.install.as_ref().map(|install| json!({
            "step": step(install.step),
            "step_time": install.step_time.map(time),
            "form": install
                .form()
                .as_str_name()
                .trim_start_matches("INSTALL_FORM_")
                .to_lowercase(),
            "old_directory": String::from_utf8_lossy(&install.old_directory),
            "keep_until": install.keep_until.map(time),
            "generation": install.generation,
        })),
        "certificate_digest": hexadecimal(&clone.certificate_digest),
        "resumes": clone.resumes,
        "throttled_seconds": clone
            .throttled_duration
            .and_then(|duration| duration_from_wire(duration).ok())
            .map(|duration| duration.as_secs_f64()),
        "limits": clone.limits.as_ref().map(|limits| json!({
            "concurrency_max": limits.concurrency_max,
            "autotune_concurrency": limits.autotune_concurrency,
            "data_bytes_per_second_max": limits.data_bytes_per_second_max,
            "network_bytes_per_second_max": limits.network_bytes_per_second_max,
        })),
        "left_out": clone.left_out,
        "findings": clone.findings.iter().map(finding).collect::<Vec<_>>(),
        "trace_id": clone.trace_id,
    })
}

pub(super) fn verification(found: &VerifyCloneResponse) -> Value {
    json!({
        "intact": found.intact,
        "modified_by_server": found.modified_by_server,
        "differences": found.differences,
        "server_evidence": found.server_evidence,
        "files": found.files,
        "bytes": found.bytes,
        "certificate_digest": hexadecimal(&found.certificate_digest),
        "signer": found.signer,
    })
}

pub(super) fn snapshots(snapshots: &[Snapshot]) -> Value {
    let snapshot = |snapshot: &Snapshot| {
        json!({
            "name": snapshot.name,
            "clone": snapshot.clone,
            "user": snapshot.user,
            "peer": snapshot.peer,
            "create_time": snapshot.create_time.map(time),
            "lease_expire_time": snapshot.lease_expire_time.map(time),
            "stage": shown::stage(snapshot.stage),
            "round": snapshot.round,
            "sent_bytes": snapshot.sent_bytes,
            "blocks_ddl": snapshot.blocks_ddl,
            "read_deadline": snapshot.read_deadline.map(time),
        })
    };
    json!({ "snapshots": snapshots.iter().map(snapshot).collect::<Vec<_>>() })
}

pub(super) fn leftovers(leftovers: &[Leftover]) -> Value {
    let leftover = |leftover: &Leftover| {
        json!({
            "name": leftover.name,
            "path": String::from_utf8_lossy(&leftover.path),
            "allocated_bytes": leftover.allocated_bytes,
            "content": leftover.content,
            "removable": leftover.removable,
        })
    };
    json!({ "leftovers": leftovers.iter().map(leftover).collect::<Vec<_>>() })
}

fn stage(row: &StageProgress) -> Value {
    json!({
        "stage": shown::stage(row.stage),
        "state": state_key(row.state),
        "begin_time": row.begin_time.map(time),
        "end_time": row.end_time.map(time),
        "threads": row.threads,
        "round": row.round,
        "estimate_bytes": row.estimate_bytes,
        "estimate_growing": row.estimate_growing,
        "data_bytes": row.data_bytes,
        "network_bytes": row.network_bytes,
        "data_speed": row.data_speed,
        "network_speed": row.network_speed,
    })
}

fn finding(finding: &Finding) -> Value {
    let status = FindingStatus::try_from(finding.status).unwrap_or_default();
    json!({
        "check": finding.check,
        "status": status.as_str_name().trim_start_matches("FINDING_STATUS_").to_lowercase(),
        "error_number": finding.error_number,
        "reason": finding.reason,
        "message": finding.message,
        "action": finding.action,
    })
}

pub(super) fn findings(answer: &ValidateCloneResponse) -> Value {
    json!({
        "valid": answer.valid,
        "findings": answer.findings.iter().map(finding).collect::<Vec<_>>(),
    })
}

pub(super) fn accounts(accounts: &[Account]) -> Value {
    let account = |account: &Account| {
        let privileges: Vec<_> = account.privileges.iter().map(ToString::to_string).collect();
        json!({ "name": account.name, "privileges": privileges, "created": account.created })
    };
    json!({ "accounts": accounts.iter().map(account).collect::<Vec<_>>() })
}
