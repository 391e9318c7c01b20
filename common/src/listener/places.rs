//! How many connections, and handshakes, there may be at one time: of all peers and of each.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::network::of_peer;

/// Most connections at one time: 8 clones of 128 streams.
const CONNECTIONS_MAX: usize = 1024;

/// Most of them of one address, for IPv6 of its /64: a clone of 128 streams, and another that takes its
/// place; or thirty of 8, behind one router.
const PER_PEER_MAX: u32 = 256;

/// Most connections whose handshake runs: each costs a core some 0.5 ms.
pub(super) const HANDSHAKES_MAX: usize = 64;

/// Most of them of one peer: whoever connects and says nothing keeps its own others waiting, and nobody
/// else.
const HANDSHAKES_PER_PEER_MAX: usize = 32;

/// All connections of a port.
#[derive(Debug, Clone)]
pub(super) struct Places {
    all: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    peers: Peers,
}

type Peers = Arc<Mutex<HashMap<IpAddr, Peer>>>;

#[derive(Debug)]
struct Peer {
    connections: u32,
    handshakes: Arc<Semaphore>,
}

/// The place of one connection.
#[derive(Debug)]
pub(super) struct Place {
    _any: OwnedSemaphorePermit,
    peers: Peers,
    peer: Option<IpAddr>,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            peers: Arc::default(),
        }
    }
}

impl Places {
    /// Waits for a place for whoever comes next.
    pub(super) async fn any(&self) -> Option<Place> {
        let any = Arc::clone(&self.all).acquire_owned().await.ok()?;
        Some(Place { _any: any, peers: Arc::clone(&self.peers), peer: None })
    }

    /// Waits for a place for a connection's handshake, its peer's first.
    pub(super) async fn handshake(
        &self,
        place: &Place,
    ) -> Option<[Option<OwnedSemaphorePermit>; 2]> {
        let own = match place.handshakes() {
            Some(own) => Some(own.acquire_owned().await.ok()?),
            None => None,
        };
        Some([own, Some(Arc::clone(&self.handshakes).acquire_owned().await.ok()?)])
    }
}

impl Place {
    /// The same, of a peer; `None` when it has as many as it may have.
    pub(super) fn of(mut self, peer: IpAddr) -> Option<Self> {
        let peer = of_peer(peer);
        {
            let mut peers = lock(&self.peers);
            let known = peers.entry(peer).or_insert_with(|| Peer {
                connections: 0,
                handshakes: Arc::new(Semaphore::new(HANDSHAKES_PER_PEER_MAX)),
            });
            if known.connections >= PER_PEER_MAX {
                return None;
            }
            known.connections += 1;
        }
        self.peer = Some(peer);
        Some(self)
    }

    fn handshakes(&self) -> Option<Arc<Semaphore>> {
        let peers = lock(&self.peers);
        peers.get(self.peer.as_ref()?).map(|peer| Arc::clone(&peer.handshakes))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(peer) = self.peer else { return };
        let mut peers = lock(&self.peers);
        if let Some(known) = peers.get_mut(&peer) {
            known.connections -= 1;
            if known.connections == 0 {
                peers.remove(&peer);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is one assignment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards other peers against one that opens connections: without its own bound it takes all
    /// places, and nobody else is accepted.
    #[tokio::test]
    async fn a_peer_has_no_more_than_its_own_connections() {
        let places = Places::default();
        let (greedy, other) = ([192, 0, 2, 1].into(), [192, 0, 2, 2].into());
        let mut held = Vec::new();
        for _ in 0..PER_PEER_MAX {
            held.push(places.any().await.unwrap().of(greedy).unwrap());
        }
        assert!(places.any().await.unwrap().of(greedy).is_none());
        assert!(places.any().await.unwrap().of(other).is_some());
        held.pop();
        assert!(places.any().await.unwrap().of(greedy).is_some());
        held.clear();
        assert!(places.peers.lock().unwrap().is_empty());
        assert_eq!(places.all.available_permits(), CONNECTIONS_MAX);
    }

    /// Guards other peers against one whose handshakes do not end: without its own bound it takes all
    /// places for them, and everybody else waits.
    #[tokio::test(start_paused = true)]
    async fn a_peer_that_says_nothing_keeps_nobody_else_waiting() {
        let places = Places::default();
        let (silent, other) = ([192, 0, 2, 1].into(), [192, 0, 2, 2].into());
        let mut held = Vec::new();
        for _ in 0..HANDSHAKES_MAX {
            let place = places.any().await.unwrap().of(silent).unwrap();
            let patience = std::time::Duration::from_secs(1);
            held.push((tokio::time::timeout(patience, places.handshake(&place)).await, place));
        }
        assert!(held[HANDSHAKES_PER_PEER_MAX - 1].0.is_ok());
        assert!(held[HANDSHAKES_PER_PEER_MAX].0.is_err());
        let place = places.any().await.unwrap().of(other).unwrap();
        assert!(places.handshake(&place).await.is_some());
    }
}
