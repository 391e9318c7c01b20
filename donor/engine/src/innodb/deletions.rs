//! Tablespaces that the redo log says are deleted.
//!
//! Recovery drops all redo of a tablespace whose deletion it meets, also that from after it
//! (recv_sys_t::parse, file_name_t::DELETED). A tablespace that is there again by the same id, by
//! DISCARD and IMPORT, would lose its changes: a clone that has it must begin after the record.

use std::collections::{HashMap, VecDeque};

use marcot_common::failure::Failure;

use super::survey::Mark;
use crate::files::compare::Base;

/// Most deletions that are kept in memory: 8 MiB. A clone that begins before those that were dropped
/// begins anew after them.
const KEPT_MAX: usize = 256 << 10;

/// A deletion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Deletion {
    /// Where its mini-transaction begins.
    pub(super) lsn: u64,
    /// And ends.
    pub(super) end: u64,
    /// Which tablespace; nothing where the log hides it.
    pub(super) space: Option<u32>,
}

/// Deletions of one generation of the log, in their order.
#[derive(Debug, Default)]
pub(super) struct Deletions {
    kept: VecDeque<Deletion>,
    /// End of the last one that is not kept any more.
    forgotten_to: u64,
}

impl Deletions {
    /// Notes what was followed.
    pub(super) fn extend(&mut self, deletions: Vec<Deletion>) {
        for deletion in deletions {
            if self.kept.len() >= KEPT_MAX
                && let Some(first) = self.kept.pop_front()
            {
                self.forgotten_to = first.end;
            }
            self.kept.push_back(deletion);
        }
    }

    /// Drops what no clone asks for any more.
    pub(super) fn drop_before(&mut self, lsn: u64) {
        while self.kept.front().is_some_and(|first| first.lsn < lsn) {
            self.kept.pop_front();
        }
    }

    /// What recovery from `checkpoint` to `end` meets.
    pub(super) fn between(&self, checkpoint: u64, end: u64) -> DeletedSpaces {
        let mut deleted = DeletedSpaces::default();
        if self.forgotten_to > checkpoint {
            deleted.unknown_to = Some(self.forgotten_to);
        }
        let range = checkpoint..end;
        for deletion in self.kept.iter().filter(|deletion| range.contains(&deletion.lsn)) {
            match deletion.space {
                Some(space) => {
                    deleted.ends.insert(space, deletion.end);
                }
                None => deleted.hidden += 1,
            }
            deleted.last = deletion.end;
        }
        deleted
    }
}

/// Tablespaces that recovery takes for deleted.
#[derive(Debug, Default)]
pub(super) struct DeletedSpaces {
    /// Where the last deletion of each ends.
    ends: HashMap<u32, u64>,
    /// Deletions whose ids are hidden.
    hidden: usize,
    /// End of the last one.
    last: u64,
    /// There were more than were kept, up to here.
    unknown_to: Option<u64>,
}

impl DeletedSpaces {
    /// Whether it takes this one for deleted.
    pub(super) fn has(&self, space: u32) -> bool {
        self.ends.contains_key(&space)
    }

    /// From which LSN on recovery must begin so that it takes none for deleted that `tree` has.
    ///
    /// `listed` are the tablespaces of a walk after the checkpoint. Where ids are hidden, each
    /// deletion must be that of one of them which has gone; one more may be a table that was
    /// imported, or one that came and went since.
    pub(super) fn replaced(&self, tree: &Base, listed: &Listed) -> Result<Option<u64>, Failure> {
        if self.ends.is_empty() && self.hidden == 0 && self.unknown_to.is_none() {
            return Ok(None);
        }
        let settled = tree.records.read_from(0)?.filter_map(|record| match record {
            Ok(record) => match Mark::of(record.identity.live) {
                Mark::Settled(space) => Some(Ok(space)),
                _ => None,
            },
            Err(failure) => Some(Err(failure)),
        });
        self.replaced_among(settled, listed)
    }

    fn replaced_among(
        &self,
        spaces: impl Iterator<Item = Result<u32, Failure>>,
        listed: &Listed,
    ) -> Result<Option<u64>, Failure> {
        if self.unknown_to.is_some() {
            return Ok(self.unknown_to.max(Some(self.last)));
        }
        let mut replaced = None;
        let mut gone = listed.0.len();
        for space in spaces {
            let space = space?;
            if listed.0.binary_search(&space).is_ok() {
                gone = gone.saturating_sub(1);
            }
            replaced = replaced.max(self.ends.get(&space).copied());
        }
        if self.hidden > gone {
            replaced = Some(self.last);
        }
        Ok(replaced)
    }
}

/// Ids of the tablespaces that a walk has found, where the log hides those that it deletes: four
/// bytes for each table. Otherwise nothing.
#[derive(Debug, Default)]
pub(super) struct Listed(Vec<u32>);

impl Listed {
    /// Of a walk.
    pub(super) fn of(tree: &Base) -> Result<Self, Failure> {
        let mut ids = Vec::new();
        for record in tree.records.read_from(0)? {
            if let Mark::Settled(space) = Mark::of(record?.identity.live) {
                ids.push(space);
            }
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(Self(ids))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deletions(all: &[(u64, Option<u32>)]) -> Deletions {
        let mut deletions = Deletions::default();
        let each = all.iter().map(|&(lsn, space)| Deletion { lsn, end: lsn + 9, space });
        deletions.extend(each.collect());
        deletions
    }

    fn replaced(deleted: &DeletedSpaces, spaces: &[u32], listed: &[u32]) -> Option<u64> {
        let spaces = spaces.iter().map(|&space| Ok(space));
        deleted.replaced_among(spaces, &Listed(listed.to_vec())).unwrap()
    }

    /// Guards the rule that keeps an imported tablespace's changes: recovery begins after the last
    /// record that says that it is deleted.
    #[test]
    fn a_tablespace_that_is_there_again_is_found() {
        let all = deletions(&[(100, Some(7)), (200, Some(8)), (300, Some(7))]);
        assert_eq!(replaced(&all.between(100, u64::MAX), &[5, 6], &[]), None);
        assert_eq!(replaced(&all.between(100, u64::MAX), &[5, 7], &[]), Some(309));
        assert_eq!(replaced(&all.between(100, u64::MAX), &[8], &[]), Some(209));
        assert_eq!(replaced(&all.between(200, u64::MAX), &[8], &[]), Some(209));
        assert_eq!(replaced(&all.between(201, u64::MAX), &[8], &[]), None);
        assert_eq!(replaced(&all.between(301, u64::MAX), &[7, 8], &[]), None);
        // One that is dropped once the locks are gone was there at the point.
        assert_eq!(replaced(&all.between(100, 300), &[7], &[]), Some(109));
        assert_eq!(replaced(&all.between(201, 300), &[7], &[]), None);
    }

    /// Guards the count where ids are hidden: one deletion more than there are tables gone is taken
    /// for an import.
    #[test]
    fn a_hidden_deletion_is_one_of_those_that_are_gone_or_an_import() {
        let all = deletions(&[(100, None), (200, None)]);
        assert_eq!(replaced(&all.between(100, u64::MAX), &[3, 9], &[1, 2, 3]), None);
        assert_eq!(replaced(&all.between(100, u64::MAX), &[2, 3], &[1, 2, 3]), Some(209));
        assert_eq!(replaced(&all.between(150, u64::MAX), &[2, 3], &[1, 2, 3]), None);
        assert_eq!(replaced(&all.between(150, u64::MAX), &[1, 2, 3], &[1, 2, 3]), Some(209));
        assert_eq!(replaced(&all.between(150, u64::MAX), &[1, 2, 3, 4], &[1, 2, 3]), Some(209));
    }

    /// Guards the bound: what was forgotten may have deleted any of them.
    #[test]
    fn more_deletions_than_are_kept_ask_for_a_later_start() {
        let mut all = Deletions::default();
        for lsn in 0..=KEPT_MAX as u64 {
            all.extend(vec![Deletion { lsn, end: lsn + 1, space: Some(5) }]);
        }
        assert_eq!(all.kept.len(), KEPT_MAX);
        let last = KEPT_MAX as u64 + 1;
        assert_eq!(replaced(&all.between(0, u64::MAX), &[9], &[]), Some(last));
        assert_eq!(replaced(&all.between(1, u64::MAX), &[9], &[]), None);
        all.drop_before(last);
        assert!(all.kept.is_empty());
    }
}
