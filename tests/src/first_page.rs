//! First pages of tables' files, which say what a file is.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path};

use marcot_proto::common::v1::Failure;

use crate::live::Live;

/// Where a first page has the id of its tablespace.
const SPACE_ID_AT: u64 = 34;

/// Clones fail while the file of `table`, as `shop/t`, has another id by a flipped bit, of which `of_flip` is
/// said, is not there, or is one of `others`; afterwards it is as it was.
pub async fn assert_wrong_first_pages_fail(
    live: &Live,
    table: &str,
    of_flip: &str,
    others: &[&Path],
) {
    let (path, away) = (live.path("data").join(format!("{table}.ibd")), live.path("away.ibd"));
    let file = File::options().read(true).write(true).open(&path).expect("the table's file");
    let mut id = [0; 4];
    file.read_exact_at(&mut id, SPACE_ID_AT).expect("a first page");
    let mut flipped = id;
    flipped[1] ^= 4;
    file.write_all_at(&flipped, SPACE_ID_AT).expect("the file is writable");
    let name = format!("{table}.ibd");
    assert_page_corrupt(&live.refusal(&live.donor).await, &["page 0", &name, of_flip]);
    file.write_all_at(&id, SPACE_ID_AT).expect("the file is writable");

    put(&path, &away);
    assert_page_corrupt(&live.refusal(&live.donor).await, &["page 0", table]);
    for other in others {
        std::fs::copy(other, &path).expect("a writable directory");
        assert_page_corrupt(&live.refusal(&live.donor).await, &["page 0", table]);
    }
    put(&away, &path);
}

fn assert_page_corrupt(failure: &Failure, words: &[&str]) {
    assert_eq!(failure.reason, "PAGE_CORRUPT", "{failure:?}");
    for word in words {
        assert!(failure.message.contains(word), "{failure:?}");
    }
}

/// Moves a file to another name, where there may be one.
fn put(from: &Path, to: &Path) {
    drop(std::fs::remove_file(to));
    std::fs::hard_link(from, to).expect("one file system");
    std::fs::remove_file(from).expect("a writable directory");
}
