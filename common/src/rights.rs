//! What stands between this process and a file: whose it is, who may read it, who this process is,
//! and the capability that it lacks.

use std::{fs::Metadata, os::unix::fs::MetadataExt as _, path::Path};

use rustix::thread::CapabilitySet;

/// Says why `path` may not be used, as far as that can be seen from here.
#[must_use]
pub fn describe(path: &Path) -> String {
    let me = format!(
        "this process is {}:{} {}",
        user(rustix::process::geteuid().as_raw()),
        group(rustix::process::getegid().as_raw()),
        capability()
    );
    // Below a directory that may not be searched nothing can be looked at: then it is the culprit.
    let seen = path.ancestors().find_map(|at| Some((at, at.metadata().ok()?)));
    match seen {
        Some((at, metadata)) if at == path => format!("it {}; {me}", whose(&metadata)),
        Some((at, metadata)) => format!("{} {}; {me}", at.display(), whose(&metadata)),
        None => me,
    }
}

fn whose(metadata: &Metadata) -> String {
    let (user, group) = (user(metadata.uid()), group(metadata.gid()));
    format!("belongs to {user}:{group} and has mode {:04o}", metadata.mode() & 0o7777)
}

fn user(uid: u32) -> String {
    let known = uzers::get_user_by_uid(uid);
    known.map_or_else(|| uid.to_string(), |u| format!("{}({uid})", u.name().to_string_lossy()))
}

fn group(gid: u32) -> String {
    let known = uzers::get_group_by_gid(gid);
    known.map_or_else(|| gid.to_string(), |g| format!("{}({gid})", g.name().to_string_lossy()))
}

/// Whether the capability to read all files is there: with it, something else refuses.
fn capability() -> &'static str {
    let reads_all = CapabilitySet::DAC_READ_SEARCH | CapabilitySet::DAC_OVERRIDE;
    match rustix::thread::capabilities(None) {
        Ok(sets) if sets.effective.intersects(reads_all) => {
            "and has CAP_DAC_READ_SEARCH: a security module, a user namespace or the server of a \
             network file system refuses"
        }
        _ => "without CAP_DAC_READ_SEARCH",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn owner_mode_and_who_this_process_is_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("f");
        std::fs::write(&file, "").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        let told = describe(&file);
        let me = rustix::process::geteuid().as_raw().to_string();
        for part in
            ["it belongs to", "has mode 0640", "this process is", "CAP_DAC_READ_SEARCH", &me]
        {
            assert!(told.contains(part), "{told}");
        }
        let below = describe(&file.join("x/y"));
        assert!(below.starts_with(&format!("{} belongs to", file.display())), "{below}");
    }
}
