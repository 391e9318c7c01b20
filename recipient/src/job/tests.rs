use std::os::unix::fs::FileExt as _;

use marcot_common::{
    entry::{Attributes, FileId, Totals},
    path::RelativePath,
};

use super::*;
use crate::{
    certificate::{
        digests::{BLOCK_BYTES, PartHasher},
        table::DigestTable,
    },
    copy_journal::{
        read_digests,
        record::{Begun, SnapshotOpened, UnitDone},
    },
    staging::Owners,
};

/// Guards the digest of a last block that is none any more: a later round gives the file another
/// size and none of the block's bytes. Without a word of it in the journal, the certificate of a right
/// clone says that it is damaged.
#[test]
fn a_file_of_another_size_has_no_digest_of_its_last_block() {
    let half = BLOCK_BYTES / 2;
    let sizes = [(half, 3 * half), (3 * half, half), (3 * half, 5 * half)];
    for (change, (old, new)) in [Change::Truncate, Change::Patch]
        .into_iter()
        .flat_map(|change| sizes.map(|of| (change, of)))
    {
        let home = tempfile::tempdir().unwrap();
        let staging = Staging::create(home.path(), "x", Owners::Preserved).unwrap();
        let path = RelativePath::new(b"f").unwrap();
        let directory = staging.directory();
        let (begun, snapshot) = (Begun::default(), SnapshotOpened::default());
        let journal = CopyJournal::create(directory, &begun, &snapshot).unwrap();
        let content = vec![7; usize::try_from(old).unwrap()];
        staging.open_file(&path, old).unwrap().write_all_at(&content, 0).unwrap();
        let mut hasher = PartHasher::new(1, old, 0);
        hasher.data(&content);
        let done = UnitDone { digests: hasher.finish(), ..UnitDone::default() };
        journal.unit_done(&done).unwrap();

        let mut entry = Entry {
            number: 0,
            file_id: FileId(1),
            change,
            path,
            kind: Some(Kind::Regular { size: new, allocated: new }),
            attributes: Attributes::default(),
            growing: false,
        };
        shape_entry(&staging, Some(&journal), None, &entry).unwrap();
        entry.change = Change::Add;
        let mut receiver = ListReceiver::create(directory, Position::FIRST, 1).unwrap();
        receiver.push(&entry).unwrap();
        let mut totals = Totals::default();
        totals.add(&entry);
        let table = DigestTable::create(directory, &receiver.finish(totals).unwrap()).unwrap();
        read_digests(directory, &table).unwrap();
        let last = old.min(new) / BLOCK_BYTES;
        assert_eq!(table.get(FileId(1), last).unwrap(), None, "{change:?} from {old} to {new}");
        if last > 0 {
            assert!(table.get(FileId(1), 0).unwrap().is_some(), "whole blocks stay known");
        }
    }
}
