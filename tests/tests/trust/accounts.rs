//! Accounts that change while the daemons run.

use std::path::Path;

use marcot_common::{access::Privilege, accounts::Accounts};
use marcot_proto::recipient::v1::State;
use marcot_tests::{
    Donor, Recipient,
    client::{clone_and_wait, clone_error},
    new_directory, recipient, tree,
};

/// Changes the file as `marcot account` does.
fn change(path: &Path, change: impl FnOnce(&mut Accounts)) {
    let mut accounts = Accounts::open_or_create(path).expect("readable");
    change(&mut accounts);
    accounts.save().expect("writable");
}

/// Guards the reading of the accounts file of a donor that runs: who was added, whose password was
/// changed and who was removed since its start. With the file read at the start alone the first clone is
/// refused, and the last ones are not. One that is damaged lets nobody in, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_donor_that_runs_goes_by_its_accounts_file_as_it_is_now() {
    let home = new_directory();
    let data = home.path().join("data");
    std::fs::create_dir(&data).expect("writable");
    tree::make(&data);
    let path = home.path().join("accounts.toml");
    let privileges = [Privilege::BackupAdmin];
    change(&path, |accounts| accounts.add("first", "secret", &privileges).expect("a name"));
    let donor = Donor::start(home.path(), &data, &["--accounts", &path.display().to_string()]);
    let at = Recipient::start(home.path(), &[]);
    let mut client = recipient(&at).await;
    let statement = |user: &str| {
        let statement = donor.statement(&home.path().join(user), "");
        statement.replace("'clone'@", &format!("'{user}'@"))
    };
    let error = clone_error(&mut client, &statement("second")).await;
    assert_eq!(error.reason, "ACCESS_DENIED", "{error:?}");
    change(&path, |accounts| accounts.add("second", "secret", &privileges).expect("a name"));
    let clone = clone_and_wait(&mut client, &statement("second")).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    change(&path, |accounts| {
        accounts.remove("second").expect("it is there");
        accounts.set_privileges("first", &[Privilege::Monitor]).expect("it is there");
    });
    std::fs::remove_dir_all(home.path().join("second")).expect("it was cloned");
    let error = clone_error(&mut client, &statement("second")).await;
    assert_eq!(error.reason, "ACCESS_DENIED", "{error:?}");
    let error = clone_error(&mut client, &statement("first")).await;
    assert_eq!(error.reason, "PRIVILEGE_REQUIRED", "{error:?}");
    std::fs::write(&path, "[account").expect("writable");
    let error = clone_error(&mut client, &statement("first")).await;
    assert_eq!(error.reason, "ACCOUNTS_UNREADABLE", "{error:?}");
    assert!(!error.message.contains(&*path.display().to_string()), "{error:?}");
    let log = donor.0.log();
    assert!(log.contains(&*path.display().to_string()), "{log}");
}
