//! Waits for the end of a clone: watches it, shows it, reconnects, and cancels on Ctrl-C.
//!
//! Invariants:
//! * From `Interrupts::new` on no Ctrl-C is lost, also while the recipient is away.
//! * A cancel that could not be sent is sent when the recipient is back.

use std::time::{Duration, Instant};

use marcot_common::{failure::Failure, time::duration_to_wire};
use marcot_proto::recipient::v1::{
    CancelCloneRequest, Clone, WatchCloneRequest, WatchCloneResponse,
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tonic::{Code, Status, Streaming};

use super::{connect::Client, progress::Shown};
use crate::job::status::is_over;

/// How long a recipient may be away before this gives up: its restart takes seconds.
const AWAY_MAX: Duration = Duration::from_secs(60);

/// Pause between two tries.
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);

/// What Ctrl-C does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interrupt {
    /// It cancels the clone and waits for its end; a second one leaves at once.
    Cancels,
    /// It leaves; the clone goes on.
    Leaves,
}

/// How a wait ended.
#[derive(Debug)]
pub(super) enum Waited {
    /// The clone has ended.
    Ended(Box<Clone>),
    /// The user has left; the clone goes on.
    Left,
}

/// Ctrl-C, which from now on does not end the process by itself.
#[derive(Debug)]
pub(super) struct Interrupts(Signal);

impl Interrupts {
    pub(super) fn new() -> Result<Self, Failure> {
        let listened = signal(SignalKind::interrupt());
        listened.map(Self).map_err(|e| Failure::bug(format!("listen for Ctrl-C: {e}")))
    }

    pub(super) async fn next(&mut self) {
        self.0.recv().await;
    }
}

/// Waits for the end of a clone.
pub(super) async fn wait(
    client: &mut Client,
    name: &str,
    interrupt: Interrupt,
    interrupts: &mut Interrupts,
) -> Result<Waited, Failure> {
    let mut shown = Shown::new();
    let mut watcher = Watcher::new(client, name);
    loop {
        tokio::select! {
            seen = watcher.next(&shown) => {
                let clone = seen?;
                if is_over(clone.state) {
                    shown.finish(&clone);
                    return Ok(Waited::Ended(Box::new(clone)));
                }
                shown.show(&clone);
            }
            () = interrupts.next() => {
                if interrupt == Interrupt::Leaves || watcher.cancel_wanted {
                    shown.leave();
                    return Ok(Waited::Left);
                }
                watcher.cancel_wanted = true;
                shown.note("cancelling; Ctrl-C again leaves at once");
            }
        }
    }
}

/// Follows a clone over lost connections.
struct Watcher<'a> {
    client: &'a mut Client,
    name: &'a str,
    resume_token: String,
    stream: Option<Streaming<WatchCloneResponse>>,
    /// Since when the recipient has not been heard, while it is away.
    away_since: Option<Instant>,
    cancel_wanted: bool,
    cancel_sent: bool,
}

impl<'a> Watcher<'a> {
    fn new(client: &'a mut Client, name: &'a str) -> Self {
        Self {
            client,
            name,
            resume_token: String::new(),
            stream: None,
            away_since: None,
            cancel_wanted: false,
            cancel_sent: false,
        }
    }

    /// Returns the clone's next state. May be dropped while it waits, and called again.
    async fn next(&mut self, shown: &Shown) -> Result<Clone, Failure> {
        loop {
            let failure = match self.attempt(shown).await {
                Ok(clone) => {
                    self.away_since = None;
                    return Ok(clone);
                }
                Err(failure) => failure,
            };
            self.stream = None;
            let away = self.away_since.map_or(Duration::ZERO, |since| since.elapsed());
            if failure.code != Code::Unavailable || away > AWAY_MAX {
                return Err(failure);
            }
            if self.away_since.is_none() {
                shown.note(&format!("lost the recipient, connecting again ({failure})"));
                self.away_since = Some(Instant::now());
            }
            tokio::time::sleep(RECONNECT_PAUSE).await;
            // While this fails so does the next attempt, and tells why.
            drop(self.client.reconnect().await);
        }
    }

    async fn attempt(&mut self, shown: &Shown) -> Result<Clone, Failure> {
        if self.cancel_wanted && !self.cancel_sent {
            self.cancel().await?;
        }
        if self.stream.is_none() {
            let request = WatchCloneRequest {
                name: self.name.to_owned(),
                resume_token: self.resume_token.clone(),
                interval: Some(duration_to_wire(shown.interval())),
            };
            let begun = self.client.api().watch_clone(request).await;
            self.stream = Some(begun.map_err(|status| lost(&status))?.into_inner());
        }
        let ended = || Failure::new(Code::Unavailable, "WATCH_ENDED", "the watch has ended");
        let stream = self.stream.as_mut().ok_or_else(ended)?;
        let message = stream.message().await.map_err(|status| lost(&status))?.ok_or_else(ended)?;
        self.resume_token = message.resume_token;
        Ok(message.clone.unwrap_or_default())
    }

    async fn cancel(&mut self) -> Result<(), Failure> {
        let request = CancelCloneRequest { name: self.name.to_owned() };
        match self.client.api().cancel_clone(request).await {
            Ok(_) => {}
            // It has just ended; the watch tells how.
            Err(status) if status.code() == Code::FailedPrecondition => {}
            Err(status) => return Err(lost(&status)),
        }
        self.cancel_sent = true;
        Ok(())
    }
}

/// A connection that broke is lost, whatever the transport calls it. What the recipient itself has
/// answered has its own reason, or one of gRPC's own codes.
fn lost(status: &Status) -> Failure {
    let mut failure = Failure::from_status(status);
    let broken = matches!(failure.code, Code::Unknown | Code::Internal | Code::Cancelled);
    if broken && matches!(failure.reason.as_ref(), "PEER_ERROR" | "CANCELLED") {
        failure.code = Code::Unavailable;
    }
    failure
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_broken_connection_is_made_again() {
        let code = |status: Status| lost(&status).code;
        assert_eq!(code(Status::unknown("transport error")), Code::Unavailable);
        assert_eq!(code(Status::internal("h2 protocol error")), Code::Unavailable);
        assert_eq!(code(Status::unavailable("closed")), Code::Unavailable);
        assert_eq!(code(Status::unimplemented("no such method")), Code::Unimplemented);
        assert_eq!(code(Status::permission_denied("no")), Code::PermissionDenied);
        assert_eq!(code(Failure::bug("x").to_status()), Code::Internal);
    }
}
