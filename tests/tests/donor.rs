//! The donor by itself: snapshots, leases, log-ins, and requests that no right recipient makes.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::{path::Path, time::Duration};

use marcot_common::{
    accounts::Accounts,
    connect::{ConnectOptions, DonorConnection, SslMode, connect},
    connection::Privilege,
    failure::Failure,
    login::{CloneKey, log_in_with_key, log_in_with_password},
    time::duration_to_wire,
};
use marcot_proto::{
    auth::v1::auth_service_client::AuthServiceClient,
    common::v1::Stage,
    donor::v1::{
        AdvanceStageRequest, CloseSnapshotRequest, FileEntry, ListFilesRequest,
        ListSnapshotsRequest, OpenSnapshotRequest, OpenSnapshotResponse, Outcome, Range,
        ReadRangesRequest, RenewLeaseRequest, donor_service_client::DonorServiceClient,
        read_ranges_response::Frame,
    },
};
use marcot_tests::{Donor, new_directory, tree, wait_for};
use tonic::{Code, Status, transport::Channel};
use zeroize::Zeroizing;

type Client = DonorServiceClient<Channel>;

async fn plain(donor: &Donor) -> DonorConnection {
    connect(&ConnectOptions::new("127.0.0.1", donor.port(), SslMode::Disabled)).await.unwrap()
}

async fn client(donor: &Donor) -> Client {
    DonorServiceClient::new(plain(donor).await.channel).max_decoding_message_size(4 << 20)
}

fn request(key: &CloneKey, request_id: &str) -> OpenSnapshotRequest {
    OpenSnapshotRequest {
        public_key: key.public_key().to_vec().into(),
        request_id: request_id.to_owned(),
        ..Default::default()
    }
}

async fn open(client: &mut Client, request_id: &str) -> Result<OpenSnapshotResponse, Failure> {
    let key = CloneKey::generate().unwrap();
    let opened = client.open_snapshot(request(&key, request_id)).await;
    opened.map(tonic::Response::into_inner).map_err(failed)
}

#[expect(clippy::needless_pass_by_value, reason = "fits map_err")]
fn failed(status: Status) -> Failure {
    Failure::from_status(&status)
}

async fn list(client: &mut Client, snapshot: &str, start_number: u64) -> Vec<FileEntry> {
    let request = ListFilesRequest {
        snapshot: snapshot.to_owned(),
        stage: Stage::FileCopy.into(),
        round: 1,
        start_number,
    };
    let mut stream = client.list_files(request).await.unwrap().into_inner();
    let mut entries = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        entries.extend(message.entries);
        if message.end.is_some() {
            assert!(stream.message().await.unwrap().is_none());
            return entries;
        }
    }
    panic!("the list has no end");
}

fn ranges(snapshot: &str, ranges: Vec<Range>) -> ReadRangesRequest {
    ReadRangesRequest {
        snapshot: snapshot.to_owned(),
        stage: Stage::FileCopy.into(),
        round: 1,
        ranges,
        ..Default::default()
    }
}

fn start(home: &Path, options: &[&str]) -> Donor {
    let data = home.join("data");
    tree::make(&data);
    Donor::start(home, &data, options)
}

fn range(file_id: u64, offset: u64, length: u64) -> Range {
    Range { file_id, offset, length, ..Range::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_goes_on_from_any_number_and_a_call_ends_at_its_bound() {
    let home = new_directory();
    let donor = start(home.path(), &[]);
    let mut client = client(&donor).await;
    let snapshot = open(&mut client, "").await.unwrap().snapshot;
    let all = list(&mut client, &snapshot, 0).await;
    let middle = all.len() / 2;
    assert_eq!(list(&mut client, &snapshot, middle as u64).await, all[middle..]);
    assert!(list(&mut client, &snapshot, all.len() as u64).await.is_empty());

    // A file of three segments, in calls of at most 16 MiB, by ordinary generated code.
    let file = all.iter().max_by_key(|e| e.allocated_bytes).unwrap();
    let (mut offset, mut calls) = (0, 0);
    while offset < file.size_bytes {
        let range = range(file.file_id, offset, file.size_bytes - offset);
        let request = ReadRangesRequest { bytes_max: 16 << 20, ..ranges(&snapshot, vec![range]) };
        let mut frames = client.read_ranges(request).await.unwrap().into_inner();
        let mut end = None;
        while let Some(message) = frames.message().await.unwrap() {
            match message.frame.unwrap() {
                Frame::Chunk(chunk) => {
                    assert_eq!(crc32c::crc32c(&chunk.payload), chunk.crc32c);
                    for extent in &chunk.extents {
                        assert_eq!((extent.file_id, extent.offset), (file.file_id, offset));
                        offset += extent.length;
                    }
                }
                Frame::Failure(failure) => panic!("{failure:?}"),
                Frame::End(frame) => end = Some(frame),
            }
        }
        calls += 1;
        let end = end.expect("an end frame");
        assert_eq!(end.ranges_done == 1, offset == file.size_bytes);
        assert!(end.raw_bytes <= 17 << 20, "{end:?}");
    }
    assert_eq!(calls, 4, "48 MiB and a little in calls of 16 MiB");
}

/// Guards the lease: an expired snapshot is gone, a renewed one stays. With `expire` not spawned the
/// wait does not end.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_ends_with_its_lease_unless_renewed() {
    let home = new_directory();
    let donor = start(home.path(), &[]);
    let mut client = client(&donor).await;
    let key = CloneKey::generate().unwrap();
    let lease = Some(duration_to_wire(Duration::from_secs(20)));
    let short = OpenSnapshotRequest { lease_duration: lease, ..request(&key, "") };
    let forgotten = client.open_snapshot(short.clone()).await.unwrap().into_inner().snapshot;
    let renewed = client.open_snapshot(short).await.unwrap().into_inner().snapshot;
    let renew = RenewLeaseRequest {
        snapshot: renewed.clone(),
        lease_duration: Some(duration_to_wire(Duration::from_secs(300))),
        ..Default::default()
    };
    client.renew_lease(renew).await.unwrap();
    wait_for("the lease to end", || donor.0.log().contains("lease expired").then_some(()));
    let held = client.list_snapshots(ListSnapshotsRequest::default()).await.unwrap().into_inner();
    let names: Vec<_> = held.snapshots.into_iter().map(|s| s.name).collect();
    assert_eq!(names, [renewed]);
    let renew = RenewLeaseRequest { snapshot: forgotten, ..Default::default() };
    let failure = client.renew_lease(renew).await.map_err(failed).unwrap_err();
    assert_eq!((failure.code, failure.reason.as_ref()), (Code::NotFound, "UNKNOWN_SNAPSHOT"));
}

#[tokio::test(flavor = "multi_thread")]
async fn opening_is_idempotent_bounded_and_told_when_to_try_again() {
    let home = new_directory();
    let donor = start(home.path(), &["--snapshots-max", "2"]);
    let mut client = client(&donor).await;
    let key = CloneKey::generate().unwrap();
    let first = client.open_snapshot(request(&key, "a")).await.unwrap().into_inner().snapshot;
    let again = client.open_snapshot(request(&key, "a")).await.unwrap().into_inner().snapshot;
    assert_eq!(first, again);
    open(&mut client, "b").await.unwrap();
    let failure = open(&mut client, "c").await.unwrap_err();
    assert_eq!(failure.reason, "SNAPSHOT_LIMIT");
    assert!(failure.retry_after.is_some() && failure.is_retryable(), "{failure:?}");
    let close = CloseSnapshotRequest { snapshot: first, outcome: Outcome::Cancelled.into() };
    client.close_snapshot(close.clone()).await.unwrap();
    client.close_snapshot(close).await.unwrap();
    open(&mut client, "c").await.unwrap();
}

/// Guards the order of those who wait for a place: without the queue whoever asks at the right moment
/// gets it, and others starve. Seen to fail with every turn taken for one's own.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_place_gets_it_in_turn_and_is_told_its_place() {
    let home = new_directory();
    let donor = start(home.path(), &["--snapshots-max", "1"]);
    let mut client = client(&donor).await;
    let key = CloneKey::generate().unwrap();
    let asks = |id: &str, seconds| OpenSnapshotRequest {
        queue_wait: Some(duration_to_wire(Duration::from_secs(seconds))),
        ..request(&key, id)
    };
    let first = client.open_snapshot(asks("a", 0)).await.unwrap().into_inner().snapshot;
    for (id, place) in [("b", "1"), ("c", "2"), ("b", "1")] {
        let failure = failed(client.open_snapshot(asks(id, 1)).await.unwrap_err());
        assert_eq!(failure.reason, "SNAPSHOT_LIMIT");
        assert_eq!(failure.metadata["queue_place"], place, "{failure:?}");
    }
    let close = |snapshot| CloseSnapshotRequest { snapshot, outcome: Outcome::Cancelled.into() };
    client.close_snapshot(close(first)).await.unwrap();
    // The place is free, and it is the turn of one who does not ask at this moment.
    for (id, wait) in [("d", 0), ("c", 1)] {
        let failure = failed(client.open_snapshot(asks(id, wait)).await.unwrap_err());
        assert_eq!(failure.reason, "SNAPSHOT_LIMIT", "{id}: {failure:?}");
    }
    let next = client.open_snapshot(asks("b", 60)).await.unwrap().into_inner().snapshot;
    let mut other = client.clone();
    let request = asks("c", 60);
    let last = tokio::spawn(async move { other.open_snapshot(request).await });
    client.close_snapshot(close(next)).await.unwrap();
    last.await.unwrap().unwrap();
    let failure = failed(client.open_snapshot(asks("e", 3601)).await.unwrap_err());
    assert_eq!(failure.reason, "BAD_QUEUE_WAIT");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_advance_is_idempotent_and_out_of_order_is_an_error() {
    let home = new_directory();
    let donor = start(home.path(), &[]);
    let mut client = client(&donor).await;
    let snapshot = open(&mut client, "").await.unwrap().snapshot;
    let request = |round| AdvanceStageRequest {
        snapshot: snapshot.clone(),
        stage: Stage::FileCopy.into(),
        round,
    };
    let mut answers = Vec::new();
    for _ in 0..2 {
        let mut steps = client.advance_stage(request(1)).await.unwrap().into_inner();
        let mut last = None;
        while let Some(step) = steps.message().await.unwrap() {
            last = step.step;
        }
        answers.push(last.unwrap());
    }
    assert_eq!(answers[0], answers[1]);
    let mut steps = client.advance_stage(request(7)).await.unwrap().into_inner();
    let status = loop {
        match steps.message().await {
            Ok(message) => assert!(message.is_some(), "the call must fail"),
            Err(status) => break status,
        }
    };
    assert_eq!(failed(status).reason, "STAGE_NOT_REACHED");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_are_typed_errors() {
    let home = new_directory();
    let donor = start(home.path(), &[]);
    let mut client = client(&donor).await;
    let snapshot = open(&mut client, "").await.unwrap().snapshot;
    let one = |offset, length| vec![range(1, offset, length)];
    for (name, request, reason) in [
        ("no ranges", ranges(&snapshot, vec![]), "BAD_RANGE"),
        ("too many", ranges(&snapshot, vec![range(1, 0, 1); 8193]), "BAD_RANGE"),
        ("empty range", ranges(&snapshot, one(0, 0)), "BAD_RANGE"),
        ("overflow", ranges(&snapshot, one(u64::MAX, 2)), "BAD_RANGE"),
        ("unknown snapshot", ranges("snapshots/x", one(0, 1)), "UNKNOWN_SNAPSHOT"),
        ("no round", ReadRangesRequest { round: 0, ..ranges(&snapshot, one(0, 1)) }, "BAD_STAGE"),
        ("no stage", ReadRangesRequest { stage: 0, ..ranges(&snapshot, one(0, 1)) }, "BAD_STAGE"),
        (
            "chunks of a gigabyte",
            ReadRangesRequest { chunk_bytes: 1 << 30, ..ranges(&snapshot, one(0, 1)) },
            "BAD_RANGE",
        ),
        (
            "unknown digest",
            ReadRangesRequest { digest_algorithm: 99, ..ranges(&snapshot, one(0, 1)) },
            "UNKNOWN_DIGEST",
        ),
    ] {
        let status = match client.read_ranges(request).await {
            Err(status) => status,
            Ok(mut stream) => stream.get_mut().message().await.expect_err(name),
        };
        assert_eq!(failed(status).reason, reason, "{name}");
    }
    let key = CloneKey::generate().unwrap();
    for (name, request, reason) in [
        ("no key", OpenSnapshotRequest::default(), "BAD_KEY"),
        (
            "lease of a day",
            OpenSnapshotRequest {
                lease_duration: Some(duration_to_wire(Duration::from_secs(86_400))),
                ..request(&key, "")
            },
            "BAD_LEASE",
        ),
        ("endless id", request(&key, &"x".repeat(129)), "BAD_REQUEST_ID"),
        (
            "a log elsewhere",
            OpenSnapshotRequest { binlog_base: "../bin".to_owned(), ..request(&key, "") },
            "BAD_BINLOG_BASE",
        ),
    ] {
        let failure = client.open_snapshot(request).await.map_err(failed).expect_err(name);
        assert_eq!(failure.reason, reason, "{name}");
    }
    // What is beyond a file, or no file, fails its range and not the call.
    let mixed = vec![range(999_999, 0, 1), range(1, 0, 1)];
    let mut frames = client.read_ranges(ranges(&snapshot, mixed)).await.unwrap().into_inner();
    let mut kinds = Vec::new();
    while let Some(message) = frames.message().await.unwrap() {
        kinds.push(match message.frame.unwrap() {
            Frame::Chunk(_) => "chunk",
            Frame::Failure(failure) => {
                assert_eq!(failure.failure.unwrap().reason, "UNKNOWN_FILE");
                "failure"
            }
            Frame::End(_) => "end",
        });
    }
    assert_eq!(kinds, ["failure", "chunk", "end"]);
}

/// What a caller is told when it uses a snapshot, call by call; empty: it may.
async fn told(client: &mut Client, snapshot: &str) -> [String; 4] {
    let reason = |status: Status| failed(status).reason.into_owned();
    let list = ListFilesRequest {
        snapshot: snapshot.to_owned(),
        stage: Stage::FileCopy.into(),
        round: 1,
        start_number: 0,
    };
    let advance = AdvanceStageRequest {
        snapshot: snapshot.to_owned(),
        stage: Stage::FileCopy.into(),
        round: 1,
    };
    let renew = RenewLeaseRequest { snapshot: snapshot.to_owned(), ..Default::default() };
    [
        client.list_files(list).await.map_or_else(reason, |_| String::new()),
        client.read_ranges(ranges(snapshot, vec![])).await.map_or_else(reason, |_| String::new()),
        client.advance_stage(advance).await.map_or_else(reason, |_| String::new()),
        client.renew_lease(renew).await.map_or_else(reason, |_| String::new()),
    ]
}

/// Guards the places of recipients that share an account, or a donor without accounts: without `is_for`
/// whoever sees a snapshot's name, which MONITOR shows, reads it, moves it on and ends it. The one that
/// has opened it, those that log in by its key, and the one that opens it again do as before.
#[tokio::test(flavor = "multi_thread")]
async fn another_log_in_of_the_same_account_has_no_part_in_a_snapshot() {
    const UNKNOWN: [&str; 4] = ["UNKNOWN_SNAPSHOT"; 4];
    let home = new_directory();
    let path = home.path().join("accounts.toml");
    let mut accounts = Accounts::open_or_create(&path).unwrap();
    accounts.add("clone", "secret", &[Privilege::BackupAdmin]).unwrap();
    accounts.save().unwrap();
    let path = path.display().to_string();
    // Who has logged in is bound, whether it asks for it or not.
    for (options, bound) in [(&["--accounts", &path][..], false), (&[], true)] {
        let donor = start(home.path(), options);
        let connected = async || {
            let connection = plain(&donor).await;
            if !options.is_empty() {
                let mut auth = AuthServiceClient::new(connection.channel.clone());
                let (security, password) = (&connection.security, "secret".to_owned().into());
                log_in_with_password(&mut auth, security, "clone", &password, None).await.unwrap();
            }
            Client::new(connection.channel)
        };
        let (mut opener, key) = (connected().await, CloneKey::generate().unwrap());
        let open = OpenSnapshotRequest { bound, ..request(&key, "mine") };
        let mine = opener.open_snapshot(open.clone()).await.unwrap().into_inner().snapshot;

        let mut other = connected().await;
        let seen = other.list_snapshots(ListSnapshotsRequest::default()).await.unwrap();
        assert_eq!(seen.into_inner().snapshots[0].name, mine, "its name is no secret");
        assert_eq!(told(&mut other, &mine).await, UNKNOWN, "{options:?}");
        let close =
            CloseSnapshotRequest { snapshot: mine.clone(), outcome: Outcome::Completed.into() };
        other.close_snapshot(close.clone()).await.unwrap();
        assert!(!list(&mut opener, &mine, 0).await.is_empty(), "it was not closed");

        let connection = plain(&donor).await;
        let mut auth = AuthServiceClient::new(connection.channel.clone());
        log_in_with_key(&mut auth, &connection.security, &mine, &key).await.unwrap();
        let mut keyed = Client::new(connection.channel);
        assert!(!list(&mut keyed, &mine, 0).await.is_empty());

        // The answer was lost with its connection: whoever has the id and the key has it again.
        let mut again = connected().await;
        let reopened = again.open_snapshot(open).await.unwrap().into_inner().snapshot;
        assert_eq!(reopened, mine);
        assert!(!list(&mut again, &mine, 0).await.is_empty());
        assert_eq!(told(&mut opener, &mine).await, UNKNOWN, "{options:?}");
        keyed.close_snapshot(close).await.unwrap();
        assert_eq!(told(&mut again, &mine).await, UNKNOWN, "it was closed");
        std::fs::remove_dir_all(home.path().join("data")).unwrap();
    }
}

/// Without accounts a clone may do without the key, as those of older recipients do: then its
/// snapshots are anybody's who can reach the donor.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_not_bound_is_there_for_all_of_an_account() {
    let home = new_directory();
    let donor = start(home.path(), &[]);
    let (mut first, mut second) = (client(&donor).await, client(&donor).await);
    let snapshot = open(&mut first, "").await.unwrap().snapshot;
    assert!(!list(&mut second, &snapshot, 0).await.is_empty());
}

/// Guards what a log-in by key is good for: its own snapshot and nothing else. Without the check in
/// `open_snapshot` the key opens another one; without the name in `Held::is_for` it reads another's.
#[tokio::test(flavor = "multi_thread")]
async fn a_clones_key_opens_its_own_snapshot_and_no_more() {
    let home = new_directory();
    let path = home.path().join("accounts.toml");
    let mut accounts = Accounts::open_or_create(&path).unwrap();
    accounts.add("clone", "secret", &[Privilege::BackupAdmin]).unwrap();
    accounts.add("other", "secret", &[Privilege::BackupAdmin]).unwrap();
    accounts.save().unwrap();
    let donor = start(home.path(), &["--accounts", &path.display().to_string()]);
    let password = Zeroizing::new("secret".to_owned());
    let logged_in = async |user: &str| {
        let connection = plain(&donor).await;
        let mut auth = AuthServiceClient::new(connection.channel.clone());
        log_in_with_password(&mut auth, &connection.security, user, &password, None).await.unwrap();
        DonorServiceClient::new(connection.channel)
    };
    let mut first = logged_in("clone").await;
    let key = CloneKey::generate().unwrap();
    let mine = first.open_snapshot(request(&key, "1")).await.unwrap().into_inner().snapshot;
    let another = open(&mut first, "2").await.unwrap().snapshot;

    let connection = plain(&donor).await;
    let mut auth = AuthServiceClient::new(connection.channel.clone());
    log_in_with_key(&mut auth, &connection.security, &mine, &key).await.unwrap();
    let mut keyed: Client = DonorServiceClient::new(connection.channel);
    assert!(!list(&mut keyed, &mine, 0).await.is_empty());
    assert_eq!(open(&mut keyed, "3").await.unwrap_err().reason, "KEY_LOG_IN");
    let renew =
        |snapshot: &str| RenewLeaseRequest { snapshot: snapshot.to_owned(), ..Default::default() };
    let failure = keyed.renew_lease(renew(&another)).await.map_err(failed).unwrap_err();
    assert_eq!(failure.reason, "UNKNOWN_SNAPSHOT");
    // Another account does not see it either.
    let mut other = logged_in("other").await;
    let failure = other.renew_lease(renew(&mine)).await.map_err(failed).unwrap_err();
    assert_eq!(failure.reason, "UNKNOWN_SNAPSHOT");
}
