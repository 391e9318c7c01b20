//! Everything that can be checked before the first byte: all findings at once.
//!
//! A clone and `ValidateClone` go through the same checks, in the same order.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use marcot_common::{
    entry::Totals,
    failure::{Failure, Violation},
    host,
};
use marcot_engine::open_engine;
use marcot_proto::{
    donor::v1::{GetServerInfoResponse, Outcome},
    recipient::v1 as pb,
};
use tracing::warn;

use crate::{
    donor_client::DonorSource,
    install::place::Form,
    job::{CloneJob, staging_directories},
    request::{CloneRequest, Owner, SourceRequest},
    reuse::Reuse,
    settings::Settings,
    source::{LocalSource, Opened, Source, blocking},
    staging::{Owners, allocated_bytes},
    target,
};

mod replaceable;
pub(crate) mod server_paths;

/// Room that must stay on the file system beside the copy: lists, directories, rounding up.
const SPACE_MARGIN_BYTES: u64 = 64 << 20;

/// A clone that may begin.
#[derive(Debug)]
pub struct Prepared {
    /// The open snapshot.
    pub source: Arc<dyn Source>,
    /// What it said when it was opened.
    pub opened: Opened,
    /// Who will own the files.
    pub owners: Owners,
    /// An older copy whose equal blocks are used.
    pub reuse: Option<Arc<Reuse>>,
    /// Most entries that the donor may list.
    pub entries_max: u64,
}

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

    /// A check that failed.
    pub fn failed(&mut self, check: &str, failure: Failure) {
        self.list.push(pb::Finding {
            check: check.to_owned(),
            status: pb::FindingStatus::Failed.into(),
            error_number: failure.mysql_error.unwrap_or(0),
            reason: failure.reason.to_string(),
            message: failure.message.clone(),
            action: failure.metadata.get("action").cloned().unwrap_or_default(),
        });
        self.first.get_or_insert(failure);
    }

    /// A check that passed or failed.
    pub fn add(&mut self, check: &str, result: Result<String, Failure>) {
        match result {
            Ok(message) => self.passed(check, message),
            Err(failure) => self.failed(check, failure),
        }
    }

    /// The first failure, with every failed check as a violation.
    #[must_use]
    pub fn into_failure(self) -> Option<Failure> {
        let mut failure = self.first?;
        let failed =
            |finding: &&pb::Finding| finding.status == i32::from(pb::FindingStatus::Failed);
        failure.violations = self
            .list
            .iter()
            .filter(failed)
            .map(|finding| Violation {
                check: finding.check.clone(),
                subject: finding.reason.clone(),
                description: finding.message.clone(),
            })
            .collect();
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

/// What was found, and the snapshot if one could be opened.
#[derive(Debug)]
pub struct Report {
    findings: Findings,
    source: Option<Arc<dyn Source>>,
}

impl Report {
    /// Frees the snapshot of a check that nothing follows; returns the findings, and whether none
    /// has failed.
    pub async fn close(self) -> (Vec<pb::Finding>, bool) {
        if let Some(source) = self.source {
            source.close(Outcome::Cancelled).await;
        }
        let valid = self.findings.first.is_none();
        (self.findings.list, valid)
    }
}

/// Checks, and opens the snapshot that the clone will read.
pub async fn prepare(job: &CloneJob) -> Result<Prepared, Failure> {
    let report = inspect(&job.request, &job.settings, &job.id, Some(job)).await;
    let Report { findings, source } = report;
    for finding in findings.list.iter().filter(|f| f.status() == pb::FindingStatus::Warning) {
        warn!(check = %finding.check, action = %finding.action, "{}", finding.message);
    }
    if let Some(failure) = findings.into_failure() {
        if let Some(source) = source {
            source.close(Outcome::Failed).await;
        }
        return Err(failure);
    }
    let source = source.ok_or_else(|| Failure::bug("no snapshot, and no finding says why"))?;
    let opened = source.opened();
    job.status.update(|clone| clone.left_out = opened.left_out.clone().into_iter().collect());
    let parent = &space_of(&job.request);
    let inodes = free_space(parent).ok().map(|free| free.inodes).filter(|&inodes| inodes > 0);
    Ok(Prepared {
        reuse: older_copy(&job.request)?,
        owners: owners(&job.request, parent)?,
        entries_max: inodes.map_or(job.settings.entries_max, |n| n.min(job.settings.entries_max)),
        source,
        opened,
    })
}

/// The older copy whose equal blocks are used: the one that was named, or what is to be replaced,
/// which is an older copy more often than not.
pub fn older_copy(request: &CloneRequest) -> Result<Option<Arc<Reuse>>, Failure> {
    let is_remote = matches!(request.source, SourceRequest::Donor(_));
    let replaced = request.form.map(|_| request.target.as_path());
    let older = request.reuse.as_deref().or(replaced.filter(|_| is_remote));
    Ok(older.map(Reuse::open).transpose()?.map(Arc::new))
}

/// Looks at everything and changes nothing.
pub async fn inspect(
    request: &CloneRequest,
    settings: &Settings,
    clone_id: &str,
    job: Option<&CloneJob>,
) -> Report {
    let mut findings = Findings::default();
    target::check(request, settings, &mut findings);
    replaceable::check(request, settings.engine.as_ref(), &mut findings).await;
    server_paths::check(request, settings.engine.as_ref(), &mut findings).await;
    let source = match &request.source {
        SourceRequest::Local => open_local(request, settings, &mut findings).await,
        SourceRequest::Donor(donor) => {
            let opened = DonorSource::open(donor, &request.snapshot, settings, clone_id, job).await;
            match opened {
                Ok(source) => {
                    findings.passed("donor", format!("{} answers", request.source_name()));
                    let other = same_directory(request, source.server_info());
                    findings.add("same_directory", other);
                    Some(Arc::new(source) as Arc<dyn Source>)
                }
                Err(failure) => {
                    findings.failed("donor", failure);
                    None
                }
            }
        }
    };
    if let Some(reuse) = &request.reuse {
        let usable = target::check_reuse(reuse, request, settings);
        findings.add("reuse_directory", usable.map(|()| format!("{} is there", reuse.display())));
    }
    let parent = &space_of(request);
    match (&source, free_space(parent)) {
        (Some(source), Ok(free)) => {
            let estimate = source.opened().estimate;
            let [_, lost] = staging_directories(&request.staging_parent(), clone_id);
            // A snapshot that was lost has left what the next one goes on with.
            let mut freed = allocated_bytes(&lost);
            if request.discard_old_data_first {
                freed = freed.saturating_add(allocated_bytes(&request.target));
            }
            let free = FreeSpace { bytes: free.bytes.saturating_add(freed), ..free };
            findings.add("free_space", enough_bytes(parent, &free, estimate));
            findings.add("free_inodes", enough_inodes(parent, &free, estimate));
        }
        (None, _) => findings.not_checked("free_space", "the size is not known"),
        (_, Err(failure)) => findings.not_checked("free_space", failure.message),
    }
    findings.add("owner", owners(request, parent).and_then(may_give));
    Report { findings, source }
}

async fn open_local(
    request: &CloneRequest,
    settings: &Settings,
    findings: &mut Findings,
) -> Option<Arc<dyn Source>> {
    const CHECK: &str = "data_directory";
    let Some(config) = settings.engine.clone() else {
        let failure = Failure::precondition(
            "NO_DATA_DIRECTORY",
            "CLONE LOCAL copies this recipient's own data directory, and it has none; start it \
             with --data-directory",
        );
        findings.failed(CHECK, failure);
        return None;
    };
    let options = request.snapshot.clone();
    let opened =
        async { LocalSource::open(blocking(move || open_engine(&config)).await?, options).await };
    match opened.await {
        Ok(source) => {
            findings.passed(CHECK, "the data directory can be read");
            Some(Arc::new(source))
        }
        Err(failure) => {
            findings.failed(CHECK, failure);
            None
        }
    }
}

/// The new directory must not lie within the donor's own, when both are on this host.
fn same_directory(
    request: &CloneRequest,
    donor: &GetServerInfoResponse,
) -> Result<String, Failure> {
    if donor.host_id[..] != host::host_id() {
        return Ok("the donor is another host".to_owned());
    }
    let donor_directory = (donor.data_directory_device, donor.data_directory_inode);
    let parent = request.target.parent().unwrap_or(Path::new("/"));
    for ancestor in std::iter::once(request.target.as_path()).chain(parent.ancestors()) {
        if host::file_identity(ancestor).is_ok_and(|identity| identity == donor_directory) {
            return Err(Failure::precondition(
                "SAME_DIRECTORY",
                format!(
                    "{} lies within the donor's own data directory {}; choose another place",
                    request.target.display(),
                    ancestor.display()
                ),
            )
            .mysql(if request.replaces { 3871 } else { 3632 }));
        }
    }
    Ok("the donor's data directory is another one".to_owned())
}

/// The directory on whose file system the clone will be staged.
fn space_of(request: &CloneRequest) -> PathBuf {
    match request.form {
        Some(Form::Move) => request.target.clone(),
        _ => request.target.parent().unwrap_or(Path::new("/")).to_owned(),
    }
}

struct FreeSpace {
    bytes: u64,
    /// 0 where the file system has no fixed number.
    inodes: u64,
    inodes_total: u64,
}

fn free_space(path: &Path) -> Result<FreeSpace, Failure> {
    let stat = rustix::fs::statvfs(path)
        .map_err(|e| Failure::io("look at the file system of", path, &e.into()))?;
    Ok(FreeSpace {
        bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        inodes: stat.f_favail,
        inodes_total: stat.f_files,
    })
}

fn enough_bytes(parent: &Path, free: &FreeSpace, estimate: Totals) -> Result<String, Failure> {
    let needed = estimate
        .allocated_bytes
        .min(estimate.size_bytes.saturating_add(estimate.files.saturating_mul(4096)))
        .saturating_add(SPACE_MARGIN_BYTES);
    if free.bytes >= needed {
        return Ok(format!("{} of {} free", human_bytes(needed), human_bytes(free.bytes)));
    }
    Err(Failure::precondition(
        "DISK_SPACE",
        format!(
            "Clone estimated database size is {}. Available space {} is not enough: free {} on \
             the file system of {}",
            human_bytes(needed),
            human_bytes(free.bytes),
            human_bytes(needed - free.bytes),
            parent.display()
        ),
    )
    .mysql(3873))
}

fn enough_inodes(parent: &Path, free: &FreeSpace, estimate: Totals) -> Result<String, Failure> {
    if free.inodes_total == 0 || free.inodes >= estimate.entries {
        return Ok(format!("{} inodes needed", estimate.entries));
    }
    Err(Failure::precondition(
        "INODES",
        format!(
            "the clone has {} files and directories, the file system of {} has {} free inodes",
            estimate.entries,
            parent.display(),
            free.inodes
        ),
    )
    .mysql(3873))
}

fn owners(request: &CloneRequest, parent: &Path) -> Result<Owners, Failure> {
    match request.owner {
        Owner::Preserved => Ok(Owners::Preserved),
        Owner::Given(uid, gid) => Ok(Owners::Fixed { uid, gid }),
        Owner::FollowParent => {
            // R13: what replaces a server's data belongs to whom they belonged.
            let model = if request.form.is_some() { request.target.as_path() } else { parent };
            let metadata =
                model.metadata().map_err(|e| Failure::io("look at directory", model, &e))?;
            Ok(Owners::Fixed { uid: metadata.uid(), gid: metadata.gid() })
        }
    }
}

/// Whether this process may give files to these owners.
fn may_give(owners: Owners) -> Result<String, Failure> {
    let me = rustix::process::geteuid();
    if me.is_root() {
        return Ok("this process may give files away".to_owned());
    }
    let groups = rustix::process::getgroups().unwrap_or_default();
    let in_group = |gid: u32| {
        rustix::process::getegid().as_raw() == gid || groups.iter().any(|g| g.as_raw() == gid)
    };
    let text = match owners {
        Owners::Fixed { uid, gid } if uid == me.as_raw() && in_group(gid) => {
            return Ok(format!("files will belong to {uid}:{gid}"));
        }
        Owners::Fixed { uid, gid } => format!(
            "files are to belong to {uid}:{gid}, and this process runs as {}; run it as that user \
             or with CAP_CHOWN, or name another owner",
            me.as_raw()
        ),
        Owners::Preserved => "this process may not give files away; run it with CAP_CHOWN to keep \
                              the donor's owners"
            .to_owned(),
    };
    Err(Failure::precondition("OWNER", text))
}

fn human_bytes(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown with two decimals")]
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.2} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ESTIMATE: Totals = Totals {
        entries: 10,
        files: 8,
        size_bytes: 1 << 40,
        allocated_bytes: 1 << 30,
        data_bytes: 0,
    };

    fn free(bytes: u64, inodes: u64, inodes_total: u64) -> FreeSpace {
        FreeSpace { bytes, inodes, inodes_total }
    }

    #[test]
    fn space_is_what_is_allocated_and_a_margin() {
        let parent = Path::new("/p");
        let needed = (1 << 30) + SPACE_MARGIN_BYTES;
        enough_bytes(parent, &free(needed, 0, 0), ESTIMATE).unwrap();
        let failure = enough_bytes(parent, &free(needed - 1, 0, 0), ESTIMATE).unwrap_err();
        assert_eq!(failure.mysql_error, Some(3873));
        let text = "Clone estimated database size is 1.06 GiB. Available space 1.06 GiB";
        assert!(failure.message.starts_with(text), "{failure}");
    }

    #[test]
    fn inodes_count_where_a_file_system_has_a_number_of_them() {
        let parent = Path::new("/p");
        enough_inodes(parent, &free(0, 10, 10), ESTIMATE).unwrap();
        enough_inodes(parent, &free(0, 0, 0), ESTIMATE).unwrap();
        let failure = enough_inodes(parent, &free(0, 9, 100), ESTIMATE).unwrap_err();
        assert_eq!(failure.reason, "INODES");
    }

    #[test]
    fn all_failures_become_violations_and_the_first_one_the_error() {
        let mut findings = Findings::default();
        findings.passed("a", "fine");
        findings.failed("b", Failure::invalid("FIRST", "one").mysql(1525));
        findings.failed("c", Failure::precondition("SECOND", "two"));
        let failure = findings.into_failure().unwrap();
        assert_eq!((failure.reason.as_ref(), failure.mysql_error), ("FIRST", Some(1525)));
        let checks: Vec<_> = failure.violations.iter().map(|v| v.check.as_str()).collect();
        assert_eq!(checks, ["b", "c"]);
    }
}
