//! One install: its journal, and the trees that it moves.
//!
//! Invariants:
//! * A step is in the journal, on the disk, before what it names is begun.
//! * From `Stopped` on, the locks of both trees are held whenever trees move.
//! * The old tree is removed at `Accepted` and never before, the new one at `LettingGo`.
//! * Nothing is moved or removed while the trees stand where no step has put them.

use std::{
    io,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use marcot_common::{
    failure::Failure,
    in_use::{InUse, InUseError},
    time,
};
use marcot_proto::recipient::v1 as pb;
use tracing::{info, warn};

use super::{
    generation,
    hold::hold,
    identity,
    locks::{TreeLocks, server_on},
    mounts::refuse_mounts_in,
    place::{Form, Place, remove_inner},
    reconcile::{Action, Standing, decide},
    recorded::{AWAY, At, BACK, Plan, REPLICATES, Recorded, encode, name_of},
    step::Step,
    trees,
};
use crate::{
    counts::Counts, journal::Journal, order, sabotage, server_control::FirstStart, staging::Staging,
};

/// More than all records of an install have, however often it is tried.
const JOURNAL_BYTES: u64 = 16 << 10;

/// What an install goes by.
#[derive(Debug, Clone)]
pub struct Wishes {
    /// The clone's id.
    pub clone: String,
    /// Whether a person has to stop the server first.
    pub waits: bool,
    /// Whether there are data that are replaced.
    pub had_data: bool,
    /// Whether the server is to be made a replica afterwards.
    pub attaches: bool,
    /// How long the old tree is kept once the new one is open; `None`: until it is accepted.
    pub keep_old: Option<Duration>,
}

/// An install.
#[derive(Debug)]
pub struct Replacement {
    /// Its paths.
    pub place: Place,
    /// What it is to do.
    pub plan: Plan,
    state: Mutex<State>,
    counts: Arc<Counts>,
}

#[derive(Debug)]
struct State {
    journal: Journal,
    recorded: Recorded,
    locks: Vec<TreeLocks>,
    alone: Option<InUse>,
}

impl Replacement {
    /// Begins an install of the tree that is staged at `place`: step `Staged`.
    pub fn create(place: Place, wishes: &Wishes, counts: &Arc<Counts>) -> Result<Self, Failure> {
        let plan = Plan {
            clone: wishes.clone.clone(),
            form: place.form,
            name: name_of(&place.data_directory),
            old_inode: inode(&place.data_directory)?,
            new_inode: inode(&place.new_tree())?,
            waits: wishes.waits,
            had_data: wishes.had_data,
            attaches: wishes.attaches,
            keep_old_seconds: wishes.keep_old.map(|keep| keep.as_secs()),
        };
        generation::write(&place.new_tree(), &plan.clone)?;
        // Under its own name once the first record is in it: one without any tells of no install.
        let (journal_path, new_path) = (place.journal(), place.staging.join("journal-new"));
        // One that a stop has left here has no record, or tells of nothing that was begun.
        match std::fs::remove_file(&new_path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Failure::io("remove", &new_path, &e));
            }
            _ => {}
        }
        let mut journal = Journal::create(&new_path)?;
        journal.reserve(JOURNAL_BYTES);
        journal.append(Step::Staged as u8, &encode(&plan)?)?;
        rustix::fs::rename(&new_path, &journal_path)
            .map_err(|e| Failure::io("name the journal", &journal_path, &e.into()))?;
        order::renamed(&new_path, &journal_path);
        if !sabotage::leaves_out("journal-create") {
            trees::sync_directory(&place.staging)?;
        }
        let recorded = Recorded {
            plan: plan.clone(),
            step: Step::Staged,
            since: SystemTime::now(),
            opened: None,
            replicates: false,
            away: None,
        };
        let state = State { journal, recorded, locks: Vec::new(), alone: None };
        let counts = Arc::clone(counts);
        let replacement = Self { place, plan, state: Mutex::new(state), counts };
        replacement.counts.reach(Step::Staged, None);
        replacement.tell(Step::Staged);
        Ok(replacement)
    }

    /// Opens the install in a staging directory, to go on with it; `None` when its journal tells of
    /// none.
    pub fn open(place: Place, counts: &Arc<Counts>) -> Result<Option<Self>, Failure> {
        let (journal, records) = Journal::open(&place.journal())?;
        let Some(recorded) = Recorded::of(&records, &place)? else {
            return Ok(None);
        };
        let plan = recorded.plan.clone();
        let state = State { journal, recorded, locks: Vec::new(), alone: None };
        Ok(Some(Self { place, plan, state: Mutex::new(state), counts: Arc::clone(counts) }))
    }

    /// The last step.
    #[must_use]
    pub fn step(&self) -> Step {
        self.lock().recorded.step
    }

    /// Whether it is neither accepted nor rolled back, and holds a tree that somebody may want.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.lock().recorded.is_pending()
    }

    /// When the old tree goes by itself: only once the new one was open for its time.
    #[must_use]
    pub fn keep_until(&self) -> Option<SystemTime> {
        let opened = self.lock().recorded.opened?;
        Some(opened + Duration::from_secs(self.plan.keep_old_seconds?))
    }

    /// Whether the new tree has ever been open to everybody.
    #[must_use]
    pub fn was_opened(&self) -> bool {
        self.lock().recorded.opened.is_some()
    }

    /// The staged tree waits again, after an install that was undone: only once the old tree stands.
    pub fn wait_again(&self) -> Result<(), Failure> {
        match self.step() {
            Step::Staged => Ok(()),
            Step::RolledBack => self.record(Step::Staged),
            step => Err(Failure::precondition(
                "INSTALL_UNFINISHED",
                format!(
                    "the install of clones/{} stopped at step {} and was not undone: it cannot be \
                     tried again; `marcot rollback` brings the old data back",
                    self.plan.clone,
                    step.name()
                ),
            )),
        }
    }

    /// As the API shows it.
    #[must_use]
    pub fn to_wire(&self) -> pb::Install {
        let (step, since) = {
            let state = self.lock();
            (state.recorded.step, state.recorded.since)
        };
        let keeps = matches!(step, Step::InPlace | Step::Started | Step::Healthy | Step::Opened);
        let form = match self.place.form {
            Form::Exchange => pb::InstallForm::Exchange,
            Form::Move => pb::InstallForm::Move,
        };
        pb::Install {
            step: step.to_wire().into(),
            step_time: Some(time::timestamp(since)),
            form: form.into(),
            old_directory: match keeps {
                true => self.place.old_tree().into_os_string().as_bytes().to_vec().into(),
                false => bytes::Bytes::new(),
            },
            keep_until: self.keep_until().filter(|_| keeps).map(time::timestamp),
            generation: generation::of(&self.place.data_directory),
        }
    }

    /// Which tree stands in the data directory's place.
    pub fn standing(&self) -> Result<Standing, Failure> {
        match self.place.form {
            Form::Exchange => {
                let path = &self.place.data_directory;
                let here = match path.metadata() {
                    Ok(metadata) => metadata.ino(),
                    // Somebody has moved it away.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Standing::Other),
                    Err(e) => return Err(Failure::io("look at", path, &e)),
                };
                Ok(match here {
                    here if here == self.plan.old_inode => Standing::Old,
                    here if here == self.plan.new_inode => Standing::New,
                    _ => Standing::Other,
                })
            }
            // Nothing tells the trees apart but what the journal says was begun.
            Form::Move => Ok(match self.step() {
                Step::Staged | Step::Stopped | Step::RolledBack | Step::LettingGo => Standing::Old,
                Step::SettingAside | Step::PuttingIn | Step::TakingOut | Step::PuttingBack => {
                    Standing::Between
                }
                _ => Standing::New,
            }),
        }
    }

    /// What a start would do with it.
    pub fn action(&self) -> Result<Action, Failure> {
        Ok(decide(self.step(), self.standing()?))
    }

    /// Which tree stands; an error when that is where no step has put it.
    fn known_standing(&self) -> Result<Standing, Failure> {
        let (step, standing) = (self.step(), self.standing()?);
        if decide(step, standing) == Action::Refuse { Err(self.refused()) } else { Ok(standing) }
    }

    /// The failure of an install whose trees somebody else has moved.
    #[must_use]
    pub fn refused(&self) -> Failure {
        Failure::precondition(
            "TREES_MOVED",
            format!(
                "the install of clones/{} in {} was at step {}, and what stands there now is not \
                 what that step has put there: somebody has moved it, so nothing is touched; {} \
                 holds the other tree: move the right one into place, then remove the rest",
                self.plan.clone,
                self.place.data_directory.display(),
                self.step().name(),
                self.place.staging.display()
            ),
        )
    }

    /// Records a step, durable when this returns.
    pub fn record(&self, step: Step) -> Result<(), Failure> {
        let now = SystemTime::now();
        let at = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let payload = encode(&At { unix_seconds: at.as_secs() })?;
        let mut state = self.lock();
        state.journal.append(step as u8, &payload)?;
        let before = state.recorded.step;
        let took = now.duration_since(state.recorded.since).unwrap_or_default();
        let waited = before == Step::Opened || (before == Step::Staged && self.plan.waits);
        // A wait for a person is no step's work.
        self.counts.reach(step, (!waited).then_some((before, took)));
        state.recorded.step = step;
        state.recorded.since = now;
        if step == Step::Opened {
            state.recorded.opened.get_or_insert(now);
        }
        drop(state);
        self.tell(step);
        Ok(())
    }

    /// The server on the new tree has been made a replica: it replicates after its next start too.
    pub fn note_replicates(&self) -> Result<(), Failure> {
        let mut state = self.lock();
        state.journal.append(REPLICATES, &[])?;
        state.recorded.replicates = true;
        Ok(())
    }

    /// Before a server that runs without this recipient is stopped for the install: whatever becomes of
    /// the install, it is to be started again.
    pub fn note_away(&self) -> Result<(), Failure> {
        self.note_server(true)
    }

    /// It has been started for everybody.
    pub fn note_back(&self) -> Result<(), Failure> {
        self.note_server(false)
    }

    fn note_server(&self, away: bool) -> Result<(), Failure> {
        let mut state = self.lock();
        if state.recorded.away.is_some() != away {
            state.journal.append(if away { AWAY } else { BACK }, &[])?;
            state.recorded.away = away.then_some(state.recorded.step);
        }
        Ok(())
    }

    /// The start command for everybody has been given: from here on the server is not stopped to be opened, and
    /// is started again where it has not come up.
    pub fn note_open(&self) -> Result<(), Failure> {
        let mut state = self.lock();
        if state.recorded.away.is_none() {
            return Ok(());
        }
        state.recorded.away = Some(state.recorded.step);
        state.journal.append(BACK, &[])?;
        state.journal.append(AWAY, &[])
    }

    /// Whether that command has been given, and nobody has seen the server since.
    #[must_use]
    pub fn is_reopened(&self) -> bool {
        self.lock().recorded.away == Some(Step::Opened)
    }

    /// The server runs, and its record could not be made: this process does not start it again.
    pub fn forget_away(&self) {
        self.lock().recorded.away = None;
    }

    /// Whether the server was stopped for the install, and has not been started for everybody since.
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.lock().recorded.away.is_some()
    }

    /// Whether a server that runs on the clone may be closed still: it was not open to everybody before it was
    /// stopped.
    #[must_use]
    pub fn may_be_closed(&self) -> bool {
        let recorded = &self.lock().recorded;
        recorded.step == Step::Opened && recorded.away.is_some_and(|at| at != Step::Opened)
    }

    /// Fails when the server was to be made a replica, and has not been: nobody has stored the
    /// password.
    pub fn check_attached(&self) -> Result<(), Failure> {
        if !self.plan.attaches || self.lock().recorded.replicates {
            return Ok(());
        }
        Err(Failure::precondition(
            "NOT_ATTACHED",
            "the clone is installed and its server is open, but the recipient stopped before it was \
             made a replica, and the password is stored nowhere: CHANGE MASTER with the clone's \
             coordinates (`marcot get` shows the statement)",
        ))
    }

    /// How a server is to be started on what stands in the data directory (R13).
    #[must_use]
    pub fn first_start(&self) -> FirstStart {
        let state = self.lock();
        match (state.recorded.step, state.recorded.replicates) {
            (Step::InPlace | Step::Started | Step::Healthy, _) => FirstStart::Yes,
            (Step::Opened, false) => FirstStart::Opened,
            (Step::Opened, true) => FirstStart::Replica,
            _ => FirstStart::No,
        }
    }

    fn tell(&self, step: Step) {
        info!(clone = %self.plan.clone, step = step.name(), form = self.place.form.name(), "install");
        hold(step.name());
    }

    /// Marks the data directory as one that is being replaced, until `unlock_trees`.
    pub fn claim(&self) -> Result<(), Failure> {
        let mut state = self.lock();
        if state.alone.is_none() {
            state.alone = take_alone(&self.place.data_directory)?;
        }
        Ok(())
    }

    /// The server has been stopped: takes the locks of both trees (R11).
    pub fn lock_trees(&self) -> Result<(), Failure> {
        self.claim()?;
        let mut state = self.lock();
        if state.locks.is_empty() {
            let place = &self.place;
            let mut trees = vec![place.data_directory.clone(), place.new_tree(), place.old_tree()];
            // In form `exchange` the last two are one.
            trees.dedup();
            let present = trees.iter().filter(|tree| tree.is_dir());
            state.locks = present.map(|tree| TreeLocks::take(tree)).collect::<Result<_, _>>()?;
        }
        Ok(())
    }

    /// Lets go of the locks, for the server to start.
    pub fn unlock_trees(&self) {
        let mut state = self.lock();
        state.locks.clear();
        state.alone = None;
    }

    /// The new tree takes the data directory's place: `Stopped` to `InPlace`.
    pub fn put_in_place(&self) -> Result<(), Failure> {
        self.known_standing()?;
        if self.step() != Step::Staged {
            return Err(Failure::precondition(
                "NOT_WAITING",
                format!(
                    "the install of clones/{} has begun already (step {})",
                    self.plan.clone,
                    self.step().name()
                ),
            ));
        }
        self.lock_trees()?;
        self.record(Step::Stopped)?;
        let place = &self.place;
        identity::carry(&place.data_directory, &place.new_tree())?;
        match place.form {
            Form::Exchange => {
                self.record(Step::Exchanging)?;
                trees::exchange(&place.data_directory, &place.new_tree(), "exchanged")?;
            }
            Form::Move => {
                self.record(Step::SettingAside)?;
                let (data, strays) = (&place.data_directory, &place.strays());
                trees::take_out(data, &place.old_tree(), strays, "setting_aside_half")?;
                self.record(Step::PuttingIn)?;
                trees::put_in(&place.new_tree(), data, strays, "putting_in_half")?;
            }
        }
        self.record(Step::InPlace)
    }

    /// The old tree comes back, from whatever step: to `RolledBack`. `why` is a label of metrics.
    pub fn put_back(&self, why: &'static str) -> Result<(), Failure> {
        let standing = self.known_standing()?;
        if standing == Standing::Old {
            // What a crash has cut may stand, and not be durable yet.
            self.sync_places()?;
        } else {
            self.lock_trees()?;
            match self.place.form {
                Form::Exchange => self.exchange_back(standing)?,
                Form::Move => self.move_back()?,
            }
        }
        self.record(Step::RolledBack)?;
        self.counts.roll_back(why);
        Ok(())
    }

    fn exchange_back(&self, standing: Standing) -> Result<(), Failure> {
        let (before, place) = (self.step(), &self.place);
        if standing != Standing::New {
            return Err(self.refused());
        }
        self.record(Step::ExchangingBack)?;
        let exchanged = trees::exchange(&place.data_directory, &place.new_tree(), "exchanged_back");
        if exchanged.is_err() && self.standing()? == Standing::New && before < Step::Accepted {
            // Nothing has moved: the clone stands as it did.
            self.record(before)?;
        }
        exchanged
    }

    fn move_back(&self) -> Result<(), Failure> {
        let place = &self.place;
        let (data, strays) = (&place.data_directory, &place.strays());
        // Before `PuttingIn` nothing of the new tree is in the data directory, and what is still
        // there is the old tree's.
        if !matches!(self.step(), Step::SettingAside | Step::PuttingBack) {
            self.record(Step::TakingOut)?;
            trees::take_out(data, &place.new_tree(), strays, "taking_out_half")?;
        }
        self.record(Step::PuttingBack)?;
        trees::put_in(&place.old_tree(), data, strays, "putting_back_half")
    }

    /// The exchange was made and a crash came before its record: the record is made.
    pub fn note_in_place(&self) -> Result<(), Failure> {
        self.sync_places()?;
        self.record(Step::InPlace)
    }

    fn sync_places(&self) -> Result<(), Failure> {
        trees::sync_directory(self.place.data_directory.parent().unwrap_or(Path::new("/")))?;
        trees::sync_directory(&self.place.staging)
    }

    /// The new tree is accepted: the old one goes, and with it the staging directory.
    pub fn accept(&self) -> Result<(), Failure> {
        let goes_on = self.step() == Step::Accepted && self.is_remainder()?;
        if !goes_on && self.known_standing()? != Standing::New {
            return Err(self.refused());
        }
        refuse_mounts_in(&self.place.staging)?;
        if self.step() != Step::Accepted {
            self.record(Step::Accepted)?;
        }
        self.remove()
    }

    /// The old tree stands, and nobody wants the new one: it goes, and with it the staging
    /// directory.
    pub fn let_go(&self) -> Result<(), Failure> {
        self.begin_letting_go()?;
        self.remove()
    }

    /// As `let_go`; where its server is stopped still, the journal stays to say so, and that nothing installs
    /// what it keeps.
    pub fn give_up(&self) -> Result<(), Failure> {
        self.begin_letting_go()?;
        if self.is_away() { Ok(()) } else { self.remove() }
    }

    /// Records that the new tree goes, before any of it has: from then on nothing installs what is left.
    pub fn begin_letting_go(&self) -> Result<(), Failure> {
        let goes_on = self.step() != Step::Accepted && self.is_remainder()?;
        if !goes_on && self.known_standing()? != Standing::Old {
            return Err(self.refused());
        }
        refuse_mounts_in(&self.place.staging)?;
        if self.step() != Step::LettingGo {
            self.record(Step::LettingGo)?;
        }
        Ok(())
    }

    /// Whether what is here is the very tree that goes, and another stands in the data directory's place:
    /// also where later clones have been installed there.
    fn is_remainder(&self) -> Result<bool, Failure> {
        let goes = match self.step() {
            Step::RolledBack | Step::LettingGo => self.plan.new_inode,
            Step::Accepted => self.plan.old_inode,
            _ => return Ok(false),
        };
        if self.place.form == Form::Move || !self.place.data_directory.is_dir() {
            return Ok(false);
        }
        let is_here = match self.place.new_tree().metadata() {
            Ok(metadata) => metadata.ino() == goes,
            Err(e) => e.kind() == io::ErrorKind::NotFound,
        };
        Ok(is_here && inode(&self.place.data_directory)? != goes)
    }

    /// Removes the staging directory and all that is in it, the journal not before the trees: until then
    /// it says what they are.
    fn remove(&self) -> Result<(), Failure> {
        for tree in [self.place.new_tree(), self.place.old_tree()] {
            if tree.is_dir() {
                // A server may run on a tree that somebody has found here.
                let _locks = TreeLocks::take(&tree)?;
                Staging::remove(&tree)?;
            }
        }
        Staging::remove(&self.place.staging)?;
        if self.place.form == Form::Move {
            remove_inner(&self.place.data_directory);
        }
        Ok(())
    }

    /// The process of a server that runs on the data directory.
    #[must_use]
    pub fn server(&self) -> Option<i32> {
        server_on(&self.place.data_directory)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All installs of a data directory, to be gone on with. One whose journal cannot be read is an
/// error: what it keeps must not be lost sight of.
pub fn all(data_directory: &Path, counts: &Arc<Counts>) -> Result<Vec<Replacement>, Failure> {
    let mut found = Vec::new();
    for place in Place::all(data_directory) {
        // A neighbour's recipient has its own open.
        if Recorded::look(&place)?.is_some() {
            found.extend(Replacement::open(place, counts)?);
        }
    }
    Ok(found)
}

/// Marks a data directory as one that is being replaced. 3634: a donor's clone reads it.
pub fn take_alone(data_directory: &Path) -> Result<Option<InUse>, Failure> {
    match InUse::alone(data_directory) {
        Ok(in_use) => Ok(Some(in_use)),
        Err(InUseError::Taken) => Err(Failure::precondition(
            "IS_DONOR",
            format!(
                "this server is the donor of a clone that runs: its data in {} cannot be replaced; \
                 wait for that clone, or cancel it",
                data_directory.display()
            ),
        )
        .mysql(3634)),
        // A file system without locks (some FUSE) has no such guard.
        Err(InUseError::Io(e)) => {
            warn!(error = %e, "the data directory cannot be marked as being replaced");
            Ok(None)
        }
    }
}

fn inode(path: &Path) -> Result<u64, Failure> {
    let metadata = path.metadata().map_err(|e| Failure::io("look at", path, &e))?;
    Ok(metadata.ino())
}

#[cfg(test)]
mod tests;
