//! The server itself: set-up and harness.

use marcot_tests::{
    database::{Database, Options, Version, install_with},
    new_directory,
};

/// The server of the tree starts on a directory that it has made, and ends without an error.
#[test]
fn the_tree_of_mysql_9_7_runs() {
    let home = new_directory();
    let data = home.path().join("data");
    let options = Options::primary(Version::MySql9_7, &[]);
    install_with(&data, &options);
    let server = Database::start_with(home.path(), &data, &options);
    assert!(server.query("SELECT VERSION()").starts_with("9.7."));
    assert_eq!(server.errors(), Vec::<String>::new());
    server.stop();
}
