//! Sends a call's messages to a caller who must take them.
//!
//! A caller that takes nothing for too long holds a thread, some buffers and a place for nothing, and
//! nothing can be told to it: its connection is closed.

use std::{sync::Arc, time::Duration};

use marcot_common::connection::Connection;
use tokio::{
    runtime::Handle,
    sync::mpsc::{
        self,
        error::{SendTimeoutError, TrySendError},
    },
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::chunk_reader::CallerGone;

/// The sending end of a call.
#[derive(Debug)]
pub struct Outbox<T> {
    sender: mpsc::Sender<T>,
    connection: Option<Arc<Connection>>,
    limit: Duration,
    /// Cancelled when there is nothing more to send but why.
    ended: CancellationToken,
}

impl<T> Outbox<T> {
    /// To a caller on this connection, who must take a message within `limit`.
    #[must_use]
    pub fn new(
        sender: mpsc::Sender<T>,
        connection: Option<Arc<Connection>>,
        limit: Duration,
    ) -> Self {
        Self { sender, connection, limit, ended: CancellationToken::new() }
    }

    /// Sends no more once `ended` is cancelled, but for `send_last`: whoever waits for room holds what the
    /// call was about.
    #[must_use]
    pub fn until(self, ended: CancellationToken) -> Self {
        Self { ended, ..self }
    }

    /// Sends, and waits for room.
    pub async fn send(&self, message: T) -> Result<(), CallerGone> {
        self.ended.run_until_cancelled(self.send_last(message)).await.unwrap_or(Err(CallerGone))
    }

    /// Sends why there is nothing more to send, or the answer.
    pub async fn send_last(&self, message: T) -> Result<(), CallerGone> {
        let sent = self.sender.send_timeout(message, self.limit).await;
        sent.map_err(|error| {
            if matches!(error, SendTimeoutError::Timeout(_)) {
                self.cut_off();
            }
            CallerGone
        })
    }

    /// The same on a thread of its own.
    pub fn send_blocking(&self, message: T) -> Result<(), CallerGone> {
        match self.sender.try_send(message) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(message)) => Handle::current().block_on(self.send(message)),
            Err(TrySendError::Closed(_)) => Err(CallerGone),
        }
    }

    /// As `send_last`, on a thread of its own.
    pub fn send_last_blocking(&self, message: T) -> Result<(), CallerGone> {
        Handle::current().block_on(self.send_last(message))
    }

    /// Sends if there is room.
    pub fn offer(&self, message: T) {
        // A full queue means that the caller is slow; the next message tells it more.
        drop(self.sender.try_send(message));
    }

    /// Whether nobody waits any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Returns once nobody waits any more.
    pub async fn closed(&self) {
        self.sender.closed().await;
    }

    fn cut_off(&self) {
        let Some(connection) = &self.connection else { return };
        warn!(
            peer = %connection.peer,
            seconds = self.limit.as_secs(),
            "a caller took nothing for as long as --caller-timeout, its connection is closed"
        );
        connection.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards threads against callers that stop to read; without the limit the send never returns.
    #[tokio::test(start_paused = true)]
    async fn a_caller_that_takes_nothing_is_gone_after_the_limit() {
        let (sender, mut receiver) = mpsc::channel(1);
        let outbox = Outbox::new(sender, None, Duration::from_secs(300));
        outbox.send(1).await.unwrap();
        let begun = tokio::time::Instant::now();
        outbox.send(2).await.unwrap_err();
        assert!((300..302).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
        assert_eq!(receiver.recv().await, Some(1));
        outbox.send(3).await.unwrap();
        drop(receiver);
        outbox.send(4).await.unwrap_err();
    }

    /// Guards what a snapshot holds, redo and blocked DDL, against a caller that takes nothing more of it
    /// once it has ended: without the look at its end the thread that sends has a part in it for the limit.
    #[tokio::test(start_paused = true)]
    async fn nothing_but_why_is_sent_once_a_snapshot_has_ended() {
        let (sender, mut receiver) = mpsc::channel(1);
        let ended = CancellationToken::new();
        let outbox = Outbox::new(sender, None, Duration::from_secs(300)).until(ended.clone());
        outbox.send(1).await.unwrap();
        let begun = tokio::time::Instant::now();
        let (sent, ()) = tokio::join!(outbox.send(2), async {
            tokio::time::sleep(Duration::from_secs(5)).await;
            ended.cancel();
        });
        sent.unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
        assert_eq!(receiver.recv().await, Some(1));
        outbox.send_last(3).await.unwrap();
        assert_eq!(receiver.recv().await, Some(3));
    }
}
