//! Tablespaces that recovery reads before it extends any file: the system's and the undo ones.
//!
//! At its start a server looks up unfinished transactions before it applies the log
//! (trx_lists_init_at_db_start comes before recv_sys.apply, and only that calls
//! extend_to_recv_size; 10.11, 11.8). The undo pages that it meets are made of redo at once. When
//! the page cleaner then writes one that lies beyond its file's end, the server aborts: `Trying to
//! write 16384 bytes at N outside the bounds of the file: .//undo003`. A server that crashed never
//! meets this, for its file had grown before the log told of it. So a clone's has the size that it
//! had at the point.

use std::collections::HashMap;

use marcot_common::{
    entry::{Change, Entry, FileId, Kind},
    failure::Failure,
};

use super::{
    classify::{Class, Classifier},
    survey::{Mark, whole_pages},
    tablespace::open_inode,
};
use crate::files::{
    compare::Base,
    list::{List, Record},
    tree::{Identity, Tree},
};

/// Sizes of these tablespaces as given out.
#[derive(Debug, Default)]
pub(super) struct EarlySizes(HashMap<FileId, u64>);

impl EarlySizes {
    /// Notes what a list that is given out says.
    pub(super) fn note(&mut self, list: &List, classifier: &Classifier) -> Result<(), Failure> {
        for record in list.records.read_from(0)? {
            let entry = record?.entry;
            if is_early(&entry, classifier)
                && let Some(Kind::Regular { size, .. }) = entry.kind
            {
                self.0.insert(entry.file_id, size);
            }
        }
        Ok(())
    }

    /// What has grown since: in path order, entries that give each its size of now. `last` is the
    /// list that they are to be part of.
    pub(super) fn grown(
        &self,
        base: &Base,
        last: &List,
        classifier: &Classifier,
        tree: &Tree,
    ) -> Result<Vec<Record>, Failure> {
        let mut grown = Vec::new();
        for record in base.records.read_from(0)? {
            let Record { mut entry, identity } = record?;
            let (Some(Kind::Regular { size, .. }), Some(given)) =
                (&entry.kind, self.0.get(&entry.file_id))
            else {
                continue;
            };
            if !is_early(&entry, classifier)
                || !matches!(Mark::of(identity.live), Mark::Settled(_))
                || last.find(entry.file_id)?.is_some()
            {
                continue;
            }
            // It may have been cut since the walk, or have grown.
            let size = match open_inode(tree, &entry.path, &identity) {
                Ok(file) => {
                    let length = file.metadata().map_or(0, |metadata| metadata.len());
                    (*size).max(whole_pages(length))
                }
                Err(_) => *size,
            };
            if size > *given {
                entry.change = Change::Truncate;
                // Nothing of it is read.
                entry.kind = Some(Kind::Regular { size, allocated: 0 });
                grown.push(Record { entry, identity: Identity::NONE });
            }
        }
        Ok(grown)
    }
}

fn is_early(entry: &Entry, classifier: &Classifier) -> bool {
    matches!(classifier.file(&entry.path), Class::System(_) | Class::Undo)
}
