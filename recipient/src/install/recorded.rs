//! What an install's journal holds.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::Path,
    time::{Duration, SystemTime},
};

use marcot_common::failure::Failure;
use serde::{Deserialize, Serialize};
use tonic::Code;
use tracing::warn;

use super::{
    place::{Form, Place},
    step::Step,
};
use crate::{
    copy_journal::record::Begun,
    journal::{Journal, Record},
};

/// Kind of the record that says that the server on the new tree has been made a replica; no step.
pub(super) const REPLICATES: u8 = 64;

/// Kind of the record that says that a server which runs without the recipient is about to be stopped for
/// the install, or to run closed; no step.
pub(super) const AWAY: u8 = 65;

/// Kind of the record that says that it has been started for everybody again; no step.
pub(super) const BACK: u8 = 66;

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
    /// Whether there were data before; without any there is nothing to keep.
    #[serde(default = "yes")]
    pub had_data: bool,
    /// Whether the server is to be made a replica afterwards.
    #[serde(default)]
    pub attaches: bool,
    /// How long the old tree is kept once the new one is open; `None`: until it is accepted.
    pub keep_old_seconds: Option<u64>,
}

fn yes() -> bool {
    true
}

/// What every later record tells.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct At {
    pub(super) unix_seconds: u64,
}

/// What a journal tells of an install.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// What it is to do.
    pub plan: Plan,
    /// The last step.
    pub step: Step,
    pub(super) since: SystemTime,
    /// When it was opened, the first time.
    pub(super) opened: Option<SystemTime>,
    /// Whether the server on the new tree replicates, by the caller's wish.
    pub(super) replicates: bool,
    /// The step at which the server was stopped for the install; `None` once it has been started for
    /// everybody since.
    pub(super) away: Option<Step>,
}

impl Recorded {
    /// Reads records; `None` when there is none.
    pub(super) fn of(records: &[Record], place: &Place) -> Result<Option<Self>, Failure> {
        let Some(first) = records.first() else {
            return Ok(None);
        };
        let mut found = Self {
            plan: decode(first, place)?,
            step: Step::Staged,
            since: SystemTime::UNIX_EPOCH,
            opened: None,
            replicates: false,
            away: None,
        };
        for record in &records[1..] {
            found.replicates |= record.kind == REPLICATES;
            match record.kind {
                AWAY => found.away = found.away.or(Some(found.step)),
                BACK => found.away = None,
                _ => {}
            }
            let Some(step) = Step::of(record.kind) else { continue };
            let at: At = decode(record, place)?;
            found.step = step;
            found.since = SystemTime::UNIX_EPOCH + Duration::from_secs(at.unix_seconds);
            if step == Step::Opened {
                found.opened.get_or_insert(found.since);
            }
        }
        Ok(Some(found))
    }

    /// Reads the journal of an install of the data directory; `None` for an install of another one, beside
    /// which this one stands: its journal may be damaged, or of another version, and is no matter of this.
    pub fn look(place: &Place) -> Result<Option<Self>, Failure> {
        match Journal::read(&place.journal()).and_then(|records| Self::of(&records, place)) {
            Ok(found) => Ok(found.filter(|found| is_of(&found.plan, &place.data_directory))),
            Err(failure) if is_of_a_neighbour(place) => {
                warn!(error = %failure, "the install of another data directory is passed by");
                Ok(None)
            }
            Err(failure) => Err(failure),
        }
    }

    /// Whether it is neither accepted nor rolled back: its staging directory holds a tree that
    /// somebody may want.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        match self.step {
            Step::Staged => self.plan.waits,
            Step::Stopped | Step::Accepted | Step::RolledBack | Step::LettingGo => false,
            _ => true,
        }
    }
}

/// What the journals of all installs of a data directory tell.
pub fn all_recorded(data_directory: &Path) -> Result<Vec<Recorded>, Failure> {
    let mut found = Vec::new();
    for place in Place::all(data_directory) {
        found.extend(Recorded::look(&place)?);
    }
    Ok(found)
}

/// Whether the clone in a staging directory is to become another data directory, by the journal of its copy.
fn is_of_a_neighbour(place: &Place) -> bool {
    let Ok(Some(begun)) = Begun::look(&place.staging) else { return false };
    place.form == Form::Exchange
        && name_of(Path::new(OsStr::from_bytes(&begun.target))) != name_of(&place.data_directory)
}

/// Beside a data directory lie the staging directories of its neighbours as well.
pub(super) fn is_of(plan: &Plan, data_directory: &Path) -> bool {
    plan.form == Form::Move || plan.name == name_of(data_directory)
}

pub(super) fn name_of(data_directory: &Path) -> Vec<u8> {
    data_directory.file_name().map(OsStr::as_bytes).unwrap_or_default().to_vec()
}

pub(super) fn encode(value: &impl Serialize) -> Result<Vec<u8>, Failure> {
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
