//! All snapshots under leases: admission, renewal, expiry.
//!
//! Invariants:
//! * A snapshot lives until it is closed or its lease ends, whichever is first; then every reader
//!   of it stops, and the engine's snapshot is dropped with the last of them.
//! * There are never more than `snapshots_max` snapshots, those being opened among them, and no more
//!   of one peer than its share.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use marcot_common::{
    failure::Failure,
    in_use::{InUse, InUseError},
};
use marcot_engine::Engine;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::{info, warn};
use uuid::Uuid;

use super::{
    Caller, Ending, HELD_BYTES_MAX, HELD_PER_PEER_BYTES_MAX, HELD_UNIT_BYTES, Held, OpenRequest,
    READERS_MAX, WALKS_MAX, ended, lock,
};
use crate::{
    counts::Counts,
    queue::{Queue, TICKET_KEPT, TICKETS_MAX, Turn},
    taken::{LeastTaken, Taken},
};

/// Snapshots that have ended of which it is known why: their recipients ask within seconds.
const ENDED_KNOWN_MAX: usize = 64;

/// How soon a refused opener may try again.
const RETRY_AFTER: Duration = Duration::from_secs(10);

/// How many snapshots there may be, and how long.
#[derive(Debug, Clone, Copy)]
pub struct SnapshotLimits {
    /// At one time.
    pub all: usize,
    /// Of one peer.
    pub per_peer: usize,
    /// Least that must be read of one.
    pub least: LeastTaken,
}

/// All snapshots of this donor.
#[derive(Debug)]
pub struct Leases {
    engine: Arc<dyn Engine>,
    data_directory: PathBuf,
    limits: SnapshotLimits,
    table: Mutex<Table>,
    /// A place has become free, or nobody may wait any more.
    freed: Notify,
    expired_total: AtomicU64,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Table {
    held: HashMap<String, Arc<Held>>,
    /// Whose snapshots are being opened.
    opening: Vec<Option<IpAddr>>,
    /// Snapshots that have ended, newest last: name, account, why.
    ended: VecDeque<(String, Option<String>, String)>,
    queue: Queue,
    draining: bool,
}

impl Leases {
    /// No snapshot yet.
    #[must_use]
    pub fn new(
        engine: Arc<dyn Engine>,
        data_directory: PathBuf,
        limits: SnapshotLimits,
        counts: Arc<Counts>,
    ) -> Self {
        Self {
            engine,
            data_directory,
            limits,
            table: Mutex::default(),
            freed: Notify::new(),
            expired_total: AtomicU64::new(0),
            counts,
        }
    }

    /// What is counted.
    #[must_use]
    pub fn counts(&self) -> &Arc<Counts> {
        &self.counts
    }

    /// The engine that makes snapshots.
    #[must_use]
    pub fn engine(&self) -> &Arc<dyn Engine> {
        &self.engine
    }

    /// Most snapshots at one time.
    #[must_use]
    pub fn snapshots_max(&self) -> usize {
        self.limits.all
    }

    /// Says that a clone reads the data directory.
    fn use_data_directory(&self) -> Result<Option<InUse>, Failure> {
        match InUse::shared(&self.data_directory) {
            Ok(in_use) => Ok(Some(in_use)),
            Err(InUseError::Taken) => Err(Failure::new(
                Code::Unavailable,
                "DATA_DIRECTORY_REPLACED",
                format!(
                    "a clone replaces the data in {} at this moment; clone from it again later",
                    self.data_directory.display()
                ),
            )),
            // A file system without locks (some FUSE) has no such guard.
            Err(InUseError::Io(e)) => {
                warn!(error = %e, "the data directory cannot be marked as in use");
                Ok(None)
            }
        }
    }

    /// Opens a snapshot, or returns the one that the same clone opened with the same id.
    pub async fn open(self: &Arc<Self>, request: OpenRequest) -> Result<Arc<Held>, Failure> {
        let place = match self.admit_or_wait(&request).await? {
            Admission::Known(held) => {
                // Whoever lost the first answer has lost its connection as well.
                *lock(&held.opener) = request.caller.connection;
                held.renew(request.lease);
                return Ok(held);
            }
            Admission::Place(place) => place,
            Admission::Waits(refusal) => return Err(refusal),
        };
        let in_use = self.use_data_directory()?;
        let engine = Arc::clone(&self.engine);
        let mut options = request.options.clone();
        // A caller that goes drops this call.
        let _waits = options.begin_to_wait();
        let snapshot = tokio::task::spawn_blocking(move || engine.open(&options))
            .await
            .map_err(|e| Failure::bug(format!("the engine stopped: {e}")))??;
        let lease = request.lease;
        let mut table = lock(&self.table);
        let share = request.caller.share();
        let of_peer = table.held.values().find(|held| held.request.caller.share() == share);
        let of_peer = of_peer.map(|held| Arc::clone(&held.held_units[1]));
        let units = |bytes| Arc::new(Semaphore::new(bytes / HELD_UNIT_BYTES));
        let held_units =
            [units(HELD_BYTES_MAX), of_peer.unwrap_or_else(|| units(HELD_PER_PEER_BYTES_MAX))];
        let taken = Taken::new(snapshot.position(), Instant::now());
        let held = Arc::new(Held {
            name: format!("snapshots/{}", Uuid::now_v7()),
            snapshot: Arc::from(snapshot),
            create_time: SystemTime::now(),
            ended: CancellationToken::new(),
            readers: Arc::new(Semaphore::new(READERS_MAX)),
            lists: Arc::new(Semaphore::new(WALKS_MAX)),
            advances: Arc::new(Semaphore::new(WALKS_MAX)),
            held_units,
            advance: tokio::sync::Mutex::new(()),
            sent_bytes: AtomicU64::new(0),
            _in_use: in_use,
            opener: Mutex::new(request.caller.connection),
            expiry: Mutex::new((Instant::now() + lease, SystemTime::now() + lease)),
            used: Mutex::new(Instant::now()),
            least: self.limits.least,
            taken: Mutex::new(taken),
            at_work: AtomicUsize::new(0),
            reads_end: AtomicU64::new(0),
            why: OnceLock::new(),
            request,
        });
        table.held.insert(held.name.clone(), Arc::clone(&held));
        // A place takes the lock when it goes.
        drop(table);
        drop(place);
        self.counts.opened.inc();
        info!(
            snapshot = %held.name,
            clone = %held.request.clone,
            user = held.request.caller.user.as_deref().unwrap_or(""),
            peer = held.request.caller.peer.map(tracing::field::display),
            "snapshot opened"
        );
        Ok(held)
    }

    /// Admits a request at once, or when its turn comes within its wait; else it is refused, and told
    /// its place, which it keeps for a moment.
    async fn admit_or_wait(self: &Arc<Self>, request: &OpenRequest) -> Result<Admission, Failure> {
        let first = self.admit(request)?;
        if request.queue_wait.is_zero() || !matches!(first, Admission::Waits(_)) {
            return Ok(first);
        }
        let _waits = Waits::begin(self, &request.request_id);
        let end = tokio::time::Instant::now() + request.queue_wait;
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            freed.as_mut().enable();
            let admission = self.admit(request)?;
            if !matches!(admission, Admission::Waits(_)) {
                return Ok(admission);
            }
            tokio::select! {
                () = freed => {}
                () = tokio::time::sleep_until(end) => return Ok(admission),
                // Those before it that have gone lose their turn by the clock alone.
                () = tokio::time::sleep(TICKET_KEPT) => {}
            }
        }
    }

    /// How many wait for a place.
    #[must_use]
    pub fn queued(&self) -> usize {
        lock(&self.table).queue.len()
    }

    fn admit(self: &Arc<Self>, request: &OpenRequest) -> Result<Admission, Failure> {
        let mut table = lock(&self.table);
        if table.draining {
            return Err(Failure::new(Code::Unavailable, "DRAINING", "the donor is shutting down")
                .retry_after(RETRY_AFTER));
        }
        let known = table.held.values().find(|held| {
            !request.request_id.is_empty()
                && held.request.request_id == request.request_id
                && held.request.public_key == request.public_key
                && held.request.caller.user == request.caller.user
        });
        if let Some(held) = known {
            return Ok(Admission::Known(Arc::clone(held)));
        }
        let peer = request.caller.share();
        let own = table.held.values().filter(|held| held.request.caller.share() == peer).count();
        let own = own + table.opening.iter().filter(|opening| **opening == peer).count();
        if own >= self.limits.per_peer {
            // It is not in the queue: whoever is behind it may have a place.
            return Ok(Admission::Waits(self.refusal_of_peer(own, peer)));
        }
        let count = table.held.len() + table.opening.len();
        let free = self.limits.all.saturating_sub(count);
        // Without an id of its own a caller could not be told from others that wait.
        let waits = !request.queue_wait.is_zero() && !request.request_id.is_empty();
        match table.queue.ask(&request.request_id, free, waits, Instant::now()) {
            Turn::Now => {
                table.opening.push(peer);
                Ok(Admission::Place(Place(Arc::clone(self), peer)))
            }
            Turn::Later { place, of } if waits => {
                let refusal =
                    self.refusal(count, &format!("its place in the queue is {place} of {of}"));
                let refusal = refusal.with("queue_place", place).with("queue_length", of);
                Ok(Admission::Waits(refusal))
            }
            Turn::Later { of, .. } => {
                let refusal = self.refusal(count, &format!("{of} wait for a place"));
                Ok(Admission::Waits(refusal))
            }
            Turn::Full => Err(self.refusal(count, &format!("{TICKETS_MAX} wait for a place"))),
        }
    }

    fn refusal(&self, count: usize, queue: &str) -> Failure {
        Failure::new(
            Code::ResourceExhausted,
            "SNAPSHOT_LIMIT",
            format!(
                "the donor holds {count} snapshots, at most {} are allowed ({queue}); \
                 wait for a clone to end or raise --snapshots-max",
                self.limits.all
            ),
        )
        .mysql(3634)
        .retry_after(RETRY_AFTER)
    }

    fn refusal_of_peer(&self, count: usize, peer: Option<IpAddr>) -> Failure {
        let peer = peer.map_or_else(|| "the caller".to_owned(), |ip| ip.to_string());
        let text = format!(
            "{peer} holds {count} snapshots, at most {} are allowed; wait for a clone to end or raise \
             --snapshots-per-peer-max",
            self.limits.per_peer
        );
        Failure::new(Code::ResourceExhausted, "SNAPSHOT_LIMIT", text)
            .mysql(3634)
            .retry_after(RETRY_AFTER)
    }

    /// Finds a snapshot that `caller` may use.
    pub fn find(&self, name: &str, caller: &Caller) -> Result<Arc<Held>, Failure> {
        let held = lock(&self.table).held.get(name).cloned();
        held.filter(|held| held.is_for(caller)).ok_or_else(|| {
            let table = lock(&self.table);
            let known =
                table.ended.iter().find(|(ended, user, _)| ended == name && *user == caller.user);
            let why = known.map(|(_, _, why)| why.clone()).unwrap_or_default();
            let shown: String = name.chars().take(80).collect();
            ended(&shown, &why)
        })
    }

    /// Renews a lease.
    pub fn renew(&self, held: &Held, lease: Option<Duration>) {
        held.renew(lease.unwrap_or(held.request.lease));
    }

    /// Ends a snapshot; nothing happens when it has ended.
    pub fn close(&self, name: &str, why: Ending) {
        self.end(name, why, why.text());
    }

    /// As `close`, with what is to be told of it.
    fn end(&self, name: &str, why: Ending, text: &str) {
        let mut table = lock(&self.table);
        let held = table.held.remove(name);
        let is_told = matches!(why, Ending::Expired | Ending::Idle | Ending::Slow);
        if let Some(held) = held.as_ref().filter(|_| is_told) {
            table.ended.push_back((
                name.to_owned(),
                held.request.caller.user.clone(),
                text.to_owned(),
            ));
            let beyond = table.ended.len().saturating_sub(ENDED_KNOWN_MAX);
            table.ended.drain(..beyond);
        }
        drop(table);
        if let Some(held) = held {
            if is_told || why == Ending::Stopped {
                // It is ended once.
                drop(held.why.set(text.to_owned()));
            }
            held.ended.cancel();
            self.counts.end(why.label());
            info!(
                snapshot = %name,
                clone = %held.request.clone,
                sent_bytes = held.sent_bytes.load(Ordering::Relaxed),
                why = text,
                "snapshot closed"
            );
            marcot_common::os::give_memory_back();
            self.freed.notify_waiters();
        }
    }

    /// All snapshots, oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Held>> {
        let mut all: Vec<_> = lock(&self.table).held.values().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Snapshots whose lease ran out, since the start.
    #[must_use]
    pub fn expired_total(&self) -> u64 {
        self.expired_total.load(Ordering::Relaxed)
    }

    /// Refuses new snapshots from now on.
    pub fn drain(&self) {
        lock(&self.table).draining = true;
        self.freed.notify_waiters();
    }

    /// Whether a snapshot is held or being opened.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        let table = lock(&self.table);
        !table.held.is_empty() || !table.opening.is_empty()
    }

    /// Ends snapshots whose lease has run out, until cancelled.
    pub async fn expire(self: Arc<Self>, stop: CancellationToken) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        while stop.run_until_cancelled(tick.tick()).await.is_some() {
            let now = Instant::now();
            let expired: Vec<_> = self
                .all()
                .into_iter()
                .filter_map(|held| Some((held.expired(now)?, held.name.clone())))
                .collect();
            for ((why, text), name) in expired {
                self.expired_total.fetch_add(1, Ordering::Relaxed);
                self.end(&name, why, &text);
            }
        }
        let names: Vec<_> = self.all().iter().map(|held| held.name.clone()).collect();
        for name in names {
            self.close(&name, Ending::Stopped);
        }
    }
}

enum Admission {
    Known(Arc<Held>),
    Place(Place),
    /// Why not now.
    Waits(Failure),
}

/// A call that waits with its ticket.
struct Waits {
    leases: Arc<Leases>,
    id: String,
}

impl Waits {
    fn begin(leases: &Arc<Leases>, id: &str) -> Self {
        lock(&leases.table).queue.begin_to_wait(id);
        Self { leases: Arc::clone(leases), id: id.to_owned() }
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        lock(&self.leases.table).queue.end_to_wait(&self.id, Instant::now());
    }
}

/// A place that counts while a snapshot is being opened.
struct Place(Arc<Leases>, Option<IpAddr>);

impl Drop for Place {
    fn drop(&mut self) {
        let mut table = lock(&self.0.table);
        if let Some(own) = table.opening.iter().position(|peer| *peer == self.1) {
            table.opening.swap_remove(own);
        }
        drop(table);
        self.0.freed.notify_waiters();
    }
}
