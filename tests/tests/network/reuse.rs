//! An older copy on the recipient's host: only what differs comes over the network.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
};

use marcot_proto::recipient::v1::{
    Clone, CloneLocalRequest, CloneOptions, CloneStatementRequest, State,
};
use marcot_tests::{
    client::{assert_intact, wait_for_end},
    clone_and_wait, process, tree,
};

use crate::{DATA_BYTES, LARGE, LARGE_BYTES, Net};

impl Net {
    async fn clone_with_reuse(&mut self, target: &str, older: &str) -> Clone {
        let statement = process::statement(self.proxy.port(), &self.path(target), "");
        let reuse_directory = self.path(older).display().to_string().into_bytes().into();
        let options = Some(CloneOptions { reuse_directory, ..Default::default() });
        let request = CloneStatementRequest { statement, options, ..Default::default() };
        let started = self.client.clone_statement(request).await.unwrap().into_inner();
        wait_for_end(&mut self.client, &started.clone.unwrap().name).await
    }
}

/// Changes one byte in each of every hundredth page of the large files; returns the pages' bytes.
fn change_pages(net: &Net, keeps_times: bool) -> u64 {
    let mut changed = 0;
    for n in 0..LARGE {
        let path = net.path("data").join(format!("large{n}"));
        let before = fs::metadata(&path).unwrap();
        let file = File::options().read(true).write(true).open(path).unwrap();
        for page in (0..LARGE_BYTES / 16384).filter(|page| page % 100 == 7 * n) {
            let at = (page * 16384 + 5000) as u64;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[!byte[0]], at).unwrap();
            changed += 16384;
        }
        if keeps_times {
            file.set_modified(before.modified().unwrap()).unwrap();
        }
    }
    changed
}

/// Guards the comparison of blocks: bytes that changed under an unchanged size and mtime come over,
/// all others do not. Without digests in the request all bytes come.
#[tokio::test(flavor = "multi_thread")]
async fn only_blocks_that_differ_come_over_the_network() {
    let mut net = Net::start(&[]).await;
    let name = net.begin("older").await;
    assert_eq!(wait_for_end(&mut net.client, &name).await.state(), State::Completed);
    let kept = listing(&net.path("older"));
    for keeps_times in [false, true] {
        let changed = change_pages(&net, keeps_times);
        let before = net.proxy.counts();
        let clone = net.clone_with_reuse("newer", "older").await;
        assert_eq!(clone.state(), State::Completed, "{clone:?}");
        tree::assert_identical(&net.path("data"), &net.path("newer"));
        assert_intact(&mut net.client, &clone.name).await;
        let after = net.proxy.counts();
        let passed = after.down_bytes - before.down_bytes + after.up_bytes - before.up_bytes;
        // Of each round: all that was changed so far, digests, and some for list and log-in.
        let differs = if keeps_times { 2 * changed } else { changed };
        let most = differs * 13 / 10 + DATA_BYTES / 500 + (128 << 10);
        assert!(passed <= most, "{passed} bytes passed, {most} at most ({differs} differ)");
        assert!(clone.reused_bytes > DATA_BYTES - 2 * differs, "{clone:?}");
        fs::remove_dir_all(net.path("newer")).unwrap();
    }
    assert!(listing(&net.path("older")) == kept, "the older copy was changed");
}

/// Guards R7: an older copy is not trusted. Files that are shorter, longer, of other bytes, cut,
/// full of holes, or no files at all: the copy is what the donor has, and the older one stays.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_of_any_kind_makes_a_right_clone() {
    let mut net = Net::start(&[]).await;
    let older = net.path("older");
    fs::create_dir_all(older.join("small")).unwrap();
    let data = net.path("data");
    let large = fs::read(data.join("large0")).unwrap();
    // Shorter, not at a block's end; then longer; then another one's bytes.
    fs::write(older.join("large0"), &large[..LARGE_BYTES / 2 + 77]).unwrap();
    fs::write(older.join("large1"), [&large[..], &[1; 5000]].concat()).unwrap();
    fs::write(older.join("small/9"), b"short").unwrap();
    fs::create_dir(older.join("small/100")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", older.join("small/101")).unwrap();
    // What is a hole here is data there, and the reverse.
    File::create(older.join("large2")).unwrap().set_len(LARGE_BYTES as u64).unwrap();
    let sparse = File::create(data.join("sparse")).unwrap();
    sparse.set_len(8 << 20).unwrap();
    sparse.write_all_at(&[9; 40_000], 1 << 20).unwrap();
    fs::write(older.join("sparse"), vec![3; 9 << 20]).unwrap();
    fs::write(older.join("not-there-any-more"), b"x").unwrap();
    let kept = listing(&older);
    let clone = net.clone_with_reuse("newer", "older").await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    tree::assert_identical(&data, &net.path("newer"));
    assert_eq!(listing(&older), kept);
    assert!(clone.reused_bytes >= LARGE_BYTES as u64 / 2, "{}", clone.reused_bytes);
}

/// Guards the length of what is compared at one time: a file of holes is a few parts however long it is,
/// and the digests of one must fit into a request. With parts as long as the file the clone failed as
/// REQUEST_TOO_LARGE.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_of_a_long_file_of_holes_is_reused() {
    const LENGTH: u64 = 2 << 30;
    const DATA: usize = 64 << 10;
    let mut net = Net::start(&[]).await;
    for (directory, last) in [("data", 1), ("older", 2)] {
        fs::create_dir_all(net.path(directory)).unwrap();
        let file = File::create(net.path(directory).join("holes")).unwrap();
        file.set_len(LENGTH).unwrap();
        file.write_all_at(&[7; DATA], 0).unwrap();
        file.write_all_at(&[last; DATA], LENGTH - DATA as u64).unwrap();
    }
    let clone = net.clone_with_reuse("newer", "older").await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    tree::assert_identical(&net.path("data"), &net.path("newer"));
    assert!(clone.reused_bytes >= DATA as u64, "{}", clone.reused_bytes);
}

/// Names and content of all files below a directory.
fn listing(directory: &std::path::Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let path = entry.path();
        match path.is_dir() {
            true => all.extend(listing(&path)),
            false => all.push((path.clone(), fs::read(&path).unwrap())),
        }
    }
    all.sort();
    all
}

/// Guards R7, copy first: an older copy that is written to while it is used, as a server would, gives
/// no byte that was not compared. Compared where it lies, and copied then, it would.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_that_changes_while_it_is_used_makes_a_right_clone() {
    let mut net = Net::start(&[]).await;
    let name = net.begin("older").await;
    assert_eq!(wait_for_end(&mut net.client, &name).await.state(), State::Completed);
    let older = net.path("older");
    let ended = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writer = std::thread::spawn({
        let ended = std::sync::Arc::clone(&ended);
        move || {
            let files: Vec<File> = (0..LARGE)
                .map(|n| File::options().write(true).open(older.join(format!("large{n}"))).unwrap())
                .collect();
            let mut changes = 0_usize;
            while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                let at = (changes * 7919 * 4096) % LARGE_BYTES;
                files[changes % LARGE].write_all_at(&[changes as u8; 512], at as u64).unwrap();
                changes += 1;
            }
            changes
        }
    });
    for n in 0..5 {
        let target = format!("newer{n}");
        let clone = net.clone_with_reuse(&target, "older").await;
        assert_eq!(clone.state(), State::Completed, "{clone:?}");
        tree::assert_identical(&net.path("data"), &net.path(&target));
        assert_intact(&mut net.client, &clone.name).await;
        fs::remove_dir_all(net.path(&target)).unwrap();
    }
    ended.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(writer.join().unwrap() > 100, "it was written to");
}

/// Guards the writer's place among digests: a call that goes on within a file asks with those of
/// what is left.
#[tokio::test(flavor = "multi_thread")]
async fn a_delta_whose_connections_are_cut_is_right() {
    let mut net = Net::start(&[]).await;
    let name = net.begin("older").await;
    assert_eq!(wait_for_end(&mut net.client, &name).await.state(), State::Completed);
    change_pages(&net, true);
    for n in 0..LARGE {
        // Enough to be cut within.
        let path = net.path("data").join(format!("large{n}"));
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(&vec![n as u8; 4 << 20], 3 << 20).unwrap();
    }
    for n in 1..20 {
        net.proxy.cut_after(n * 600_000);
        let target = format!("newer{n}");
        let clone = net.clone_with_reuse(&target, "older").await;
        assert_eq!(clone.state(), State::Completed, "{clone:?}");
        tree::assert_identical(&net.path("data"), &net.path(&target));
        fs::remove_dir_all(net.path(&target)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_may_not_be_reused_is_refused_by_name() {
    let mut net = Net::start(&[]).await;
    for (older, reason) in [("/etc", "REUSE_DIRECTORY"), ("etc", "BAD_REUSE_DIRECTORY")] {
        let statement = process::statement(net.proxy.port(), &net.path("copy"), "");
        let reuse_directory = older.as_bytes().to_vec().into();
        let options = Some(CloneOptions { reuse_directory, ..Default::default() });
        let request = CloneStatementRequest { statement, options, ..Default::default() };
        let found = match net.client.clone_statement(request).await {
            Err(status) => {
                marcot_common::failure::Failure::from_status(&status).reason.into_owned()
            }
            Ok(started) => {
                let name = started.into_inner().clone.unwrap().name;
                wait_for_end(&mut net.client, &name).await.error.unwrap().reason
            }
        };
        assert_eq!(found, reason, "{older}");
    }
    let request = CloneLocalRequest {
        data_directory: net.path("local").display().to_string().into_bytes().into(),
        options: Some(CloneOptions {
            reuse_directory: net.path("data").display().to_string().into_bytes().into(),
            ..Default::default()
        }),
    };
    let refused = net.client.clone_local(request).await.unwrap_err();
    let reason = marcot_common::failure::Failure::from_status(&refused).reason;
    assert_eq!(reason, "BAD_REUSE_DIRECTORY");
    // All is well without it.
    let statement = process::statement(net.proxy.port(), &net.path("copy"), "");
    assert_eq!(clone_and_wait(&mut net.client, &statement).await.state(), State::Completed);
}
