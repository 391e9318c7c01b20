//! What others see of a clone: its resource, kept up to date and published to watchers.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use marcot_common::{
    chunk::CHUNK_BYTES_MAX, entry::Totals, failure::Failure, position::Position, time,
    time::duration_to_wire,
};
use marcot_engine::Advanced;
use marcot_proto::{
    common::v1::{self as pbc, Stage},
    recipient::v1 as pb,
};
use tokio::sync::watch;

use super::{End, stage_span::StageSpan};
use crate::{
    counts::{Counts, STAGES, duration},
    install::replacement::Replacement,
    progress::Progress,
    server_control::not_managed,
};

/// Rates are means over this long: shorter ones jump with every sync of the disk.
const RATE_WINDOW: Duration = Duration::from_secs(5);

/// Nothing has moved for this long: the status says so.
const STALL_AFTER: Duration = Duration::from_secs(10);

/// A clone's resource while it runs.
#[derive(Debug)]
pub struct CloneStatus {
    state: Mutex<Tracked>,
    published: watch::Sender<pb::Clone>,
    progress: Arc<Progress>,
    /// Whether `progress` speaks of this clone; after a restart its resource says what it was.
    counts: bool,
    /// Spans of what is done for it.
    pub spans: StageSpan,
}

#[derive(Debug)]
struct Tracked {
    clone: pb::Clone,
    /// Counters at the present stage's begin.
    stage_base: (u64, u64),
    /// Counters that the process's counts by stage have.
    counted: (u64, u64),
    /// Whether the next stage to begin is one that an earlier run had begun.
    keeps_base: bool,
    /// Totals of first copies, for the estimate of time left.
    samples: VecDeque<(Instant, u64, u64)>,
    last_move: Instant,
    /// Which place the clone waits for.
    queued: Option<String>,
}

impl CloneStatus {
    /// A clone that has been accepted.
    #[must_use]
    pub fn new(mut clone: pb::Clone, progress: Arc<Progress>) -> Self {
        clone.state = pb::State::InProgress.into();
        clone.begin_time = Some(time::timestamp(SystemTime::now()));
        clone.stages = STAGES
            .iter()
            .map(|&stage| pb::StageProgress {
                stage: stage.into(),
                state: pb::State::NotStarted.into(),
                ..pb::StageProgress::default()
            })
            .collect();
        let (published, _) = watch::channel(clone.clone());
        let state = Tracked {
            clone,
            stage_base: (0, 0),
            counted: (0, 0),
            keeps_base: false,
            samples: VecDeque::new(),
            last_move: Instant::now(),
            queued: None,
        };
        let spans = StageSpan::default();
        Self { state: Mutex::new(state), published, progress, counts: true, spans }
    }

    /// A clone whose install goes on after a restart of the recipient.
    #[must_use]
    pub fn again(clone: pb::Clone, counts: &Arc<Counts>) -> Self {
        let (published, _) = watch::channel(clone.clone());
        let state = Tracked {
            clone,
            stage_base: (0, 0),
            counted: (0, 0),
            keeps_base: false,
            samples: VecDeque::new(),
            last_move: Instant::now(),
            queued: None,
        };
        let progress = Arc::new(Progress::new(counts));
        let spans = StageSpan::default();
        Self { state: Mutex::new(state), published, progress, counts: false, spans }
    }

    /// A clone that goes on with what an earlier run of it has copied.
    #[must_use]
    pub fn resumed(mut clone: pb::Clone, progress: Arc<Progress>, is_paused: bool) -> Self {
        clone.resumes += 1;
        clone.state = if is_paused { pb::State::Paused } else { pb::State::InProgress }.into();
        clone.error = None;
        clone.end_time = None;
        clone.requested_cancellation = false;
        let present = clone.stages.iter().position(|row| {
            row.begin_time.is_some() && row.state != i32::from(pb::State::Completed)
        });
        let mut base = (0, 0);
        for (i, row) in clone.stages.iter_mut().enumerate() {
            if Some(i) == present {
                row.state = pb::State::InProgress.into();
                row.end_time = None;
            } else {
                base.0 += row.data_bytes;
                base.1 += row.network_bytes;
            }
        }
        let (published, _) = watch::channel(clone.clone());
        let state = Tracked {
            clone,
            stage_base: base,
            counted: (progress.data_bytes.get(), progress.network_bytes.get()),
            keeps_base: present.is_none(),
            samples: VecDeque::new(),
            last_move: Instant::now(),
            queued: None,
        };
        let spans = StageSpan::default();
        Self { state: Mutex::new(state), published, progress, counts: true, spans }
    }

    /// The resource as last published.
    #[must_use]
    pub fn clone_resource(&self) -> pb::Clone {
        self.published.borrow().clone()
    }

    /// The resource as it is, published or not.
    #[must_use]
    pub fn present(&self) -> pb::Clone {
        self.lock().clone.clone()
    }

    /// When anything moved last: bytes, entries that the donor has looked at, a stage's begin.
    #[must_use]
    pub fn last_progress(&self) -> SystemTime {
        let moved = self.lock().last_move.max(self.progress.retries.progressed());
        SystemTime::now() - moved.elapsed()
    }

    /// Streams at work.
    #[must_use]
    pub fn streams(&self) -> u64 {
        self.progress.streams.get()
    }

    /// Tells of every change.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<pb::Clone> {
        self.published.subscribe()
    }

    /// Changes fields that the job learns as it goes.
    pub fn update(&self, change: impl FnOnce(&mut pb::Clone)) {
        change(&mut self.lock().clone);
        self.publish();
    }

    /// A round begins: its stage begins, and those before it have ended.
    pub fn begin_round(&self, position: Position) {
        self.begin_stage(position.stage.to_wire());
        self.update(|clone| {
            if let Some(row) = row(clone, position.stage.to_wire()) {
                row.round = position.round;
            }
        });
    }

    /// A stage begins; those before it that have not ended, end.
    pub fn begin_stage(&self, stage: Stage) {
        let mut state = self.lock();
        let now = Some(time::timestamp(SystemTime::now()));
        let running = row(&mut state.clone, stage).is_some_and(|row| row.begin_time.is_some());
        if running {
            self.spans.begin(&state.clone.name, stage);
            return;
        }
        self.settle(&mut state);
        self.end_span(&mut state, None);
        self.spans.begin(&state.clone.name, stage);
        if !std::mem::take(&mut state.keeps_base) {
            let progress = &self.progress;
            state.stage_base = (progress.data_bytes.get(), progress.network_bytes.get());
        }
        state.samples.clear();
        for row in &mut state.clone.stages {
            if row.stage < i32::from(stage) {
                complete(row, now, &self.progress.counts);
            } else if row.stage == i32::from(stage) {
                row.state = pb::State::InProgress.into();
                row.begin_time = now;
            }
        }
        drop(state);
        self.publish();
    }

    /// Another snapshot begins: so do the stages.
    pub fn begin_again(&self) {
        let mut state = self.lock();
        self.end_span(&mut state, None);
        for row in &mut state.clone.stages {
            let stage = row.stage;
            *row = pb::StageProgress {
                stage,
                state: pb::State::NotStarted.into(),
                ..pb::StageProgress::default()
            };
        }
        state.samples.clear();
        drop(state);
        self.publish();
    }

    /// The copy is whole: the stage that runs has ended.
    pub fn end_stages(&self) {
        let mut state = self.lock();
        self.settle(&mut state);
        self.end_span(&mut state, None);
        let now = Some(time::timestamp(SystemTime::now()));
        for row in &mut state.clone.stages {
            if row.state == i32::from(pb::State::InProgress) {
                complete(row, now, &self.progress.counts);
            }
        }
        drop(state);
        self.publish();
    }

    /// Sets what a stage is expected to copy: the sum over its rounds.
    pub fn set_estimate(&self, position: Position, totals: Totals, growing: bool) {
        let first = position == Position::FIRST;
        self.update(|clone| {
            if first {
                clone.files_expected = totals.files;
            }
            if let Some(row) = row(clone, position.stage.to_wire()) {
                if first {
                    row.estimate_bytes = totals.data_bytes;
                } else {
                    row.estimate_bytes += totals.data_bytes;
                }
                row.estimate_growing = growing;
            }
        });
    }

    /// The user has paused the clone, or resumed it.
    pub fn set_paused(&self, paused: bool) {
        let state = if paused { pb::State::Paused } else { pb::State::InProgress };
        self.update(|clone| {
            if !is_final(clone.state) {
                clone.state = state.into();
            }
        });
    }

    /// The clone waits for a place on the donor, or no more.
    pub fn set_queued(&self, place: Option<String>) {
        let mut state = self.lock();
        let (waiting, running) = (pb::State::Queued.into(), pb::State::InProgress.into());
        let (from, to) = if place.is_some() { (running, waiting) } else { (waiting, running) };
        // Paused is the user's word.
        if state.clone.state == from {
            state.clone.state = to;
        }
        state.queued = place;
        self.settle(&mut state);
        drop(state);
        self.publish();
    }

    /// Sets the limits in force.
    pub fn set_limits(&self, limits: pb::CloneLimits) {
        self.update(|clone| clone.limits = Some(limits));
    }

    /// Sets where the install stands.
    pub fn set_install(&self, replacement: &Replacement) {
        let install = replacement.to_wire();
        self.update(|clone| clone.install = Some(install));
    }

    /// Sets what the finished copy is consistent with.
    pub fn set_consistency(&self, advanced: &Advanced) {
        self.update(|clone| {
            clone.consistency_level = advanced.consistency_level.into();
            clone.coordinates = advanced.coordinates.clone();
        });
    }

    /// Reads the counters; called several times a second while the clone runs.
    pub fn tick(&self) {
        let mut state = self.lock();
        self.settle(&mut state);
        drop(state);
        self.publish();
    }

    /// The clone has ended. Returns its last state, which nobody has been told yet: see `tell`.
    pub fn finish(&self, result: &Result<End, Failure>, cancelled: bool) -> pb::Clone {
        let mut state = self.lock();
        self.settle(&mut state);
        self.end_span(&mut state, result.as_ref().err());
        let now = Some(time::timestamp(SystemTime::now()));
        let clone = &mut state.clone;
        clone.end_time = now;
        clone.eta = None;
        clone.stall_reason.clear();
        clone.held_back_reason.clear();
        let end = match result {
            Ok(End::Completed) => pb::State::Completed,
            Ok(End::AwaitsInstall) => pb::State::AwaitingInstall,
            Ok(End::AwaitsCredentials) => pb::State::AwaitingCredentials,
            Err(_) if cancelled => pb::State::Cancelled,
            Err(_) => pb::State::Failed,
        };
        clone.state = end.into();
        match result {
            Ok(End::Completed) => clone.error = None,
            Ok(End::AwaitsInstall) => clone.error = Some(awaits_install(clone).to_wire()),
            Ok(End::AwaitsCredentials) => {
                clone.end_time = None;
                clone.error = Some(awaits_credentials(clone).to_wire());
            }
            Err(failure) => clone.error = Some(failure.to_wire()),
        }
        for row in &mut clone.stages {
            row.data_speed = 0;
            row.network_speed = 0;
            row.threads = 0;
            if row.state == i32::from(pb::State::InProgress) {
                row.state = end.into();
                row.end_time = now;
            }
        }
        state.clone.clone()
    }

    /// Tells watchers the present state.
    pub fn tell(&self) {
        self.publish();
    }

    /// The span of the stage that runs ends, with what the stage has copied.
    fn end_span(&self, state: &mut Tracked, failure: Option<&Failure>) {
        let clone = &mut state.clone;
        self.spans.end(|stage| row(clone, stage).map_or(0, |row| row.data_bytes), failure);
    }

    fn publish(&self) {
        let clone = self.lock().clone.clone();
        self.published.send_if_modified(|published| {
            let changed = *published != clone;
            *published = clone;
            changed
        });
    }

    /// Brings the rows up to the counters.
    fn settle(&self, state: &mut Tracked) {
        if !self.counts {
            return;
        }
        let progress = &self.progress;
        let (data, network) = (progress.data_bytes.get(), progress.network_bytes.get());
        let now = Instant::now();
        if state.samples.back().is_none_or(|last| (last.1, last.2) != (data, network)) {
            state.last_move = now;
        }
        state.samples.push_back((now, data, network));
        while state.samples.front().is_some_and(|first| now - first.0 > RATE_WINDOW) {
            state.samples.pop_front();
        }
        let (data_speed, network_speed) = speeds(&state.samples);
        let counted = std::mem::replace(&mut state.counted, (data, network));
        let stalled = now.saturating_duration_since(state.last_move);
        let base = state.stage_base;
        let clone = &mut state.clone;
        clone.files_copied = progress.files_copied.get();
        clone.verified_bytes = progress.verified_bytes.get();
        clone.reused_bytes = progress.reused_bytes.get();
        clone.resent_bytes = progress.resent_bytes.get();
        clone.retries = u32::try_from(progress.retries.count.get()).unwrap_or(u32::MAX);
        let (last_cause, waits) = progress.retries.told();
        clone.throttled_duration =
            Some(duration_to_wire(Duration::from_nanos(progress.throttled.get())));
        clone.eta = None;
        clone.stall_reason.clear();
        if waits {
            clone.stall_reason = format!("waits for the donor: {last_cause}");
        }
        clone.last_retry_cause = last_cause;
        clone.held_back_reason = progress.held_back();
        if let Some(place) = &state.queued {
            clone.stall_reason.clone_from(place);
        }
        let Some(row) =
            clone.stages.iter_mut().find(|row| row.state == i32::from(pb::State::InProgress))
        else {
            return;
        };
        if let Ok(stage) = Stage::try_from(row.stage) {
            let moved = (data.saturating_sub(counted.0), network.saturating_sub(counted.1));
            progress.counts.move_in_stage(stage, moved.0, moved.1);
        }
        row.data_bytes = data.saturating_sub(base.0);
        row.network_bytes = network.saturating_sub(base.1);
        row.threads = u32::try_from(progress.streams.get()).unwrap_or(u32::MAX);
        row.data_speed = data_speed;
        row.network_speed = network_speed;
        let copies = row.stage < i32::from(Stage::FileSync);
        if copies && data_speed > 0 && row.estimate_bytes > 0 {
            let left = row.estimate_bytes.saturating_sub(row.data_bytes);
            clone.eta = Some(duration_to_wire(Duration::from_secs(left.div_ceil(data_speed))));
        }
        let held_back = longest_wait(clone.limits.as_ref());
        let paused = clone.state == i32::from(pb::State::Paused);
        if paused {
            clone.stall_reason = "paused by the user".to_owned();
        } else if !waits && copies && stalled >= STALL_AFTER.max(held_back) {
            clone.stall_reason = format!("no byte for {} s", stalled.as_secs());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Tracked> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long nothing may move since limits hold it back: two chunks' time.
fn longest_wait(limits: Option<&pb::CloneLimits>) -> Duration {
    let rates = limits.map(|l| [l.data_bytes_per_second_max, l.network_bytes_per_second_max]);
    let least = rates.into_iter().flatten().flatten().filter(|&rate| rate > 0).min();
    least.map_or(Duration::ZERO, |rate| Duration::from_secs(2 * CHUNK_BYTES_MAX / rate))
}

fn row(clone: &mut pb::Clone, stage: Stage) -> Option<&mut pb::StageProgress> {
    clone.stages.iter_mut().find(|row| row.stage == i32::from(stage))
}

fn complete(row: &mut pb::StageProgress, now: Option<prost_types::Timestamp>, counts: &Counts) {
    if row.state == i32::from(pb::State::Completed) {
        return;
    }
    let took = duration(row.begin_time.as_ref(), now.as_ref());
    if let (Ok(stage), Some(took)) = (Stage::try_from(row.stage), took) {
        counts.end_stage(stage, took);
    }
    row.state = pb::State::Completed.into();
    row.begin_time = row.begin_time.or(now);
    row.end_time = now;
    row.threads = 0;
    row.data_speed = 0;
    row.network_speed = 0;
}

fn speeds(samples: &VecDeque<(Instant, u64, u64)>) -> (u64, u64) {
    let (Some(first), Some(last)) = (samples.front(), samples.back()) else {
        return (0, 0);
    };
    let millis = u64::try_from((last.0 - first.0).as_millis()).unwrap_or(u64::MAX);
    if millis == 0 {
        return (0, 0);
    }
    let rate = |from: u64, to: u64| to.saturating_sub(from).saturating_mul(1000) / millis;
    (rate(first.1, last.1), rate(first.2, last.2))
}

/// Whether a state is final.
#[must_use]
pub fn is_final(state: i32) -> bool {
    matches!(
        pb::State::try_from(state),
        Ok(pb::State::Completed | pb::State::Failed | pb::State::Cancelled | pb::State::RolledBack)
    )
}

/// Whether nothing more becomes of a clone by itself: it is final, or waits for a person.
#[must_use]
pub fn is_over(state: i32) -> bool {
    is_final(state)
        || state == i32::from(pb::State::AwaitingInstall)
        || state == i32::from(pb::State::AwaitingCredentials)
}

/// What a clone waits for, and what to type.
fn awaits_credentials(clone: &pb::Clone) -> Failure {
    let id = clone.name.rsplit('/').next().unwrap_or_default();
    Failure::precondition(
        "AWAITING_CREDENTIALS",
        format!(
            "the donor has ended the snapshot, and nobody has stored the password for another, or it \
             was refused; `marcot resume {id}` asks for it and goes on with what is staged, \
             `marcot cancel {id}` gives it up"
        ),
    )
}

/// What a clone waits for, and what to type.
fn awaits_install(clone: &pb::Clone) -> Failure {
    let failure = not_managed();
    let id = clone.name.rsplit('/').next().unwrap_or_default();
    let message = format!(
        "{}; the clone is whole and waits: stop the server (`mariadb-admin shutdown` or `mysqladmin \
         shutdown`, or its service), run `marcot install {id}`, and start the server",
        failure.message
    );
    Failure { message, ..failure }
}

/// The pseudo-error of a clone that a restart of the recipient has ended.
#[must_use]
pub fn interrupted() -> pbc::Failure {
    Failure::new(
        tonic::Code::Aborted,
        "RECIPIENT_RESTARTED",
        "the recipient stopped while the clone ran; clone again",
    )
    .mysql(1317)
    .to_wire()
}
