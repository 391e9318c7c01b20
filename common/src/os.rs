//! System calls that no safe library offers. The only module of this crate with unsafe code.

#![expect(unsafe_code, reason = "sync_file_range has no safe wrapper in rustix")]

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
