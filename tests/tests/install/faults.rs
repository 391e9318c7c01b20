//! What goes wrong around an install: the error is clear, the old data stand, and nothing is left
//! that is not accounted for.

use marcot_proto::recipient::v1::{Clone, State};
use marcot_tests::{
    Recipient,
    client::wait_for_end,
    mariadb::MariaDb,
    recipient,
    site::{Site, copy_tree},
    volume::{Mounted, run},
    wait_for,
};

/// The clone has failed, and all is as it was.
fn assert_untouched(site: &Site, clone: &Clone, texts: &[&str]) {
    assert_eq!(clone.state(), State::Failed, "{clone:?}");
    let error = clone.error.as_ref().expect("a failure");
    for text in texts {
        assert!(
            error.message.contains(text),
            "`{text}` is not in: {} ({})",
            error.message,
            error.reason
        );
    }
    site.wait_for_server();
    assert_eq!(site.mark(), "old");
    assert_eq!(site.damaged_tables(), "");
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
}

/// A site whose data directory lies on a file system of its own.
fn on_volume(size: &str, mkfs: &[&str]) -> (Site, Mounted) {
    let mut site = Site::new();
    let volume = Mounted::image(&site.path("volume"), size, mkfs);
    let data = volume.mount_point.join("own");
    copy_tree(&site.data, &data);
    site.data = data;
    (site, volume)
}

#[tokio::test(flavor = "multi_thread")]
async fn too_little_room_for_two_copies_is_told_before_the_first_byte() {
    for mkfs in [&["mkfs.ext4", "-q", "-F"][..], &["mkfs.xfs", "-q", "-f"]] {
        let (site, _volume) = on_volume("320M", mkfs);
        let filler = site.data.parent().expect("a parent").join("filler");
        run("fallocate", &["-l", "170M", filler.to_str().expect("plain")]);
        let at = site.supervise(&[]);
        let (_, clone) = site.replace(&at).await;
        assert_untouched(&site, &clone, &["Available space"]);
        assert_eq!(clone.error.expect("a failure").error_number, 3873);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_inode_table_is_told_before_the_first_byte() {
    let (site, _volume) = on_volume("320M", &["mkfs.ext4", "-q", "-F", "-N", "512"]);
    let filler = site.data.parent().expect("a parent").join("filler");
    std::fs::create_dir(&filler).expect("an inode is left");
    for i in 0.. {
        if std::fs::write(filler.join(i.to_string()), "").is_err() {
            break;
        }
    }
    // The server needs some for itself.
    for i in 0..30 {
        std::fs::remove_file(filler.join(i.to_string())).expect("our own file");
    }
    let at = site.supervise(&[]);
    let (_, clone) = site.replace(&at).await;
    assert_untouched(&site, &clone, &["inodes"]);
}

/// Guards the undoing of an exchange that the kernel refuses, and the choice of the form: the same
/// mount point is no obstacle when the form is left to the recipient.
#[tokio::test(flavor = "multi_thread")]
async fn a_mount_point_cannot_be_exchanged_and_is_moved_into() {
    let site = Site::new();
    let _mounted = Mounted::over_itself(&site.data);
    let mut at = site.supervise(&["--install-form", "exchange"]);
    let (_, clone) = site.replace(&at).await;
    assert_untouched(&site, &clone, &["exchange", "busy", "the old data are back"]);
    assert_eq!(at.0.terminate(), Some(0));
    let at = site.supervise(&[]);
    let (_, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(site.mark(), "new");
    drop(at);
    wait_for("the server to end", || site.server_pid().is_none().then_some(()));
}

/// Guards the undoing of a move that stops half-way.
#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_cannot_be_moved_brings_all_others_back() {
    let site = Site::new();
    let fixed = site.data.join("fixed.cnf");
    std::fs::write(&fixed, "").expect("writable");
    let fixed = fixed.to_str().expect("plain");
    run("chattr", &["+i", fixed]);
    let at = site.supervise(&["--install-form", "move"]);
    let (_, clone) = site.replace(&at).await;
    run("chattr", &["-i", fixed]);
    assert_untouched(&site, &clone, &["fixed.cnf", "not permitted", "the old data are back"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_file_system_is_named() {
    let (site, volume) = on_volume("320M", &["mkfs.ext4", "-q", "-F"]);
    let mount_point = volume.mount_point.to_str().expect("plain");
    run("mount", &["-o", "remount,ro", mount_point]);
    let data = site.data.display().to_string();
    let at = Recipient::start(site.home.path(), &["--data-directory", &data]);
    let mut client = recipient(&at).await;
    let refused =
        site.begin(&mut client, Default::default()).await.expect_err("it cannot be written");
    assert!(refused.message().contains("Read-only file system"), "{refused}");
    run("mount", &["-o", "remount,rw", mount_point]);
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
}

/// Guards R11: while trees move their locks are held, so that a server that somebody starts then
/// ends, and the install goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_started_by_someone_else_finds_the_locks_held() {
    for (form, step) in
        [("exchange", "stopped"), ("exchange", "exchanging"), ("move", "putting_in")]
    {
        let site = Site::new();
        let hold = site.path("hold");
        std::fs::write(&hold, "").expect("writable");
        let wish = format!("{step}:{}", hold.display());
        let at = site.supervise_with(&["--install-form", form], &[("MARCOT_TEST_HOLD_AT", &wish)]);
        let mut client = recipient(&at).await;
        let clone = site.begin(&mut client, Default::default()).await.expect("accepted");
        let line = format!("step=\"{step}\"");
        wait_for("the step", || at.0.log().contains(&line).then_some(()));
        start_by_hand(&site, if form == "move" { "ibdata1" } else { "lock" });
        std::fs::remove_file(&hold).expect("our own file");
        let clone = wait_for_end(&mut client, &clone.name).await;
        assert_eq!(clone.state(), State::Completed, "{form} {step}: {clone:?}");
        assert_eq!(site.mark(), "new");
    }
}

/// Guards the guard: half a tree, and no lock of anybody, is still no place for a server.
#[tokio::test(flavor = "multi_thread")]
async fn no_server_starts_on_half_a_tree() {
    let site = Site::new();
    let hold = site.path("hold");
    std::fs::write(&hold, "").expect("writable");
    let wish = format!("putting_in:{}", hold.display());
    let mut at =
        site.supervise_with(&["--install-form", "move"], &[("MARCOT_TEST_HOLD_AT", &wish)]);
    let mut client = recipient(&at).await;
    site.begin(&mut client, Default::default()).await.expect("accepted");
    wait_for("the step", || at.0.log().contains("step=\"putting_in\"").then_some(()));
    at.0.kill();
    start_by_hand(&site, "ibdata1");
    std::fs::remove_file(&hold).expect("our own file");
    let at = site.supervise(&["--install-form", "move"]);
    site.wait_for_server();
    assert_eq!(site.mark(), "old");
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
    drop(at);
}

/// A server that is started by hand does not come to run, and says why.
fn start_by_hand(site: &Site, why: &str) {
    let log = MariaDb::start_until_log(site.home.path(), &site.data, &site.options, why);
    assert!(log.contains(why), "`{why}` is not in: {log}");
}
