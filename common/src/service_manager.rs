//! What systemd is told of a service of `Type=notify`.

use sd_notify::NotifyState;
use tracing::warn;

/// Calls are taken from now on, here.
pub fn ready(addresses: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(&format!("takes calls on {addresses}"))]);
}

/// The drain has begun.
pub fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("draining: nothing new is taken")]);
}

/// Nothing happens where no service manager waits for it.
fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!(%error, "the service manager cannot be told");
    }
}
