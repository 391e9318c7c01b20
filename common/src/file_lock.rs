//! The locks that database servers hold on their files: fcntl's, over the whole file.
//!
//! Taken here as open-file-description locks: they stand against those of servers, and closing
//! another descriptor of the same file does not drop them.
#![expect(unsafe_code, reason = "fcntl takes a pointer; no safe wrapper handles all holders")]

use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};

use rustix::io::Errno;

/// The process whose lock on any byte of `file` stands against a write lock; 0 or less when it has
/// no number here.
pub fn holder(file: BorrowedFd<'_>) -> rustix::io::Result<Option<i32>> {
    let lock = match call(file.as_raw_fd(), libc::F_OFD_GETLK) {
        // Sandboxes such as gVisor do not know it.
        Err(Errno::INVAL) => call(file.as_raw_fd(), libc::F_GETLK)?,
        other => other?,
    };
    Ok((lock.l_type != libc::F_UNLCK as libc::c_short).then_some(lock.l_pid))
}

/// Takes a write lock of the whole file, which must be open for writing; it lasts until the last
/// copy of the descriptor is closed. `Errno::AGAIN`: another process holds one.
pub fn take(file: BorrowedFd<'_>) -> rustix::io::Result<()> {
    match call(file.as_raw_fd(), libc::F_OFD_SETLK) {
        Ok(_) => Ok(()),
        Err(Errno::ACCESS) => Err(Errno::AGAIN),
        Err(e) => Err(e),
    }
}

fn call(fd: RawFd, command: libc::c_int) -> rustix::io::Result<libc::flock> {
    // SAFETY: `flock` is plain integers, for which zero is a value. A length of 0 means to the end
    // of the file; the OFD calls demand a pid of 0.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: `lock` lives across the call, and all commands take a `flock` to read or write.
    let result = unsafe { libc::fcntl(fd, command, &raw mut lock) };
    if result == -1 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(lock)
}
