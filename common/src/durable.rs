//! Files that are there whole or not at all.

use std::{fs::File, io, io::Write as _, os::unix::fs::OpenOptionsExt as _, path::Path};

/// Writes a file so that a crash shows the old content or the new, never a mix: a temporary file
/// beside it, fsync, rename, fsync of the directory.
pub fn write_atomically(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = directory.join(format!(".{name}.{}", uuid::Uuid::new_v4()));
    let write = || -> io::Result<()> {
        let mut file = File::options().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        rustix::fs::rename(&temporary, path)?;
        let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        File::open(directory)?.sync_all()
    };
    write().inspect_err(|_| {
        // The first error is the one to tell; a temporary file that stays is harmless.
        drop(std::fs::remove_file(&temporary));
    })
}
