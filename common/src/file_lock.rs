//! The locks that database servers hold on their files: fcntl's, over the whole file.
//!
//! Taken here as open-file-description locks: they stand against those of servers, and closing
//! another descriptor of the same file does not drop them.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use crate::os::fcntl_lock;

/// The process whose lock on any byte of `file` stands against a write lock; 0 or less when it has
/// no number here.
pub fn holder(file: BorrowedFd<'_>) -> rustix::io::Result<Option<i32>> {
    let lock = match fcntl_lock(file, libc::F_OFD_GETLK) {
        // Sandboxes such as gVisor do not know it.
        Err(Errno::INVAL) => fcntl_lock(file, libc::F_GETLK)?,
        other => other?,
    };
    Ok((lock.l_type != libc::F_UNLCK as libc::c_short).then_some(lock.l_pid))
}

/// Takes a write lock of the whole file, which must be open for writing; it lasts until the last
/// copy of the descriptor is closed. `Errno::AGAIN`: another process holds one.
pub fn take(file: BorrowedFd<'_>) -> rustix::io::Result<()> {
    match fcntl_lock(file, libc::F_OFD_SETLK) {
        Ok(_) => Ok(()),
        Err(Errno::ACCESS) => Err(Errno::AGAIN),
        Err(e) => Err(e),
    }
}
