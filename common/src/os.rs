//! System calls that no safe library offers. The only module of this crate with unsafe code.

#![expect(unsafe_code, reason = "sync_file_range, mallopt and malloc_trim have no safe wrapper")]

use std::{fs::File, os::fd::AsRawFd as _};

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
