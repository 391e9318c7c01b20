//! The binary log, written back before the server syncs it.
//!
//! BACKUP STAGE BLOCK_COMMIT ends with a sync of the binary log, and commits wait for it (MariaDB,
//! sql/backup.cc, `backup_block_commit`; seen by strace of 10.11). Under sync_binlog=0 that is all that was
//! written since the kernel last did so, and most of the time for which commits are blocked. Written back
//! from here just before, little is left for then. A whole fsync from here would do as well, and hold
//! commits up by the file system's journal: measured by `make bench BENCH=cuts`.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use marcot_common::os::write_back;

use crate::innodb::server::{Facts, Session, SqlError};

/// Writes the current binary log back. One that cannot be opened here, as where it lies outside of what this
/// process sees, costs commits the server's own sync and nothing else.
pub(in crate::innodb) fn write_back_current(
    session: &mut Session,
    facts: &Facts,
    data_directory: &Path,
) -> Result<(), SqlError> {
    if !facts.has_binlog {
        return Ok(());
    }
    let Some(row) = session.row("SHOW MASTER STATUS")? else { return Ok(()) };
    let name = String::from_utf8_lossy(row.bytes(0)).into_owned();
    let (basename, datadir) = (facts.variable("log_bin_basename"), facts.variable("datadir"));
    let path = path_here(basename, datadir, data_directory, &name);
    if let Err(error) = File::open(&path).and_then(|file| write_back(&file)) {
        tracing::debug!(%error, path = %path.display(), "the binary log is left to the server's sync");
    }
    Ok(())
}

/// Where this process sees the log `name`: the server may know the data directory by another path.
pub(in crate::innodb) fn path_here(
    basename: &str,
    datadir: &str,
    data_directory: &Path,
    name: &str,
) -> PathBuf {
    let directory = Path::new(basename).parent().unwrap_or(Path::new(""));
    match directory.strip_prefix(datadir) {
        Ok(inside) => data_directory.join(inside).join(name),
        Err(_) => directory.join(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_looked_for_where_this_process_sees_it() {
        let here = |basename| {
            path_here(basename, "/var/lib/mysql/", Path::new("/data"), "bin.000007")
                .display()
                .to_string()
        };
        assert_eq!(here("/var/lib/mysql/bin"), "/data/bin.000007");
        assert_eq!(here("/var/lib/mysql/logs/bin"), "/data/logs/bin.000007");
        assert_eq!(here("/var/log/mysql/bin"), "/var/log/mysql/bin.000007");
    }
}
