//! Snapshots under leases: admission, renewal, expiry.
//!
//! Invariants:
//! * A snapshot lives until it is closed or its lease ends, whichever is first; then every reader
//!   of it stops, and the engine's snapshot is dropped with the last of them.
//! * There are never more than `snapshots_max` snapshots, those being opened among them.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use marcot_common::{
    failure::Failure,
    in_use::{InUse, InUseError},
};
use marcot_engine::{Engine, Snapshot, SnapshotOptions};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::{info, warn};
use uuid::Uuid;

/// Lease of a snapshot whose opener asked for none.
pub const LEASE_DEFAULT: Duration = Duration::from_secs(60);

/// Shortest lease: a recipient renews at a third of it and may miss one renewal.
pub const LEASE_MIN: Duration = Duration::from_secs(5);

/// Longest lease: clone_donor_timeout_after_network_failure's longest value.
pub const LEASE_MAX: Duration = Duration::from_secs(30 * 60);

/// Most ReadRanges calls at one time for one snapshot: a clone's most streams (128 in the plugin)
/// would only queue on this host's disks.
pub const READERS_MAX: usize = 32;

/// How soon a refused opener may try again.
const RETRY_AFTER: Duration = Duration::from_secs(10);

/// What a caller opens a snapshot with, checked.
#[derive(Debug, Clone)]
pub struct OpenRequest {
    /// Ed25519 key of the clone.
    pub public_key: [u8; 32],
    /// Lease.
    pub lease: Duration,
    /// The clone's own id for this snapshot.
    pub request_id: String,
    /// The clone's name.
    pub clone: String,
    /// Who asks.
    pub caller: Caller,
    /// For the engine.
    pub options: SnapshotOptions,
}

/// Who is on the other end of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caller {
    /// Account; `None` where the donor has no accounts.
    pub user: Option<String>,
    /// The one snapshot that a log-in by key is good for.
    pub snapshot: Option<String>,
    /// Address.
    pub peer: Option<SocketAddr>,
}

/// A snapshot under its lease.
#[derive(Debug)]
pub struct Held {
    /// `snapshots/{id}`.
    pub name: String,
    /// The engine's snapshot.
    pub snapshot: Arc<dyn Snapshot>,
    /// What it was opened with.
    pub request: OpenRequest,
    /// When it was opened.
    pub create_time: SystemTime,
    /// Cancelled when the snapshot ends.
    pub ended: CancellationToken,
    /// A place for each ReadRanges call.
    pub readers: Arc<Semaphore>,
    /// One advance at a time.
    pub advance: tokio::sync::Mutex<()>,
    /// Payload bytes sent.
    pub sent_bytes: AtomicU64,
    /// Keeps the data directory from being replaced.
    _in_use: Option<InUse>,
    expiry: Mutex<(Instant, SystemTime)>,
}

impl Held {
    /// When the lease ends.
    #[must_use]
    pub fn expire_time(&self) -> SystemTime {
        lock(&self.expiry).1
    }

    fn renew(&self, lease: Duration) {
        *lock(&self.expiry) = (Instant::now() + lease, SystemTime::now() + lease);
    }

    fn expired(&self, now: Instant) -> bool {
        lock(&self.expiry).0 <= now
    }
}

/// All snapshots of this donor.
#[derive(Debug)]
pub struct Leases {
    engine: Arc<dyn Engine>,
    data_directory: PathBuf,
    snapshots_max: usize,
    table: Mutex<Table>,
    expired_total: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    held: HashMap<String, Arc<Held>>,
    opening: usize,
    draining: bool,
}

impl Leases {
    /// No snapshot yet.
    #[must_use]
    pub fn new(engine: Arc<dyn Engine>, data_directory: PathBuf, snapshots_max: usize) -> Self {
        Self {
            engine,
            data_directory,
            snapshots_max,
            table: Mutex::default(),
            expired_total: AtomicU64::new(0),
        }
    }

    /// The engine that makes snapshots.
    #[must_use]
    pub fn engine(&self) -> &Arc<dyn Engine> {
        &self.engine
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
        let place = match self.admit(&request)? {
            Admission::Known(held) => {
                held.renew(request.lease);
                return Ok(held);
            }
            Admission::Place(place) => place,
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
        let held = Arc::new(Held {
            name: format!("snapshots/{}", Uuid::now_v7()),
            snapshot: Arc::from(snapshot),
            create_time: SystemTime::now(),
            ended: CancellationToken::new(),
            readers: Arc::new(Semaphore::new(READERS_MAX)),
            advance: tokio::sync::Mutex::new(()),
            sent_bytes: AtomicU64::new(0),
            _in_use: in_use,
            expiry: Mutex::new((Instant::now() + lease, SystemTime::now() + lease)),
            request,
        });
        lock(&self.table).held.insert(held.name.clone(), Arc::clone(&held));
        drop(place);
        info!(
            snapshot = %held.name,
            clone = %held.request.clone,
            user = held.request.caller.user.as_deref().unwrap_or(""),
            peer = held.request.caller.peer.map(tracing::field::display),
            "snapshot opened"
        );
        Ok(held)
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
        let count = table.held.len() + table.opening;
        if count >= self.snapshots_max {
            return Err(Failure::new(
                Code::ResourceExhausted,
                "SNAPSHOT_LIMIT",
                format!(
                    "the donor holds {count} snapshots, at most {} are allowed; \
                     wait for a clone to end or raise --snapshots-max",
                    self.snapshots_max
                ),
            )
            .mysql(3634)
            .retry_after(RETRY_AFTER));
        }
        table.opening += 1;
        Ok(Admission::Place(Place(Arc::clone(self))))
    }

    /// Finds a snapshot that `caller` may use.
    pub fn find(&self, name: &str, caller: &Caller) -> Result<Arc<Held>, Failure> {
        let held = lock(&self.table).held.get(name).cloned();
        held.filter(|held| {
            let own = held.request.caller.user == caller.user;
            let keyed = caller.snapshot.as_deref().is_none_or(|snapshot| snapshot == name);
            own && keyed
        })
        .ok_or_else(|| {
            let shown: String = name.chars().take(80).collect();
            Failure::new(
                Code::NotFound,
                "UNKNOWN_SNAPSHOT",
                format!(
                    "`{shown}` is no snapshot of this donor; it may have been closed or expired"
                ),
            )
            .with("snapshot", shown)
        })
    }

    /// Renews a lease.
    pub fn renew(&self, held: &Held, lease: Option<Duration>) {
        held.renew(lease.unwrap_or(held.request.lease));
    }

    /// Ends a snapshot; nothing happens when it has ended.
    pub fn close(&self, name: &str, why: &str) {
        let held = lock(&self.table).held.remove(name);
        if let Some(held) = held {
            held.ended.cancel();
            info!(
                snapshot = %name,
                clone = %held.request.clone,
                sent_bytes = held.sent_bytes.load(Ordering::Relaxed),
                why,
                "snapshot closed"
            );
            marcot_common::os::give_memory_back();
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
    }

    /// Whether a snapshot is held or being opened.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        let table = lock(&self.table);
        !table.held.is_empty() || table.opening > 0
    }

    /// Ends snapshots whose lease has run out, until cancelled.
    pub async fn expire(self: Arc<Self>, stop: CancellationToken) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        while stop.run_until_cancelled(tick.tick()).await.is_some() {
            let now = Instant::now();
            let expired: Vec<_> = lock(&self.table)
                .held
                .values()
                .filter(|held| held.expired(now))
                .map(|held| held.name.clone())
                .collect();
            for name in expired {
                self.expired_total.fetch_add(1, Ordering::Relaxed);
                self.close(&name, "lease expired");
            }
        }
        let names: Vec<_> = self.all().iter().map(|held| held.name.clone()).collect();
        for name in names {
            self.close(&name, "donor stops");
        }
    }
}

enum Admission {
    Known(Arc<Held>),
    Place(Place),
}

/// A place that counts while a snapshot is being opened.
struct Place(Arc<Leases>);

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.0.table).opening -= 1;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
