//! `marcot-recipient seed`: an empty data directory is filled once, by a process that ends.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use marcot_tests::{Donor, killer::Blow, new_directory, tree, wait_for};

/// A recipient that seeds `home/copy`.
struct Seed {
    child: Child,
    log: PathBuf,
}

impl Seed {
    fn start(home: &Path, donor: &str, run: &str) -> Self {
        let log = home.join(format!("{run}.log"));
        let output = File::create(&log).expect("writable");
        let program = marcot_tests::target_directory().join("marcot-recipient");
        let child = Command::new(program)
            .args([
                "seed",
                "--listen",
                "127.0.0.1:0",
                "--seed-from",
                donor,
                "--donor-timeout",
                "3s",
            ])
            .arg("--state-directory")
            .arg(home.join("state"))
            .arg("--data-directory")
            .arg(home.join("copy"))
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a file"))
            .stderr(output)
            .spawn()
            .expect("marcot-recipient is built");
        Self { child, log }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn end(&mut self) -> Option<i32> {
        wait_for("the seed to end", || self.child.try_wait().expect("our own child")).code()
    }

    fn strike_once_it_copies(&mut self, home: &Path, blow: Blow) -> Option<i32> {
        wait_for("a part that is durable", || {
            let staged = std::fs::read_dir(home).expect("it exists").flatten();
            let journal = staged.map(|entry| entry.path().join("copy-journal"));
            let recorded = journal.filter_map(|path| path.metadata().ok()).any(|m| m.len() > 4096);
            recorded.then_some(())
        });
        blow.strike(self.child.id());
        self.end()
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), self.log());
        }
    }
}

fn donor(home: &Path, options: &[&str]) -> (Donor, String) {
    let data = home.join("data");
    if !data.exists() {
        std::fs::create_dir(&data).expect("writable");
        tree::make(&data);
    }
    let donor = Donor::start(home, &data, options);
    let address = format!("127.0.0.1:{}", donor.port());
    (donor, address)
}

/// Guards data that are there: a pod that is started again must keep what its server has written.
/// Without the look at the directory a clone would replace it.
#[test]
fn an_empty_directory_is_filled_and_one_with_data_is_left_alone() {
    let home = new_directory();
    let (_donor, address) = donor(home.path(), &[]);
    std::fs::create_dir(home.path().join("copy")).expect("writable");
    let mut first = Seed::start(home.path(), &address, "first");
    assert_eq!(first.end(), Some(0));
    let copy = home.path().join("copy");
    tree::assert_identical(&home.path().join("data"), &copy);
    std::fs::write(copy.join("written since"), b"x").expect("writable");
    let mut again = Seed::start(home.path(), &address, "again");
    assert_eq!(again.end(), Some(0));
    assert!(again.log().contains("nothing to seed"), "{}", again.log());
    assert!(copy.join("written since").exists());
}

/// Guards the way on: what is durable is not copied again, after a kill as after a SIGTERM, and an end
/// without data is an error, so that no server starts on it.
#[test]
fn a_seed_that_was_killed_or_stopped_goes_on_at_its_next_start() {
    let home = new_directory();
    let slow = ["--max-data-bandwidth", "8MiB"];
    let (_donor, address) = donor(home.path(), &slow);
    let mut killed = Seed::start(home.path(), &address, "killed");
    assert_eq!(killed.strike_once_it_copies(home.path(), Blow::Kill), None);
    let mut stopped = Seed::start(home.path(), &address, "stopped");
    wait_for("it to go on", || stopped.log().contains("the clone goes on").then_some(()));
    Blow::Terminate.strike(stopped.child.id());
    assert_eq!(stopped.end(), Some(1));
    assert!(!home.path().join("copy").exists());
    let mut last = Seed::start(home.path(), &address, "last");
    assert_eq!(last.end(), Some(0));
    assert!(last.log().contains("the clone goes on"), "{}", last.log());
    tree::assert_identical(&home.path().join("data"), &home.path().join("copy"));
}

/// Guards the exit code of a failure, and what comes after one: a donor that is there again is asked.
#[test]
fn a_donor_that_is_not_there_is_an_error_and_the_next_start_tries_again() {
    let home = new_directory();
    let (gone, address) = donor(home.path(), &[]);
    drop(gone);
    let mut alone = Seed::start(home.path(), &address, "alone");
    assert_eq!(alone.end(), Some(1));
    assert!(alone.log().contains("DONOR_UNREACHABLE"), "{}", alone.log());
    let (_donor, address) = donor(home.path(), &[]);
    let mut with = Seed::start(home.path(), &address, "with");
    assert_eq!(with.end(), Some(0));
    tree::assert_identical(&home.path().join("data"), &home.path().join("copy"));
}
