//! Tablespaces that the server has open or knows, as it names them at one moment.
//!
//! A file says itself which tablespace it is, in its first page. That page the server may write as
//! late as its next checkpoint, while the others of a table that was just filled are on the disk
//! already: until then only the server can tell (MariaDB writes none as it makes a file).

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{BuildHasher as _, RandomState},
};

use marcot_common::{failure::Failure, path::RelativePath};
use tonic::Code;

use super::{
    flavor::Flavor,
    page::PageFormat,
    server::{Row, Session, SqlError},
};

/// Newest tablespaces whose names are kept, of which each costs 40 bytes: those without a first page
/// were made since the last checkpoint, and ids ascend. Of older ones the name is not needed.
const NAMED_MAX: usize = 64 << 10;

/// Bits of the flags that are the server's own, and in no file: FSP_FLAGS_MEM_MASK, `fsp0types.h`.
const FLAGS_IN_MEMORY: u32 = !0 << 25;

/// Most tablespaces that one error names.
const NAMED_IN_ERROR_MAX: usize = 20;

/// The tablespaces.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Their ids. A file of any other is one that the server does not write, such as one about to
    /// be imported.
    ids: HashSet<u32>,
    /// Of the newest: the format, by a hash of the path.
    newest: HashMap<u64, PageFormat>,
    /// The first of them, where there are more.
    newest_from: u32,
    hasher: RandomState,
}

impl Known {
    /// Asks the server.
    pub(super) fn ask(session: &mut Session, flavor: Flavor) -> Result<Self, SqlError> {
        Self::ask_by(RandomState::new(), session, flavor)
    }

    fn ask_by(
        hasher: RandomState,
        session: &mut Session,
        flavor: Flavor,
    ) -> Result<Self, SqlError> {
        let mut known = Self { hasher, ..Self::default() };
        match flavor {
            Flavor::MariaDb => {
                let mut newest = BTreeMap::new();
                session.each_row(
                    "SELECT SPACE, FLAG, FILENAME FROM information_schema.INNODB_SYS_TABLESPACES \
                     WHERE COALESCE(NAME, '') <> 'innodb_temporary'",
                    |row| {
                        let Ok(space) = u32::try_from(row.number(0)) else { return };
                        known.ids.insert(space);
                        let Some(flags) = flags(row) else { return };
                        let path = row.bytes(2);
                        let path = path.strip_prefix(b"./").unwrap_or(path);
                        newest.insert(space, (flags, known.hasher.hash_one(path)));
                        if newest.len() > NAMED_MAX {
                            newest.pop_first();
                            known.newest_from = newest.keys().next().copied().unwrap_or(0);
                        }
                    },
                )?;
                known.newest = newest
                    .into_iter()
                    .filter_map(|(space, (flags, path))| Some((path, format(space, flags)?)))
                    .collect();
            }
            // It writes the first page as it makes a file. The system's own is not among them.
            Flavor::MySql => session.each_row(
                "SELECT SPACE FROM information_schema.INNODB_TABLESPACES WHERE COALESCE(NAME, '') \
                 <> 'innodb_temporary' AND COALESCE(STATE, '') <> 'discarded' UNION SELECT 0",
                |row| {
                    known.ids.extend(u32::try_from(row.number(0)));
                },
            )?,
        }
        Ok(known)
    }

    /// Whether the server has a tablespace of this id.
    pub(super) fn has(&self, space: u32) -> bool {
        self.ids.contains(&space)
    }

    /// Fails when files of some of them were not `found`, by a walk while DDL was blocked: the file
    /// that should be one says that it is another tablespace, or is not there.
    pub(super) fn check_found(
        &self,
        session: &mut Session,
        flavor: Flavor,
        found: &FoundSpaces,
    ) -> Result<(), Failure> {
        // Of these a first page may not be written yet, and their names were not kept.
        let is_named = |space: &u32| !found.has_unsettled || *space >= self.newest_from;
        let mut missing: Vec<u32> =
            self.ids.difference(&found.ids).copied().filter(is_named).collect();
        if missing.is_empty() {
            return Ok(());
        }
        missing.sort_unstable();
        // Asked again: what the server ends by itself meanwhile it does not name any more.
        let named = names(session, flavor, &missing)?;
        if named.is_empty() {
            return Ok(());
        }
        Err(Failure::new(
            Code::DataLoss,
            "PAGE_CORRUPT",
            format!(
                "page 0 of no file says that it is of {}, which the server has: {}; check the tables, \
                 and the disk",
                if named.len() == 1 { "a tablespace" } else { "tablespaces" },
                first_of(&named)
            ),
        ))
    }

    /// What the tablespace at `path` is by the server's word, where it is one of the newest.
    pub(super) fn named(&self, path: &RelativePath) -> Option<Named> {
        let path = self.hasher.hash_one(path.as_bytes());
        self.newest.get(&path).map(|&format| Named { path, format })
    }
}

/// Tablespaces that a walk has found.
#[derive(Debug, Default)]
pub(super) struct FoundSpaces {
    /// Those that the server knew before the walk.
    pub(super) ids: HashSet<u32>,
    /// There are others, without a first page, that nobody has named.
    pub(super) has_unsettled: bool,
    /// How many of these are not empty files, and the first of them.
    unnamed: usize,
    first_unnamed: Option<RelativePath>,
}

impl FoundSpaces {
    /// Notes a file that is not empty, has no first page, and that nobody has named.
    pub(super) fn note_unnamed(&mut self, path: &RelativePath) {
        self.unnamed += 1;
        self.first_unnamed.get_or_insert_with(|| path.clone());
    }

    /// Whether there is a first page that is all zero.
    pub(super) fn has_unwritten(&self, unwritten: &Unwritten) -> bool {
        self.unnamed > 0 || !unwritten.0.is_empty()
    }

    /// Fails when a first page that is all zero was lost. One that is not written yet is made by redo
    /// since the checkpoint, which has `made` these tablespaces and has not deleted them: a checkpoint
    /// waits for such pages.
    pub(super) fn check_made(
        &self,
        session: &mut Session,
        unwritten: &Unwritten,
        made: &HashSet<u32>,
    ) -> Result<(), Failure> {
        let mut lost: Vec<u32> =
            unwritten.0.keys().copied().filter(|space| !made.contains(space)).collect();
        lost.sort_unstable();
        let mut named = match lost.is_empty() {
            true => Vec::new(),
            false => names(session, Flavor::MariaDb, &lost)?,
        };
        if self.unnamed > made.difference(&self.ids).count() {
            named.extend(self.first_unnamed.as_ref().map(ToString::to_string));
        }
        if named.is_empty() {
            return Ok(());
        }
        Err(Failure::new(
            Code::DataLoss,
            "PAGE_CORRUPT",
            format!(
                "page 0 is all zero, and no redo since the last checkpoint makes it, of: {}; check \
                 the tables, and the disk; a file that the server does not use belongs elsewhere",
                first_of(&named)
            ),
        ))
    }
}

/// Names of tablespaces that the server still has.
fn names(session: &mut Session, flavor: Flavor, ids: &[u32]) -> Result<Vec<String>, Failure> {
    let view = match flavor {
        Flavor::MariaDb => "INNODB_SYS_TABLESPACES",
        Flavor::MySql => "INNODB_TABLESPACES",
    };
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    let rows = session
        .rows(&format!(
            "SELECT NAME, SPACE FROM information_schema.{view} WHERE SPACE IN ({})",
            ids.join(", ")
        ))
        .map_err(|e| e.failure("list tablespaces"))?;
    Ok(rows.iter().map(|row| format!("{} (id {})", row.text(0), row.text(1))).collect())
}

/// The first few of some names, and how many more there are.
fn first_of(names: &[String]) -> String {
    let first = names.get(..NAMED_IN_ERROR_MAX).unwrap_or(names).join(", ");
    match names.len().saturating_sub(NAMED_IN_ERROR_MAX) {
        0 => first,
        more => format!("{first}, and {more} more"),
    }
}

/// A tablespace without a first page, that the server has named.
#[derive(Debug, Clone, Copy)]
pub(super) struct Named {
    path: u64,
    pub(super) format: PageFormat,
}

/// Those that a walk has found, by id.
#[derive(Debug, Clone, Default)]
pub(super) struct Unwritten(HashMap<u32, Named>);

impl Unwritten {
    /// One more.
    pub(super) fn insert(&mut self, named: Named) {
        self.0.insert(named.format.space_id(), named);
    }

    /// The format of one.
    pub(super) fn get(&self, space: u32) -> Option<PageFormat> {
        self.0.get(&space).map(|named| named.format)
    }

    /// Asks the server again, after the walk: a file that has taken another's name between the first
    /// question and the walk is not what the server said. Those that it names otherwise now are
    /// forgotten: they count as changed when they are read, and the next walk finds what they are.
    pub(super) fn confirm(&mut self, session: &mut Session, known: &Known) -> Result<(), SqlError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let again = Known::ask_by(known.hasher.clone(), session, Flavor::MariaDb)?;
        self.0.retain(|&space, named| {
            again.newest.get(&named.path).is_some_and(|format| format.space_id() == space)
        });
        Ok(())
    }
}

/// None for flags that no file may have: the file is copied as it is then.
fn format(space: u32, flags: u32) -> Option<PageFormat> {
    PageFormat::of_tablespace(space, flags & !FLAGS_IN_MEMORY).ok()
}

/// The view shows 32 bits, as a number with a sign.
fn flags(row: &Row) -> Option<u32> {
    let number: i64 = row.text(1).parse().ok()?;
    u32::try_from(number).ok().or_else(|| Some(i32::try_from(number).ok()?.cast_unsigned()))
}
