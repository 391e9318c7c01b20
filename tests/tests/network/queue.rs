//! A donor that serves as many clones as it may.

use marcot_common::connect::{ConnectOptions, SslMode, connect};
use marcot_proto::{
    donor::v1::{
        CloseSnapshotRequest, OpenSnapshotRequest, Outcome,
        donor_service_client::DonorServiceClient,
    },
    recipient::v1::{CancelCloneRequest, CloneStatementRequest, State},
};
use marcot_tests::{client::wait_for_end, process, tree};
use tonic::transport::Channel;

use crate::Net;

/// A donor with one place, and a snapshot that has it.
async fn full() -> (Net, DonorServiceClient<Channel>, String) {
    let one = |_: &std::path::Path| vec!["--snapshots-max".to_owned(), "1".to_owned()];
    let net = Net::start_with(&["--queue-wait", "5min"], one).await;
    let options = ConnectOptions::new("127.0.0.1", net.donor.port(), SslMode::Disabled);
    let mut other = DonorServiceClient::new(connect(&options).await.unwrap().channel);
    let request = OpenSnapshotRequest { public_key: vec![7; 32].into(), ..Default::default() };
    let snapshot = other.open_snapshot(request).await.unwrap().into_inner().snapshot;
    (net, other, snapshot)
}

impl Net {
    /// Begins a clone, and waits until it is in the queue.
    async fn begin_queued(&mut self) -> String {
        let statement = process::statement(self.proxy.port(), &self.path("copy"), "");
        let request = CloneStatementRequest { statement, ..Default::default() };
        let started = self.client.clone_statement(request).await.unwrap().into_inner();
        let name = started.clone.unwrap().name;
        let is_queued = |clone: &marcot_proto::recipient::v1::Clone| {
            clone.state() == State::Queued && clone.stall_reason.contains("as number 1 of 1")
        };
        self.until(&name, "its place in the queue", is_queued).await;
        name
    }
}

/// Guards a clone whose donor is full: it waits for its turn, says so, and goes on by itself. Seen to
/// fail with refusals taken for the end.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_waits_for_a_place_says_so_and_goes_on() {
    let (mut net, mut other, snapshot) = full().await;
    let name = net.begin_queued().await;
    let close = CloseSnapshotRequest { snapshot, outcome: Outcome::Completed.into() };
    other.close_snapshot(close).await.unwrap();
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    assert_eq!(end.stall_reason, "");
    tree::assert_identical(&net.path("data"), &net.path("copy"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_waits_for_a_place_can_be_cancelled() {
    let (mut net, _other, _snapshot) = full().await;
    let name = net.begin_queued().await;
    net.client.cancel_clone(CancelCloneRequest { name: name.clone() }).await.unwrap();
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Cancelled, "{end:?}");
    assert!(!net.path("copy").exists());
}
