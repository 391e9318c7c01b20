//! What goes wrong when half of the entries of a data directory have moved, which is a mount point.

use std::path::Path;

use marcot_proto::recipient::v1::{CloneOptions, ListLeftoversRequest, State};
use marcot_tests::{
    recipient,
    site::Site,
    volume::{Mounted, run},
    wait_for,
};

use crate::{
    faults::{assert_untouched, fill},
    held::{Held, get},
};

/// The two moves on the way in.
const HALVES: [&str; 2] = ["setting_aside_half", "putting_in_half"];

/// Entries whose names take more blocks of a directory while they move: half of them are left.
const MANY: usize = 120;

/// Makes so many files with long names.
fn make_long_names(directory: &Path, count: usize) {
    for i in 0..count {
        std::fs::write(directory.join(format!("{i:03}{}", "x".repeat(200))), "").expect("writable");
    }
}

fn count_long_names(directory: &Path) -> usize {
    let entries = std::fs::read_dir(directory).expect("it can be read").flatten();
    entries.filter(|entry| entry.file_name().len() == 203).count()
}

/// A clone held at a moment, whose data directory is an ext4 of its own; so many files with long names are
/// in the old data, and in the donor's.
async fn held_on_mount_point(moment: &str, own: usize, donors: usize) -> Held {
    let mut site = Site::with_donor_changed_by(|source| make_long_names(source, donors));
    make_long_names(&site.data, own);
    let mkfs = ["mkfs.ext4", "-q", "-F", "-m", "0"];
    let volume = Mounted::image(&site.path("volume"), "400M", &mkfs);
    let from = site.data.join(".");
    let text = |path: &Path| path.to_str().expect("plain").to_owned();
    run("cp", &["-a", &text(&from), &text(&volume.mount_point)]);
    site.data.clone_from(&volume.mount_point);
    Held::on(site, Some(volume), moment, &[], CloneOptions::default()).await
}

/// Guards the undoing of a move that finds the disk full: the room that entries had is still theirs, and
/// so is that of the journal's records.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_while_entries_move_brings_all_back() {
    for (moment, [own, donors]) in HALVES.into_iter().zip([[MANY, 0], [0, MANY]]) {
        let mut held = held_on_mount_point(moment, own, donors).await;
        // The file system's own directory does not move.
        let filler = held.site.data.join("lost+found/filler");
        fill(&filler, "0");
        held.go_on();
        wait_for("the undoing", || held.at.0.log().contains("step=\"rolled_back\"").then_some(()));
        // The server needs room to start.
        std::fs::remove_file(filler).expect("our own file");
        let clone = held.end().await;
        assert_untouched(&held.site, &clone, &["No space left", "the old data are back"]);
        assert_eq!(count_long_names(&held.site.data), own, "{moment}");
    }
}

/// Guards data on a disk that fails in the middle: nothing can be moved back, nor recorded. The clone says
/// so, no server starts on the half, and the next start brings the old data back.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_that_becomes_read_only_while_entries_move_is_settled_by_the_next_start() {
    for moment in HALVES {
        let mut held = held_on_mount_point(moment, 0, 0).await;
        held.volume.as_ref().expect("a volume").make_read_only();
        held.go_on();
        let clone = held.end().await;
        assert_eq!(clone.state(), State::Failed, "{moment}: {clone:?}");
        let error = clone.error.expect("a failure");
        assert_eq!(error.reason, "INSTALL_UNFINISHED", "{error:?}");
        for text in ["Read-only file system", "could not be brought back", "the next start"] {
            assert!(error.message.contains(text), "`{text}` is not in: {}", error.message);
        }
        assert_eq!(held.site.server_pid(), None);
        let list = held.client.list_leftovers(ListLeftoversRequest {}).await.expect("a list");
        let [kept] = &list.into_inner().leftovers[..] else { panic!("both trees are in one") };
        assert!(!kept.removable && kept.allocated_bytes > 1 << 20, "{kept:?}");
        assert_eq!(held.at.0.terminate(), Some(0));
        held.volume.as_ref().expect("a volume").mount_again();
        let at = held.site.supervise(&[]);
        let clone = get(&mut recipient(&at).await, &held.clone.name).await;
        assert_untouched(&held.site, &clone, &["Read-only file system"]);
        // It is in the way of nothing.
        let (_, clone) = held.site.replace(&at).await;
        assert_eq!(clone.state(), State::Completed, "{moment}: {clone:?}");
        assert_eq!(held.site.mark(), "new");
    }
}
