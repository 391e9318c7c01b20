//! Waits for orphans: processes whose parents have ended become children of PID 1, or of a
//! subreaper such as this one, and stay zombies until it has waited for them.

use std::io;

use rustix::{
    io::Errno,
    process::{Pid, WaitOptions, getpid, set_child_subreaper, waitpid},
};
use tokio::signal::unix::{SignalKind, signal};

use super::children;

/// Takes orphans on, and reaps them from now on.
pub fn start() -> io::Result<()> {
    set_child_subreaper(Some(getpid()))?;
    let mut ended = signal(SignalKind::child())?;
    tokio::spawn(async move {
        while ended.recv().await.is_some() {
            reap();
        }
    });
    Ok(())
}

/// Waits for every ended child that nobody else waits for.
fn reap() {
    let own = children::lock();
    for pid in children_of_this_process() {
        if own.contains(&pid) {
            continue;
        }
        let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { continue };
        match waitpid(Some(pid), WaitOptions::NOHANG) {
            Ok(Some(_)) => tracing::debug!(pid = pid.as_raw_nonzero().get(), "an orphan has ended"),
            Ok(None) | Err(Errno::CHILD) => {}
            Err(e) => tracing::warn!(error = %e, "an orphan cannot be waited for"),
        }
    }
}

/// Children of all threads, as the kernel lists them.
fn children_of_this_process() -> Vec<u32> {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else {
        return Vec::new();
    };
    let lists = threads
        .flatten()
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()
        })
        .collect()
}
