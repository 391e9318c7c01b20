//! What clones have left behind: listed, and removed when somebody says so.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use marcot_common::{
    failure::Failure,
    host::path_bytes,
    in_use::{InUse, InUseError},
};
use marcot_proto::recipient::v1 as pb;
use tonic::Code;

use super::{Clones, Table, refuse_if_busy, resumes::staged};
use crate::{
    copy_journal::record::Begun,
    install::{
        generation,
        place::{self, Form},
        replacement::Replacement,
        step::Step,
    },
    job::{installed_journal, status::is_final},
    staging::{Staging, allocated_bytes},
};

/// A clone's id and directories, what they hold, and whether they may be removed.
type Described = (String, Vec<PathBuf>, &'static str, Removable);

/// Whether something may be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Removable {
    /// With all others.
    Yes,
    /// By its name alone: it may be another recipient's.
    ByName,
    /// Not so.
    No,
}

/// Directories of one clone.
#[derive(Debug, Default)]
pub(super) struct Left {
    pub(super) directories: Vec<PathBuf>,
}

impl Clones {
    /// What clones have left: beside and in this recipient's data directory, and where copies that
    /// can be gone on with are staged.
    pub fn leftovers(&self) -> Vec<pb::Leftover> {
        let found: Vec<_> = {
            let table = self.lock();
            let described = self.left(&table).into_iter().filter_map(|(id, left)| {
                let own = self.own_directory();
                let path = left.directories.first()?;
                let (content, removable) = self.describe(&table, own.as_deref(), &id, path);
                Some((id, left.directories, content, removable))
            });
            described.collect()
        };
        // Trees are walked for their sizes while calls go on.
        let to_wire = |(id, directories, content, removable): Described| {
            Some(pb::Leftover {
                name: format!("leftovers/{id}"),
                allocated_bytes: directories.iter().map(|path| allocated_bytes(path)).sum(),
                path: path_bytes(directories.first()?),
                content: content.to_owned(),
                removable: removable == Removable::Yes,
            })
        };
        found.into_iter().filter_map(to_wire).collect()
    }

    /// The data directory whose server is this recipient's.
    fn own_directory(&self) -> Option<PathBuf> {
        let directory = self.settings.data_directory.as_ref()?;
        Some(directory.canonicalize().unwrap_or_else(|_| directory.clone()))
    }

    pub(super) fn left(&self, table: &Table) -> BTreeMap<String, Left> {
        let mut left: BTreeMap<String, Left> = BTreeMap::new();
        if let Some(directory) = self.own_directory() {
            for form in [Form::Exchange, Form::Move] {
                let Ok(entries) = std::fs::read_dir(form.staging_parent(&directory)) else {
                    continue;
                };
                for path in entries.flatten().map(|entry| entry.path()) {
                    if let Some(id) = path.file_name().and_then(place::clone_id) {
                        left.entry(id.to_owned()).or_default().directories.push(path);
                    }
                }
            }
        }
        for clone in table.past.values().filter(|clone| keeps_staging(clone)) {
            let id = clone.name.rsplit('/').next().unwrap_or_default();
            for path in staged(clone).into_iter().filter(|path| path.is_dir()) {
                let left = left.entry(id.to_owned()).or_default();
                if !left.directories.contains(&path) {
                    left.directories.push(path);
                }
            }
        }
        left
    }

    /// What it is, and whether it may be removed.
    fn describe(
        &self,
        table: &Table,
        own: Option<&Path>,
        id: &str,
        path: &Path,
    ) -> (&'static str, Removable) {
        if self.is_away(table, &format!("clones/{id}")) {
            return ("of a clone whose server is to be started again first", Removable::No);
        }
        describe(table, own, id, path)
    }

    /// Removes one of them.
    pub fn remove_leftover(&self, name: &str) -> Result<(), Failure> {
        let shown: String = name.chars().take(80).collect();
        let unknown = || {
            Failure::new(
                Code::NotFound,
                "UNKNOWN_LEFTOVER",
                format!("`{shown}` is no leftover; `marcot prune` lists them"),
            )
        };
        let id = name.strip_prefix("leftovers/").ok_or_else(unknown)?;
        let clone = format!("clones/{id}");
        // What it is may change until nothing else can begin with it.
        let removal = self.begin_removal(&clone, |table| {
            let left = self.left(table).remove(id).ok_or_else(unknown)?;
            let path = left.directories.first().ok_or_else(unknown)?;
            match self.describe(table, self.own_directory().as_deref(), id, path) {
                (_, Removable::Yes | Removable::ByName) => Ok(left),
                (content, Removable::No) => Err(Failure::precondition(
                    "LEFTOVER_IN_USE",
                    format!("{name} is {content} and cannot be removed so"),
                )),
            }
        })?;
        match removal.install() {
            Some(replacement) if replacement.step() == Step::Accepted => replacement.accept()?,
            Some(replacement) => replacement.let_go()?,
            None => {
                for directory in &removal.found.directories {
                    Staging::remove(directory)?;
                }
            }
        }
        if let Ok(clone) = self.get(&clone) {
            place::remove_inner(Path::new(OsStr::from_bytes(&clone.destination)));
        }
        removal.done(None, false);
        Ok(())
    }

    /// Takes the one place that clones and installs run in, for what removes a clone's trees; `find`
    /// decides whether they may go.
    pub(super) fn begin_removal<'a, T>(
        &'a self,
        clone: &str,
        find: impl FnOnce(&Table) -> Result<T, Failure>,
    ) -> Result<Removal<'a, T>, Failure> {
        let mut table = self.lock();
        let found = find(&table)?;
        refuse_if_busy(&table)?;
        table.removing = Some(clone.to_owned());
        let install = table.installs.get(clone).cloned();
        Ok(Removal { clones: self, clone: clone.to_owned(), install, found })
    }
}

/// A clone's trees are being removed; nothing else begins meanwhile.
#[derive(Debug)]
pub(super) struct Removal<'a, T> {
    clones: &'a Clones,
    clone: String,
    install: Option<Arc<Replacement>>,
    found: T,
}

impl<T> Removal<'_, T> {
    /// The install that keeps them.
    pub(super) fn install(&self) -> Option<&Replacement> {
        self.install.as_deref()
    }

    /// They have gone, unless something `is_left` of them; `record` is the clone's, if it has changed.
    pub(super) fn done(self, record: Option<pb::Clone>, is_left: bool) {
        let mut table = self.clones.lock();
        if !is_left {
            table.installs.remove(&self.clone);
        }
        if let Some(record) = record {
            table.past.insert(self.clone.clone(), record);
        }
    }
}

impl<T> Drop for Removal<'_, T> {
    fn drop(&mut self) {
        self.clones.lock().removing = None;
    }
}

/// The same of one whose server runs, or is nobody's to start.
fn describe(table: &Table, own: Option<&Path>, id: &str, path: &Path) -> (&'static str, Removable) {
    if table.running.as_ref().is_some_and(|running| running.id == id) {
        return ("of the clone that runs", Removable::No);
    }
    let name = format!("clones/{id}");
    if let Some(install) = table.installs.get(&name) {
        return kept_by(install);
    }
    if installed_journal(path).exists() {
        return ("of another data directory", Removable::No);
    }
    match table.past.get(&name).map(pb::Clone::state) {
        None => unknown(path, own),
        Some(pb::State::Failed) => {
            ("of a clone that failed; `marcot resume` goes on with it", Removable::Yes)
        }
        Some(pb::State::AwaitingCredentials) => {
            ("of a clone that waits for a password; `marcot cancel` gives it up", Removable::No)
        }
        Some(state) if is_final(state.into()) => ("of a clone that has ended", Removable::Yes),
        Some(_) => ("of a clone that goes on", Removable::No),
    }
}

fn kept_by(install: &Replacement) -> (&'static str, Removable) {
    // Else it is all that there is.
    let has_data = !generation::was_discarded(&install.place.data_directory);
    match install.step() {
        Step::RolledBack if has_data => ("a clone that was rolled back", Removable::Yes),
        Step::Staged if has_data && !install.plan.waits => {
            ("a clone whose install could not begin", Removable::Yes)
        }
        Step::Staged => ("a clone that waits to be installed", Removable::No),
        Step::LettingGo => ("what is left of a clone that was given up", Removable::Yes),
        Step::Accepted => ("what is left of data from before an accepted clone", Removable::Yes),
        Step::RolledBack => ("a clone that was rolled back, and all that there is", Removable::No),
        _ => ("the data from before the clone; `marcot accept` removes them", Removable::No),
    }
}

/// What no record tells of. Data directories of several servers may lie side by side, each with a
/// recipient of its own, which remembers its clones.
fn unknown(staging: &Path, own: Option<&Path>) -> (&'static str, Removable) {
    const ANOTHERS: &str = "of another recipient's clone";
    if matches!(InUse::shared(staging), Err(InUseError::Taken)) {
        return (ANOTHERS, Removable::No);
    }
    match Begun::look(staging) {
        Ok(Some(begun)) if begun.target.is_empty() => {}
        Ok(Some(begun)) if own == Some(Path::new(OsStr::from_bytes(&begun.target))) => {}
        Ok(None) => {}
        Ok(Some(_)) | Err(_) => return (ANOTHERS, Removable::ByName),
    }
    ("of a clone that is not known any more", Removable::Yes)
}

fn keeps_staging(clone: &pb::Clone) -> bool {
    matches!(
        clone.state(),
        pb::State::Failed | pb::State::AwaitingCredentials | pb::State::Cancelled
    )
}
