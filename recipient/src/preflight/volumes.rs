//! Room: bytes and inodes on each file system that a clone writes to, and files as large as the
//! largest one.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use marcot_common::{entry::Totals, failure::Failure};
use rustix::fs::{Mode, OFlags};

use super::findings::Findings;
use crate::{
    install::place::Form, job::staging_directories, request::CloneRequest, settings::Settings,
    source::Opened, staging::allocated_bytes,
};

/// Room that must stay on the file system beside the copy: lists, directories, rounding up.
const SPACE_MARGIN_BYTES: u64 = 64 << 20;

/// Room for the history of clones, each a few KiB, and a few files at one time.
const STATE_BYTES_MIN: u64 = 4 << 20;
const STATE_INODES_MIN: u64 = 16;

/// Adds what there is room for.
pub(super) fn check(
    request: &CloneRequest,
    settings: &Settings,
    clone_id: &str,
    opened: Option<&Opened>,
    findings: &mut Findings,
) {
    let parent = &space_of(request);
    match (opened, free_space(parent)) {
        (Some(opened), Ok(free)) => {
            let estimate = opened.estimate;
            let [_, lost] = staging_directories(&request.staging_parent(), clone_id);
            // A snapshot that was lost has left what the next one goes on with.
            let mut freed = allocated_bytes(&lost);
            if request.discard_old_data_first {
                freed = freed.saturating_add(allocated_bytes(&request.target));
            }
            let free = FreeSpace { bytes: free.bytes.saturating_add(freed), ..free };
            findings.add("free_space", enough_bytes(parent, &free, estimate));
            findings.add("free_inodes", enough_inodes(parent, &free, estimate));
            check_largest(parent, estimate.largest_bytes, findings);
        }
        (None, _) => {
            for check in ["free_space", "free_inodes", "file_size"] {
                findings
                    .not_checked(check, "the donor has opened no snapshot, whose size it tells");
            }
        }
        (_, Err(failure)) => findings.not_checked("free_space", failure.message),
    }
    let state = &settings.state_directory;
    if !is_one_file_system(parent, state) {
        match free_space(state) {
            Ok(free) => findings.add("free_space_state", enough_for_state(state, &free)),
            Err(failure) => findings.not_checked("free_space_state", failure.message),
        }
    }
}

/// The directory on whose file system the clone will be staged.
pub(super) fn space_of(request: &CloneRequest) -> PathBuf {
    match request.form {
        Some(Form::Move) => request.target.clone(),
        _ => request.target.parent().unwrap_or(Path::new("/")).to_owned(),
    }
}

pub(super) struct FreeSpace {
    pub(super) bytes: u64,
    /// 0 where the file system has no fixed number.
    pub(super) inodes: u64,
    pub(super) inodes_total: u64,
}

pub(super) fn free_space(path: &Path) -> Result<FreeSpace, Failure> {
    let stat = rustix::fs::statvfs(path)
        .map_err(|e| Failure::io("look at the file system of", path, &e.into()))?;
    Ok(FreeSpace {
        bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        inodes: stat.f_favail,
        inodes_total: stat.f_files,
    })
}

/// Paths that cannot be looked at are told by their own checks.
fn is_one_file_system(one: &Path, other: &Path) -> bool {
    match (one.metadata(), other.metadata()) {
        (Ok(one), Ok(other)) => one.dev() == other.dev(),
        _ => true,
    }
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

fn enough_for_state(state: &Path, free: &FreeSpace) -> Result<String, Failure> {
    if free.bytes < STATE_BYTES_MIN {
        let text = format!(
            "the file system of --state-directory {} has {} free, {} are needed; free some",
            state.display(),
            human_bytes(free.bytes),
            human_bytes(STATE_BYTES_MIN)
        );
        return Err(Failure::precondition("DISK_SPACE", text).mysql(3873));
    }
    if free.inodes_total != 0 && free.inodes < STATE_INODES_MIN {
        let text = format!(
            "the file system of --state-directory {} has {} free inodes, {STATE_INODES_MIN} are \
             needed; free some",
            state.display(),
            free.inodes
        );
        return Err(Failure::precondition("INODES", text).mysql(3873));
    }
    Ok(format!("{} free for the history of clones", human_bytes(free.bytes)))
}

/// Whether a file may become as large as the donor's largest: by this process's limit, which a signal
/// enforces, and by the file system, which is tried with a file that has no name and no blocks.
fn check_largest(parent: &Path, largest: u64, findings: &mut Findings) {
    const CHECK: &str = "file_size";
    if largest == 0 {
        return findings.not_checked(CHECK, "the donor does not tell how large its files are");
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
    if let Err(failure) = within_limit(largest, limit) {
        return findings.failed(CHECK, failure);
    }
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = match rustix::fs::open(parent, flags, Mode::from_raw_mode(0o600)) {
        Ok(file) => file,
        Err(e) => {
            let text = format!("no file without a name can be made in {}: {e}", parent.display());
            return findings.not_checked(CHECK, text);
        }
    };
    findings.add(CHECK, match rustix::fs::ftruncate(&file, largest) {
        Ok(()) => Ok(format!("the largest file has {}", human_bytes(largest))),
        Err(e) => Err(Failure::precondition(
            "FILE_TOO_LARGE",
            format!(
                "the donor's largest file has {largest} bytes, and the file system of {} takes none \
                 of that size: {e}; clone to another one",
                parent.display()
            ),
        )
        .mysql(3873)),
    });
}

fn within_limit(largest: u64, limit: Option<u64>) -> Result<(), Failure> {
    match limit {
        Some(limit) if limit < largest => Err(Failure::precondition(
            "FILE_TOO_LARGE",
            format!(
                "the donor's largest file has {largest} bytes, and this process may write files of \
                 {limit} bytes at the most (RLIMIT_FSIZE); raise the limit (LimitFSIZE= of its unit, \
                 ulimit -f) and start it again"
            ),
        )
        .mysql(3873)),
        _ => Ok(()),
    }
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
        largest_bytes: 0,
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
    fn files_must_fit_the_limit_of_this_process() {
        within_limit(10, None).unwrap();
        within_limit(10, Some(10)).unwrap();
        let failure = within_limit(10, Some(9)).unwrap_err();
        assert!(failure.message.contains("10 bytes") && failure.message.contains("of 9 bytes"));
    }

    #[test]
    fn a_file_as_large_as_no_file_system_takes_is_refused_and_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let checked = |largest| {
            let mut findings = Findings::default();
            check_largest(directory.path(), largest, &mut findings);
            findings.all()[0].status()
        };
        use marcot_proto::recipient::v1::FindingStatus;
        assert_eq!(checked(1 << 20), FindingStatus::Passed);
        assert_eq!(checked(u64::MAX), FindingStatus::Failed);
        assert_eq!(checked(0), FindingStatus::NotChecked);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_history_needs_room_of_its_own() {
        let state = Path::new("/s");
        enough_for_state(state, &free(STATE_BYTES_MIN, 0, 0)).unwrap();
        let failure = enough_for_state(state, &free(STATE_BYTES_MIN - 1, 0, 0)).unwrap_err();
        assert_eq!(failure.reason, "DISK_SPACE");
        let failure = enough_for_state(state, &free(STATE_BYTES_MIN, 3, 9)).unwrap_err();
        assert_eq!(failure.reason, "INODES");
    }
}
