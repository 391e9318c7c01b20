//! All clones of this recipient: at most one runs; the past ones are remembered.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use marcot_common::{
    failure::Failure,
    host::path_bytes,
    in_use::{InUse, InUseError},
    telemetry::spans::{BYTES, CLONE, fail, set_number},
};
use marcot_proto::recipient::v1 as pb;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Code;
use tracing::{Instrument as _, Span, error, info, info_span, warn};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use uuid::Uuid;

use self::{found::Found, measured::LastSuccess, space::Space};
use super::{
    CloneJob, End,
    history::{CLONES_MAX, History},
    status::{self, CloneStatus},
};
use crate::{
    counts::Counts, install::replacement::Replacement, preflight::binary_logs::KnownBase,
    progress::Progress, request::CloneRequest, server_control::ServerControl, settings::Settings,
};

mod bring_back;
mod found;
mod installs;
mod leftovers;
mod measured;
mod on_end;
mod resumes;
mod space;
mod upkeep;
mod verifications;

/// How often a running clone's counters are read.
const TICK: Duration = Duration::from_millis(250);

/// How often its record is written: a recipient that is killed forgets no more of what it counted.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);

/// Longest wait for an install to leave: trees may be moving, which takes moments.
const LEAVE_MAX: Duration = Duration::from_secs(10);

/// Who asked for a clone, and as part of what.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    /// Account; empty without accounts.
    pub user: String,
    /// W3C trace id; empty when there is none.
    pub trace_id: String,
}

/// All clones.
#[derive(Debug)]
pub struct Clones {
    settings: Arc<Settings>,
    history: History,
    control: Arc<dyn ServerControl>,
    table: Mutex<Table>,
    /// Held while a finished clone is read again.
    verification: Mutex<()>,
    /// Held while a running clone's record is copied and written.
    saving: Mutex<()>,
    tasks: TaskTracker,
    /// Cancelled when this process ends, whatever still runs.
    leaving: CancellationToken,
    /// Whether the file system is nearly full while old data are kept.
    space_is_low: AtomicBool,
    /// What trees take, looked at once in a while.
    space: Mutex<Space>,
    counts: Arc<Counts>,
    /// Of the state directory: one process writes there.
    _alone: Option<InUse>,
}

#[derive(Debug, Default)]
struct Table {
    /// By name; ids are UUIDv7, so the order is that of their beginning.
    past: BTreeMap<String, pb::Clone>,
    running: Option<Running>,
    /// Installs that keep a tree, by the clone's name.
    installs: BTreeMap<String, Arc<Replacement>>,
    /// Clones that a start has found ended, whose end nobody was told of.
    untold: Vec<pb::Clone>,
    /// Clones whose server was stopped for data that were to be discarded, and is not back.
    away: BTreeSet<String>,
    /// Whether somebody starts a server again that was stopped for a clone.
    brings_back: bool,
    /// A clone whose trees are being removed.
    removing: Option<String>,
    /// A clone whose server is being started again.
    starting: Option<String>,
    /// A clone that a stop of the service has interrupted.
    interrupted: Option<String>,
    draining: bool,
    /// What ran last in this process, or runs.
    shown: Option<Arc<CloneStatus>>,
    last_success: Option<LastSuccess>,
}

/// What runs: a clone, or the install of one.
#[derive(Debug, Clone)]
struct Running {
    id: String,
    status: Arc<CloneStatus>,
    /// The clone; `None` for an install that is all that is left of it.
    job: Option<Arc<CloneJob>>,
}

/// Bytes counted since the start.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct ByteTotals {
    /// Written to staging.
    pub data: u64,
    /// Received from donors.
    pub network: u64,
}

impl Clones {
    /// Reads what is remembered, brings every install that a stop has cut to a state in which a
    /// server may start, and clears up the rest.
    pub async fn open(
        settings: Arc<Settings>,
        state_directory: &Path,
        control: Arc<dyn ServerControl>,
    ) -> Result<Self, Failure> {
        let history = History::open(state_directory)?;
        let alone = one_process(state_directory)?;
        let counts = Counts::default().shared();
        let mut found = found::reconcile(&settings, &control, &counts).await?;
        let mut table = Table::default();
        for mut clone in history.load()? {
            let (had_ended, was_over) =
                (status::is_final(clone.state), status::is_over(clone.state));
            let is_cancelled = clone.requested_cancellation && !had_ended;
            if control.is_independent() && resumes::is_away(&clone, &settings).await {
                table.away.insert(clone.name.clone());
            }
            let install = found.iter_mut().find(|found| clone.name == found.name());
            let install = match install {
                // What was said stays said.
                Some(install) if is_cancelled || had_ended => {
                    install.give_up().await?;
                    Some(&*install)
                }
                install => install.map(|install| &*install),
            };
            let looks = install.is_none() && !is_cancelled;
            let staged = looks.then(|| resumes::look(&clone, &settings)).flatten();
            if let Some(Ok(())) = staged {
                let waits = clone.state == i32::from(pb::State::AwaitingCredentials);
                if !waits && !status::is_final(clone.state) {
                    table.interrupted = Some(clone.name.clone());
                }
            } else if let Some(Err(failure)) = &staged
                && failure.reason == "JOURNAL_VERSION"
            {
                resumes::keep_failed(&mut clone, failure);
                history.save(&clone)?;
            } else if found::settle(&mut clone, install) {
                if let Some(Err(failure)) = staged {
                    clone.error = Some(failure.to_wire());
                }
                history.save(&clone)?;
            }
            if !had_ended && status::is_final(clone.state) {
                counts.finish(&clone);
            }
            if !was_over && status::is_over(clone.state) {
                table.untold.push(clone.clone());
            }
            table.note_success(&clone);
            table.past.insert(clone.name.clone(), clone);
        }
        for found in found.into_iter().filter(Found::keeps) {
            // The state directory may be another one than when the clone was made.
            let clone = table.past.entry(found.name()).or_insert_with(|| found.unknown_clone());
            clone.install = Some(found.replacement.to_wire());
            table.installs.insert(found.name(), found.replacement);
        }
        Ok(Self {
            settings,
            history,
            control,
            table: Mutex::new(table),
            verification: Mutex::default(),
            saving: Mutex::default(),
            tasks: TaskTracker::new(),
            leaving: CancellationToken::new(),
            space_is_low: AtomicBool::new(false),
            space: Mutex::default(),
            counts,
            _alone: alone,
        })
    }

    /// The operator's settings.
    #[must_use]
    pub fn settings(&self) -> &Arc<Settings> {
        &self.settings
    }

    /// The clone that the same request has started before.
    pub fn known(&self, request: &CloneRequest) -> Result<Option<pb::Clone>, Failure> {
        known_request(&self.lock(), request)
    }

    /// Starts a clone, or returns the one that the same request has started before.
    pub fn start(
        self: &Arc<Self>,
        request: CloneRequest,
        origin: Origin,
    ) -> Result<pb::Clone, Failure> {
        let mut table = self.lock();
        if let Some(known) = known_request(&table, &request)? {
            return Ok(known);
        }
        refuse_if_busy(&table)?;
        let id = Uuid::now_v7().to_string();
        let job = Arc::new(self.new_job(&id, request, origin));
        let clone = job.status.clone_resource();
        self.history.save(&clone)?;
        self.counts.started.inc();
        info!(clone = %id, statement = %clone.statement, user = %clone.user, "clone accepted");
        self.spawn(&mut table, job);
        Ok(clone)
    }

    /// Runs a clone in the one place there is.
    fn spawn(self: &Arc<Self>, table: &mut Table, job: Arc<CloneJob>) {
        let id = job.id.clone();
        table.shown = Some(Arc::clone(&job.status));
        table.running = Some(Running {
            id: id.clone(),
            status: Arc::clone(&job.status),
            job: Some(Arc::clone(&job)),
        });
        // A child of the call in its trace, but not in the logs: the clone outlives the call.
        let span = info_span!(parent: None, "clone", clone = %id);
        // An error means that no trace layer is installed, as in tests.
        drop(span.set_parent(Span::current().context()));
        span.set_attribute(CLONE, format!("clones/{id}"));
        job.status.spans.set_clone(span.clone());
        let (clones, status) = (Arc::clone(self), Arc::clone(&job.status));
        let work = async move {
            clones.run(job).await;
            status.spans.release();
        };
        self.tasks.spawn(work.instrument(span));
    }

    fn new_job(&self, id: &str, request: CloneRequest, origin: Origin) -> CloneJob {
        let progress = Arc::new(Progress::new(&self.counts));
        let clone = pb::Clone {
            name: format!("clones/{id}"),
            source: request.source_name(),
            destination: path_bytes(&request.target),
            statement: request.statement.clone(),
            request_id: request.request_id.clone(),
            user: origin.user,
            trace_id: origin.trace_id,
            limits: Some(request.limits.to_wire()),
            ..pb::Clone::default()
        };
        let status = CloneStatus::new(clone, Arc::clone(&progress));
        self.job(id, request, status, progress)
    }

    fn job(
        &self,
        id: &str,
        request: CloneRequest,
        status: CloneStatus,
        progress: Arc<Progress>,
    ) -> CloneJob {
        CloneJob {
            id: id.to_owned(),
            request,
            settings: Arc::clone(&self.settings),
            status: Arc::new(status),
            goes_on: false,
            donor_has_accounts: AtomicBool::new(false),
            binlog_base: KnownBase::default(),
            pins: OnceLock::new(),
            journal: Mutex::default(),
            is_interrupted: AtomicBool::new(false),
            growing: Arc::default(),
            gate: Arc::default(),
            progress,
            control: Arc::clone(&self.control),
            leaving: self.leaving.clone(),
            replacement: OnceLock::new(),
            cancel: CancellationToken::new(),
        }
    }

    async fn run(self: Arc<Self>, job: Arc<CloneJob>) {
        let ticker = tokio::spawn({
            let (status, clones) = (Arc::clone(&job.status), Arc::clone(&self));
            async move {
                let mut tick = tokio::time::interval(TICK);
                let mut saved = Instant::now();
                let mut round = None;
                loop {
                    tick.tick().await;
                    status.tick();
                    let clone = status.clone_resource();
                    // The rows of stages that have ended are told by nothing else after a kill.
                    let is_next = running_round(&clone) != round;
                    if is_next || saved.elapsed() >= SAVE_INTERVAL {
                        saved = Instant::now();
                        round = running_round(&clone);
                        clones.save_present(&status);
                    }
                }
            }
        });
        let work = tokio::spawn({
            let job = Arc::clone(&job);
            async move { Box::pin(job.run()).await }.in_current_span()
        });
        let result =
            work.await.unwrap_or_else(|e| Err(Failure::bug(format!("the clone stopped: {e}"))));
        ticker.abort();
        // It may be saving at this moment; what is saved last must be the end.
        drop(ticker.await);
        let is_interrupted = job.is_interrupted.load(Ordering::Relaxed);
        let goes_on = is_interrupted && result.is_err() && job.can_be_gone_on_with(&result);
        if goes_on || job.install_is_left(&result) {
            info!("the service stops; the clone goes on when it is started again");
            self.save_present(&job.status);
            self.lock().running = None;
            return;
        }
        let cancelled = job.cancel.is_cancelled();
        // A clone that had been installed when the cancel came is there, and says so.
        let clone = job.status.finish(&result, cancelled);
        let span = Span::current();
        set_number(&span, BYTES, clone.verified_bytes);
        span.set_attribute("marcot.state", clone.state().as_str_name());
        if let Err(failure) = &result {
            fail(&span, failure);
        }
        match &result {
            Ok(End::Completed) => info!(bytes = clone.verified_bytes, "clone completed"),
            Ok(End::AwaitsInstall) => info!("clone waits for its server to be stopped"),
            Ok(End::AwaitsCredentials) => info!("clone waits for a password"),
            Err(_) if cancelled => info!("clone cancelled"),
            Err(failure) => error!(
                reason = %failure.reason,
                mysql_error = failure.mysql_error,
                error = %failure,
                "clone failed"
            ),
        }
        self.save_present(&job.status);
        let is_away =
            self.control.is_independent() && resumes::is_away(&clone, &self.settings).await;
        let mut table = self.lock();
        table.away.remove(&clone.name);
        if is_away {
            table.away.insert(clone.name.clone());
        }
        if status::is_final(clone.state) {
            self.note_end(&mut table, &clone);
        }
        table.running = None;
        if let Some(replacement) = job.replacement.get().filter(|i| i.place.staging.exists()) {
            table.installs.insert(clone.name.clone(), Arc::clone(replacement));
        }
        let ended = clone.clone();
        table.past.insert(clone.name.clone(), clone);
        while table.past.len() > CLONES_MAX {
            // The record of a clone whose install keeps a tree is what its accept or roll-back asks for.
            let forgotten = table.past.keys().find(|name| !table.installs.contains_key(*name));
            let Some(name) = forgotten.cloned() else { break };
            table.past.remove(&name);
            self.history.remove(&name);
        }
        drop(table);
        marcot_common::os::give_memory_back();
        self.tell_end(&ended);
        self.bring_server_back();
        // Last: whoever waits for the end may start the next clone at once.
        job.status.tell();
    }

    /// Writes a clone's record as it is now: several may do so, and the last one has the last word.
    fn save_present(&self, status: &CloneStatus) {
        let _one_at_a_time = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        self.save(&status.present());
    }

    fn save(&self, clone: &pb::Clone) {
        if let Err(failure) = self.history.save(clone) {
            warn!(error = %failure, "the clone's record could not be written");
        }
    }

    /// A clone by name; `clones/-` is the newest.
    pub fn get(&self, name: &str) -> Result<pb::Clone, Failure> {
        let table = self.lock();
        if let Some(running) = running(&table, name) {
            return Ok(running.status.clone_resource());
        }
        let past = match name {
            "clones/-" => table.past.last_key_value().map(|(_, clone)| clone),
            name => table.past.get(name),
        };
        past.cloned().ok_or_else(|| unknown(name))
    }

    /// A clone, and what tells of its changes while it runs.
    pub fn watch(
        &self,
        name: &str,
    ) -> Result<(pb::Clone, Option<watch::Receiver<pb::Clone>>), Failure> {
        let receiver = running(&self.lock(), name).map(|running| running.status.watch());
        match receiver {
            Some(receiver) => {
                let clone = receiver.borrow().clone();
                Ok((clone, Some(receiver)))
            }
            None => Ok((self.get(name)?, None)),
        }
    }

    /// Clones whose name is below `before`, newest first.
    #[must_use]
    pub fn list(&self, before: Option<&str>, count: usize) -> Vec<pb::Clone> {
        let table = self.lock();
        let running = table.running.as_ref().map(|running| running.status.clone_resource());
        let is_running = running.as_ref().map(|clone| clone.name.clone());
        running
            .into_iter()
            .chain(table.past.values().rev().cloned())
            .enumerate()
            .filter(|(i, clone)| *i == 0 || is_running.as_ref() != Some(&clone.name))
            .map(|(_, clone)| clone)
            .filter(|clone| before.is_none_or(|before| clone.name.as_str() < before))
            .take(count)
            .collect()
    }

    /// Cancels a clone.
    pub fn cancel(&self, name: &str) -> Result<pb::Clone, Failure> {
        let running = running(&self.lock(), name).cloned();
        if let Some(running) = running {
            if let Some(job) = running.job {
                running.status.update(|clone| clone.requested_cancellation = true);
                // Before the answer, and before the end, which may take a while: a recipient that is
                // killed until then must not go on with the clone.
                self.save_present(&running.status);
                job.cancel.cancel();
            }
            return Ok(running.status.clone_resource());
        }
        let clone = self.get(name)?;
        if self.lock().interrupted.take_if(|waits| *waits == clone.name).is_some() {
            return self.cancel_interrupted(clone);
        }
        if clone.state == i32::from(pb::State::AwaitingInstall) {
            return self.cancel_waiting(clone);
        }
        if clone.state == i32::from(pb::State::AwaitingCredentials) {
            return self.discard_staged(clone);
        }
        if clone.state == i32::from(pb::State::Cancelled) {
            return Ok(clone);
        }
        let state = pb::State::try_from(clone.state).unwrap_or_default().as_str_name();
        Err(Failure::precondition(
            "CLONE_ENDED",
            format!("{} has ended ({state}); there is nothing to cancel", clone.name),
        ))
    }

    /// Pauses a clone: nothing more is read, the snapshot stays. Idempotent.
    pub fn pause(&self, name: &str) -> Result<pb::Clone, Failure> {
        self.set_paused(name, true)
    }

    fn set_paused(&self, name: &str, paused: bool) -> Result<pb::Clone, Failure> {
        let job = self.running_job(name, if paused { "pause" } else { "resume" })?;
        if job.gate.set_open(!paused) {
            job.status.set_paused(paused);
            // Before the answer: a recipient that is killed after it goes on as it was told.
            self.save_present(&job.status);
            info!(clone = %job.id, paused, "clone paused or resumed");
        }
        Ok(job.status.clone_resource())
    }

    /// Changes the limits of a clone that runs.
    pub fn update_limits(&self, name: &str, asked: &pb::CloneLimits) -> Result<pb::Clone, Failure> {
        let job = self.running_job(name, "limit")?;
        job.request.limits.change(asked)?;
        job.status.set_limits(job.request.limits.to_wire());
        self.save_present(&job.status);
        let clone = job.status.clone_resource();
        info!(clone = %job.id, limits = ?clone.limits, "limits changed");
        Ok(clone)
    }

    /// The job of a clone that runs; another one has nothing left to `verb`.
    fn running_job(&self, name: &str, verb: &str) -> Result<Arc<CloneJob>, Failure> {
        let job = running(&self.lock(), name).and_then(|running| running.job.clone());
        job.map_or_else(
            || {
                let clone = self.get(name)?;
                let state = pb::State::try_from(clone.state).unwrap_or_default().as_str_name();
                Err(Failure::precondition(
                    "CLONE_ENDED",
                    format!("{} has ended ({state}); there is nothing to {verb}", clone.name),
                ))
            },
            Ok,
        )
    }

    /// The clone that runs.
    #[must_use]
    pub fn running(&self) -> Option<pb::Clone> {
        self.lock().running.as_ref().map(|running| running.status.clone_resource())
    }

    /// Bytes of all clones since the start.
    #[must_use]
    pub fn byte_totals(&self) -> ByteTotals {
        ByteTotals { data: self.counts.data_bytes.get(), network: self.counts.network_bytes.get() }
    }

    /// Refuses new clones, stops the running one, and waits until it has ended: what it has copied is
    /// kept, where it can be gone on with.
    pub async fn drain(&self) {
        let running = {
            let mut table = self.lock();
            table.draining = true;
            table.running.clone()
        };
        if let Some(job) = running.and_then(|running| running.job) {
            job.is_interrupted.store(true, Ordering::Relaxed);
            job.cancel.cancel();
        }
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Waits until this process leaves what still runs.
    pub async fn until_left(&self) {
        self.leaving.cancelled().await;
    }

    /// Leaves whatever still runs where it is, for the next start: the server ends now, and an install
    /// must not take that for its own end.
    pub async fn leave(&self) {
        self.leaving.cancel();
        self.tasks.close();
        if tokio::time::timeout(LEAVE_MAX, self.tasks.wait()).await.is_err() {
            warn!(seconds = LEAVE_MAX.as_secs(), "an install is cut, the next start settles it");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn running<'a>(table: &'a Table, name: &str) -> Option<&'a Running> {
    let running = table.running.as_ref()?;
    let matches = name == "clones/-" || name.strip_prefix("clones/") == Some(running.id.as_str());
    matches.then_some(running)
}

/// Two processes on one state directory would work on the same clones.
fn one_process(state_directory: &Path) -> Result<Option<InUse>, Failure> {
    match InUse::alone(state_directory) {
        Ok(alone) => Ok(Some(alone)),
        Err(InUseError::Taken) => Err(Failure::precondition(
            "STATE_DIRECTORY_IN_USE",
            format!(
                "another marcot-recipient runs with --state-directory {}; end it, or name another \
                 directory",
                state_directory.display()
            ),
        )),
        // A file system without locks (some FUSE).
        Err(InUseError::Io(e)) => {
            warn!(error = %e, "the state directory cannot be locked against another process");
            Ok(None)
        }
    }
}

/// One clone, install, removal or start of a server at a time.
fn refuse_if_busy(table: &Table) -> Result<(), Failure> {
    if table.draining {
        let text = "the recipient is shutting down";
        return Err(Failure::new(Code::Unavailable, "DRAINING", text));
    }
    let running = table.running.as_ref().map(|running| running.status.clone_resource().name);
    let (name, what) = match (running, &table.removing, &table.starting) {
        (Some(name), ..) => {
            let what = format!("{name} is running; wait for it, or cancel it");
            (name, what)
        }
        (None, Some(name), _) => {
            (name.clone(), format!("what {name} has left is being removed; wait for that"))
        }
        (None, None, Some(name)) => {
            let what = format!(
                "the server that was stopped for {name} is being started again; wait for that"
            );
            (name.clone(), what)
        }
        (None, None, None) => return Ok(()),
    };
    Err(Failure::new(
        Code::Aborted,
        "CLONE_IN_PROGRESS",
        format!("Too many concurrent clone operations. Maximum allowed - 1. {what}"),
    )
    .mysql(3634)
    .with("clone", name))
}

/// The clone that the same request id has started; a different request under it is an error.
fn known_request(table: &Table, request: &CloneRequest) -> Result<Option<pb::Clone>, Failure> {
    if request.request_id.is_empty() {
        return Ok(None);
    }
    let running = table.running.as_ref().map(|running| running.status.clone_resource());
    let known = running
        .into_iter()
        .chain(table.past.values().rev().cloned())
        .find(|clone| clone.request_id == request.request_id);
    match known {
        Some(clone) if clone.statement != request.statement => Err(Failure::new(
            Code::AlreadyExists,
            "REQUEST_ID_TAKEN",
            format!(
                "request id `{}` belongs to {}, which was another request",
                clone.request_id, clone.name
            ),
        )),
        known => Ok(known),
    }
}

fn unknown(name: &str) -> Failure {
    let shown: String = name.chars().take(80).collect();
    Failure::new(
        Code::NotFound,
        "UNKNOWN_CLONE",
        format!("`{shown}` is no clone of this recipient; `marcot list` shows them"),
    )
}

/// The stage and round that run.
fn running_round(clone: &pb::Clone) -> Option<(i32, u32)> {
    let row = clone.stages.iter().find(|row| row.state == i32::from(pb::State::InProgress));
    row.map(|row| (row.stage, row.round))
}
