//! A finished clone's directory is read again, and compared with its certificate.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::PathBuf,
    sync::{Arc, PoisonError},
};

use marcot_common::failure::Failure;
use marcot_proto::recipient::v1 as pb;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::Clones;
use crate::{
    certificate::{
        FILE_NAME,
        check::{answer, check},
        read::Certificate,
    },
    fetch::stopped,
    install::step::Step,
    source::blocking,
};

impl Clones {
    /// Verifies a clone. It ends when its caller goes away; one runs at a time, for each reads a
    /// whole data directory from the disk.
    pub async fn verify(self: &Arc<Self>, name: &str) -> Result<pb::VerifyCloneResponse, Failure> {
        let clone = self.get(name)?;
        let directory = PathBuf::from(OsStr::from_bytes(&clone.destination));
        let step = self.lock().installs.get(&clone.name).map(|install| install.step());
        let gone = CancellationToken::new();
        let _ends_with_the_caller = gone.clone().drop_guard();
        let clones = Arc::clone(self);
        blocking(move || {
            let Ok(_one) = clones.verification.try_lock().or_else(|e| match e {
                std::sync::TryLockError::Poisoned(poisoned) => {
                    Ok(PoisonError::into_inner(poisoned))
                }
                std::sync::TryLockError::WouldBlock => Err(()),
            }) else {
                return Err(Failure::new(
                    Code::Aborted,
                    "VERIFICATION_IN_PROGRESS",
                    "another clone is being verified at this moment; try again when it has ended",
                ));
            };
            let certificate = Certificate::open(&directory.join(FILE_NAME))?;
            if certificate.summary.clone != clone.name {
                return Err(Failure::precondition(
                    "CERTIFICATE_OF_ANOTHER",
                    format!(
                        "{} holds {} by now, not {}",
                        directory.display(),
                        certificate.summary.clone,
                        clone.name
                    ),
                ));
            }
            let stop = || if gone.is_cancelled() { Err(stopped()) } else { Ok(()) };
            let mut report = check(&directory, &certificate, &stop)?;
            if let Some(step) = step.filter(|step| *step >= Step::Started) {
                report.evidence.push(format!(
                    "its server was started on it by this recipient (install step {})",
                    step.name()
                ));
            }
            let answer = answer(&directory, &certificate, report);
            if !answer.intact && !answer.modified_by_server {
                clones.counts.verification_failures.inc();
            }
            Ok(answer)
        })
        .await
    }
}
