//! A recipient that ends while it clones: started again, it goes on with what is staged.

use std::path::{Path, PathBuf};

use marcot_common::{
    accounts::Accounts,
    connect::{ConnectOptions, SslMode, connect},
    connection::Privilege,
};
use marcot_proto::donor::v1::{
    CloseSnapshotRequest, OpenSnapshotRequest, Outcome, donor_service_client::DonorServiceClient,
};
use marcot_proto::recipient::v1::{
    CancelCloneRequest, Clone, CloneLimits, CloneOptions, CloneStatementRequest,
    DeleteLeftoverRequest, ListLeftoversRequest, PauseCloneRequest, ResumeCloneRequest, State,
};
use marcot_tests::{
    Donor, Recipient,
    certificates::Certificates,
    client::{assert_intact, wait_for_end},
    process, tree,
};

use crate::{DATA_BYTES, LARGE_BYTES, Net};

/// Bytes that have passed when the recipient ends: two of three large files are durable by then.
const PASSED: u64 = (2 * LARGE_BYTES + (LARGE_BYTES >> 1)) as u64;

/// What may pass after it: the file that was cut short, and what else there is.
const LEFT_MOST: u64 = DATA_BYTES - (2 * LARGE_BYTES) as u64 + (4 << 20);

/// Bytes that have left the proxy and that the recipient has not read when it or its donor ends: the window
/// of HTTP/2, sockets, and what lists and answers take.
const IN_FLIGHT: u64 = 12 << 20;

impl Net {
    /// Starts a clone of one stream, so that what is durable at a moment is known.
    async fn begin_one_stream(&mut self, target: &str) -> String {
        let statement = process::statement(self.proxy.port(), &self.path(target), "");
        let limits = Some(CloneLimits { concurrency_max: Some(1), ..Default::default() });
        let options = Some(CloneOptions { limits, ..Default::default() });
        let request = CloneStatementRequest { statement, options, ..Default::default() };
        let started = self.client.clone_statement(request).await.unwrap();
        started.into_inner().clone.unwrap().name
    }

    /// A clone whose recipient has been killed when most of it was durable.
    async fn killed(&mut self) -> String {
        self.proxy.limit(Some(16 << 20));
        let name = self.begin_one_stream("copy").await;
        self.pass_bytes(PASSED);
        self.recipient.0.kill();
        self.proxy.limit(None);
        assert!(!self.path("copy").exists());
        name
    }

    async fn end(&mut self, name: &str) -> Clone {
        wait_for_end(&mut self.client, name).await
    }

    async fn resume(&mut self, name: &str, password: &str) -> Clone {
        let (name, password) = (name.to_owned(), password.to_owned());
        let request = ResumeCloneRequest { name, password, ..Default::default() };
        self.client.resume_clone(request).await.unwrap().into_inner().clone.unwrap()
    }

    async fn assert_right(&mut self, end: &Clone) {
        assert_eq!(end.state(), State::Completed, "{end:?}");
        tree::assert_identical(&self.path("data"), &self.path("copy"));
        assert_eq!(self.staged(), Vec::<PathBuf>::new());
        assert_eq!(end.files_copied, end.files_expected);
        assert_intact(&mut self.client, &end.name).await;
    }

    fn staged(&self) -> Vec<PathBuf> {
        let names = tree::names(self.home.path());
        let staged = names.into_iter().filter(|name| name.starts_with(".marcot-"));
        staged.map(|name| self.path(&name)).collect()
    }
}

/// Guards the journal of finished units: without it all bytes come again.
#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_that_is_killed_goes_on_by_itself() {
    let mut net = Net::start(&[]).await;
    let name = net.killed().await;
    let before = net.proxy.counts().down_bytes;
    net.start_recipient().await;
    let end = net.end(&name).await;
    net.assert_right(&end).await;
    let passed = net.proxy.counts().down_bytes - before;
    assert!(passed < LEFT_MOST, "{passed} bytes, {LEFT_MOST} at most");
    assert_eq!(end.resumes, 1);
    let log = net.donor.0.log();
    assert_eq!(log.matches("snapshot opened").count(), 1, "the snapshot was the same");
    assert!(log.contains("snapshot closed"));
    let row = &end.stages[0];
    assert!(row.data_bytes > DATA_BYTES && row.data_bytes < DATA_BYTES * 11 / 10, "{row:?}");
}

/// Guards the units against a host with another number of cores (a container's limit): large files are cut
/// for the streams that were planned first, which the journal says. Without that (`plan_for`) other units are
/// cut, and what was finished is compared again and counted twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_goes_on_with_the_units_of_a_host_with_other_cores() {
    let options = |streams: &'static str| ["--donor-timeout", "60s", "--max-concurrency", streams];
    let mut net = Net::start(&options("1")).await;
    net.proxy.limit(Some(16 << 20));
    let name = net.begin("copy").await;
    net.pass_bytes(PASSED);
    net.recipient.0.kill();
    net.proxy.limit(None);
    net.options = options("12").map(str::to_owned).to_vec();
    net.start_recipient().await;
    let end = net.end(&name).await;
    net.assert_right(&end).await;
    assert!(end.reused_bytes <= LARGE_BYTES as u64, "finished units were compared: {end:?}");
    let row = &end.stages[0];
    assert!(row.data_bytes >= DATA_BYTES && row.data_bytes < DATA_BYTES * 11 / 10, "{row:?}");
}

/// What is told of bytes that come again after a kill is no more than the proxy has seen twice, and no less
/// but for what was in sockets and pipes. (It passes without the look at what is found staged: a status that
/// was saved seconds before the kill knows of little that was under way.)
#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_come_again_after_a_kill_are_told_as_they_are() {
    let mut net = Net::start(&[]).await;
    let name = net.killed().await;
    net.start_recipient().await;
    let end = net.end(&name).await;
    net.assert_right(&end).await;
    let seen = net.proxy.counts().down_bytes.saturating_sub(DATA_BYTES);
    assert!(end.resent_bytes <= seen, "told {}, seen {seen}", end.resent_bytes);
    assert!(end.resent_bytes + IN_FLIGHT >= seen, "told {}, seen {seen}", end.resent_bytes);
}

/// Guards what is told of bytes that come again for a snapshot that was lost: blocks that had come, and are
/// others now. Without a look at what was staged (`Known::again`) none of them is told.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_come_again_for_a_lost_snapshot_are_told_as_they_are() {
    const CHANGED: usize = 6 << 20;
    let mut net = Net::start(&[]).await;
    net.proxy.limit(Some(16 << 20));
    let name = net.begin_one_stream("copy").await;
    net.pass_bytes(PASSED);
    net.donor.0.kill();
    let file = std::fs::File::options().write(true).open(net.path("data/large0")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![9; CHANGED], 1 << 20).unwrap();
    drop(file);
    net.donor = Donor::start(net.home.path(), &net.path("data"), &[]);
    net.proxy.limit(None);
    net.proxy.set_target(net.donor.0.address);
    let end = net.end(&name).await;
    net.assert_right(&end).await;
    assert!(end.reused_bytes >= LARGE_BYTES as u64, "{end:?}");
    assert!(end.resent_bytes >= CHANGED as u64, "{end:?}");
    let seen = net.proxy.counts().down_bytes.saturating_sub(DATA_BYTES);
    assert!(end.resent_bytes <= seen, "told {}, seen {seen}", end.resent_bytes);
    assert!(end.resent_bytes + IN_FLIGHT >= seen, "told {}, seen {seen}", end.resent_bytes);
}

/// Guards the moment between the rename and its record: the target of a clone that is not known to
/// be done is its own, by the certificate in it, and no stranger's (TARGET_EXISTS).
#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_that_is_killed_before_it_has_recorded_the_end_knows_its_clone() {
    let mut net = Net::start(&[]).await;
    net.recipient.0.kill();
    let held = net.path("held");
    std::fs::write(&held, "").unwrap();
    let wish = format!("verified:{}", held.display());
    let options = crate::texts(&net.options);
    let environment = [("MARCOT_TEST_HOLD_AT", &*wish)];
    net.recipient = Recipient::start_with(net.home.path(), &options, &environment);
    net.client = marcot_tests::recipient(&net.recipient).await;
    let name = net.begin_one_stream("copy").await;
    let is_held = || net.recipient.0.log().contains("at=\"verified\"").then_some(());
    marcot_tests::wait_for("the copy to be certified", is_held);
    let tree = net.staged()[0].join("tree");
    rustix::fs::rename(&tree, net.path("copy")).expect("it is whole");
    net.recipient.0.kill();
    net.start_recipient().await;
    let end = net.end(&name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    tree::assert_identical(&net.path("data"), &net.path("copy"));
    assert_eq!(net.staged(), Vec::<PathBuf>::new());
    assert_eq!(end.certificate_digest.len(), 32);
    assert_intact(&mut net.client, &name).await;
}

/// Guards SIGTERM, which an upgrade sends: the clone goes on afterwards as after a kill.
#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_that_is_stopped_goes_on_when_it_is_started() {
    let mut net = Net::start(&[]).await;
    net.proxy.limit(Some(16 << 20));
    let name = net.begin_one_stream("copy").await;
    net.pass_bytes(PASSED);
    assert_eq!(net.recipient.0.terminate(), Some(0));
    net.proxy.limit(None);
    let before = net.proxy.counts().down_bytes;
    net.start_recipient().await;
    let end = net.end(&name).await;
    net.assert_right(&end).await;
    let passed = net.proxy.counts().down_bytes - before;
    assert!(passed < LEFT_MOST, "{passed} bytes, {LEFT_MOST} at most");
}

/// Guards the look at what is staged: a file that a journal speaks of and that is not there, or has
/// another size, is copied again.
#[tokio::test(flavor = "multi_thread")]
async fn staged_files_that_are_gone_or_cut_are_copied_again() {
    let mut net = Net::start(&[]).await;
    let name = net.killed().await;
    let tree = net.staged().remove(0).join("tree");
    std::fs::remove_file(tree.join("large0")).unwrap();
    std::fs::File::options().write(true).open(tree.join("large1")).unwrap().set_len(5).unwrap();
    net.start_recipient().await;
    let end = net.end(&name).await;
    net.assert_right(&end).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_clone_is_paused_after_a_restart() {
    let mut net = Net::start(&[]).await;
    net.proxy.limit(Some(16 << 20));
    let name = net.begin_one_stream("copy").await;
    net.pass_bytes(PASSED);
    net.client.pause_clone(PauseCloneRequest { name: name.clone() }).await.unwrap();
    // Its record is written within seconds.
    let state = net.path("state/clones").join(format!("{}.clone", &name["clones/".len()..]));
    marcot_tests::wait_for("the record of a paused clone", || {
        let record = std::fs::read(&state).ok()?;
        let clone = <Clone as prost::Message>::decode(&record[12..]).ok()?;
        (clone.state() == State::Paused).then_some(())
    });
    net.recipient.0.kill();
    net.proxy.limit(None);
    net.start_recipient().await;
    net.until(&name, "the clone to be taken up", |clone| clone.resumes == 1).await;
    assert_eq!(net.get(&name).await.state(), State::Paused);
    assert_eq!(net.resume(&name, "").await.state(), State::InProgress);
    let end = net.end(&name).await;
    net.assert_right(&end).await;
}

/// Guards the journal's checks: damaged, it is no progress, and what is staged is compared with another
/// snapshot; so it is when a list beside it is damaged. Neither costs a wrong byte. A journal of which
/// nothing can be read ends the clone.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_journal_or_list_costs_another_snapshot() {
    let mut net = Net::start(&[]).await;
    for (file, record, completes) in
        [("copy-journal", 0, false), ("copy-journal", 2, true), ("list-1-1", 2, true)]
    {
        let name = net.killed().await;
        let path = find(&net.staged()[0], file);
        let mut bytes = std::fs::read(&path).unwrap();
        // What is behind it is whole.
        let at = match file {
            "copy-journal" => (0..record).fold(8, |at, _| {
                let length = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
                at + 9 + length as usize
            }),
            _ => bytes.len() / 3,
        };
        bytes[at + 12] ^= 16;
        std::fs::write(&path, bytes).unwrap();
        net.start_recipient().await;
        let end = net.end(&name).await;
        if completes {
            net.assert_right(&end).await;
            assert!(end.reused_bytes >= (2 * LARGE_BYTES) as u64, "{end:?}");
            std::fs::remove_dir_all(net.path("copy")).unwrap();
        } else {
            assert_eq!(end.state(), State::Failed);
            assert_eq!(end.error.unwrap().reason, "JOURNAL_CORRUPT");
            assert_eq!(net.staged(), Vec::<PathBuf>::new());
        }
    }
}

/// Guards what is staged against a kill between two snapshots: the lost one's tree is set aside by then,
/// and the next one's journal tells nothing yet. (Without the look at that the clone fails, and all that
/// was copied goes.)
#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_killed_between_two_snapshots_keeps_what_is_staged() {
    let mut net = Net::start(&[]).await;
    for has_journal in [false, true] {
        let name = net.killed().await;
        let staged = net.staged().remove(0);
        // As the kill would leave it.
        rustix::fs::rename(&staged, format!("{}-older", staged.display())).unwrap();
        for directory in ["tree", "aside"] {
            std::fs::create_dir_all(staged.join(directory)).unwrap();
        }
        if has_journal {
            std::fs::write(staged.join("copy-journal"), b"marcotj1").unwrap();
        }
        net.start_recipient().await;
        let end = net.end(&name).await;
        net.assert_right(&end).await;
        assert!(end.reused_bytes >= LARGE_BYTES as u64, "{end:?}");
        std::fs::remove_dir_all(net.path("copy")).unwrap();
    }
}

/// Guards what another version of the recipient has staged: it is named, kept, and gone on with by the
/// version that knows it.
#[tokio::test(flavor = "multi_thread")]
async fn a_journal_of_another_version_is_kept() {
    let mut net = Net::start(&[]).await;
    let name = net.killed().await;
    let path = find(&net.staged()[0], "copy-journal");
    let right = std::fs::read(&path).unwrap();
    let mut bytes = right.clone();
    bytes[7] = b'2';
    std::fs::write(&path, bytes).unwrap();
    net.start_recipient().await;
    let failed = net.get(&name).await;
    assert_eq!(failed.state(), State::Failed);
    assert_eq!(failed.error.unwrap().reason, "JOURNAL_VERSION");
    assert_eq!(net.staged().len(), 1);
    std::fs::write(&path, right).unwrap();
    net.resume(&name, "").await;
    let end = net.end(&name).await;
    net.assert_right(&end).await;
}

fn find(directory: &Path, prefix: &str) -> PathBuf {
    let names = tree::names(directory);
    let name = names.iter().find(|name| name.starts_with(prefix));
    directory.join(name.unwrap_or_else(|| panic!("{prefix} is not among {names:?}")))
}

/// Options of a donor that has an account, the same after a restart.
fn accounts(home: &Path) -> Vec<String> {
    let path = home.join("accounts.toml");
    let options = vec!["--accounts".to_owned(), path.display().to_string()];
    if path.exists() {
        return options;
    }
    let mut accounts = Accounts::open_or_create(&path).unwrap();
    accounts.add("clone", "secret", &[Privilege::BackupAdmin]).unwrap();
    accounts.save().unwrap();
    options
}

/// Guards the clone's key: it opens further connections for the snapshot without the password, which
/// nobody has stored; not for another snapshot, which waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn the_key_is_enough_for_the_same_snapshot_and_a_password_is_awaited_for_another() {
    let mut net = Net::start_with(&[], accounts).await;
    let name = net.killed().await;
    let journal = std::fs::read(net.staged()[0].join("copy-journal")).unwrap();
    let holds = |text: &[u8]| journal.windows(text.len()).any(|window| window == text);
    assert!(holds(b"clone") && !holds(b"secret"), "a password is in the journal");
    net.start_recipient().await;
    let end = net.end(&name).await;
    net.assert_right(&end).await;
    std::fs::remove_dir_all(net.path("copy")).unwrap();

    let name = net.killed().await;
    net.donor.0.kill();
    let options = accounts(net.home.path());
    net.donor = Donor::start(net.home.path(), &net.path("data"), &crate::texts(&options));
    net.proxy.set_target(net.donor.0.address);
    net.start_recipient().await;
    let waiting = net.end(&name).await;
    assert_eq!(waiting.state(), State::AwaitingCredentials, "{waiting:?}");
    assert!(waiting.error.unwrap().message.contains("marcot resume"));
    assert_eq!(waiting.end_time, None);
    // It is still so after one more restart, and with a wrong password.
    assert_eq!(net.recipient.0.terminate(), Some(0));
    net.start_recipient().await;
    assert_eq!(net.get(&name).await.state(), State::AwaitingCredentials);
    net.resume(&name, "wrong").await;
    let refused = net.end(&name).await;
    assert_eq!(refused.state(), State::AwaitingCredentials, "{refused:?}");
    net.resume(&name, "secret").await;
    let end = net.end(&name).await;
    net.assert_right(&end).await;
    assert!(end.reused_bytes >= (2 * LARGE_BYTES) as u64, "{end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_awaits_a_password_can_be_given_up() {
    let mut net = Net::start_with(&[], accounts).await;
    let name = net.killed().await;
    net.donor.0.kill();
    let options = accounts(net.home.path());
    net.donor = Donor::start(net.home.path(), &net.path("data"), &crate::texts(&options));
    net.proxy.set_target(net.donor.0.address);
    net.start_recipient().await;
    assert_eq!(net.end(&name).await.state(), State::AwaitingCredentials);
    net.client.cancel_clone(CancelCloneRequest { name: name.clone() }).await.unwrap();
    assert_eq!(net.get(&name).await.state(), State::Cancelled);
    assert_eq!(net.staged(), Vec::<PathBuf>::new());
}

/// Guards what is staged when a donor stays away: the clone ends within its bound, and goes on with
/// it when somebody says so; or somebody removes it.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_whose_donor_was_away_goes_on_when_told_to() {
    let mut net = Net::start(&["--donor-timeout", "3s"]).await;
    for goes_on in [true, false] {
        net.proxy.limit(Some(16 << 20));
        let name = net.begin_one_stream("copy").await;
        net.pass_bytes(PASSED);
        net.proxy.take_down();
        let failed = net.end(&name).await;
        assert_eq!(failed.state(), State::Failed, "{failed:?}");
        assert_eq!(net.staged().len(), 1);
        net.proxy.limit(None);
        net.proxy.pass();
        let before = net.proxy.counts().down_bytes;
        if goes_on {
            assert_eq!(net.resume(&name, "").await.state(), State::InProgress);
            let end = net.end(&name).await;
            net.assert_right(&end).await;
            let passed = net.proxy.counts().down_bytes - before;
            assert!(passed < LEFT_MOST, "{passed} bytes, {LEFT_MOST} at most");
            std::fs::remove_dir_all(net.path("copy")).unwrap();
        } else {
            let list = ListLeftoversRequest::default();
            let listed = net.client.list_leftovers(list).await.unwrap().into_inner();
            let [leftover] = &listed.leftovers[..] else { panic!("{listed:?}") };
            assert!(leftover.removable && leftover.content.contains("marcot resume"));
            let request = DeleteLeftoverRequest { name: leftover.name.clone() };
            net.client.delete_leftover(request).await.unwrap();
            assert_eq!(net.staged(), Vec::<PathBuf>::new());
            let request = ResumeCloneRequest { name, ..Default::default() };
            let refused = net.client.resume_clone(request).await.unwrap_err();
            let failure = marcot_common::failure::Failure::from_status(&refused);
            assert_eq!(failure.reason, "CLONE_ENDED");
        }
    }
}

/// Guards the disk of a recipient that nobody looks after: what a clone that failed has staged goes
/// when its time is over, also when the recipient was down by then.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_failed_clone_has_staged_is_kept_for_its_time() {
    let mut net = Net::start(&["--donor-timeout", "3s", "--keep-staging", "1h"]).await;
    net.proxy.limit(Some(16 << 20));
    let name = net.begin_one_stream("copy").await;
    net.pass_bytes(PASSED);
    net.proxy.take_down();
    assert_eq!(net.end(&name).await.state(), State::Failed);
    assert_eq!(net.staged().len(), 1);
    assert_eq!(net.recipient.0.terminate(), Some(0));
    net.options = ["--donor-timeout", "3s", "--keep-staging", "1s"].map(str::to_owned).to_vec();
    net.start_recipient().await;
    marcot_tests::wait_for("it to go", || net.staged().is_empty().then_some(()));
    assert_eq!(net.get(&name).await.state(), State::Failed);
}

/// Guards what is staged when a snapshot is lost and another one is refused for good: the clone ends
/// within its bound, and goes on with what is staged when somebody says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_whose_next_snapshot_is_refused_keeps_what_is_staged() {
    let mut net = Net::start(&["--donor-timeout", "8s"]).await;
    // Up and full before the first one goes: its start takes nobody's patience.
    let next = Donor::start(net.home.path(), &net.path("data"), &["--snapshots-max", "1"]);
    let options = ConnectOptions::new("127.0.0.1", next.port(), SslMode::Disabled);
    let mut other = DonorServiceClient::new(connect(&options).await.unwrap().channel);
    let request = OpenSnapshotRequest { public_key: vec![7; 32].into(), ..Default::default() };
    let snapshot = other.open_snapshot(request).await.unwrap().into_inner().snapshot;
    net.proxy.limit(Some(16 << 20));
    let name = net.begin_one_stream("copy").await;
    net.pass_bytes(PASSED);
    net.proxy.set_target(next.0.address);
    net.donor.0.kill();
    net.donor = next;
    net.proxy.limit(None);
    let failed = net.end(&name).await;
    let failure = failed.error.unwrap();
    assert_eq!(failure.reason, "SNAPSHOT_LIMIT", "{failure:?}");
    assert!(failure.message.contains("the donor was waited for"), "{failure:?}");
    assert_eq!(net.staged().len(), 1, "{:?}", net.staged());
    let close = CloseSnapshotRequest { snapshot, outcome: Outcome::Cancelled.into() };
    other.close_snapshot(close).await.unwrap();
    assert_eq!(net.resume(&name, "").await.state(), State::InProgress);
    let end = net.end(&name).await;
    net.assert_right(&end).await;
    assert!(end.reused_bytes >= (2 * LARGE_BYTES) as u64, "{end:?}");
}

/// Guards the donor's identity across snapshots: a donor that came back with another certificate, of
/// the same CA, is not what the clone began with.
#[tokio::test(flavor = "multi_thread")]
async fn a_donor_that_comes_back_with_another_certificate_is_refused() {
    let home = marcot_tests::new_directory();
    let certificates = Certificates::create(&home.path().join("tls"));
    let options = |label: &str| {
        let (chain, key) = certificates.sign(label, &["localhost", "127.0.0.1"]);
        ["--tls-cert".to_owned(), chain, "--tls-key".to_owned(), key].to_vec()
    };
    let ca = certificates.ca();
    let first = options("first");
    let mut net = Net::start_with(&["--ssl-ca", &ca, "--donor-timeout", "60s"], |_| first).await;
    net.proxy.limit(Some(16 << 20));
    let name = net.begin_one_stream("copy").await;
    net.pass_bytes(PASSED);
    assert_eq!(net.get(&name).await.encrypted, Some(true));
    net.donor.0.kill();
    let second = options("second");
    net.donor = Donor::start(net.home.path(), &net.path("data"), &crate::texts(&second));
    net.proxy.limit(None);
    net.proxy.set_target(net.donor.0.address);
    let end = net.end(&name).await;
    assert_eq!(end.error.unwrap().reason, "CERTIFICATE_NOT_TRUSTED");
    assert!(!net.donor.0.log().contains("snapshot opened"));
}
