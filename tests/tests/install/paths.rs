//! A server whose files are not all in its data directory is not replaced: the clone would start on
//! the redo log of the old data, and nobody would notice.

use marcot_proto::recipient::v1::State;
use marcot_tests::{
    Recipient,
    mariadb::{self, MariaDb},
    site::{Site, copy_tree},
};

use crate::faults::assert_untouched;

/// A site whose server keeps its redo log elsewhere.
fn with_redo_elsewhere() -> Site {
    let mut site = Site::new();
    let redo = site.path("redo");
    std::fs::create_dir(&redo).expect("writable");
    rustix::fs::rename(site.data.join("ib_logfile0"), redo.join("ib_logfile0"))
        .expect("a redo log");
    site.options.arguments.push(format!("--innodb-log-group-home-dir={}", redo.display()));
    site
}

/// Guards R9 on the recipient: the server is asked where its files are. (Without the check the clone
/// ends COMPLETED, its server on the old log.)
#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_its_redo_elsewhere_is_not_replaced() {
    let site = with_redo_elsewhere();
    let at = site.supervise(&[]);
    let (_, clone) = site.replace(&at).await;
    assert_untouched(&site, &clone, &["innodb_log_group_home_dir", "/redo"]);
    assert_eq!(clone.error.expect("a failure").reason, "PATH_OUTSIDE_DATA_DIRECTORY");
}

/// Guards the same where no server runs that could be asked, and against the socket of another one.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_be_asked_is_judged_by_what_it_has_left() {
    let site = with_redo_elsewhere();
    let data = site.data.display().to_string();
    let mut at = Recipient::start(site.home.path(), &["--data-directory", &data]);
    let (_, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Failed, "{clone:?}");
    assert_eq!(clone.error.expect("a failure").reason, "PATH_OUTSIDE_DATA_DIRECTORY");
    assert_eq!(at.0.terminate(), Some(0));

    let other = site.path("other");
    copy_tree(&site.path("source"), &other);
    let options = mariadb::Options { arguments: Vec::new(), ..site.options.clone() };
    let server = MariaDb::start_with(site.home.path(), &other, &options);
    let socket = server.socket().display().to_string();
    let options =
        ["--data-directory", &data, "--database-socket", &socket, "--database-user", "root"];
    let at = Recipient::start(site.home.path(), &options);
    let (_, clone) = site.replace(&at).await;
    let error = clone.error.expect("a failure");
    assert_eq!(error.reason, "OTHER_DATA_DIRECTORY");
    assert!(error.message.contains("/other") && error.message.contains(&data), "{error:?}");
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
    server.stop();
}
