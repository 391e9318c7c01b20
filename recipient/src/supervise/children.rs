//! Processes that this one has started and waits for itself: the reaper leaves them alone.

use std::{
    collections::HashSet,
    io,
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};

use rustix::process::Pid;
use tokio::process::{Child, Command};

static OWN: LazyLock<Mutex<HashSet<u32>>> = LazyLock::new(Mutex::default);

/// Says that a process is waited for; dropped once it has been.
#[derive(Debug)]
pub struct OwnChild(u32);

impl Drop for OwnChild {
    fn drop(&mut self) {
        lock().remove(&self.0);
    }
}

/// Starts a process that the caller waits for.
pub fn spawn(command: &mut Command) -> io::Result<(Child, OwnChild)> {
    // Held over the start: the reaper must not meet a child that is not noted yet.
    let mut own = lock();
    let child = command.spawn()?;
    let pid = child.id().unwrap_or(0);
    own.insert(pid);
    Ok((child, OwnChild(pid)))
}

/// Whether a process is this one's child: started here, or an orphan that came to it.
#[must_use]
pub fn is_child_of_this_process(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    let parent = stat.ok().and_then(|stat| {
        let (_, rest) = stat.rsplit_once(") ")?;
        rest.split(' ').nth(1)?.parse::<u32>().ok()
    });
    parent == Some(std::process::id())
}

/// The processes that are waited for, for as long as the guard is held.
pub(super) fn lock() -> MutexGuard<'static, HashSet<u32>> {
    OWN.lock().unwrap_or_else(PoisonError::into_inner)
}
