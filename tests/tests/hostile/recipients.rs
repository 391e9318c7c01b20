//! Recipients that ask a donor for what no right recipient asks for: more, for longer, or in pieces. Others
//! are cloned to all the while.

use std::{
    collections::HashSet,
    net::{Ipv4Addr, TcpStream},
    path::Path,
    time::{Duration, Instant},
};

use marcot_common::{
    accounts::Accounts,
    connect::{ConnectOptions, DonorConnection, SslMode, connect},
    connection::Privilege,
    failure::Failure,
    login::{CloneKey, log_in_with_password},
    time::duration_to_wire,
};
use marcot_proto::{
    auth::v1::{
        LogInRequest, PasswordStart, auth_service_client::AuthServiceClient, log_in_request::Step,
    },
    common::v1::Stage,
    donor::v1::{
        CloseSnapshotRequest, ListFilesRequest, ListSnapshotsRequest, OpenSnapshotRequest, Outcome,
        Range, ReadRangesRequest, RenewLeaseRequest, donor_service_client::DonorServiceClient,
    },
};
use marcot_tests::{
    Beside, Donor, Proxy, Recipient, Watch, beside, new_directory, recipient, tree, wait_for,
};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

type Client = DonorServiceClient<Channel>;

/// Where the hostile recipient comes from: the honest one is at 127.0.0.1.
const HOSTILE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 9);

/// Longest that each of these may take where no limit says another time, with the end of the honest clone
/// beside it, of thousands of files, on a loaded machine.
const END_MAX: Duration = Duration::from_secs(180);

/// A file that no socket's buffers hold, and more names than messages of a list that wait.
const LARGE_BYTES: u64 = 48 << 20;
const NAMES: u64 = 8000;

/// A donor with an honest recipient, and the way of a hostile one to it.
struct Scene {
    donor: Donor,
    honest: Recipient,
    proxy: Proxy,
    /// Last: what is in it is shown when a test fails.
    home: tempfile::TempDir,
}

impl Scene {
    fn start(options: &[&str], fill: impl FnOnce(&Path)) -> Self {
        let home = new_directory();
        let data = home.path().join("data");
        std::fs::create_dir(&data).unwrap();
        beside::fill(&data);
        fill(&data);
        let donor = Donor::start(home.path(), &data, options);
        let honest = Recipient::start(home.path(), &[]);
        let proxy = Proxy::start_from(donor.0.address, Some(HOSTILE));
        Self { donor, honest, proxy, home }
    }

    /// Begins with the donor at rest: what a first clone takes for good is taken, and the rest given back.
    async fn watch(&self) -> Watch<'_> {
        let before = self.donor.0.descriptors();
        self.beside().await.assert_completed().await;
        wait_for("the donor to rest", || (self.donor.0.descriptors() <= before).then_some(()));
        Watch::begin(&self.donor.0)
    }

    /// Clones one after another by the honest recipient.
    async fn beside(&self) -> Beside {
        let client = recipient(&self.honest).await;
        Beside::of(client, self.donor.port(), self.home.path())
    }

    /// A connection of the hostile recipient, whose windows are small.
    async fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.proxy.address()))
            .unwrap()
            .initial_stream_window_size(Some(65_535))
            .initial_connection_window_size(Some(65_535))
            .connect()
            .await
            .unwrap()
    }

    async fn client(&self) -> Client {
        DonorServiceClient::new(self.channel().await).max_decoding_message_size(4 << 20)
    }
}

async fn open(client: &mut Client, lease: Duration) -> Result<String, Failure> {
    let key = CloneKey::generate().unwrap();
    let request = OpenSnapshotRequest {
        public_key: key.public_key().to_vec().into(),
        lease_duration: Some(duration_to_wire(lease)),
        ..Default::default()
    };
    let opened = client.open_snapshot(request).await;
    opened.map(|opened| opened.into_inner().snapshot).map_err(failed)
}

#[expect(clippy::needless_pass_by_value, reason = "fits map_err")]
fn failed(status: Status) -> Failure {
    Failure::from_status(&status)
}

/// Path of an accounts file of two who may be cloned from, the honest recipient's account among them.
fn two_accounts(home: &Path) -> String {
    let path = home.join("accounts.toml");
    let mut accounts = Accounts::open_or_create(&path).unwrap();
    accounts.add("clone", "secret", &[Privilege::BackupAdmin]).unwrap();
    accounts.add("other", "secret", &[Privilege::BackupAdmin]).unwrap();
    accounts.save().unwrap();
    path.display().to_string()
}

fn list_request(snapshot: &str) -> ListFilesRequest {
    ListFilesRequest {
        snapshot: snapshot.to_owned(),
        stage: Stage::FileCopy.into(),
        round: 1,
        start_number: 0,
    }
}

fn read_request(snapshot: &str, ranges: Vec<Range>) -> ReadRangesRequest {
    ReadRangesRequest {
        snapshot: snapshot.to_owned(),
        stage: Stage::FileCopy.into(),
        round: 1,
        ranges,
        ..Default::default()
    }
}

fn range(file_id: u64, offset: u64, length: u64) -> Range {
    Range { file_id, offset, length, ..Range::default() }
}

/// The largest file of a snapshot, whole.
async fn largest(client: &mut Client, snapshot: &str) -> Range {
    let mut list = client.list_files(list_request(snapshot)).await.unwrap().into_inner();
    let mut largest = range(0, 0, 0);
    while let Some(message) = list.message().await.unwrap() {
        for entry in message.entries {
            if entry.size_bytes > largest.length {
                largest = range(entry.file_id, 0, entry.size_bytes);
            }
        }
    }
    largest
}

fn fill_much(data: &Path) {
    tree::write(&data.join("largest"), LARGE_BYTES, 3);
    std::fs::create_dir(data.join("names")).unwrap();
    for number in 0..NAMES {
        std::fs::write(data.join(format!("names/{number:0200}")), b"").unwrap();
    }
}

/// Guards other recipients' snapshots against one that opens a thousand: without its own bound it holds
/// all of them, and the clones beside are refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_snapshots_of_one_recipient_leave_room_for_others() {
    let scene = Scene::start(&["--snapshots-per-peer-max", "4"], |_| {});
    let watch = scene.watch().await;
    let beside = scene.beside().await;
    let mut client = scene.client().await;
    let (mut opened, begun) = (0, Instant::now());
    for _ in 0..1000 {
        match open(&mut client, Duration::from_secs(5)).await {
            Ok(_) => opened += 1,
            Err(failure) => {
                assert_eq!(failure.reason, "SNAPSHOT_LIMIT", "{failure}");
                assert_eq!(failure.mysql_error, Some(3634));
                assert!(failure.message.contains("at most 4 are allowed"), "{failure}");
                assert!(failure.message.contains("--snapshots-per-peer-max"), "{failure}");
                assert!(failure.retry_after.is_some());
            }
        }
    }
    // Each for 5 s.
    let most = 4 * (begun.elapsed().as_secs() / 5 + 1);
    assert!((4..=most).contains(&opened), "{opened} of 1000 in {:?}", begun.elapsed());
    beside.assert_completed().await;
    drop(client);
    watch.assert_harmless("a thousand snapshots", END_MAX);
}

/// Guards clones against a recipient that closes whatever snapshot it sees: the honest recipient's are
/// bound to its connection and its key. With `bound` left out of its request they end under its clones.
#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_ends_no_snapshot_of_another() {
    let scene = Scene::start(&[], |_| {});
    let watch = scene.watch().await;
    let beside = scene.beside().await;
    let (mut client, mut seen, begun) = (scene.client().await, HashSet::new(), Instant::now());
    while seen.len() < 5 && !beside.has_ended() {
        let held = client.list_snapshots(ListSnapshotsRequest::default()).await.unwrap();
        for snapshot in held.into_inner().snapshots {
            let outcome = Outcome::Failed.into();
            let close = CloseSnapshotRequest { snapshot: snapshot.name.clone(), outcome };
            client.close_snapshot(close).await.unwrap();
            seen.insert(snapshot.name);
        }
        assert!(begun.elapsed() < END_MAX, "{} snapshots were seen", seen.len());
    }
    beside.assert_completed().await;
    drop(client);
    let log = scene.donor.0.log();
    assert!(log.contains("snapshot closed") && !log.contains("why=\"failed\""), "{log}");
    watch.assert_harmless("closing what others hold", END_MAX);
}

/// Guards threads, places and buffers against callers that take nothing, or next to nothing: without
/// `Outbox`'s limit the calls hold them for as long as the connection lives.
#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_that_takes_next_to_nothing_is_cut_off() {
    let scene = Scene::start(&["--caller-timeout", "2s"], fill_much);
    let watch = scene.watch().await;
    let beside = scene.beside().await;
    let mut client = scene.client().await;
    let snapshot = open(&mut client, Duration::from_secs(60)).await.unwrap();
    let whole = largest(&mut client, &snapshot).await;
    assert_eq!(whole.length, LARGE_BYTES);
    // The honest recipient has the same bound, and the same disk.
    let hostile = HOSTILE.to_string();
    let is_cut = |line: &&str| line.contains("a caller took nothing") && line.contains(&hostile);
    let cut = || scene.donor.0.log().lines().filter(is_cut).count();

    let (mut reads, mut lists) = (scene.client().await, scene.client().await);
    let mut reading =
        reads.read_ranges(read_request(&snapshot, vec![whole.clone()])).await.unwrap();
    let mut listing = lists.list_files(list_request(&snapshot)).await.unwrap();
    wait_for("both to be cut off", || (cut() >= 2).then_some(()));
    let read = async {
        while let Some(_frame) = reading.get_mut().message().await? {}
        Ok::<_, Status>(())
    };
    read.await.expect_err("the donor has gone");
    let list = async {
        while let Some(_message) = listing.get_mut().message().await? {}
        Ok::<_, Status>(())
    };
    list.await.expect_err("the donor has gone");

    // Some bytes at a time are taken, and no chunk for an hour.
    scene.proxy.limit(Some(200));
    let mut slow = scene.client().await;
    let slow = tokio::spawn(async move {
        let mut reading = slow.read_ranges(read_request(&snapshot, vec![whole])).await?;
        while let Some(_frame) = reading.get_mut().message().await? {}
        Ok::<_, Status>(())
    });
    wait_for("the slow one to be cut off", || (cut() >= 3).then_some(()));
    scene.proxy.cut();
    slow.await.unwrap().expect_err("the donor has gone");
    beside.assert_completed().await;
    drop((client, reads, lists));
    watch.assert_harmless("callers that take nothing", END_MAX);
}

/// Guards the donor's database and disk against snapshots whose leases are renewed for ever: without the
/// look at what is read the first of the two lives on.
#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_is_renewed_for_ever_ends_when_nothing_is_read() {
    let options = ["--snapshot-idle-max", "15s", "--snapshot-rate-min", "0"];
    let scene = Scene::start(&options, |_| {});
    let watch = scene.watch().await;
    let beside = scene.beside().await;
    let mut client = scene.client().await;
    let begun = Instant::now();
    let idle = open(&mut client, Duration::from_secs(60)).await.unwrap();
    let read = open(&mut client, Duration::from_secs(60)).await.unwrap();
    let file = largest(&mut client, &read).await;
    let ended = loop {
        let byte = read_request(&read, vec![range(file.file_id, 0, 1)]);
        let mut frames = client.read_ranges(byte).await.unwrap().into_inner();
        while let Some(_frame) = frames.message().await.unwrap() {}
        let renew = RenewLeaseRequest { snapshot: idle.clone(), ..Default::default() };
        match client.renew_lease(renew).await {
            Ok(_) => tokio::time::sleep(Duration::from_millis(500)).await,
            Err(status) => break failed(status),
        }
        assert!(begun.elapsed() < END_MAX, "the lease is renewed for ever");
    };
    assert_eq!(ended.reason, "UNKNOWN_SNAPSHOT");
    let told = |text| ended.message.contains(text);
    assert!(told("--snapshot-idle-max: ") && told(" s, at most 15 s are allowed"), "{ended}");
    assert!(begun.elapsed() >= Duration::from_secs(14), "{:?}", begun.elapsed());
    let held = client.list_snapshots(ListSnapshotsRequest::default()).await.unwrap().into_inner();
    assert!(held.snapshots.iter().any(|snapshot| snapshot.name == read), "{held:?}");
    assert!(scene.donor.0.log().contains("nothing was read of it for --snapshot-idle-max"));
    beside.assert_completed().await;
    drop(client);
    // The one that was read ends as well, by now.
    watch.assert_harmless("leases for ever", END_MAX);
}

/// Guards the donor's database and disk against a recipient that reads a byte now and then: it holds redo as
/// one that reads nothing. With the rate left out (`is_slow`) the first of the two lives on; one that is slow,
/// and quick enough, does.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_which_a_byte_is_read_now_and_then_ends() {
    let options = ["--snapshot-idle-max", "10s", "--snapshot-rate-min", "8KiB"];
    let scene = Scene::start(&options, fill_much);
    let watch = scene.watch().await;
    let beside = scene.beside().await;
    let mut client = scene.client().await;
    let begun = Instant::now();
    let trickled = open(&mut client, Duration::from_secs(60)).await.unwrap();
    let slow = open(&mut client, Duration::from_secs(60)).await.unwrap();
    let file = largest(&mut client, &slow).await;
    let mut at = 0;
    let ended = loop {
        for (snapshot, offset, length) in [(&trickled, 0, 1), (&slow, at, 16 << 10)] {
            let some = read_request(snapshot, vec![range(file.file_id, offset, length)]);
            match client.read_ranges(some).await {
                Ok(frames) => {
                    let mut frames = frames.into_inner();
                    while let Ok(Some(_frame)) = frames.message().await {}
                }
                Err(status) => assert_eq!(
                    (failed(status).reason, snapshot),
                    ("UNKNOWN_SNAPSHOT".into(), &trickled)
                ),
            }
        }
        at += 16 << 10;
        let renew = RenewLeaseRequest { snapshot: trickled.clone(), ..Default::default() };
        match client.renew_lease(renew).await {
            Ok(_) => tokio::time::sleep(Duration::from_millis(300)).await,
            Err(status) => break failed(status),
        }
        assert!(begun.elapsed() < END_MAX, "a byte now and then is enough");
    };
    assert_eq!(ended.reason, "UNKNOWN_SNAPSHOT");
    for told in
        ["bytes of it were read in", "at least 81920 must be within --snapshot-idle-max", "8192"]
    {
        assert!(ended.message.contains(told), "{ended}");
    }
    assert!(begun.elapsed() >= Duration::from_secs(9), "{:?}", begun.elapsed());
    let held = client.list_snapshots(ListSnapshotsRequest::default()).await.unwrap().into_inner();
    let held = held.snapshots.into_iter().find(|snapshot| snapshot.name == slow);
    let held = held.expect("16 KiB in 300 ms are enough");
    assert!(held.read_deadline.is_some() && !held.blocks_ddl, "{held:?}");
    beside.assert_completed().await;
    drop(client);
    watch.assert_harmless("a byte now and then", END_MAX);
}

/// Guards threads against calls without number, and memory against requests without end. Without the
/// places of `Held` and the bounds of `RequestBody` each of these passes.
#[tokio::test(flavor = "multi_thread")]
async fn too_many_calls_and_too_large_requests_are_refused() {
    let scene = Scene::start(&[], fill_much);
    let watch = scene.watch().await;
    let beside = scene.beside().await;
    let mut client = scene.client().await;
    let snapshot = open(&mut client, Duration::from_secs(60)).await.unwrap();
    let whole = largest(&mut client, &snapshot).await;
    let mut held = Vec::new();
    let refused = loop {
        let mut lists = scene.client().await;
        match lists.list_files(list_request(&snapshot)).await {
            Ok(stream) => held.push(stream.into_inner()),
            Err(status) => break failed(status),
        }
    };
    assert_eq!((held.len(), &*refused.reason), (4, "CALL_LIMIT"), "{refused}");
    assert!(refused.retry_after.is_some());
    drop(held);
    let mut held = Vec::new();
    let refused = loop {
        match client.read_ranges(read_request(&snapshot, vec![whole.clone()])).await {
            Ok(stream) => held.push(stream.into_inner()),
            Err(status) => break failed(status),
        }
    };
    assert_eq!((held.len(), &*refused.reason), (32, "READER_LIMIT"), "{refused}");
    drop(held);

    client = scene.client().await;
    for (name, ranges, reason) in [
        ("ranges without number", vec![Range::default(); 400_000], "BAD_RANGE"),
        (
            "a request without end",
            vec![range(1 << 60, 1 << 60, 1 << 60); 60_000],
            "REQUEST_TOO_LARGE",
        ),
        ("beyond all files", vec![range(1, u64::MAX, u64::MAX)], "BAD_RANGE"),
    ] {
        let answer = client.read_ranges(read_request(&snapshot, ranges)).await;
        assert_eq!(failed(answer.expect_err(name)).reason, reason, "{name}");
    }
    let renew = RenewLeaseRequest { snapshot: "x".repeat(100_000), ..Default::default() };
    let failure = failed(client.renew_lease(renew).await.unwrap_err());
    assert_eq!(failure.reason, "REQUEST_TOO_LARGE", "{failure}");
    beside.assert_completed().await;
    drop(client);
    watch.assert_harmless("calls and requests", END_MAX);
}

/// Guards accounts against a recipient that tries passwords: after ten wrong ones of its address it is told
/// when the next may come, and nothing of whether one is right, whatever the account. Without
/// `check_password_allowed`, or without `failed`, all of them are answered. Others log in as before.
#[tokio::test(flavor = "multi_thread")]
async fn a_guesser_is_told_to_wait_while_others_log_in_and_clone() {
    let elsewhere = new_directory();
    let accounts = two_accounts(elsewhere.path());
    let scene = Scene::start(&["--accounts", &accounts], |_| {});
    let watch = scene.watch().await;
    let beside = scene.beside().await;
    let guess = async |user: &str, password: &str| {
        let port = scene.proxy.address().port();
        let options = ConnectOptions::new("127.0.0.1", port, SslMode::Disabled);
        let DonorConnection { channel, security, .. } = connect(&options).await.unwrap();
        let (mut auth, password) = (AuthServiceClient::new(channel), password.to_owned().into());
        log_in_with_password(&mut auth, &security, user, &password, None).await
    };
    let (mut denied, begun) = (0, Instant::now());
    let refused = loop {
        let failure = guess("clone", "wrong").await.unwrap_err();
        match &*failure.reason {
            "ACCESS_DENIED" => denied += 1,
            // One is forgiven every 15 s: just before, the right one below would be taken.
            "TOO_MANY_FAILED_LOG_INS" if failure.retry_after > Some(Duration::from_secs(8)) => {
                break failure;
            }
            "TOO_MANY_FAILED_LOG_INS" => {}
            _ => panic!("{failure:?}"),
        }
        let forgiven = begun.elapsed().as_secs() / 15;
        assert!(denied <= 10 + forgiven, "{denied} were answered in {:?}", begun.elapsed());
    };
    assert!(denied >= 10, "{denied}: {refused:?}");
    assert_eq!(refused.mysql_error, Some(1045));
    assert!(refused.retry_after <= Some(Duration::from_secs(16)), "{refused:?}");
    for user in ["clone", "other"] {
        let failure = guess(user, "secret").await.unwrap_err();
        assert_eq!(failure.reason, "TOO_MANY_FAILED_LOG_INS", "{user}: {failure:?}");
    }
    beside.assert_completed().await;
    watch.assert_harmless("guesses", END_MAX);
}

/// Guards a log-in's memory: a message of it is small.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_in_of_megabytes_is_refused() {
    let elsewhere = new_directory();
    let accounts = two_accounts(elsewhere.path());
    let scene = Scene::start(&["--accounts", &accounts], |_| {});
    let watch = scene.watch().await;
    let beside = scene.beside().await;
    for _ in 0..20 {
        let mut client =
            AuthServiceClient::connect(format!("http://{}", scene.proxy.address())).await.unwrap();
        let start = PasswordStart { user: "u".repeat(3 << 20), ..Default::default() };
        let request = LogInRequest { step: Some(Step::PasswordStart(start)) };
        let requests = futures::stream::iter([request]);
        let status = match client.log_in(requests).await {
            Err(status) => status,
            Ok(answers) => answers.into_inner().message().await.unwrap_err(),
        };
        let failure = failed(status);
        // Each is counted as one that has failed, as wrong passwords are.
        let reasons = ["REQUEST_TOO_LARGE", "TOO_MANY_FAILED_LOG_INS"];
        assert!(reasons.contains(&&*failure.reason), "{failure:?}");
    }
    beside.assert_completed().await;
    watch.assert_harmless("log-ins of megabytes", END_MAX);
}

/// Guards others' connections against an address that opens as many as it can, and against those that
/// never say anything: without its own bounds it has every place, or every handshake, and the clones
/// beside wait. One that speaks HTTP/2 and makes no call is closed after 60 s.
#[tokio::test(flavor = "multi_thread")]
async fn connections_without_number_or_without_a_word_harm_nobody() {
    let scene = Scene::start(&[], |_| {});
    let watch = scene.watch().await;
    let before = scene.donor.0.descriptors();
    let beside = scene.beside().await;
    let quiet = scene.channel().await;
    let silent: Vec<_> =
        (0..400).map(|_| TcpStream::connect(scene.proxy.address()).unwrap()).collect();
    let held = wait_for("the connections to be taken", || {
        Some(scene.donor.0.descriptors()).filter(|held| *held >= before + 200)
    });
    // The honest recipient's own, and a clone's files, are among these.
    assert!(held <= before + 256 + 60, "{held} descriptors, {before} before");
    drop(silent);
    beside.assert_completed().await;
    // Pings are answered for as long as the channel lives, and no call is made.
    watch.assert_harmless("connections", Duration::from_secs(90));
    drop(quiet);
}
