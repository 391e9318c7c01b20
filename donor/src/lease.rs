//! A snapshot under its lease: what it holds, whom it is there for, and when it ends.
//!
//! Invariants:
//! * A snapshot whose lease is renewed for ever ends all the same once nothing, or too little, was read of
//!   it for too long; sooner while DDL waits for it.
//! * A bound snapshot is there for the connection that has opened it and for those that have logged in
//!   by its key; for nobody else of the same account.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use marcot_common::{
    connection::ConnectionNumber, failure::Failure, in_use::InUse, network::of_peer,
};
use marcot_engine::{Snapshot, SnapshotOptions};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::Code;

pub use self::table::{Leases, SnapshotLimits};
use crate::taken::{LeastTaken, Taken};

mod table;

/// Lease of a snapshot whose opener asked for none.
pub const LEASE_DEFAULT: Duration = Duration::from_secs(60);

/// Shortest lease: a recipient renews at a third of it and may miss one renewal.
pub const LEASE_MIN: Duration = Duration::from_secs(5);

/// Longest lease: clone_donor_timeout_after_network_failure's longest value.
pub const LEASE_MAX: Duration = Duration::from_secs(30 * 60);

/// Most ReadRanges calls at one time for one snapshot: a clone's most streams (128 in the plugin)
/// would only queue on this host's disks.
pub const READERS_MAX: usize = 32;

/// Most lists, and most advances, at one time for one snapshot: a clone has one of each, and calls that
/// were cut may not have ended.
pub const WALKS_MAX: usize = 4;

/// Most bytes of data that are held for one snapshot, read and not yet taken: two chunks for each of
/// eight streams. A recipient that takes nothing waits for itself.
pub const HELD_BYTES_MAX: usize = 16 << 20;

/// Most of them for all snapshots of one peer: one that takes nothing leaves something for another.
pub const HELD_PER_PEER_BYTES_MAX: usize = 24 << 20;

/// What they are counted in.
pub const HELD_UNIT_BYTES: usize = 64 << 10;

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
    /// Whether the snapshot is for its opener's connection and the clone's key alone.
    pub bound: bool,
    /// How long the caller waits for a place; zero: not at all.
    pub queue_wait: Duration,
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
    /// The connection.
    pub connection: Option<ConnectionNumber>,
    /// Whether it has logged in, rather than being known by a certificate or a token.
    pub has_logged_in: bool,
}

impl Caller {
    /// What its share of snapshots goes by.
    fn share(&self) -> Option<IpAddr> {
        self.peer.map(|peer| of_peer(peer.ip()))
    }
}

/// How a snapshot has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Its clone is complete.
    Completed,
    /// Its clone has failed.
    Failed,
    /// Its clone was cancelled.
    Cancelled,
    /// Nobody has renewed its lease.
    Expired,
    /// Nothing was read of it for long.
    Idle,
    /// Too little was read of it for long.
    Slow,
    /// This donor ends.
    Stopped,
}

impl Ending {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
        Self::Expired,
        Self::Idle,
        Self::Slow,
        Self::Stopped,
    ];

    /// For the log.
    fn text(self) -> &'static str {
        match self {
            Self::Expired => "lease expired",
            Self::Stopped => "donor stops",
            ending => ending.label(),
        }
    }

    /// For metrics.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
            Self::Idle => "idle",
            Self::Slow => "slow",
            Self::Stopped => "stopped",
        }
    }
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
    /// A place for each ListFiles call.
    pub lists: Arc<Semaphore>,
    /// A place for each AdvanceStage call.
    pub advances: Arc<Semaphore>,
    /// What may be held for it, and for all of its peer's, in `HELD_UNIT_BYTES`.
    pub held_units: [Arc<Semaphore>; 2],
    /// One advance at a time.
    pub advance: tokio::sync::Mutex<()>,
    /// Payload bytes sent.
    pub sent_bytes: AtomicU64,
    /// Keeps the data directory from being replaced.
    _in_use: Option<InUse>,
    /// The connection that it was opened on last.
    opener: Mutex<Option<ConnectionNumber>>,
    expiry: Mutex<(Instant, SystemTime)>,
    /// When something of it was sent last.
    used: Mutex<Instant>,
    least: LeastTaken,
    taken: Mutex<Taken>,
    /// Advances at work.
    at_work: AtomicUsize,
    /// Counts how often its recipient has asked for its reads to end.
    reads_end: AtomicU64,
    /// Why it has ended.
    why: OnceLock<String>,
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

    /// Whether it is there for a caller: by the clone's key, or as its opener.
    fn is_for(&self, caller: &Caller) -> bool {
        if let Some(snapshot) = &caller.snapshot {
            return *snapshot == self.name;
        }
        let is_own = self.request.caller.user == caller.user;
        is_own && (!self.request.bound || *lock(&self.opener) == caller.connection)
    }

    /// Something of it is being sent.
    pub fn note_use(&self) {
        *lock(&self.used) = Instant::now();
    }

    /// So many bytes of its present list are being sent.
    pub fn note_taken(&self, bytes: u64) {
        self.note_use();
        let position = self.snapshot.position();
        let Ok(whole) = self.snapshot.totals(position) else { return };
        let needed = self.least.bytes(self.least.window(self.snapshot.blocks_ddl()).0);
        let (mut taken, now) = (lock(&self.taken), Instant::now());
        taken.at(position, now);
        taken.add(bytes, &whole, needed, now);
    }

    /// The donor is at work for its recipient, for as long as what is returned lives. Not again where the
    /// time was over before: work that is broken off, and begun anew, would never end.
    pub fn begin_work(self: &Arc<Self>) -> Result<AtWork, Failure> {
        if let Some((_, why)) = self.expired(Instant::now()) {
            return Err(ended(&self.name, &why));
        }
        self.at_work.fetch_add(1, Ordering::Relaxed);
        Ok(AtWork(Arc::clone(self)))
    }

    /// Its reads end at their next chunk.
    pub fn end_reads(&self) {
        self.reads_end.fetch_add(1, Ordering::Relaxed);
    }

    /// How often they were to end so far.
    pub fn reads_ended(&self) -> u64 {
        self.reads_end.load(Ordering::Relaxed)
    }

    /// Why it ends now, if it does.
    fn expired(&self, now: Instant) -> Option<(Ending, String)> {
        if lock(&self.expiry).0 <= now {
            return Some((Ending::Expired, Ending::Expired.text().to_owned()));
        }
        let blocks_ddl = self.snapshot.blocks_ddl();
        let (idle, option) = self.least.window(blocks_ddl);
        let while_ddl = if blocks_ddl { ", while DDL waits for it" } else { "" };
        let unused = now.saturating_duration_since(*lock(&self.used));
        if unused >= idle {
            let (past, most) = (unused.as_secs(), idle.as_secs());
            let why = format!(
                "nothing was read of it for {option}: {past} s, at most {most} s are allowed{while_ddl}"
            );
            return Some((Ending::Idle, why));
        }
        let (since, bytes) = self.taken_since(now);
        let past = now.saturating_duration_since(since);
        let is_slow = self.least.rate > 0 && past >= idle;
        // What the donor works at may be much; it is told what has come of it.
        if !is_slow || self.at_work.load(Ordering::Relaxed) > 0 {
            return None;
        }
        let why = format!(
            "{bytes} bytes of it were read in {} s, at least {} must be within {option} ({} s at \
             --snapshot-rate-min, {} bytes per second){while_ddl}",
            past.as_secs(),
            self.least.bytes(idle),
            idle.as_secs(),
            self.least.rate
        );
        Some((Ending::Slow, why))
    }

    fn taken_since(&self, now: Instant) -> (Instant, u64) {
        let position = self.snapshot.position();
        let mut taken = lock(&self.taken);
        taken.at(position, now);
        taken.since()
    }

    /// When it ends unless more of it is read until then.
    #[must_use]
    pub fn read_deadline(&self) -> SystemTime {
        let now = Instant::now();
        let idle = self.least.window(self.snapshot.blocks_ddl()).0;
        let mut from = *lock(&self.used);
        if self.least.rate > 0 && self.at_work.load(Ordering::Relaxed) == 0 {
            from = from.min(self.taken_since(now).0);
        }
        SystemTime::now() + idle.saturating_sub(now.saturating_duration_since(from))
    }

    /// What a call that needs it is told once it has ended.
    #[must_use]
    pub fn has_ended(&self) -> Failure {
        let why = self.why.get().map(String::as_str).unwrap_or_default();
        ended(&self.name, why)
    }
}

/// While it lives the donor is at work for a snapshot.
#[derive(Debug)]
pub struct AtWork(Arc<Held>);

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.at_work.fetch_sub(1, Ordering::Relaxed);
    }
}

fn ended(name: &str, why: &str) -> Failure {
    let text = match why {
        "" => format!("`{name}` is no snapshot of this donor; it may have been closed or expired"),
        why => format!("{name} was ended by the donor: {why}"),
    };
    Failure::new(Code::NotFound, "UNKNOWN_SNAPSHOT", text).with("snapshot", name)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
