//! Room: bytes and inodes on each file system that a clone writes to, and files as large as the
//! largest one.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use marcot_common::{entry::Totals, failure::Failure, shown::bytes};
use rustix::fs::{Mode, OFlags};

use super::findings::Findings;
use crate::{
    certificate::digests::{BLOCK_BYTES, DIGEST_BYTES},
    install::place::Form,
    job::staging_directories,
    request::CloneRequest,
    settings::Settings,
    source::Opened,
    staging::allocated_bytes,
};

/// Least room that must stay on the file system beside the copy: lists, directories, rounding up.
const SPACE_MARGIN_BYTES: u64 = 64 << 20;

/// Of each block of 1 MiB that a file has begun: its digest in the copy's journal and in the table that
/// the certificate is made of, and its line there, in hexadecimal digits behind a space.
const BLOCK_BESIDE_BYTES: u64 = 4 * DIGEST_BYTES as u64 + 2;

/// Of each entry: its record with a place in an index (80 to 124 bytes for names of 20 to 64 bytes), in
/// three lists while rounds are merged; the journal's record of a small file (45), and the entry's line in
/// the certificate, which mostly is a path.
const ENTRY_BESIDE_BYTES: u64 = 3 * 124 + 45 + 64;

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
    match opened {
        Some(opened) => {
            let [_, lost] = staging_directories(&request.staging_parent(), clone_id);
            // A snapshot that was lost has left what the next one goes on with.
            let mut freed = allocated_bytes(&lost);
            if request.discard_old_data_first {
                freed = freed.saturating_add(allocated_bytes(&request.target));
            }
            check_copy(parent, freed, opened.estimate, findings);
        }
        None => {
            for check in ["free_space", "free_inodes", "file_size"] {
                findings
                    .not_checked(check, "the donor has opened no snapshot, whose size it tells");
            }
        }
    }
    let state = &settings.state_directory;
    if !is_one_file_system(parent, state) {
        match free_space(state) {
            Ok(free) => findings.add("free_space_state", enough_for_state(state, &free)),
            Err(failure) => findings.not_checked("free_space_state", failure.message),
        }
    }
}

/// Room for the copy, with what is `freed` for it. Each check is told, also where nothing can be looked
/// at: one that is missing would be taken for one that has passed.
fn check_copy(parent: &Path, freed: u64, estimate: Totals, findings: &mut Findings) {
    match free_space(parent) {
        Ok(free) => {
            let free = FreeSpace { bytes: free.bytes.saturating_add(freed), ..free };
            findings.add("free_space", enough_bytes(parent, &free, estimate));
            findings.add("free_inodes", enough_inodes(parent, &free, estimate));
        }
        Err(failure) => {
            for check in ["free_space", "free_inodes"] {
                findings.not_checked(check, failure.message.clone());
            }
        }
    }
    check_largest(parent, estimate.largest_bytes, findings);
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

/// What stands beside the copy until its end: journal, lists, table of digests; and its certificate.
fn beside_bytes(estimate: Totals) -> u64 {
    // Each file begins one block more than it fills, at the most.
    let blocks = (estimate.size_bytes / BLOCK_BYTES).saturating_add(estimate.files);
    let of_blocks = blocks.saturating_mul(BLOCK_BESIDE_BYTES);
    let of_entries = estimate.entries.saturating_mul(ENTRY_BESIDE_BYTES);
    of_blocks.saturating_add(of_entries).max(SPACE_MARGIN_BYTES)
}

fn enough_bytes(parent: &Path, free: &FreeSpace, estimate: Totals) -> Result<String, Failure> {
    let needed = estimate
        .allocated_bytes
        .min(estimate.size_bytes.saturating_add(estimate.files.saturating_mul(4096)))
        .saturating_add(beside_bytes(estimate));
    if free.bytes >= needed {
        return Ok(format!("{} of {} free", bytes(needed), bytes(free.bytes)));
    }
    Err(Failure::precondition(
        "DISK_SPACE",
        format!(
            "Clone estimated database size is {}. Available space {} is not enough: free {} on \
             the file system of {}",
            bytes(needed),
            bytes(free.bytes),
            bytes(needed - free.bytes),
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
    .mysql(3873)
    .with("action", "remove files there, or clone to a file system that was made with more inodes"))
}

fn enough_for_state(state: &Path, free: &FreeSpace) -> Result<String, Failure> {
    if free.bytes < STATE_BYTES_MIN {
        let text = format!(
            "the file system of --state-directory {} has {} free, {} are needed; free some",
            state.display(),
            bytes(free.bytes),
            bytes(STATE_BYTES_MIN)
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
    Ok(format!("{} free for the history of clones", bytes(free.bytes)))
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
        Ok(()) => Ok(format!("the largest file has {}", bytes(largest))),
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
    fn space_is_what_is_allocated_and_what_stands_beside_it() {
        let parent = Path::new("/p");
        let needed = (1 << 30) + beside_bytes(ESTIMATE);
        enough_bytes(parent, &free(needed, 0, 0), ESTIMATE).unwrap();
        let failure = enough_bytes(parent, &free(needed - 1, 0, 0), ESTIMATE).unwrap_err();
        assert_eq!(failure.mysql_error, Some(3873));
        let text = "Clone estimated database size is 1.13 GiB. Available space 1.13 GiB";
        assert!(failure.message.starts_with(text), "{failure}");
    }

    /// Guards clones that fill the file system with what stands beside them: a TiB in large files has
    /// 130 MiB, a million small files some 600; a small clone needs no more than it ever did.
    #[test]
    fn what_stands_beside_a_copy_grows_with_it() {
        let totals = |files, size_bytes| Totals { entries: files, files, size_bytes, ..ESTIMATE };
        assert_eq!(beside_bytes(totals(0, 0)), SPACE_MARGIN_BYTES);
        assert_eq!(beside_bytes(totals(1_000, 100 << 30)), SPACE_MARGIN_BYTES);
        assert_eq!(beside_bytes(totals(0, 1 << 40)) >> 20, 130);
        assert_eq!(beside_bytes(totals(1_000_000, 1_000_000 << 14)) >> 20, 584);
        assert_eq!(beside_bytes(totals(u64::MAX, u64::MAX)), u64::MAX);
    }

    /// Guards a list of findings that says of each check what became of it: without it two of three are
    /// not told where the file system cannot be looked at.
    #[test]
    fn what_cannot_be_looked_at_is_not_checked_and_told_for_each_check() {
        let mut findings = Findings::default();
        let estimate = Totals { largest_bytes: 1, ..ESTIMATE };
        check_copy(Path::new("/no/such/directory"), 0, estimate, &mut findings);
        let told: Vec<_> = findings.all().iter().map(|f| (&*f.check, f.status())).collect();
        let not_checked = marcot_proto::recipient::v1::FindingStatus::NotChecked;
        let checks = ["free_space", "free_inodes", "file_size"];
        assert_eq!(told, checks.map(|check| (check, not_checked)));
    }

    #[test]
    fn inodes_count_where_a_file_system_has_a_number_of_them() {
        let parent = Path::new("/p");
        enough_inodes(parent, &free(0, 10, 10), ESTIMATE).unwrap();
        enough_inodes(parent, &free(0, 0, 0), ESTIMATE).unwrap();
        let failure = enough_inodes(parent, &free(0, 9, 100), ESTIMATE).unwrap_err();
        assert_eq!(failure.reason, "INODES");
        let mut findings = Findings::default();
        findings.failed("free_inodes", failure);
        assert!(findings.all()[0].action.contains("more inodes"), "{findings:?}");
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
