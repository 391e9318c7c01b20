//! A gate that a user closes to pause a clone: whoever copies waits at it.

use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Between two looks of a thread that waits.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// Open unless the clone is paused.
#[derive(Debug)]
pub struct Gate(watch::Sender<bool>);

impl Default for Gate {
    fn default() -> Self {
        Self(watch::Sender::new(true))
    }
}

impl Gate {
    /// Opens or closes it; says whether that changed anything.
    pub fn set_open(&self, open: bool) -> bool {
        self.0.send_if_modified(|now| std::mem::replace(now, open) != open)
    }

    /// Whether it is open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until it is open.
    pub async fn pass(&self) {
        if !self.is_open() {
            // The sender lives as long as this.
            drop(self.0.subscribe().wait_for(|open| *open).await);
        }
    }

    /// As `pass`, on a thread; returns at once when `stop` is cancelled.
    pub fn pass_blocking(&self, stop: &CancellationToken) {
        while !self.is_open() && !stop.is_cancelled() {
            std::thread::sleep(LOOK_PAUSE);
        }
    }
}
