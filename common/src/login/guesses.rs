//! What one peer may try, so that a guesser is slow and crowds nobody else out.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tonic::Code;

use crate::{failure::Failure, network::of_peer};

/// Most log-ins of one peer at one time: a clone's streams log in together.
const UNDER_WAY_MAX: u32 = 16;

/// Wrong passwords that a peer may send at once, and how soon it may send the next one then: ten
/// slips are a person's or a script's, and six thousand guesses a day lead nowhere.
const FAILURES_MAX: f64 = 10.0;
const FAILURE_EVERY: Duration = Duration::from_secs(15);

/// Most peers that are remembered; those that have failed least are forgotten first.
const PEERS_MAX: usize = 4096;

/// What all peers have tried.
#[derive(Debug, Clone, Default)]
pub(super) struct Guesses(Arc<Mutex<HashMap<IpAddr, Peer>>>);

#[derive(Debug)]
struct Peer {
    under_way: u32,
    /// Failures that are still held against it, as of `since`.
    failures: f64,
    since: Instant,
}

impl Peer {
    fn failures_at(&self, now: Instant) -> f64 {
        let forgiven = now.duration_since(self.since).as_secs_f64() / FAILURE_EVERY.as_secs_f64();
        (self.failures - forgiven).max(0.0)
    }
}

/// A log-in that is under way.
#[derive(Debug)]
pub(super) struct Attempt {
    guesses: Guesses,
    peer: IpAddr,
}

impl Guesses {
    /// Begins a log-in.
    pub(super) fn begin(&self, peer: IpAddr) -> Result<Attempt, Failure> {
        let peer = of_peer(peer);
        let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        forget(&mut peers);
        let now = Instant::now();
        let known = peers.entry(peer).or_insert(Peer { under_way: 0, failures: 0.0, since: now });
        if known.under_way >= UNDER_WAY_MAX {
            let text = format!("{UNDER_WAY_MAX} log-ins from this address are under way");
            return Err(Failure::new(Code::ResourceExhausted, "TOO_MANY_LOG_INS", text)
                .retry_after(Duration::from_secs(1)));
        }
        known.under_way += 1;
        Ok(Attempt { guesses: self.clone(), peer })
    }
}

impl Attempt {
    /// Whether this peer may try a password now.
    pub(super) fn check_password_allowed(&self) -> Result<(), Failure> {
        let peers = self.guesses.0.lock().unwrap_or_else(PoisonError::into_inner);
        let failures = peers.get(&self.peer).map_or(0.0, |peer| peer.failures_at(Instant::now()));
        if failures <= FAILURES_MAX - 1.0 {
            return Ok(());
        }
        let wait = FAILURE_EVERY.mul_f64(failures - (FAILURES_MAX - 1.0));
        Err(Failure::new(
            Code::ResourceExhausted,
            "TOO_MANY_FAILED_LOG_INS",
            format!(
                "too many wrong passwords have come from this address; the next one may come in {} s",
                wait.as_secs() + 1
            ),
        )
        .mysql(1045)
        .retry_after(wait))
    }

    /// The password was wrong, or the client broke off when it found that it is.
    pub(super) fn failed(&self) {
        let mut peers = self.guesses.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(peer) = peers.get_mut(&self.peer) {
            let now = Instant::now();
            peer.failures = peer.failures_at(now) + 1.0;
            peer.since = now;
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let mut peers = self.guesses.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(peer) = peers.get_mut(&self.peer) {
            peer.under_way = peer.under_way.saturating_sub(1);
        }
    }
}

/// Makes room for one more peer.
fn forget(peers: &mut HashMap<IpAddr, Peer>) {
    if peers.len() < PEERS_MAX {
        return;
    }
    let now = Instant::now();
    peers.retain(|_, peer| peer.under_way > 0 || peer.failures_at(now) > 0.0);
    while peers.len() >= PEERS_MAX {
        let idle = peers.iter().filter(|(_, peer)| peer.under_way == 0);
        let least = idle.min_by(|(_, a), (_, b)| a.failures_at(now).total_cmp(&b.failures_at(now)));
        let Some(least) = least.map(|(peer, _)| *peer) else { return };
        peers.remove(&least);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn may_guess(guesses: &Guesses, from: &str) -> bool {
        guesses.begin(peer(from)).unwrap().check_password_allowed().is_ok()
    }

    fn fail(guesses: &Guesses, from: &str) {
        guesses.begin(peer(from)).unwrap().failed();
    }

    /// Guards the rate of guesses: ten at once, then one every 15 s of a clock that the test turns;
    /// and nobody else is kept waiting. With `failed` made to do nothing, the eleventh passes.
    #[tokio::test(start_paused = true)]
    async fn a_guesser_is_slowed_down_and_nobody_else_is() {
        let guesses = Guesses::default();
        for _ in 0..10 {
            assert!(may_guess(&guesses, "192.0.2.1"));
            fail(&guesses, "192.0.2.1");
        }
        assert!(!may_guess(&guesses, "192.0.2.1"));
        assert!(!may_guess(&guesses, "::ffff:192.0.2.1"));
        assert!(may_guess(&guesses, "192.0.2.2"));
        tokio::time::advance(FAILURE_EVERY).await;
        assert!(may_guess(&guesses, "192.0.2.1"));
        fail(&guesses, "192.0.2.1");
        assert!(!may_guess(&guesses, "192.0.2.1"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_network_of_ipv6_addresses_is_one_guesser() {
        let guesses = Guesses::default();
        for n in 0..10 {
            fail(&guesses, &format!("2001:db8::{n:x}"));
        }
        assert!(!may_guess(&guesses, "2001:db8::ffff"));
        assert!(may_guess(&guesses, "2001:db8:0:1::1"));
    }

    /// Guards honest log-ins against one peer that holds places.
    #[tokio::test(start_paused = true)]
    async fn a_peer_holds_no_more_than_its_own_places() {
        let guesses = Guesses::default();
        let held: Vec<_> = (0..16).map(|_| guesses.begin(peer("192.0.2.1")).unwrap()).collect();
        assert_eq!(guesses.begin(peer("192.0.2.1")).unwrap_err().reason, "TOO_MANY_LOG_INS");
        guesses.begin(peer("192.0.2.2")).unwrap();
        drop(held);
        guesses.begin(peer("192.0.2.1")).unwrap();
    }

    /// Guards the memory: a flood of addresses is forgotten, a guesser among them is not.
    #[tokio::test(start_paused = true)]
    async fn a_flood_of_addresses_neither_fills_memory_nor_hides_a_guesser() {
        let guesses = Guesses::default();
        for _ in 0..10 {
            fail(&guesses, "192.0.2.1");
        }
        for n in 0..3 * u32::try_from(PEERS_MAX).unwrap() {
            fail(&guesses, &std::net::Ipv4Addr::from_bits(0x0a00_0000 + n).to_string());
        }
        assert!(guesses.0.lock().unwrap().len() <= PEERS_MAX);
        assert!(!may_guess(&guesses, "192.0.2.1"));
    }
}
