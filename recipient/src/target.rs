//! Where a new data directory may be: the plugin's rules, in its order, with its numbers.

use std::{
    os::unix::ffi::OsStrExt as _,
    path::{Component, Path, PathBuf},
};

use marcot_common::failure::Failure;
use tonic::Code;

use crate::{
    install::{generation, identity, locks, mounts, place::Form, recorded, replacement},
    preflight::Findings,
    request::{CloneRequest, SourceRequest},
    settings::Settings,
};

/// Longest path, bytes, as the plugin has it (FN_REFLEN - 1).
const PATH_BYTES_MAX: usize = 511;

/// Checks the target and adds a finding for each rule.
pub fn check(request: &CloneRequest, settings: &Settings, findings: &mut Findings) {
    let target = &request.target;
    let shown = target.display();
    findings.add("path_absolute", absolute(target).map(|()| format!("{shown} is absolute")));
    findings.add("path_length", length(target).map(|()| format!("{shown} is short enough")));
    if target.is_relative() {
        findings.not_checked("path_free", "the path is not absolute");
        return;
    }
    match request.form {
        Some(form) => check_replacement(request, form, findings),
        None if request.replaces => {
            findings.passed("path_free", format!("nothing is in {shown}"));
        }
        None => {
            findings.add("path_free", free(target).map(|()| format!("nothing is at {shown}")));
        }
    }
    if !request.replaces {
        let outside = outside_data_directory(target, settings);
        findings.add("path_outside", outside.map(|()| format!("{shown} is outside")));
    }
    let parent = match request.form {
        Some(Form::Move) => directory_is_writable(target, target),
        _ => directory_is_writable(target, target.parent().unwrap_or(Path::new("/"))),
    };
    findings.add("path_parent", parent.map(|()| "the directory above is writable".to_owned()));
    if !request.replaces {
        let allowed = allowed(target, settings);
        findings.add("path_allowed", allowed.map(|()| format!("{shown} is below an allowed root")));
    }
}

/// The first rule that is broken: told before a clone is accepted.
pub fn check_first(request: &CloneRequest, settings: &Settings) -> Result<(), Failure> {
    let mut findings = Findings::default();
    check(request, settings, &mut findings);
    if let SourceRequest::Donor(donor) = &request.source {
        settings.donors.current().check_name(&donor.host, donor.port)?;
    }
    findings.into_failure().map_or(Ok(()), Err)
}

/// 1525.
#[must_use]
pub fn not_absolute(target: &Path) -> Failure {
    Failure::invalid(
        "PATH_NOT_ABSOLUTE",
        format!("Incorrect path value: '{}'; give an absolute path without `..`", target.display()),
    )
    .mysql(1525)
}

fn absolute(target: &Path) -> Result<(), Failure> {
    let plain = target.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
    let nul = target.as_os_str().as_bytes().contains(&0);
    if target.is_absolute() && plain && !nul && target.parent().is_some() {
        Ok(())
    } else {
        Err(not_absolute(target))
    }
}

fn length(target: &Path) -> Result<(), Failure> {
    let bytes = target.as_os_str().len();
    if bytes < PATH_BYTES_MAX {
        return Ok(());
    }
    Err(Failure::invalid(
        "PATH_TOO_LONG",
        format!(
            "The path specified for DATA DIRECTORY is too long: {bytes} bytes, less than \
             {PATH_BYTES_MAX} are allowed"
        ),
    )
    .mysql(1680))
}

/// Nothing may be there, not even a link that leads nowhere.
fn free(target: &Path) -> Result<(), Failure> {
    match target.symlink_metadata() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        // The parent is no directory; its own rule says so.
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => Ok(()),
        Err(e) => Err(Failure::io("look at", target, &e).mysql(1006)),
        Ok(_) => Err(Failure::new(
            Code::AlreadyExists,
            "TARGET_EXISTS",
            format!(
                "Can't create database '{}'; database exists: name a directory that is not there \
                 yet",
                target.display()
            ),
        )
        .mysql(1007)),
    }
}

/// The server's own data make way, when they are those that the caller has seen and no earlier
/// install still needs them.
fn check_replacement(request: &CloneRequest, form: Form, findings: &mut Findings) {
    let target = &request.target;
    findings.passed("install_form", format!("{}: form {}", target.display(), form.name()));
    // Once they are discarded for it the clone is all that there is.
    if !(request.discard_old_data_first && generation::was_discarded(target)) {
        findings.add("generation", generation::check(target, &request.expected_generation));
    }
    findings.add(
        "server_locks",
        locks::check_seen(target).map(|()| "a server that runs on it is seen".to_owned()),
    );
    findings.add("earlier_install", no_earlier_install(target));
    findings.add("identity", identity::check(target).map(|()| "it can be carried over".to_owned()));
    findings.add(
        "mounts",
        mounts::refuse_mounts_in(target).map(|()| "nothing is mounted in it".to_owned()),
    );
    findings.add(
        "not_a_donor",
        replacement::take_alone(target)
            .map(|_| "no clone reads the data that are to be replaced".to_owned()),
    );
}

/// At most one install at a time keeps a tree of somebody's.
pub fn no_earlier_install(target: &Path) -> Result<String, Failure> {
    for earlier in recorded::all_recorded(target)? {
        if earlier.is_pending() {
            return Err(Failure::precondition(
                "INSTALL_PENDING",
                format!(
                    "clones/{} was installed in {} (step {}) and is neither accepted nor rolled \
                     back: `marcot accept` removes the data from before it, `marcot rollback` \
                     brings them back",
                    earlier.plan.clone,
                    target.display(),
                    earlier.step.name()
                ),
            ));
        }
    }
    Ok("no earlier install waits".to_owned())
}

fn outside_data_directory(target: &Path, settings: &Settings) -> Result<(), Failure> {
    let Some(data_directory) = &settings.data_directory else {
        return Ok(());
    };
    let Ok(data_directory) = data_directory.canonicalize() else {
        return Ok(());
    };
    if resolve(target).starts_with(&data_directory) {
        return Err(Failure::precondition(
            "PATH_IN_DATADIR",
            format!(
                "Path is within the current data directory '{}'; choose a path outside of it",
                data_directory.display()
            ),
        )
        .mysql(3632));
    }
    Ok(())
}

/// An older copy is read only where clones may be written, or in the server's own data directory: a
/// caller cannot ask about other files of this host.
pub fn check_reuse(
    reuse: &Path,
    request: &CloneRequest,
    settings: &Settings,
) -> Result<(), Failure> {
    let refused = |why: String| {
        let shown = reuse.display();
        Failure::precondition("REUSE_DIRECTORY", format!("the copy to reuse, {shown}: {why}"))
    };
    let resolved = reuse.canonicalize().map_err(|e| refused(e.to_string()))?;
    if !resolved.is_dir() {
        return Err(refused("it is no directory".to_owned()));
    }
    let roots = settings.allow_directories.iter().chain(&settings.data_directory);
    let mut roots = roots.filter_map(|root| root.canonicalize().ok());
    if !roots.any(|root| resolved.starts_with(root)) {
        return Err(refused(
            "it lies neither below an allowed directory (--allow-directory) nor in the data \
             directory"
                .to_owned(),
        ));
    }
    let target = resolve(&request.target);
    if !request.replaces && (target.starts_with(&resolved) || resolved.starts_with(&target)) {
        return Err(refused(format!("it and {} lie in one another", target.display())));
    }
    Ok(())
}

fn directory_is_writable(target: &Path, parent: &Path) -> Result<(), Failure> {
    let failed = |why: String| {
        Err(Failure::precondition(
            "PARENT_NOT_WRITABLE",
            format!(
                "Can't create database '{}': its parent directory {} {why}",
                target.display(),
                parent.display()
            ),
        )
        .mysql(1006))
    };
    match parent.metadata() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return failed("does not exist; make it first".to_owned());
        }
        Err(e) => return failed(format!("cannot be looked at: {e}")),
        Ok(metadata) if !metadata.is_dir() => return failed("is no directory".to_owned()),
        Ok(_) => {}
    }
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    let flags = rustix::fs::AtFlags::EACCESS;
    match rustix::fs::accessat(rustix::fs::CWD, parent, access, flags) {
        Ok(()) => Ok(()),
        Err(e) => failed(format!("is not writable for this process: {e}")),
    }
}

fn allowed(target: &Path, settings: &Settings) -> Result<(), Failure> {
    let roots = allowed_roots(settings);
    let resolved = resolve(target);
    let below = |root: &PathBuf| {
        root.canonicalize().is_ok_and(|root| resolved.starts_with(&root) && resolved != root)
    };
    if roots.iter().any(below) {
        return Ok(());
    }
    let shown: Vec<String> = roots.iter().map(|root| root.display().to_string()).collect();
    let shown = if shown.is_empty() { "none".to_owned() } else { shown.join(", ") };
    Err(Failure::precondition(
        "PATH_NOT_ALLOWED",
        format!(
            "{} lies below no directory that the operator has allowed ({shown}); choose another \
             path, or start the recipient with --allow-directory",
            target.display()
        ),
    )
    .mysql(1290))
}

/// What the operator has allowed; by default the directory that the data directory stands in.
fn allowed_roots(settings: &Settings) -> Vec<PathBuf> {
    if !settings.allow_directories.is_empty() {
        return settings.allow_directories.clone();
    }
    // A relative data directory may be a single name, whose parent is written as nothing.
    let directory = settings.data_directory.as_ref().and_then(|d| std::path::absolute(d).ok());
    directory.as_deref().and_then(Path::parent).map(PathBuf::from).into_iter().collect()
}

/// The path with the links of what exists of it resolved.
fn resolve(target: &Path) -> PathBuf {
    for ancestor in target.ancestors() {
        if let Ok(resolved) = ancestor.canonicalize() {
            let rest = target.strip_prefix(ancestor).unwrap_or(Path::new(""));
            return resolved.join(rest);
        }
    }
    target.to_owned()
}

#[cfg(test)]
mod tests;
