//! Waits for the end of a clone: watches it, shows it, reconnects, and cancels on Ctrl-C.

use std::time::{Duration, Instant};

use marcot_common::failure::Failure;
use marcot_proto::recipient::v1::{CancelCloneRequest, Clone, WatchCloneRequest};
use tonic::Code;

use super::{connect::Client, progress::Shown};
use crate::job::status::is_final;

/// How long a lost connection to the recipient is made again before this gives up: a restart of the
/// recipient takes seconds.
const RECONNECT_MAX: Duration = Duration::from_secs(60);

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

/// Waits for the end of a clone.
pub(super) async fn wait(
    client: &mut Client,
    name: &str,
    interrupt: Interrupt,
) -> Result<Clone, Failure> {
    let mut shown = Shown::new();
    let mut token = String::new();
    let mut cancelled = false;
    let mut lost_since: Option<Instant> = None;
    loop {
        let watched = watch(client, name, interrupt, &mut token, &mut shown, &mut cancelled).await;
        let failure = match watched {
            Ok(clone) => {
                shown.finish(&clone);
                return Ok(clone);
            }
            Err(failure) => failure,
        };
        let lost = *lost_since.get_or_insert_with(Instant::now);
        if failure.code != Code::Unavailable || lost.elapsed() > RECONNECT_MAX {
            return Err(failure);
        }
        shown.note(&format!(
            "lost the recipient ({failure}); the clone may go on; connecting again"
        ));
        tokio::time::sleep(RECONNECT_PAUSE).await;
        if client.reconnect().await.is_ok() {
            lost_since = None;
        }
    }
}

async fn watch(
    client: &mut Client,
    name: &str,
    interrupt: Interrupt,
    token: &mut String,
    shown: &mut Shown,
    cancelled: &mut bool,
) -> Result<Clone, Failure> {
    let request = WatchCloneRequest {
        name: name.to_owned(),
        resume_token: token.clone(),
        interval: Some(marcot_common::time::duration_to_wire(shown.interval())),
    };
    let stream = client.api().watch_clone(request).await;
    let mut stream = stream.map_err(|status| lost(&status))?.into_inner();
    loop {
        let message = tokio::select! {
            message = stream.message() => message.map_err(|status| lost(&status))?,
            signal = tokio::signal::ctrl_c() => {
                signal.map_err(|e| Failure::bug(format!("signals: {e}")))?;
                on_interrupt(client, name, interrupt, shown, cancelled).await?;
                continue;
            }
        };
        let Some(message) = message else {
            return Err(Failure::new(Code::Unavailable, "WATCH_ENDED", "the watch has ended"));
        };
        *token = message.resume_token;
        let clone = message.clone.unwrap_or_default();
        if is_final(clone.state) {
            return Ok(clone);
        }
        shown.show(&clone);
    }
}

async fn on_interrupt(
    client: &mut Client,
    name: &str,
    interrupt: Interrupt,
    shown: &mut Shown,
    cancelled: &mut bool,
) -> Result<(), Failure> {
    if interrupt == Interrupt::Leaves || *cancelled {
        shown.note(&format!("{name} goes on; `marcot watch {name}` shows it again"));
        std::process::exit(130);
    }
    *cancelled = true;
    shown.note("cancelling; Ctrl-C again leaves at once");
    let request = CancelCloneRequest { name: name.to_owned() };
    match client.api().cancel_clone(request).await {
        // It has just ended; the watch tells how.
        Err(status) if status.code() == Code::FailedPrecondition => Ok(()),
        other => other.map(|_| ()).map_err(|status| Failure::from_status(&status)),
    }
}

/// A connection that broke is lost, whatever the transport calls it.
fn lost(status: &tonic::Status) -> Failure {
    let mut failure = Failure::from_status(status);
    if failure.reason.starts_with("PEER_") || failure.reason == "CANCELLED" {
        failure.code = Code::Unavailable;
    }
    failure
}
