//! What is refused or warned of before a server's data are replaced, and what a recipient may not do.

use marcot_common::failure::Failure;
use marcot_proto::recipient::v1::{
    CloneInstanceRequest, CloneOptions, DeleteLeftoverRequest, FindingStatus, ValidateCloneRequest,
    validate_clone_request::Request as Asked,
};
use marcot_tests::{
    Donor, Recipient, client::wait_for_end, mariadb::MariaDb, recipient, site::Site, wait_for,
};
use rustix::thread::CapabilitySet;

use crate::faults::assert_untouched;

fn request(port: u16) -> CloneInstanceRequest {
    CloneInstanceRequest {
        host: "127.0.0.1".to_owned(),
        port: port.into(),
        user: "clone".to_owned(),
        ..Default::default()
    }
}

/// Guards R11: a server that is its own donor would be stopped under its clone. (3871; with the check
/// taken out the clone replaces the directory by its own copy.)
#[tokio::test(flavor = "multi_thread")]
async fn a_servers_own_data_are_not_replaced_by_a_clone_of_themselves() {
    let site = Site::new();
    let own = Donor::start(site.home.path(), &site.data, &[]);
    let data = site.data.display().to_string();
    let at = Recipient::start(site.home.path(), &["--data-directory", &data]);
    let mut client = recipient(&at).await;
    let failure = match client.clone_instance(request(own.port())).await {
        Err(status) => Failure::from_status(&status).to_wire(),
        Ok(clone) => {
            let name = clone.into_inner().clone.expect("a clone").name;
            wait_for_end(&mut client, &name).await.error.expect("a failure")
        }
    };
    assert_eq!((failure.reason.as_str(), failure.error_number), ("SAME_DIRECTORY", 3871));
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
    let server = MariaDb::start_with(site.home.path(), &site.data, &site.options);
    assert_eq!(server.query("SELECT mark FROM app.mark"), "old\n");
}

/// Guards the node of a cluster, whose data the cluster gives and takes (3875).
#[tokio::test(flavor = "multi_thread")]
async fn a_node_of_a_galera_cluster_is_not_replaced() {
    let mut site = Site::new();
    site.options.arguments.push("--wsrep-on=ON".to_owned());
    let at = site.supervise(&[]);
    assert_eq!(site.ask("SELECT @@wsrep_on").trim(), "1");
    let (_, clone) = site.replace(&at).await;
    assert_untouched(&site, &clone, &["Galera", "take the server out"]);
    let error = clone.error.expect("a failure");
    assert_eq!((error.reason.as_str(), error.error_number), ("GALERA", 3875));
}

/// Guards the schema list of a MariaDB: preflight names the setting that keeps the install's directory
/// out of it, and does not where it is set or not needed.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_ignore_db_dirs_is_named_before_the_copy() {
    for (form, is_set, is_named) in
        [("move", false, true), ("move", true, false), ("exchange", false, false)]
    {
        let mut site = Site::new();
        if !is_set {
            site.options.arguments.retain(|argument| !argument.contains("marcot-install"));
        }
        let at = site.supervise(&["--install-form", form]);
        let mut client = recipient(&at).await;
        let request = ValidateCloneRequest {
            request: Some(Asked::CloneInstance(request(site.donor.port()))),
        };
        let answer = client.validate_clone(request).await.expect("an answer").into_inner();
        assert!(answer.valid, "{answer:?}");
        let found = answer.findings.iter().find(|finding| finding.check == "ignore_db_dirs");
        assert_eq!(found.is_some(), is_named, "{form} {is_set}: {answer:?}");
        if let Some(found) = found {
            assert_eq!(found.status(), FindingStatus::Warning);
            let setting = "ignore_db_dirs=.marcot-install";
            assert!(found.action.contains(setting), "{found:?}");
        }
    }
}

/// Starts what `start` starts without root's right to pass over the modes of files.
fn without_override<T: Send>(start: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let started = scope.spawn(|| {
            // The bounding set is the thread's; a process that it starts has no more than that.
            for capability in [CapabilitySet::DAC_OVERRIDE, CapabilitySet::DAC_READ_SEARCH] {
                rustix::thread::remove_capability_from_bounding_set(capability)
                    .expect("the tests run as root");
            }
            start()
        });
        started.join().expect("it is started")
    })
}

/// Guards the clear end where the recipient may not write: told before the copy when that is seen then,
/// and undone when it comes in the middle of an install.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_may_not_be_written_is_named_and_undone() {
    use std::os::unix::fs::PermissionsExt as _;
    let mut site = Site::new();
    let parent = site.path("parent");
    std::fs::create_dir(&parent).expect("writable");
    let data = parent.join("own");
    rustix::fs::rename(&site.data, &data).expect("on one file system");
    site.data = data;
    let set = |mode| {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&parent, mode).expect("our own directory");
    };
    let hold = site.path("hold");
    std::fs::write(&hold, "").expect("writable");
    let wish = format!("stopped:{}", hold.display());
    let options = ["--install-form", "exchange"];
    let at = without_override(|| site.supervise_with(&options, &[("MARCOT_TEST_HOLD_AT", &wish)]));
    let mut client = recipient(&at).await;
    set(0o555);
    match site.begin(&mut client, CloneOptions::default()).await {
        Err(refused) => {
            let message = refused.message();
            assert!(message.contains("Permission denied"), "{refused}");
            assert!(message.contains(&parent.display().to_string()), "{refused}");
        }
        Ok(clone) => {
            let clone = wait_for_end(&mut client, &clone.name).await;
            let parent = parent.display().to_string();
            assert_untouched(&site, &clone, &["Permission denied", &parent]);
        }
    }
    set(0o755);
    let clone = site.begin(&mut client, CloneOptions::default()).await.expect("accepted");
    wait_for("the step", || at.0.log().contains("step=\"stopped\"").then_some(()));
    set(0o555);
    std::fs::remove_file(&hold).expect("our own file");
    let clone = wait_for_end(&mut client, &clone.name).await;
    set(0o755);
    // Its directory could not go either, for want of the same right.
    let left = DeleteLeftoverRequest { name: clone.name.replace("clones/", "leftovers/") };
    client.delete_leftover(left).await.expect("it is removed");
    assert_untouched(&site, &clone, &["Permission denied", "the old data are back"]);
}
