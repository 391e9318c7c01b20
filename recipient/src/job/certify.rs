//! The end of a copy: its tree is compared with the list, certified, made durable, and read again
//! where that was asked for.

use std::{sync::Arc, time::SystemTime};

use bytes::Bytes;
use jiff::Timestamp;
use marcot_common::{failure::Failure, time::system_time};
use marcot_engine::Advanced;
use marcot_proto::{
    common::v1::{ConsistencyLevel, Coordinates},
    recipient::v1::Clone,
};
use tonic::Code;
use tracing::info;

use super::CloneJob;
use crate::{
    certificate::{
        self, BLAKE3_256, CertifiedCoordinates, FILE_NAME, NO_DIGESTS, Summary,
        check::{Report, check},
        digests::BLOCK_BYTES,
        hexadecimal,
        read::Certificate,
        table::DigestTable,
    },
    copy_journal::read_digests,
    fetch::stopped,
    list::FileList,
    source::blocking,
    staging::Staging,
    verify::{VerifiedTree, verify},
};

/// Most differences that a failure tells: the rest is in the report of `marcot verify`.
const TOLD_MAX: usize = 5;

impl CloneJob {
    pub(super) async fn verify(
        &self,
        staging: &Arc<Staging>,
        whole: FileList,
        done: &Advanced,
    ) -> Result<VerifiedTree, Failure> {
        let (staging, cancel) = (Arc::clone(staging), self.cancel.clone());
        let (settings, root) = (Arc::clone(&self.settings), done.root.clone());
        if let Some(journal) = self.journal() {
            journal.log_cost();
        }
        let has_digests = self.journal().is_some();
        let is_full = self.request.verifies_fully;
        let mut summary = summary(&self.status.clone_resource(), done);
        let (verified, digest) = blocking(move || {
            let stop = || if cancel.is_cancelled() { Err(stopped()) } else { Ok(()) };
            let totals = whole.totals();
            (summary.entries, summary.files) = (totals.entries, totals.files);
            summary.size_bytes = totals.size_bytes;
            // What a file system has copied was never in this process: it is read only if asked for.
            let table = if has_digests || is_full {
                let table = DigestTable::create(staging.directory(), &whole)?;
                if has_digests {
                    read_digests(staging.directory(), &table)?;
                }
                BLAKE3_256.clone_into(&mut summary.digests);
                Some(table)
            } else {
                NO_DIGESTS.clone_into(&mut summary.digests);
                None
            };
            let mut digest = None;
            let signer = settings.certificate_signer.as_ref();
            let mut certify = || {
                let written =
                    certificate::write(&staging, &whole, table.as_ref(), &summary, signer, &stop)?;
                digest = Some(written);
                Ok(())
            };
            let verified = verify(&staging, &whole, root.as_ref(), &mut certify, &stop)?;
            if is_full {
                let tree = staging.tree();
                let certificate = Certificate::open(&tree.join(FILE_NAME))?;
                read_again(&check(&tree, &certificate, &stop)?)?;
            }
            Ok((verified, digest.unwrap_or_default()))
        })
        .await
        .inspect_err(|failure| {
            if matches!(failure.reason.as_ref(), "VERIFICATION_FAILED" | "MANIFEST_MISMATCH") {
                self.progress.counts.verification_failures.inc();
            }
        })?;
        info!(clone = %self.id, root = hexadecimal(&digest), "the copy is certified");
        self.status.update(|clone| clone.certificate_digest = Bytes::copy_from_slice(&digest));
        Ok(verified)
    }
}

impl CloneJob {
    /// Tells of a copy that stands what its certificate does.
    pub(super) fn set_certified(&self, certificate: &Certificate) {
        let summary = &certificate.summary;
        let level = format!("CONSISTENCY_LEVEL_{}", summary.consistency_level.to_uppercase());
        let level = ConsistencyLevel::from_str_name(&level).unwrap_or_default();
        let coordinates = summary.coordinates.as_ref().map(|at| Coordinates {
            binlog_file: at.binlog_file.clone().into_bytes().into(),
            binlog_position: at.binlog_position,
            gtid_executed: at.gtid_executed.clone(),
            lsn: at.lsn,
            server_uuid: at.server_uuid.clone(),
            server_id: at.server_id,
            server_version: at.server_version.clone(),
            binlog_lacks_replicated: at.binlog_lacks_replicated,
            ..Coordinates::default()
        });
        self.status.update(|clone| {
            clone.certificate_digest = Bytes::copy_from_slice(&certificate.root);
            clone.consistency_level = level.into();
            clone.coordinates = coordinates;
        });
    }
}

fn read_again(report: &Report) -> Result<(), Failure> {
    if report.is_intact() {
        info!(files = report.files, bytes = report.bytes, "the copy was read again from the disk");
        return Ok(());
    }
    let told: Vec<_> = report.differences.iter().take(TOLD_MAX).cloned().collect();
    Err(Failure::new(
        Code::DataLoss,
        "VERIFICATION_FAILED",
        format!(
            "what was read from this host's disk is not what was written to it: {}; look into the \
             kernel's log, check the disk and the memory, and clone again",
            told.join("; ")
        ),
    ))
}

fn summary(clone: &Clone, done: &Advanced) -> Summary {
    let text = |time: SystemTime| Timestamp::try_from(time).unwrap_or_default().to_string();
    Summary {
        clone: clone.name.clone(),
        statement: clone.statement.clone(),
        source: clone.source.clone(),
        donor_fingerprint: hexadecimal(&clone.donor_fingerprint),
        donor_version: clone.donor_version.clone(),
        recipient_version: env!("CARGO_PKG_VERSION").to_owned(),
        begin_time: clone.begin_time.map(|time| text(system_time(time))).unwrap_or_default(),
        certificate_time: text(SystemTime::now()),
        consistency_level: done
            .consistency_level
            .as_str_name()
            .trim_start_matches("CONSISTENCY_LEVEL_")
            .to_lowercase(),
        coordinates: done.coordinates.as_ref().map(certified),
        block_bytes: BLOCK_BYTES,
        ..Summary::default()
    }
}

fn certified(at: &Coordinates) -> CertifiedCoordinates {
    CertifiedCoordinates {
        binlog_file: String::from_utf8_lossy(&at.binlog_file).into_owned(),
        binlog_position: at.binlog_position,
        gtid_executed: at.gtid_executed.clone(),
        lsn: at.lsn,
        server_uuid: at.server_uuid.clone(),
        server_id: at.server_id,
        server_version: at.server_version.clone(),
        binlog_lacks_replicated: at.binlog_lacks_replicated,
    }
}
