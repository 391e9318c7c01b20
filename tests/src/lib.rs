//! The harness: real processes on free ports, certificates, accounts, and waits with a bound.
//!
//! A story in tests/tests/ reads: start a donor, start a recipient, clone, look.

#![forbid(unsafe_code)]

pub mod admin;
pub mod bench;
pub mod beside;
pub mod certificates;
pub mod client;
pub mod collector;
pub mod database;
pub mod disk;
pub mod first_page;
pub mod hostile;
pub mod invariants;
pub mod killer;
pub mod live;
pub mod load;
pub mod mariadb;
pub mod mysql;
pub mod pair;
pub mod process;
pub mod proxy;
pub mod random;
pub mod scrape;
pub mod site;
pub mod tree;
pub mod volume;
pub mod watch;

pub use beside::Beside;
pub use certificates::Certificates;
pub use client::{clone_and_wait, clone_error, error_of, recipient};
pub use collector::Collector;
pub use pair::Pair;
pub use process::{Donor, Recipient};
pub use proxy::Proxy;
pub use watch::Watch;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

/// Longest wait for anything that a test waits for: a loaded machine with two cores, and a snapshot of a
/// recipient that was killed, which goes with its lease of 60 s.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Waits until `condition` gives something; panics with `what` when it never does.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

/// A new directory on the build's own file system, which keeps holes and attributes; /tmp may not.
#[must_use]
pub fn new_directory() -> tempfile::TempDir {
    let parent = target_directory().join("tests");
    std::fs::create_dir_all(&parent).expect("the build's directory is writable");
    tempfile::Builder::new().prefix("t-").tempdir_in(parent).expect("a temporary directory")
}

/// Where cargo has put the programs under test.
#[must_use]
pub fn target_directory() -> PathBuf {
    let mut path = std::env::current_exe().expect("a running program has a path");
    while path.pop() {
        if path.join("marcot-donor").is_file() {
            return path;
        }
    }
    panic!("marcot-donor is not built; `make test` builds it (cargo build --workspace --bins)");
}
