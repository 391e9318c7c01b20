//! The server crashes while an install has its trees in or beside the data directory, or cannot start
//! on a clone; and what a clone's rows say of both.

use marcot_proto::{
    common::v1::Stage,
    recipient::v1::{
        AcceptCloneRequest, Clone, GetCloneRequest, PauseCloneRequest, ResumeCloneRequest,
        StageProgress, State,
    },
};
use marcot_tests::{
    client::{slowly, wait_for_end},
    killer::Blow,
    mariadb::{self, Options},
    recipient,
    site::Site,
    wait_for,
};

use crate::faults::assert_untouched;

/// Kills the server, and waits until the supervisor has started it again.
fn crash(site: &Site) {
    let pid = site.server_pid().expect("a server");
    Blow::Kill.strike(pid);
    wait_for("another server", || site.server_pid().filter(|&other| other != pid));
    site.wait_for_server();
}

/// Guards the form `move`: what an install keeps inside the data directory is in no server's way, also
/// in that of its crash recovery; and none of it is a schema, as ignore_db_dirs says.
#[tokio::test(flavor = "multi_thread")]
async fn a_mariadb_that_crashes_starts_beside_a_half_staged_clone_and_beside_its_old_data() {
    let site = Site::new();
    let at = site.supervise(&["--install-form", "move"]);
    let mut client = recipient(&at).await;
    let clone = site.begin(&mut client, slowly()).await.expect("accepted");
    let pause = PauseCloneRequest { name: clone.name.clone() };
    client.pause_clone(pause).await.expect("paused");
    let id = clone.name.rsplit('/').next().expect("an id");
    let staged = site.staging("move", id);
    wait_for("the staging", || staged.join("tree").is_dir().then_some(()));
    // As a copy that was cut leaves it: a table of the same tablespace, half written.
    let half = staged.join("cut/app");
    std::fs::create_dir_all(&half).expect("writable");
    let table = std::fs::read(site.data.join("app/rows.ibd")).expect("a table");
    std::fs::write(half.join("rows.ibd"), &table[..table.len() / 2]).expect("writable");
    crash(&site);
    assert_eq!(site.mark(), "old");
    assert_eq!(site.damaged_tables(), "");
    let schemas = site.ask("SHOW DATABASES");
    assert!(!schemas.contains("marcot"), "{schemas}");
    std::fs::remove_dir_all(&half).expect("ours");
    let go_on = ResumeCloneRequest { name: clone.name.clone(), ..Default::default() };
    client.resume_clone(go_on).await.expect("resumed");
    let clone = wait_for_end(&mut client, &clone.name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert!(staged.join("old/app/rows.ibd").exists(), "the old data are kept inside");
    crash(&site);
    assert_eq!(site.mark(), "new");
    assert_eq!(site.damaged_tables(), "");
    let schemas = site.ask("SHOW DATABASES");
    assert!(!schemas.contains("marcot"), "{schemas}");
    client.accept_clone(AcceptCloneRequest { name: clone.name }).await.expect("accepted");
    assert_eq!(site.mark(), "new");
}

/// Guards the automatic roll-back against a server that is set up for other data: the clone's pages
/// have another size than its configuration says, which only the server finds.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_the_servers_configuration_does_not_fit_is_rolled_back_by_itself() {
    let site = Site::with_donor_changed_by(|source| {
        std::fs::remove_dir_all(source).expect("our own directory");
        let arguments = vec!["--innodb-page-size=8k".to_owned()];
        mariadb::install_with(source, &Options { arguments, ..Options::default() });
    });
    for form in ["exchange", "move"] {
        let mut at = site.supervise(&["--install-form", form]);
        let (_, clone) = site.replace(&at).await;
        assert_untouched(&site, &clone, &["[ERROR]", "ibdata1", "the old data are back"]);
        assert_eq!(clone.error.expect("a failure").reason, "SERVER_NOT_HEALTHY");
        assert_eq!(at.0.terminate(), Some(0));
    }
}

fn row(clone: &Clone, stage: Stage) -> StageProgress {
    let row = clone.stages.iter().find(|row| row.stage() == stage);
    row.copied().unwrap_or_else(|| panic!("no row {stage:?} in {clone:?}"))
}

/// Guards what is shown of the two stages that are the server's: RESTART from its stop on, RECOVERY from
/// its start until it has answered the health query.
#[tokio::test(flavor = "multi_thread")]
async fn restart_and_recovery_have_rows_with_their_times() {
    let site = Site::new();
    let hold = site.path("hold");
    for (step, restart, recovery) in [
        ("in_place", State::InProgress, State::NotStarted),
        // Where a step is held, what it begins is not shown yet.
        ("healthy", State::Completed, State::InProgress),
        ("opened", State::Completed, State::Completed),
    ] {
        std::fs::write(&hold, "").expect("writable");
        let wish = format!("{step}:{}", hold.display());
        let mut at = site.supervise_with(&[], &[("MARCOT_TEST_HOLD_AT", &wish)]);
        let mut client = recipient(&at).await;
        let clone = site.begin(&mut client, Default::default()).await.expect("accepted");
        let line = format!("step=\"{step}\"");
        wait_for("the step", || at.0.log().contains(&line).then_some(()));
        let request = GetCloneRequest { name: clone.name.clone() };
        let held = client.get_clone(request).await.expect("it is known").into_inner();
        let held = held.clone.expect("a clone");
        std::fs::remove_file(&hold).expect("our own file");
        let clone = wait_for_end(&mut client, &clone.name).await;
        assert_eq!(clone.state(), State::Completed, "{clone:?}");
        let (one, two) = (row(&clone, Stage::Restart), row(&clone, Stage::Recovery));
        assert_eq!((one.state(), two.state()), (State::Completed, State::Completed), "{clone:?}");
        let nanoseconds = |time: Option<_>| {
            let time: prost_types::Timestamp = time.unwrap_or_else(|| panic!("{clone:?}"));
            i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos)
        };
        let times = [one.begin_time, one.end_time, two.begin_time, two.end_time].map(nanoseconds);
        assert!(times.is_sorted() && times[2] < times[3], "{clone:?}");
        let (one, two) = (row(&held, Stage::Restart), row(&held, Stage::Recovery));
        assert_eq!((one.state(), two.state()), (restart, recovery), "{step}: {held:?}");
        client.accept_clone(AcceptCloneRequest { name: clone.name }).await.expect("accepted");
        assert_eq!(at.0.terminate(), Some(0));
    }
}
