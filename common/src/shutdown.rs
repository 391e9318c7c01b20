//! The end of a service in two phases: drain, then stop.
//!
//! ```text
//! running -- SIGTERM or SIGINT --> draining -- second signal, or grace is over --> stopping
//! ```
//!
//! Draining takes no new work and lets running work end; stopping ends it where it is.

use std::{future, io, time::Duration};

use futures::stream::{Stream, StreamExt as _};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::info;

/// Both phases; clones share them. A cancelled token never comes back.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Take nothing new.
    pub drain: CancellationToken,
    /// End what runs. Only ever cancelled after `drain`.
    pub stop: CancellationToken,
}

impl Shutdown {
    /// A shutdown that only this program's own code begins.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Follows SIGTERM and SIGINT from now on. `grace` bounds the drain; without it only a second
    /// signal ends a drain. Must be called within a runtime.
    pub fn on_signals(grace: Option<Duration>) -> io::Result<Self> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let signals = futures::stream::poll_fn(move |context| {
            if terminate.poll_recv(context).is_ready() {
                return std::task::Poll::Ready(Some("SIGTERM"));
            }
            interrupt.poll_recv(context).map(|_| Some("SIGINT"))
        });
        let shutdown = Self::new();
        tokio::spawn(shutdown.clone().follow(signals, grace));
        Ok(shutdown)
    }

    /// Begins the drain.
    pub fn begin_drain(&self) {
        self.drain.cancel();
    }

    /// Ends both phases at once.
    pub fn stop_now(&self) {
        self.drain.cancel();
        self.stop.cancel();
    }

    /// Turns signals, and the end of `grace`, into phases.
    async fn follow(self, signals: impl Stream<Item = &'static str>, grace: Option<Duration>) {
        // A closed stream of signals must not look like one.
        let mut signals = std::pin::pin!(signals.chain(futures::stream::pending()));
        tokio::select! {
            signal = signals.next() => {
                info!(signal, "draining: nothing new is taken, a second signal stops at once");
                self.begin_drain();
            }
            // Begun by the program itself; grace counts from there too.
            () = self.drain.cancelled() => {}
        }
        let over = async {
            match grace {
                Some(grace) => tokio::time::sleep(grace).await,
                None => future::pending().await,
            }
        };
        tokio::select! {
            signal = signals.next() => info!(signal, "stopping at once"),
            () = over => info!(grace_seconds = grace.unwrap_or_default().as_secs(), "grace is over"),
            () = self.stop.cancelled() => {}
        }
        self.stop_now();
    }
}

#[cfg(test)]
mod tests {
    use tokio::{sync::mpsc, time::Instant};

    use super::*;

    /// A shutdown that follows this sender.
    fn followed(grace: Option<Duration>) -> (Shutdown, mpsc::Sender<&'static str>) {
        let (sender, mut receiver) = mpsc::channel(2);
        let shutdown = Shutdown::new();
        let signals = futures::stream::poll_fn(move |context| receiver.poll_recv(context));
        tokio::spawn(shutdown.clone().follow(signals, grace));
        (shutdown, sender)
    }

    const GRACE: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn the_first_signal_drains_and_the_second_stops() {
        let (shutdown, signals) = followed(None);
        signals.send("SIGTERM").await.unwrap();
        shutdown.drain.cancelled().await;
        let hour = tokio::time::timeout(Duration::from_secs(3600), shutdown.stop.cancelled());
        hour.await.unwrap_err();
        signals.send("SIGINT").await.unwrap();
        shutdown.stop.cancelled().await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_grace_stops_without_a_second_signal() {
        let (shutdown, signals) = followed(Some(GRACE));
        let begin = Instant::now();
        signals.send("SIGTERM").await.unwrap();
        shutdown.stop.cancelled().await;
        assert_eq!(begin.elapsed().as_secs(), GRACE.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn grace_counts_from_a_drain_that_the_program_begins() {
        let (shutdown, _signals) = followed(Some(GRACE));
        let begin = Instant::now();
        shutdown.begin_drain();
        shutdown.stop.cancelled().await;
        assert_eq!(begin.elapsed().as_secs(), GRACE.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn no_signal_ends_nothing() {
        let (shutdown, signals) = followed(Some(GRACE));
        drop(signals);
        let day = tokio::time::timeout(Duration::from_secs(86_400), shutdown.drain.cancelled());
        day.await.unwrap_err();
        shutdown.stop_now();
        assert!(shutdown.drain.is_cancelled() && shutdown.stop.is_cancelled());
    }

    #[tokio::test]
    async fn a_real_signal_drains_this_process() {
        let shutdown = Shutdown::on_signals(Some(GRACE)).unwrap();
        let own = rustix::process::getpid();
        rustix::process::kill_process(own, rustix::process::Signal::TERM).unwrap();
        shutdown.drain.cancelled().await;
        assert!(!shutdown.stop.is_cancelled());
        rustix::process::kill_process(own, rustix::process::Signal::INT).unwrap();
        shutdown.stop.cancelled().await;
    }
}
