//! Replace, accept, roll back: with a server that the recipient supervises.

use std::path::PathBuf;

use marcot_proto::recipient::v1::{
    AcceptCloneRequest, DeleteLeftoverRequest, InstallStep, ListLeftoversRequest,
    RollbackCloneRequest, State,
};
use marcot_tests::site::Site;

use crate::held::Held;

/// Guards point 3 of the install: the old data are there until the clone is accepted, and no longer.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_replaces_the_servers_data_by_one_rename_and_is_accepted() {
    accepted("exchange").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_replaces_the_servers_data_entry_by_entry_and_is_accepted() {
    accepted("move").await;
}

async fn accepted(form: &str) {
    let site = Site::new();
    let recipient = site.supervise(&["--install-form", form]);
    assert_eq!(site.mark(), "old");
    let (mut client, clone) = site.replace(&recipient).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(site.mark(), "new");
    assert_eq!(site.damaged_tables(), "");
    assert!(site.takes_connections());
    assert_eq!(site.ask("SELECT @@event_scheduler").trim(), "OFF");
    let install = clone.install.expect("an install");
    assert_eq!(install.step(), InstallStep::Opened);
    assert!(clone.name.ends_with(&install.generation));
    let old = String::from_utf8(install.old_directory.to_vec()).expect("a path");
    assert!(std::path::Path::new(&old).join("app").is_dir(), "the old data are kept in {old}");
    assert!(clone.reused_bytes > 0, "the old data are an older copy");
    let refused = site.begin(&mut client, Default::default()).await;
    let refused = refused.expect_err("one install at a time keeps old data");
    assert!(refused.message().contains("marcot accept"), "{refused}");
    let list = client.list_leftovers(ListLeftoversRequest {}).await.expect("a list").into_inner();
    let [kept] = &list.leftovers[..] else { panic!("{list:?}") };
    assert!(!kept.removable && kept.allocated_bytes > 1 << 20, "{kept:?}");
    let request = DeleteLeftoverRequest { name: kept.name.clone() };
    let refused = client.delete_leftover(request).await.expect_err("it is the only old tree");
    assert!(refused.message().contains("marcot accept"), "{refused}");
    let request = AcceptCloneRequest { name: clone.name.clone() };
    for _ in 0..2 {
        let answer = client.accept_clone(request.clone()).await.expect("it is accepted");
        let clone = answer.into_inner().clone.expect("a clone");
        assert_eq!(clone.install.expect("an install").step(), InstallStep::Accepted);
    }
    assert_eq!(site.leftovers(), Vec::<PathBuf>::new());
    assert_eq!(site.mark(), "new");
}

/// Guards R12: writes are not lost without a word for it, and the clone's tree is kept.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_is_rolled_back_after_writes_by_one_rename() {
    rolled_back("exchange").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_is_rolled_back_after_writes_entry_by_entry() {
    rolled_back("move").await;
}

async fn rolled_back(form: &str) {
    let site = Site::new();
    let recipient = site.supervise(&["--install-form", form]);
    let (mut client, clone) = site.replace(&recipient).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    drop(site.ask("INSERT INTO only_new.t VALUES (1)"));
    let mut request = RollbackCloneRequest { name: clone.name.clone(), discard_writes: false };
    let refused = client.rollback_clone(request.clone()).await.expect_err("writes would be lost");
    assert!(refused.message().contains("--discard-writes"), "{refused}");
    assert_eq!(site.mark(), "new");
    request.discard_writes = true;
    let answer = client.rollback_clone(request).await.expect("it is rolled back");
    let clone = answer.into_inner().clone.expect("a clone");
    assert_eq!(clone.state(), State::RolledBack, "{clone:?}");
    site.wait_for_server();
    assert_eq!(site.mark(), "old");
    assert_eq!(site.damaged_tables(), "");
    let list = client.list_leftovers(ListLeftoversRequest {}).await.expect("a list").into_inner();
    let [leftover] = &list.leftovers[..] else { panic!("{list:?}") };
    assert!(leftover.removable && leftover.allocated_bytes > 1 << 20, "{leftover:?}");
    let request = DeleteLeftoverRequest { name: leftover.name.clone() };
    client.delete_leftover(request).await.expect("it is removed");
    assert_eq!(site.leftovers(), Vec::<PathBuf>::new());
    assert_eq!(site.mark(), "old");
}

/// Guards the automatic roll-back: a clone whose server does not start is given up, and says why in
/// the server's own words.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_no_server_starts_on_is_given_up_by_itself() {
    for form in ["exchange", "move"] {
        let site = Site::with_donor_changed_by(|source| {
            // The first page says what the tablespace is.
            let mut system = std::fs::read(source.join("ibdata1")).expect("a system tablespace");
            system[..16384].fill(0xa5);
            std::fs::write(source.join("ibdata1"), system).expect("writable");
        });
        let recipient = site.supervise(&["--install-form", form]);
        let (_, clone) = site.replace(&recipient).await;
        assert_eq!(clone.state(), State::Failed, "{clone:?}");
        let error = clone.error.expect("a failure");
        assert_eq!(error.reason, "SERVER_NOT_HEALTHY", "{error:?}");
        assert!(error.message.contains("[ERROR]"), "{}", error.message);
        assert!(error.message.contains("the old data are back"), "{}", error.message);
        site.wait_for_server();
        assert_eq!(site.mark(), "old");
        assert_eq!(site.damaged_tables(), "");
        assert_eq!(site.leftovers(), Vec::<PathBuf>::new());
    }
}

/// Guards the health query: a page that the disk has damaged between the staging and the start is
/// read by it, and the old data come back.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_damaged_after_it_was_staged_is_met_before_the_server_is_open() {
    let mut held = Held::at("staged", &[]).await;
    let staged =
        held.site.leftovers().pop().expect("a staging directory").join("tree/app/rows.ibd");
    let mut file = std::fs::read(&staged).expect("a staged table");
    // The root of the index: every read of the table begins there.
    file[3 * 16384 + 200..3 * 16384 + 300].fill(0x5a);
    std::fs::write(&staged, file).expect("writable");
    held.go_on();
    let clone = held.end().await;
    assert_eq!(clone.state(), State::Failed, "{clone:?}");
    let error = clone.error.expect("a failure");
    assert_eq!(error.reason, "SERVER_NOT_HEALTHY", "{error:?}");
    assert!(error.message.contains("app.rows"), "{}", error.message);
    held.site.wait_for_server();
    assert_eq!(held.site.mark(), "old");
    assert!(held.site.leftovers().is_empty(), "{:?}", held.site.leftovers());
}
