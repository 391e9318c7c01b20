//! What goes wrong around an install: the error is clear, the old data stand, and nothing is left
//! that is not accounted for.

use std::path::Path;

use marcot_proto::recipient::v1::{
    Clone, CloneOptions, PauseCloneRequest, ResumeCloneRequest, RollbackCloneRequest, State,
};
use marcot_tests::{
    Recipient,
    client::{slowly, wait_for_end},
    mariadb::MariaDb,
    recipient,
    site::{Site, copy_tree},
    volume::{Immutable, Mounted, run},
    wait_for,
};

use crate::held::{Held, get};

/// The clone has failed, and all is as it was.
pub(crate) fn assert_untouched(site: &Site, clone: &Clone, texts: &[&str]) {
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
    for mkfs in
        [&["mkfs.ext4", "-q", "-F", "-N", "512"][..], &["mkfs.xfs", "-q", "-f", "-i", "maxpct=1"]]
    {
        let (site, _volume) = on_volume("320M", mkfs);
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
        // XFS gives them back when it comes to it.
        wait_for("inodes", || std::fs::create_dir(site.data.with_extension("tmp")).ok());
        let at = site.supervise(&[]);
        let (_, clone) = site.replace(&at).await;
        assert_untouched(&site, &clone, &["inodes"]);
    }
}

/// Takes all the room that is left for a file, but for what `leave` says.
pub(crate) fn fill(filler: &Path, leave: &str) {
    let script = format!(
        "fallocate -l $(( $(stat -f -c '%a*%S' {v}) - {leave} )) {f}; \
         dd if=/dev/zero of={f} bs=4k oflag=append conv=notrunc status=none",
        v = filler.parent().expect("a directory").display(),
        f = filler.display()
    );
    let script =
        if leave == "0" { script } else { script.split(';').next().expect("a part").to_owned() };
    // dd ends when the disk is full.
    drop(std::process::Command::new("bash").args(["-c", &script]).output().expect("bash"));
}

/// Guards the clean end of a copy that finds the disk full: the server runs on, nothing is left.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_while_copying_ends_the_clone() {
    let (site, _volume) = on_volume("400M", &["mkfs.ext4", "-q", "-F", "-m", "0"]);
    let at = site.supervise(&[]);
    let mut client = recipient(&at).await;
    let clone = site.begin(&mut client, slowly()).await.expect("accepted");
    client.pause_clone(PauseCloneRequest { name: clone.name.clone() }).await.expect("paused");
    wait_for("the staging", || (!site.leftovers().is_empty()).then_some(()));
    let filler = site.path("volume").join("filler");
    fill(&filler, "(1<<20)");
    client
        .resume_clone(ResumeCloneRequest { name: clone.name.clone(), ..Default::default() })
        .await
        .expect("resumed");
    let clone = wait_for_end(&mut client, &clone.name).await;
    let error = clone.error.as_ref().expect("a failure");
    assert_eq!(error.reason, "DISK_FULL", "{error:?}");
    std::fs::remove_file(filler).expect("our own file");
    assert_untouched(&site, &clone, &["No space left"]);
}

/// Guards the undoing of an install that finds the disk full. (The room that its journal keeps does not
/// show here: few records fit into the block that it has.)
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_undoes_the_install() {
    let (site, volume) = on_volume("400M", &["mkfs.ext4", "-q", "-F", "-m", "0"]);
    // What is carried over needs room.
    std::fs::write(site.data.join("server-key.pem"), vec![b'k'; 100_000]).expect("writable");
    let mut held = Held::on(site, Some(volume), "stopped", &[], CloneOptions::default()).await;
    let filler = held.site.path("volume").join("filler");
    fill(&filler, "0");
    held.go_on();
    wait_for("the undoing", || held.at.0.log().contains("step=\"rolled_back\"").then_some(()));
    std::fs::remove_file(filler).expect("our own file");
    let clone = held.end().await;
    assert_untouched(&held.site, &clone, &["No space left", "the old data are back"]);
}

/// Guards the clear end where a directory cannot leave its file system: one of a lower layer of an
/// overlay.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_cannot_be_renamed_stays_where_it_is() {
    let mut site = Site::new();
    let (lower, merged) = (site.path("lower"), site.path("merged"));
    for directory in ["lower", "layers", "merged"] {
        std::fs::create_dir(site.path(directory)).expect("writable");
    }
    copy_tree(&site.data, &lower.join("own"));
    let layers = Mounted::image(&site.path("layers"), "320M", &["mkfs.ext4", "-q", "-F"]);
    let (upper, work) = (layers.mount_point.join("upper"), layers.mount_point.join("work"));
    for directory in [&upper, &work] {
        std::fs::create_dir(directory).expect("writable");
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={},redirect_dir=off",
        lower.display(),
        upper.display(),
        work.display()
    );
    run("mount", &["-t", "overlay", "overlay", "-o", &options, merged.to_str().expect("plain")]);
    let merged = Mounted { mount_point: merged };
    site.data = merged.mount_point.join("own");
    let at = site.supervise(&["--install-form", "exchange"]);
    let (_, clone) = site.replace(&at).await;
    assert_untouched(&site, &clone, &["exchange", "cross-device", "the old data are back"]);
    drop(at);
    wait_for("the server to end", || site.server_pid().is_none().then_some(()));
    drop(merged);
}

/// Guards R13: what replaces a server's data has their SELinux label, or the server may not read it.
#[tokio::test(flavor = "multi_thread")]
async fn the_label_of_the_data_directory_is_that_of_the_clone() {
    let (site, _volume) = on_volume("320M", &["mkfs.ext4", "-q", "-F"]);
    let label = "system_u:object_r:mysqld_db_t:s0";
    let set = |path: &std::path::Path, value: &[u8]| {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(path, "security.selinux", value, flags).expect("root may");
    };
    let of = |path: &std::path::Path| {
        let mut value = [0; 200];
        let length = rustix::fs::getxattr(path, "security.selinux", &mut value[..]);
        String::from_utf8(value[..length.expect("a label")].to_vec()).expect("text")
    };
    set(&site.data, label.as_bytes());
    let at = site.supervise(&[]);
    let (_, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    for path in ["", "ibdata1", "app", "app/rows.ibd", "app/mark.frm"] {
        assert_eq!(of(&site.data.join(path)), label, "{path}");
    }
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
    let fixed = Immutable::new(&fixed);
    let at = site.supervise(&["--install-form", "move"]);
    let (_, clone) = site.replace(&at).await;
    drop(fixed);
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
        let mut held = Held::at(step, &["--install-form", form]).await;
        start_by_hand(&held.site, if form == "move" { "ibdata1" } else { "lock" });
        held.go_on();
        let clone = held.end().await;
        assert_eq!(clone.state(), State::Completed, "{form} {step}: {clone:?}");
        assert_eq!(held.site.mark(), "new");
    }
}

/// Guards the guard: half a tree, and no lock of anybody, is still no place for a server.
#[tokio::test(flavor = "multi_thread")]
async fn no_server_starts_on_half_a_tree() {
    let form = ["--install-form", "move"];
    let mut held = Held::at("putting_in", &form).await;
    held.at.0.kill();
    start_by_hand(&held.site, "ibdata1");
    held.go_on();
    let at = held.site.supervise(&form);
    let clone = get(&mut recipient(&at).await, &held.clone.name).await;
    assert_untouched(&held.site, &clone, &["the recipient stopped"]);
}

/// A server that is started by hand does not come to run, and says why.
fn start_by_hand(site: &Site, why: &str) {
    let log = MariaDb::start_until_log(site.home.path(), &site.data, &site.options, why);
    assert!(log.contains(why), "`{why}` is not in: {log}");
}

/// Guards the copy of a clone that replaces a server's data: killed while it copies, the recipient goes
/// on with it when it is started again, and the server runs on the old data until then.
#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_killed_while_a_replacing_clone_copies_goes_on() {
    let site = Site::new();
    let proxy = marcot_tests::Proxy::start(site.donor.0.address);
    // Equal blocks of the old data do not come: there is little to copy.
    proxy.limit(Some(128 << 10));
    let mut at = site.supervise(&[]);
    let mut client = recipient(&at).await;
    let request = marcot_proto::recipient::v1::CloneInstanceRequest {
        host: "127.0.0.1".to_owned(),
        port: proxy.port().into(),
        user: "clone".to_owned(),
        ..Default::default()
    };
    let started = client.clone_instance(request).await.expect("the clone is accepted");
    let name = started.into_inner().clone.expect("a clone").name;
    wait_for("bytes to pass", || (proxy.counts().down_bytes > 256 << 10).then_some(()));
    at.0.kill();
    proxy.limit(None);
    wait_for("the server to end with its supervisor", || site.server_pid().is_none().then_some(()));
    let at = site.supervise(&[]);
    let mut client = recipient(&at).await;
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!((clone.state(), clone.resumes), (State::Completed, 1), "{clone:?}");
    site.wait_for_server();
    assert_eq!(site.mark(), "new");
    assert_eq!(site.damaged_tables(), "");
}

/// Shows what a server does that somebody starts while trees move, and that waits for the locks: it gets
/// those of the files that it has come from, which are kept by then. Neither tree has anything of the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_started_by_someone_else_that_waits_for_the_locks_makes_no_mix() {
    for (form, step) in [("exchange", "exchanging"), ("move", "setting_aside")] {
        let held = Held::at(step, &["--install-form", form]).await;
        let (site, mut client) = (&held.site, held.client.clone());
        let mut other = MariaDb::begin(site.home.path(), &site.data, &site.options);
        wait_for("it to meet the locks", || {
            other.log().contains("Will retry for 30").then_some(())
        });
        held.go_on();
        let clone = wait_for_end(&mut client, &held.clone.name).await;
        wait_for("it to end", || other.has_ended().then_some(()));
        // It may have been in the new server's way.
        let stands = site.mark();
        let expected = if clone.state() == State::Completed { "new" } else { "old" };
        assert_eq!(stands, expected, "{form}: {clone:?}\n{}", other.log());
        assert_eq!(site.damaged_tables(), "", "{form}: {}", other.log());
        if stands == "new" {
            let back = RollbackCloneRequest { name: clone.name.clone(), discard_writes: true };
            client.rollback_clone(back).await.expect("it is rolled back");
            site.wait_for_server();
            assert_eq!(site.mark(), "old", "{form}: {}", other.log());
            assert_eq!(site.damaged_tables(), "", "{form}: {}", other.log());
        }
    }
}
