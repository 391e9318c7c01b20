//! One install: its journal, and the trees that it moves.
//!
//! Invariants:
//! * A step is in the journal, on the disk, before what it names is begun.
//! * From `Stopped` on, the locks of both trees are held whenever trees move.
//! * The old tree is removed at `Accepted` and never before.

use std::{
    ffi::OsStr,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use marcot_common::{
    failure::Failure,
    in_use::{InUse, InUseError},
    time,
};
use marcot_proto::recipient::v1 as pb;
use serde::{Deserialize, Serialize};
use tonic::Code;
use tracing::{info, warn};

use super::{
    generation, identity,
    locks::{TreeLocks, server_on},
    place::{self, Form, INNER_DIRECTORY, Place},
    reconcile::Standing,
    step::Step,
    trees,
};
use crate::{
    journal::{Journal, Record},
    staging::Staging,
};

/// Holds an install at a step that is in the journal and not acted on, for tests that kill the
/// recipient there: `STEP:FILE`, which waits until FILE has gone.
const HOLD_VARIABLE: &str = "MARCOT_TEST_HOLD_AT";

/// Milliseconds of rest at every step, for tests that kill the recipient at any moment.
const PAUSE_VARIABLE: &str = "MARCOT_TEST_STEP_PAUSE";

/// What the first record tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The clone's id.
    pub clone: String,
    /// How the trees change places.
    pub form: Form,
    /// Name of the data directory in its parent: a volume may be mounted elsewhere after a restart.
    pub name: Vec<u8>,
    /// Inode of the old tree.
    pub old_inode: u64,
    /// Inode of the new tree.
    pub new_inode: u64,
    /// Whether the staged tree waits for a person to stop the server.
    pub waits: bool,
    /// How long the old tree is kept once the new one is open; `None`: until it is accepted.
    pub keep_old_seconds: Option<u64>,
}

/// What every record tells.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct At {
    unix_seconds: u64,
}

/// An install.
#[derive(Debug)]
pub struct Replacement {
    /// Its paths.
    pub place: Place,
    /// What it is to do.
    pub plan: Plan,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    journal: Journal,
    step: Step,
    since: SystemTime,
    /// When it was opened.
    opened: Option<SystemTime>,
    locks: Vec<TreeLocks>,
    alone: Option<InUse>,
}

impl Replacement {
    /// Begins an install of the tree that is staged at `place`: step `Staged`.
    pub fn create(
        place: Place,
        clone: &str,
        waits: bool,
        keep_old: Option<Duration>,
    ) -> Result<Self, Failure> {
        let plan = Plan {
            clone: clone.to_owned(),
            form: place.form,
            name: name_of(&place.data_directory),
            old_inode: inode(&place.data_directory)?,
            new_inode: inode(&place.new_tree())?,
            waits,
            keep_old_seconds: keep_old.map(|keep| keep.as_secs()),
        };
        generation::write(&place.new_tree(), clone)?;
        let journal = Journal::create(&place.journal())?;
        let now = SystemTime::now();
        let replacement = Self {
            place,
            plan: plan.clone(),
            state: Mutex::new(State {
                journal,
                step: Step::Staged,
                since: now,
                opened: None,
                locks: Vec::new(),
                alone: None,
            }),
        };
        replacement.append(Step::Staged, &encode(&plan)?)?;
        Ok(replacement)
    }

    /// Reads the install in a staging directory; `None` when its journal tells of none.
    pub fn open(place: Place) -> Result<Option<Self>, Failure> {
        let (journal, records) = Journal::open(&place.journal())?;
        let Some(first) = records.first() else {
            return Ok(None);
        };
        let plan: Plan = decode(first, &place)?;
        let (mut step, mut since, mut opened) = (Step::Staged, SystemTime::UNIX_EPOCH, None);
        for record in &records[1..] {
            let Some(next) = Step::of(record.kind) else { continue };
            let at: At = decode(record, &place)?;
            step = next;
            since = SystemTime::UNIX_EPOCH + Duration::from_secs(at.unix_seconds);
            if step == Step::Opened {
                opened = Some(since);
            }
        }
        let state = State { journal, step, since, opened, locks: Vec::new(), alone: None };
        Ok(Some(Self { place, plan, state: Mutex::new(state) }))
    }

    /// The last step.
    #[must_use]
    pub fn step(&self) -> Step {
        self.lock().step
    }

    /// Whether the staging directory must stay: it holds a tree that somebody may want.
    #[must_use]
    pub fn must_stay(&self) -> bool {
        match self.step() {
            Step::Staged => self.plan.waits,
            Step::Stopped | Step::Accepted => false,
            _ => true,
        }
    }

    /// When the old tree goes by itself: only once the new one was open for its time.
    #[must_use]
    pub fn keep_until(&self) -> Option<SystemTime> {
        let opened = self.lock().opened?;
        Some(opened + Duration::from_secs(self.plan.keep_old_seconds?))
    }

    /// Whether the new tree has ever been open to everybody.
    #[must_use]
    pub fn was_opened(&self) -> bool {
        self.lock().opened.is_some()
    }

    /// The staged tree waits again, after an install that was undone.
    pub fn wait_again(&self) -> Result<(), Failure> {
        self.record(Step::Staged)
    }

    /// As the API shows it.
    #[must_use]
    pub fn to_wire(&self) -> pb::Install {
        let (step, since) = {
            let state = self.lock();
            (state.step, state.since)
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
                let here = inode(&self.place.data_directory)?;
                Ok(match here {
                    here if here == self.plan.old_inode => Standing::Old,
                    here if here == self.plan.new_inode => Standing::New,
                    _ => Standing::Other,
                })
            }
            // Nothing tells the trees apart but what the journal says was begun.
            Form::Move => Ok(match self.step() {
                Step::Staged | Step::Stopped | Step::RolledBack => Standing::Old,
                Step::SettingAside | Step::PuttingIn | Step::TakingOut | Step::PuttingBack => {
                    Standing::Between
                }
                _ => Standing::New,
            }),
        }
    }

    /// Records a step, durable when this returns.
    pub fn record(&self, step: Step) -> Result<(), Failure> {
        let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.append(step, &encode(&At { unix_seconds: at.as_secs() })?)
    }

    fn append(&self, step: Step, payload: &[u8]) -> Result<(), Failure> {
        let mut state = self.lock();
        state.journal.append(step as u8, payload)?;
        state.step = step;
        state.since = SystemTime::now();
        if step == Step::Opened {
            state.opened = Some(state.since);
        }
        drop(state);
        info!(clone = %self.plan.clone, step = step.name(), form = self.place.form.name(), "install");
        hold(step);
        Ok(())
    }

    /// The server has been stopped: takes the locks of both trees (R11).
    pub fn lock_trees(&self) -> Result<(), Failure> {
        let mut state = self.lock();
        if state.locks.is_empty() {
            state.alone = take_alone(&self.place.data_directory)?;
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
        self.lock_trees()?;
        self.record(Step::Stopped)?;
        let place = &self.place;
        identity::carry(&place.data_directory, &place.new_tree())?;
        match place.form {
            Form::Exchange => {
                self.record(Step::Exchanging)?;
                trees::exchange(&place.data_directory, &place.new_tree())?;
            }
            Form::Move => {
                self.record(Step::SettingAside)?;
                trees::take_out(&place.data_directory, &place.old_tree(), &place.strays())?;
                self.record(Step::PuttingIn)?;
                trees::put_in(&place.new_tree(), &place.data_directory, &place.strays())?;
            }
        }
        self.record(Step::InPlace)
    }

    /// The old tree comes back, from whatever step: to `RolledBack`.
    pub fn put_back(&self) -> Result<(), Failure> {
        self.lock_trees()?;
        let place = &self.place;
        match place.form {
            Form::Exchange => {
                if self.standing()? == Standing::New {
                    self.record(Step::ExchangingBack)?;
                    trees::exchange(&place.data_directory, &place.new_tree())?;
                }
            }
            Form::Move => {
                // Before `PuttingIn` nothing of the new tree is in the data directory, and what is
                // still there is the old tree's.
                let has_new = !matches!(
                    self.step(),
                    Step::Staged | Step::Stopped | Step::SettingAside | Step::PuttingBack
                );
                if has_new {
                    self.record(Step::TakingOut)?;
                    trees::take_out(&place.data_directory, &place.new_tree(), &place.strays())?;
                }
                if !matches!(self.step(), Step::Staged | Step::Stopped) {
                    self.record(Step::PuttingBack)?;
                    trees::put_in(&place.old_tree(), &place.data_directory, &place.strays())?;
                }
            }
        }
        self.record(Step::RolledBack)
    }

    /// The exchange was made and a crash came before its record: the record is made.
    pub fn note_in_place(&self) -> Result<(), Failure> {
        trees::sync_directory(self.place.data_directory.parent().unwrap_or(Path::new("/")))?;
        trees::sync_directory(&self.place.staging)?;
        self.record(Step::InPlace)
    }

    /// The new tree is accepted: the old one goes, and with it the staging directory.
    pub fn accept(&self) -> Result<(), Failure> {
        if self.step() != Step::Accepted {
            self.record(Step::Accepted)?;
        }
        self.remove()
    }

    /// Removes the staging directory and all that is in it.
    ///
    /// The journal goes last: until then it says what the rest is.
    pub fn remove(&self) -> Result<(), Failure> {
        for tree in [self.place.new_tree(), self.place.old_tree()] {
            Staging::remove(&tree)?;
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

/// All installs of a data directory. One whose journal cannot be read is an error: what it keeps
/// must not be lost sight of.
pub fn all(data_directory: &Path) -> Result<Vec<Replacement>, Failure> {
    let mut found = Vec::new();
    for place in Place::all(data_directory) {
        if let Some(replacement) = Replacement::open(place)?
            && (replacement.place.form == Form::Move
                || replacement.plan.name == name_of(data_directory))
        {
            found.push(replacement);
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

/// Makes the directory that the form `move` works in.
pub fn make_inner(inner: &Path) -> Result<(), Failure> {
    match rustix::fs::mkdir(inner, rustix::fs::Mode::RWXU) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(e) => Err(Failure::io("create directory", inner, &e.into())),
    }
}

/// Removes the directory that the form `move` works in, once it is empty.
pub fn remove_inner(data_directory: &Path) {
    match std::fs::remove_dir(data_directory.join(INNER_DIRECTORY)) {
        Ok(()) => {}
        Err(e)
            if matches!(
                e.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::DirectoryNotEmpty
            ) => {}
        Err(e) => warn!(error = %e, "{INNER_DIRECTORY} is left in the data directory"),
    }
}

fn name_of(data_directory: &Path) -> Vec<u8> {
    data_directory.file_name().map(OsStr::as_bytes).unwrap_or_default().to_vec()
}

fn inode(path: &Path) -> Result<u64, Failure> {
    let metadata = path.metadata().map_err(|e| Failure::io("look at", path, &e))?;
    Ok(metadata.ino())
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>, Failure> {
    serde_json::to_vec(value).map_err(|e| Failure::bug(format!("journal record: {e}")))
}

fn decode<T: for<'a> Deserialize<'a>>(record: &Record, place: &Place) -> Result<T, Failure> {
    serde_json::from_slice(&record.payload).map_err(|e| {
        Failure::new(
            Code::DataLoss,
            "JOURNAL_CORRUPT",
            format!(
                "journal {} has a record of kind {} that cannot be read: {e}",
                place.journal().display(),
                record.kind
            ),
        )
    })
}

/// Waits where a test has asked for it.
fn hold(step: Step) {
    let pause = std::env::var(PAUSE_VARIABLE).ok().and_then(|text| text.parse().ok());
    std::thread::sleep(Duration::from_millis(pause.unwrap_or(0)));
    let Ok(wish) = std::env::var(HOLD_VARIABLE) else { return };
    let Some((name, file)) = wish.split_once(':') else { return };
    if name != step.name() {
        return;
    }
    warn!(step = name, "held by {HOLD_VARIABLE}");
    while Path::new(file).exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Names of staging directories of clones that no install speaks of.
#[must_use]
pub fn is_staging(name: &OsStr) -> bool {
    place::clone_id(name).is_some()
}
