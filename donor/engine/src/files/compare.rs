//! Lists the tree anew and says what has changed since the last time.
//!
//! Both the walk and the earlier list ascend, so one pass over both tells, in constant memory but
//! for the files that have several names.
//!
//! Invariants:
//! * A list ascends strictly: a path occurs in it at most once.
//! * What a list removes or replaces by something that is no directory goes with all below it,
//!   which is not listed again. A directory replaced by a directory keeps what is in it.
//! * An id stays with a path for as long as inode and type there stay. A hard link names a file
//!   that came earlier in path order, in this list or, unchanged, in an earlier one.

use std::{
    collections::{BTreeMap, HashMap},
    iter::Peekable,
    path::Path,
    time::{Duration, Instant},
};

use marcot_common::{
    entry::{Attributes, Change, Entry, FileId, Kind},
    failure::Failure,
    path::RelativePath,
};
use tonic::Code;

use super::{
    list::{List, ListWriter, Record, RecordReader, RecordWriter, Records},
    tree::{Identity, Tree},
    walk::{Found, Judge, Walker},
};

/// Most files with several names: their table takes at most 64 MiB.
const LINKED_FILES_MAX: usize = 1 << 20;

/// Between two calls of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Called with the number of entries looked at; an error stops the work.
pub(crate) type Progress<'a> = &'a mut dyn FnMut(u64) -> Result<(), Failure>;

/// The tree as it was at one time.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    /// Every entry.
    pub(crate) records: Records,
    /// Entries left out, by reason.
    pub(crate) left_out: BTreeMap<String, u64>,
    /// No id from here on was ever given out.
    next_id: u64,
}

impl Base {
    /// The smallest id that was never given out.
    pub(crate) fn next_id(&self) -> u64 {
        self.next_id
    }
}

/// A tree listed anew.
#[derive(Debug)]
pub(crate) struct Relisted {
    /// What has changed.
    pub(crate) list: List,
    /// The whole tree.
    pub(crate) base: Base,
    /// The first change in path order.
    pub(crate) first_change: Option<RelativePath>,
    /// Newest ctime without a fraction of a second, for `clock::settle`.
    pub(crate) newest_whole_second: i64,
    /// The file of the tree that grows while it is read.
    pub(crate) growing: Option<FileId>,
}

/// Lists all of `tree`, as changes since `base`; all of it when there was none.
///
/// Nothing listed may be read before `clock::settle` has returned.
pub(crate) fn relist(
    tree: &Tree,
    judge: &mut dyn Judge,
    base: Option<&Base>,
    spool: &Path,
    progress: Progress<'_>,
) -> Result<Relisted, Failure> {
    let mut walker = Walker::new(tree, judge)?;
    let mut merge = Merge {
        earlier: match base {
            Some(base) => Some(base.records.read_from(0)?.peekable()),
            None => None,
        },
        list: ListWriter::create(spool)?,
        // The first list is the whole tree: it serves as both.
        full: base.map(|_| RecordWriter::create(spool)).transpose()?,
        linked: HashMap::new(),
        next_id: base.map_or(1, |base| base.next_id),
        gone: None,
        first_change: None,
        growing: None,
    };
    let mut count = 0;
    let mut told = Instant::now();
    progress(0)?;
    while let Some(found) = walker.next()? {
        merge.take(found)?;
        count += 1;
        if told.elapsed() >= PROGRESS_INTERVAL {
            progress(count)?;
            told = Instant::now();
        }
    }
    let end = walker.finish()?;
    merge.remove_until(None)?;
    progress(count)?;
    let list = merge.list.finish()?;
    let records = match merge.full {
        Some(full) => full.finish()?,
        None => list.records.clone(),
    };
    Ok(Relisted {
        list,
        base: Base { records, left_out: end.left_out, next_id: merge.next_id },
        first_change: merge.first_change,
        newest_whole_second: end.newest_whole_second,
        growing: merge.growing,
    })
}

/// The walk and the earlier list side by side.
struct Merge {
    earlier: Option<Peekable<RecordReader>>,
    list: ListWriter,
    full: Option<RecordWriter>,
    /// First names of files that have several.
    linked: HashMap<(u64, u64), FileId>,
    next_id: u64,
    /// What was in here went with it.
    gone: Option<RelativePath>,
    first_change: Option<RelativePath>,
    growing: Option<FileId>,
}

impl Merge {
    fn take(&mut self, found: Found) -> Result<(), Failure> {
        self.remove_until(Some(&found.path))?;
        let earlier = match &mut self.earlier {
            Some(reader) => reader
                .next_if(|r| r.as_ref().is_ok_and(|r| r.entry.path == found.path))
                .transpose()?,
            None => None,
        };
        let identity = found.identity;
        let links_to = match found.kind {
            Kind::Regular { .. } if identity.links > 1 => {
                self.linked.get(&(identity.device, identity.inode)).copied()
            }
            _ => None,
        };
        let kind = links_to.map_or(found.kind, |file_id| Kind::HardLink { file_id });
        let kept = earlier
            .as_ref()
            .filter(|e| e.identity.is_same_inode(&identity) && is_same_type(&e.entry, &kind));
        let file_id = kept.map_or(FileId(self.next_id), |e| e.entry.file_id);
        if kept.is_none() {
            self.next_id += 1;
        }
        if matches!(kind, Kind::Regular { .. }) && identity.links > 1 {
            self.link(&identity, file_id, &found.path)?;
        }
        let mut record = Record {
            entry: Entry {
                number: 0,
                file_id,
                change: Change::Add,
                path: found.path,
                kind: Some(kind),
                attributes: found.attributes,
                growing: found.growing,
            },
            identity,
        };
        if found.growing {
            self.growing = Some(file_id);
        }
        if let Some(full) = &mut self.full {
            full.append(&mut record)?;
        }
        match earlier {
            Some(earlier) if is_unchanged(&earlier, &record) => Ok(()),
            Some(earlier) => {
                record.entry.change = Change::Replace;
                if earlier.entry.kind == Some(Kind::Directory)
                    && record.entry.kind != Some(Kind::Directory)
                {
                    self.gone = Some(record.entry.path.clone());
                }
                self.change(record)
            }
            None => self.change(record),
        }
    }

    /// Lists as removed what the walk has passed by; at its end, all that is left.
    fn remove_until(&mut self, path: Option<&RelativePath>) -> Result<(), Failure> {
        while let Some(earlier) = self.next_before(path)? {
            let path = earlier.entry.path;
            if self.gone.as_ref().is_some_and(|gone| path.is_below(gone)) {
                continue;
            }
            self.gone = Some(path.clone());
            self.change(Record {
                entry: Entry {
                    number: 0,
                    file_id: earlier.entry.file_id,
                    change: Change::Remove,
                    path,
                    kind: None,
                    attributes: Attributes::default(),
                    growing: false,
                },
                identity: Identity::NONE,
            })?;
        }
        Ok(())
    }

    /// The next earlier entry, if it comes before `path`.
    fn next_before(&mut self, path: Option<&RelativePath>) -> Result<Option<Record>, Failure> {
        let Some(reader) = &mut self.earlier else {
            return Ok(None);
        };
        reader
            .next_if(|record| match (record, path) {
                (Ok(record), Some(path)) => record.entry.path < *path,
                (Err(_), _) | (_, None) => true,
            })
            .transpose()
    }

    fn change(&mut self, mut record: Record) -> Result<(), Failure> {
        self.list.append(&mut record)?;
        if self.first_change.is_none() {
            self.first_change = Some(record.entry.path);
        }
        Ok(())
    }

    fn link(
        &mut self,
        identity: &Identity,
        id: FileId,
        path: &RelativePath,
    ) -> Result<(), Failure> {
        if self.linked.len() >= LINKED_FILES_MAX {
            return Err(Failure::new(
                Code::FailedPrecondition,
                "TOO_MANY_HARD_LINKS",
                format!(
                    "{path} is one of more than {LINKED_FILES_MAX} files with several names; at \
                     most {LINKED_FILES_MAX} can be cloned"
                ),
            ));
        }
        self.linked.insert((identity.device, identity.inode), id);
        Ok(())
    }
}

fn is_same_type(earlier: &Entry, kind: &Kind) -> bool {
    let earlier = earlier.kind.as_ref();
    earlier.is_some_and(|e| std::mem::discriminant(e) == std::mem::discriminant(kind))
}

/// Whether nothing that a copy carries has changed.
///
/// Which blocks are allocated may change by itself, long after the last write. A hard link's file
/// must be the same one: a directory renamed changes which name comes first, and no inode.
fn is_unchanged(earlier: &Record, now: &Record) -> bool {
    let is_same_kind = match (&earlier.entry.kind, &now.entry.kind) {
        (Some(Kind::Regular { .. }), Some(Kind::Regular { .. })) => true,
        (earlier, now) => earlier == now,
    };
    let is_same_inside = if now.identity.live == 0 {
        earlier.entry.attributes == now.entry.attributes
    } else {
        // Its time goes with each write.
        let modify_time = now.entry.attributes.modify_time;
        Attributes { modify_time, ..earlier.entry.attributes.clone() } == now.entry.attributes
    };
    is_same_kind && earlier.identity.is_same_state(&now.identity) && is_same_inside
}
