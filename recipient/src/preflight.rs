//! Everything that can be checked before the first byte: all findings at once.
//!
//! A clone and `ValidateClone` go through the same checks, in the same order.

use std::{os::unix::fs::MetadataExt as _, path::Path, sync::Arc};

use marcot_common::{connect::ClientTls, failure::Failure, host};
use marcot_engine::open_engine;
use marcot_proto::{
    donor::v1::{GetServerInfoResponse, Outcome},
    recipient::v1::FindingStatus,
};
use tracing::{info, warn};

pub use self::findings::Findings;
use self::{
    binary_logs::Logs,
    donor_facts::DonorFacts,
    own_server::OwnServer,
    volumes::{free_space, space_of},
};
use crate::{
    donor_client::{DonorSource, Greeted},
    job::CloneJob,
    request::{CloneRequest, DonorRequest, Owner, SourceRequest},
    reuse::Reuse,
    settings::Settings,
    source::{LocalSource, Opened, Source, blocking},
    staging::Owners,
    target,
};

pub mod binary;
pub mod binary_logs;
mod compare;
mod donor_facts;
mod findings;
pub mod own_server;
mod replaceable;
pub(crate) mod server_paths;
mod volumes;

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

/// What was found, and the snapshot if one could be opened.
#[derive(Debug)]
pub struct Report {
    findings: Findings,
    source: Option<Arc<dyn Source>>,
}

impl Report {
    /// Frees the snapshot of a check that nothing follows; returns the findings.
    pub async fn close(self) -> Findings {
        if let Some(source) = self.source {
            source.close(Outcome::Cancelled).await;
        }
        self.findings
    }
}

/// Checks, and opens the snapshot that the clone will read.
pub async fn prepare(job: &CloneJob) -> Result<Prepared, Failure> {
    let report = inspect(&job.request, &job.settings, &job.id, Some(job)).await;
    let Report { findings, source } = report;
    job.status.update(|clone| clone.findings = findings.notable());
    log(&findings);
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
    let own = OwnServer::ask(request, settings, &mut findings).await;
    server_paths::check(request, settings.engine.as_ref(), &own.variables(), &mut findings).await;
    let source = match &request.source {
        SourceRequest::Local => {
            if let (Some(engine), Some(version)) = (&settings.engine, own.get("version")) {
                tell_of_ddl(request, &engine.engine, &version.value, &mut findings);
            }
            open_local(request, settings, &mut findings).await
        }
        SourceRequest::Donor(donor) => {
            let remote = Remote { donor, request, settings, clone_id, job, own: &own };
            Box::pin(open_remote(remote, &mut findings)).await
        }
    };
    if let Some(reuse) = &request.reuse {
        let usable = target::check_reuse(reuse, request, settings);
        findings.add("reuse_directory", usable.map(|()| format!("{} is there", reuse.display())));
    }
    let opened = source.as_ref().map(|source| source.opened());
    volumes::check(request, settings, clone_id, opened.as_ref(), &mut findings);
    let parent = &space_of(request);
    findings.add("owner", owners(request, parent).and_then(may_give));
    Report { findings, source }
}

/// What it takes to open a donor's snapshot, and to compare its server with the own one.
struct Remote<'a> {
    donor: &'a DonorRequest,
    request: &'a CloneRequest,
    settings: &'a Settings,
    clone_id: &'a str,
    job: Option<&'a CloneJob>,
    own: &'a OwnServer,
}

/// Compares also where no snapshot can be opened: both are told.
async fn open_remote(remote: Remote<'_>, findings: &mut Findings) -> Option<Arc<dyn Source>> {
    const CHECK: &str = "donor";
    let Remote { donor, request, settings, clone_id, job, own } = remote;
    tell_of_tls_files(&settings.donor_tls, findings);
    let greeted = match Greeted::connect(donor, settings, job).await {
        Ok(greeted) => greeted,
        Err(failure) => {
            findings.failed(CHECK, failure);
            findings.not_checked("server", "the donor has told nothing of its server");
            return None;
        }
    };
    let info = greeted.server_info().clone();
    let facts = DonorFacts::read(&info);
    let told = facts.as_ref().ok().filter(|facts| facts.has_server());
    if let Some(facts) = told {
        tell_of_ddl(request, &facts.engine, facts.server.variable("version"), findings);
    }
    let mut snapshot = request.snapshot.clone();
    if request.form.is_some() {
        let manages = settings.install.manages;
        let (capabilities, data_directory) = (&info.capabilities[..], &request.target);
        let logs = Logs { own, data_directory, donor: told, capabilities, manages };
        let base = logs.check(findings);
        snapshot.binlog_base = match job {
            Some(job) => {
                job.binlog_base.note(base);
                job.binlog_base.get()
            }
            None => base,
        };
    }
    let opened = DonorSource::open(greeted, donor, &snapshot, settings, clone_id, job);
    let source = match opened.await {
        Ok(source) => {
            findings.passed(CHECK, format!("{} answers", request.source_name()));
            Some(Arc::new(source) as Arc<dyn Source>)
        }
        Err(failure) => {
            findings.failed(CHECK, failure);
            None
        }
    };
    findings.add("same_directory", same_directory(request, &info));
    let in_use = source.as_ref().map(|source| source.opened().storage_engines);
    match facts {
        Ok(facts) => compare::compare(&facts, own, &in_use.unwrap_or_default(), findings),
        Err(failure) => findings.failed("server", failure),
    }
    source
}

/// Says which files towards donors are wrong now: what was right last is in use, and may end or be revoked
/// without anybody seeing why.
fn tell_of_tls_files(tls: &ClientTls, findings: &mut Findings) {
    for error in tls.wrong_files() {
        findings.warning(
            "tls_files",
            format!("{error}; what was right last is in use towards donors"),
            "see that --ssl-ca, --ssl-crl, --ssl-cert and --ssl-key are whole and fit each other; \
             they are read again for each connection"
                .to_owned(),
        );
    }
}

/// Says where DDL waits though nobody has asked for that.
fn tell_of_ddl(request: &CloneRequest, engine: &str, version: &str, findings: &mut Findings) {
    if request.snapshot.block_ddl || engine != "innodb" || version.contains("MariaDB") {
        return;
    }
    findings.warning(
        "block_ddl",
        format!(
            "clone_block_ddl is off, and DDL on the donor's MySQL {version} waits for the whole clone \
             all the same: index builds and imports write no redo there"
        ),
        "clone when no DDL is due, or from a replica; --ddl-timeout bounds how long the clone waits \
         for DDL that runs already"
            .to_owned(),
    );
}

fn log(findings: &Findings) {
    for finding in findings.all() {
        let check = finding.check.as_str();
        match finding.status() {
            FindingStatus::Warning => {
                warn!(check, action = %finding.action, "{}", finding.message);
            }
            FindingStatus::NotChecked => info!(check, why = %finding.message, "not checked"),
            _ => {}
        }
    }
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
