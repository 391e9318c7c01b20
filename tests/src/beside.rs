//! Honest clones beside what is hostile: one after another, until told to end. Each must complete.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use marcot_proto::recipient::v1::{State, recipient_service_client::RecipientServiceClient};
use tokio::task::JoinHandle;
use tonic::transport::Channel;

use crate::{Pair, client::clone_and_wait, process::statement, tree};

/// Honest clones that run.
pub struct Beside {
    stop: Arc<AtomicBool>,
    clones: JoinHandle<u32>,
    /// Processes of their own, where nobody else's are used.
    _pair: Option<Pair>,
}

impl Beside {
    /// Clones between a donor and a recipient of their own.
    pub async fn start() -> Self {
        let pair = Pair::start_with(&[], &[], fill).await;
        let own = Self::of(pair.client.clone(), pair.donor.port(), pair.home());
        Self { _pair: Some(pair), ..own }
    }

    /// Clones by this recipient from the donor on that port, to directories in `home`.
    #[must_use]
    pub fn of(client: RecipientServiceClient<Channel>, port: u16, home: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stops, target) = (Arc::clone(&stop), home.join("beside"));
        let clones = tokio::spawn(clone_over_and_over(client, port, target, stops));
        Self { stop, clones, _pair: None }
    }

    /// Whether one has failed: none runs any more.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.clones.is_finished()
    }

    /// Waits for the end of the clone that runs; asserts that there were some.
    pub async fn assert_completed(self) {
        self.stop.store(true, Ordering::SeqCst);
        let count = self.clones.await.expect("every honest clone completes");
        assert!(count > 0, "no honest clone ran");
    }
}

/// A data directory for them: a file of some chunks, and small ones.
pub fn fill(directory: &Path) {
    tree::write(&directory.join("large"), 3 << 20, 7);
    for number in 0..20 {
        tree::write(&directory.join(format!("small {number}")), number * 100, number);
    }
}

async fn clone_over_and_over(
    mut client: RecipientServiceClient<Channel>,
    port: u16,
    target: PathBuf,
    stops: Arc<AtomicBool>,
) -> u32 {
    let mut count = 0;
    while count == 0 || !stops.load(Ordering::SeqCst) {
        let statement = statement(port, &target, "REQUIRE NO SSL");
        let clone = clone_and_wait(&mut client, &statement).await;
        assert_eq!(clone.state(), State::Completed, "an honest clone beside: {clone:?}");
        assert_eq!(std::fs::read(target.join("large")).expect("a clone").len(), 3 << 20);
        std::fs::remove_dir_all(&target).expect("a clone of ours");
        count += 1;
    }
    count
}
