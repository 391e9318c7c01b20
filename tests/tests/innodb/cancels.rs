//! A cancel in each stage leaves nothing: no lock, no snapshot, no spool file, no connection.
//!
//! The donor is reached by a proxy that stalls when a stage has begun: the cancel comes within it.

use marcot_proto::{
    common::v1::Stage,
    recipient::v1::{
        CancelCloneRequest, CloneOptions, CloneStatementRequest, GetCloneRequest, State,
        recipient_service_client::RecipientServiceClient,
    },
};
use marcot_tests::{
    client::wait_for_end,
    clone_and_wait,
    killer::seed,
    live::{Live, WRITERS},
    load::{Load, LoadOptions},
    mariadb::Version,
    process,
    proxy::Proxy,
    random::Random,
    recipient, wait_for,
};
use mysql::prelude::Queryable as _;
use tonic::transport::Channel;

/// Enough to be in a stage for a while through a proxy with a limit.
const BYTES: u64 = 24 << 20;

/// The proxy's limit.
const BYTES_PER_SECOND: u64 = 24 << 20;

struct Story {
    live: Live,
    load: Load,
    proxy: Proxy,
    client: RecipientServiceClient<Channel>,
    /// Of a donor that has served a clone and has none now: what it keeps open by itself.
    descriptors: usize,
}

impl Story {
    async fn start(arguments: &[&str]) -> Self {
        let live = Live::start(Version::V10_11, arguments, BYTES);
        let load =
            Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
        load.wait_for_commits(200);
        let mut client = recipient(&live.recipient).await;
        let first = clone_and_wait(&mut client, &live.statement("first", false)).await;
        assert_eq!(first.state(), State::Completed, "{first:?}");
        let descriptors = settled(&live, usize::MAX);
        let proxy = Proxy::start(live.donor.0.address);
        Self { live, load, proxy, client, descriptors }
    }

    async fn begin(&mut self) -> String {
        let statement = process::statement(self.proxy.port(), &self.live.path("clone"), "");
        let request = CloneStatementRequest { statement, ..Default::default() };
        let started = self.client.clone_statement(request).await.expect("the clone is accepted");
        started.into_inner().clone.expect("a clone").name
    }

    async fn is_in(&mut self, name: &str, stage: Stage) -> bool {
        let request = GetCloneRequest { name: name.to_owned() };
        let clone = self.client.get_clone(request).await.expect("the clone exists").into_inner();
        let clone = clone.clone.expect("a clone");
        assert!(clone.end_time.is_none(), "it has ended: {clone:?}");
        let rows = clone.stages.iter();
        rows.filter(|row| row.state() == State::InProgress).any(|row| row.stage() == stage)
    }

    /// Polls until the clone is in a stage, then stalls the network.
    async fn stall_in(&mut self, name: &str, stage: Stage) {
        let deadline = std::time::Instant::now() + marcot_tests::PATIENCE;
        while !self.is_in(name, stage).await {
            assert!(std::time::Instant::now() < deadline, "never in {}", stage.as_str_name());
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        self.proxy.stall();
    }

    /// Cancels; then nothing of the clone is left anywhere, and the next one is right.
    async fn cancel(mut self, name: &str) {
        let cancel = CancelCloneRequest { name: name.to_owned() };
        self.client.cancel_clone(cancel).await.expect("a running clone can be cancelled");
        // A network that stays away leaves the donor the snapshot until its lease ends.
        self.proxy.limit(None);
        self.proxy.pass();
        let clone = wait_for_end(&mut self.client, name).await;
        assert_eq!(clone.state(), State::Cancelled, "{clone:?}");
        let _descriptors = settled(&self.live, self.descriptors);
        let taken =
            self.live.server.query("SET lock_wait_timeout=1; CREATE TABLE ddl.after (id INT)");
        assert_eq!(taken, "", "DDL goes on");
        assert!(!self.live.path("clone").exists());
        let left: Vec<_> = std::fs::read_dir(self.live.home.path())
            .expect("home is readable")
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with(".marcot") || name.contains("staging"))
            .collect();
        assert_eq!(left, Vec::<String>::new(), "staging is left");
        self.live.clone_and_check("clone", self.load).await;
    }
}

/// Waits until the donor has no snapshot, no connection to the server and no more descriptors than
/// `most`: spool files have no names, a descriptor is all that keeps them. Returns how many it has.
fn settled(live: &Live, most: usize) -> usize {
    let daemon = &live.donor.0;
    let count = |text: &str| daemon.log().matches(text).count();
    wait_for("the snapshot to go", || {
        (count("snapshot opened") == count("snapshot closed")).then_some(())
    });
    wait_for("the server's connections to go", || {
        live.donor_connections().is_empty().then_some(())
    });
    wait_for("spool files and sockets to go", || {
        let now = daemon.descriptors();
        (now <= most).then_some(now)
    })
}

/// Guards the end of a snapshot under FILE COPY: the follower, its spool and its connection go too.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_in_file_copy_leaves_nothing() {
    let mut story = Story::start(&[]).await;
    story.proxy.limit(Some(BYTES_PER_SECOND));
    let name = story.begin().await;
    story.stall_in(&name, Stage::FileCopy).await;
    story.cancel(&name).await;
}

/// Guards the end of a snapshot that has had two logs: the first one's hold goes with its round.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_in_page_copy_leaves_nothing() {
    let mut story = Story::start(&["--innodb-log-file-size=8M"]).await;
    story.proxy.limit(Some(BYTES_PER_SECOND / 8));
    let name = story.begin().await;
    let begun = story.live.lsn();
    // Redo outgrows its bound while files are copied slowly.
    wait_for("redo beyond the bound", || {
        let update = "UPDATE mix.bulk SET v = REVERSE(v) WHERE id % 4 = 0 AND id < 35000";
        drop(story.live.server.query(update));
        (story.live.lsn() > begun + (80 << 20)).then_some(())
    });
    story.proxy.limit(Some(4 * BYTES_PER_SECOND));
    story.stall_in(&name, Stage::PageCopy).await;
    story.cancel(&name).await;
}

/// Guards the end of a snapshot after the point: what was read under the locks is in no file any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_in_redo_copy_leaves_nothing() {
    let mut story = Story::start(&[]).await;
    story.proxy.limit(Some(BYTES_PER_SECOND));
    let name = story.begin().await;
    // The first clone has had one as well.
    let points = || story.live.donor.0.log().matches("the point is fixed").count();
    wait_for("the point", || (points() == 2).then_some(()));
    story.proxy.limit(Some(64 << 10));
    story.stall_in(&name, Stage::RedoCopy).await;
    story.cancel(&name).await;
}

/// The donor waits for its locks: who waits for them stops all DDL that comes after.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_while_locks_are_awaited_leaves_nothing() {
    let mut story = Story::start(&[]).await;
    let mut holder = story.live.server.connect();
    holder.query_drop("LOCK TABLES mix.csv WRITE").expect("a lock");
    let name = story.begin().await;
    wait_for("the donor to wait for its locks", || {
        story.live.donor_connections().contains("BACKUP STAGE").then_some(())
    });
    let cancel = CancelCloneRequest { name: name.clone() };
    story.client.cancel_clone(cancel).await.expect("a running clone can be cancelled");
    wait_for("the donor to give up", || story.live.donor_connections().is_empty().then_some(()));
    drop(holder);
    let clone = wait_for_end(&mut story.client, &name).await;
    assert_eq!(clone.state(), State::Cancelled, "{clone:?}");
    let _descriptors = settled(&story.live, story.descriptors);
    story.live.clone_and_check("clone", story.load).await;
}

/// Guards the end of `open` when nobody waits for it: it asks for the locks for 300 s otherwise, and
/// stops DDL each time.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_while_ddl_is_to_be_blocked_ends_the_donors_waiting() {
    let mut story = Story::start(&[]).await;
    let mut holder = story.live.server.connect();
    holder.query_drop("LOCK TABLES mix.csv WRITE").expect("a lock");
    let statement = process::statement(story.proxy.port(), &story.live.path("clone"), "");
    let options = Some(CloneOptions { block_ddl: true, ..Default::default() });
    let request = CloneStatementRequest { statement, options, ..Default::default() };
    let started = story.client.clone_statement(request).await.expect("the clone is accepted");
    let name = started.into_inner().clone.expect("a clone").name;
    wait_for("the donor to wait for its locks", || {
        story.live.donor_connections().contains("BACKUP STAGE").then_some(())
    });
    let cancel = CancelCloneRequest { name: name.clone() };
    story.client.cancel_clone(cancel).await.expect("a running clone can be cancelled");
    let clone = wait_for_end(&mut story.client, &name).await;
    assert_eq!(clone.state(), State::Cancelled, "{clone:?}");
    wait_for("the donor to give up", || story.live.donor_connections().is_empty().then_some(()));
    drop(holder);
    let _descriptors = settled(&story.live, story.descriptors);
    story.live.clone_and_check("clone", story.load).await;
}

/// Removes all that a recipient knows, and has staged.
fn forget(home: &std::path::Path) {
    for entry in std::fs::read_dir(home).expect("home is readable").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == "state" || name == "clone" || name.starts_with(".marcot-") {
            std::fs::remove_dir_all(entry.path()).expect("our own");
        }
    }
}

/// Resident memory of a process, bytes.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") << 10
}

/// Goal: a donor of which clones are aborted over and over keeps nothing of them.
/// Method: clones are cancelled, cut off or their recipient is killed, at moments that a seed decides; a
/// recipient that goes on by itself is cancelled then, and some never come back, so that their leases
/// end. ABORTS=n for another number than 40; the full run is 200.
/// Guards what ends with a snapshot: locks, connections, spool files, descriptors, memory.
#[tokio::test(flavor = "multi_thread")]
async fn clones_that_are_aborted_over_and_over_leave_nothing() {
    let aborts = marcot_tests::bench::number("ABORTS", 40);
    let mut story = Story::start(&[]).await;
    let mut random = Random(seed());
    let mut early = 0;
    for turn in 1..=aborts {
        let name = story.begin().await;
        let moment = std::time::Duration::from_millis(600).mul_f64(random.fraction());
        tokio::time::sleep(moment).await;
        match turn % 8 {
            2 => story.proxy.cut(),
            // Until the cancel, which the donor does not hear of in time.
            5 => story.proxy.take_down(),
            _ => {}
        }
        if turn % 40 == 20 {
            // It forgets all: only the end of its lease frees the snapshot.
            story.live.recipient.0.kill();
            forget(story.live.home.path());
            story.live.restart_recipient();
            story.client = recipient(&story.live.recipient).await;
            continue;
        }
        if turn % 8 == 0 {
            story.live.recipient.0.kill();
            story.live.restart_recipient();
            story.client = recipient(&story.live.recipient).await;
        }
        let cancel = CancelCloneRequest { name: name.clone() };
        // It may have ended.
        drop(story.client.cancel_clone(cancel).await);
        let end = wait_for_end(&mut story.client, &name).await;
        story.proxy.pass();
        drop(std::fs::remove_dir_all(story.live.path("clone")));
        if turn == aborts / 4 {
            let _descriptors = settled(&story.live, story.descriptors);
            early = resident(story.live.donor.0.pid());
        }
        assert_ne!(end.state(), State::InProgress, "{end:?}");
    }
    let _descriptors = settled(&story.live, story.descriptors);
    let late = resident(story.live.donor.0.pid());
    eprintln!("{aborts} aborts: {early} bytes resident after a quarter of them, {late} at the end");
    assert!(late < early + (16 << 20), "{early} bytes grew to {late}");
    story.live.clone_and_check("clone", story.load).await;
}
