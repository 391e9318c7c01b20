//! System calls that no safe library offers: the one module with unsafe code. Everywhere else the
//! compiler forbids it.
//!
//! Each block is one call that gets no memory but its own, and says why it is sound.

#![expect(unsafe_code, reason = "these calls have no safe wrapper in a library that is kept")]

use std::{
    fs::File,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use rustix::{io::Errno, process::Signal};

/// Tells the kernel to begin writing a range back. A hint: errors show at the next fsync.
pub fn start_write_back(file: &File, from: u64, to: u64) {
    let (Ok(offset), Ok(length)) = (i64::try_from(from), i64::try_from(to.saturating_sub(from)))
    else {
        return;
    };
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    unsafe {
        libc::sync_file_range(file.as_raw_fd(), offset, length, libc::SYNC_FILE_RANGE_WRITE);
    }
}

/// Writes back what a file has in the page cache, whoever wrote it, and waits for that. Neither the file's
/// size nor the disk's cache are synced, so that the file system's journal holds nobody up meanwhile.
pub fn write_back(file: &File) -> std::io::Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the descriptor is open for as long as `file` is borrowed; no memory is passed.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Arenas of the allocator. Each stream is a new thread, and glibc gives threads arenas of their own,
/// up to eight for each core, which keep what one clone has used; two are enough for two streams that
/// allocate a few times for each megabyte.
const ARENAS_MAX: libc::c_int = 2;

/// Bounds what the allocator keeps. Call it first in `main`.
pub fn bound_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a parameter of the allocator; no memory is passed.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX);
    }
}

/// Gives memory that is free back to the system; called when a clone has ended.
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: walks the allocator's own free lists, under its locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// fcntl with a write lock of the whole file: asks for it, or for who stands against it. No library's
/// wrapper knows the calls for open file descriptions.
pub(crate) fn fcntl_lock(
    file: BorrowedFd<'_>,
    command: libc::c_int,
) -> rustix::io::Result<libc::flock> {
    debug_assert!(
        [libc::F_OFD_GETLK, libc::F_OFD_SETLK, libc::F_GETLK].contains(&command),
        "a command that takes a `flock`"
    );
    // SAFETY: `flock` is plain integers, for which zero is a value. A length of 0 means to the end
    // of the file; the OFD calls demand a pid of 0.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: `lock` lives across the call, and all commands take a `flock` to read or write.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
    if result == -1 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(lock)
}

/// Has the kernel kill the child of `command` when this process is killed, as it does in a container.
pub fn end_with_this_process(command: &mut tokio::process::Command) {
    let set = || Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?);
    // SAFETY: one system call that allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(set);
    }
}
