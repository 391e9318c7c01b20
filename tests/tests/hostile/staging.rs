//! What lies in staging is exchanged while it is written to.

use std::{os::unix::fs::symlink, path::Path, sync::Arc};

use marcot_proto::donor::v1::read_ranges_response::Frame;
use marcot_tests::{
    Beside,
    hostile::{Behaviour, CONTENT, chunk, directory, end, file},
};

use crate::victim::{Victim, staging};

/// Guards `openat2` beneath staging, through no link: who may write there, or a donor that could, puts a
/// link in the place of a directory, or of a file, just before its bytes come. With plain opens the
/// bytes go where the link leads.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_is_put_into_staging_is_not_followed() {
    let victim = Victim::start(&[]).await;
    let beside = Beside::start().await;
    let home = victim.home.path().to_owned();
    let outside = home.join("beside");
    let exchanged: [(&str, fn(&Path, &Path)); 2] = [
        // Once: what is tried again finds the link.
        ("a directory", |tree, outside| {
            if std::fs::remove_dir(tree.join("a")).is_ok() {
                symlink(outside, tree.join("a")).unwrap();
            }
        }),
        ("a file", |tree, outside| drop(symlink(outside.join("x"), tree.join("a/x")))),
    ];
    for (name, exchange) in exchanged {
        let (home, outside) = (home.clone(), outside.clone());
        let behaviour = Behaviour {
            list: Arc::new(|_| {
                let entries = [directory(0, b"a"), file(1, b"a/x", CONTENT.len() as u64)];
                Box::new(entries.into_iter())
            }),
            ..Behaviour::reading_by(move |_| {
                exchange(&staging(&home).unwrap().join("tree"), &outside);
                let bytes = CONTENT.len() as u64;
                Box::new([Frame::Chunk(chunk(2, 0, CONTENT)), end(1, bytes)].into_iter())
            })
        };
        let failure = victim.fails(name, behaviour).await;
        assert_eq!(failure.reason, "PEER_MISBEHAVED", "{name}: {failure:?}");
        assert!(
            failure.message.contains("not lie in a directory of the staged tree"),
            "{failure:?}"
        );
    }
    beside.assert_completed().await;
}
