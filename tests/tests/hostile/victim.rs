//! A recipient that hostile donors are cloned by, and all that lies beside its target.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use marcot_proto::{
    common::v1::Failure,
    recipient::v1::{
        CloneOptions, CloneStatementRequest, State,
        recipient_service_client::RecipientServiceClient,
    },
};
use marcot_tests::{
    Recipient, Watch, clone_and_wait, error_of,
    hostile::{Behaviour, CONTENT},
    new_directory, recipient, tree,
};
use tonic::transport::Channel;

/// Longest that a clone of a hostile donor may take where no limit says another time: three tries with
/// their pauses, on a loaded machine; less than the 40 s after which keepalive would end it.
pub(crate) const END_MAX: Duration = Duration::from_secs(35);

/// Reasons after which a clone may be gone on with.
const GONE_ON_WITH: [&str; 2] = ["STALLED", "DONOR_TIMEOUT"];

pub(crate) struct Victim {
    pub(crate) daemon: Recipient,
    client: RecipientServiceClient<Channel>,
    before: Vec<String>,
    /// Last: what is in it is shown when a test fails.
    pub(crate) home: tempfile::TempDir,
}

impl Victim {
    /// A recipient that has cloned once: what that takes is taken, and nobody's fault.
    pub(crate) async fn start(options: &[&str]) -> Self {
        let home = new_directory();
        std::fs::write(home.path().join("canary"), "sings").unwrap();
        std::fs::create_dir(home.path().join("beside")).unwrap();
        let daemon = Recipient::start(home.path(), options);
        let client = recipient(&daemon).await;
        let before = everything(home.path());
        let victim = Self { daemon, client, before, home };
        victim.clones("the first clone", Behaviour::honest()).await;
        victim
    }

    pub(crate) fn target(&self) -> PathBuf {
        self.home.path().join("copy")
    }

    pub(crate) fn watch(&self) -> Watch<'_> {
        Watch::begin(&self.daemon.0)
    }

    pub(crate) fn statement(&self, donor: SocketAddr) -> String {
        format!(
            "CLONE INSTANCE FROM 'u'@'127.0.0.1':{} IDENTIFIED BY '' DATA DIRECTORY = '{}' \
             REQUIRE NO SSL",
            donor.port(),
            self.target().display()
        )
    }

    /// The failure that a clone of `donor` ends in within `bound`; asserts that nothing is left of it.
    pub(crate) async fn fails_on(&self, name: &str, donor: SocketAddr, bound: Duration) -> Failure {
        let watch = self.watch();
        // A donor that waits for no lock has no 300 s for it.
        let second = marcot_common::time::duration_to_wire(Duration::from_secs(1));
        let options = CloneOptions { ddl_timeout: Some(second), ..Default::default() };
        let statement = self.statement(donor);
        let request =
            CloneStatementRequest { statement, options: Some(options), ..Default::default() };
        let failure = error_of(&mut self.client.clone(), request).await;
        watch.assert_harmless(name, bound);
        // What a donor that may come back has given is kept for `marcot resume`.
        if GONE_ON_WITH.contains(&&*failure.reason)
            && let Some(kept) = staging(self.home.path())
        {
            std::fs::remove_dir_all(kept).unwrap();
        }
        self.assert_nothing_is_left(name);
        failure
    }

    /// As `fails_on`, of a donor that behaves like this.
    pub(crate) async fn fails_within(
        &self,
        name: &str,
        behaviour: Behaviour,
        bound: Duration,
    ) -> Failure {
        self.fails_on(name, behaviour.serve().await, bound).await
    }

    /// As `fails_within`, in the usual time.
    pub(crate) async fn fails(&self, name: &str, behaviour: Behaviour) -> Failure {
        self.fails_within(name, behaviour, END_MAX).await
    }

    /// All bytes were right, and what else came is of no effect.
    pub(crate) async fn completes(&self, name: &str, behaviour: Behaviour) {
        self.completes_within(name, behaviour, END_MAX).await;
    }

    /// As `completes`, within `bound`.
    pub(crate) async fn completes_within(&self, name: &str, behaviour: Behaviour, bound: Duration) {
        let watch = self.watch();
        self.clones(name, behaviour).await;
        watch.assert_harmless(name, bound);
    }

    async fn clones(&self, name: &str, behaviour: Behaviour) {
        let donor = behaviour.serve().await;
        let clone = clone_and_wait(&mut self.client.clone(), &self.statement(donor)).await;
        assert_eq!(clone.state(), State::Completed, "{name}: {clone:?}");
        assert_eq!(std::fs::read(self.target().join("file")).unwrap(), CONTENT, "{name}");
        std::fs::remove_dir_all(self.target()).unwrap();
        self.assert_nothing_is_left(name);
    }

    fn assert_nothing_is_left(&self, name: &str) {
        assert_eq!(everything(self.home.path()), self.before, "{name} left something");
        let canary = std::fs::read_to_string(self.home.path().join("canary")).unwrap();
        assert_eq!(canary, "sings", "{name}");
    }
}

/// Where the clone that runs in a home, or was kept there, is staged.
pub(crate) fn staging(home: &Path) -> Option<PathBuf> {
    let name = tree::names(home).into_iter().find(|name| name.starts_with(".marcot-"));
    name.map(|name| home.join(name))
}

/// All names below a directory, but for the recipient's own history and log.
fn everything(home: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut left = vec![home.to_owned()];
    while let Some(directory) = left.pop() {
        for name in tree::names(&directory) {
            let path = directory.join(&name);
            if name == "state" || name.ends_with(".log") {
                continue;
            }
            if path.symlink_metadata().unwrap().is_dir() {
                left.push(path.clone());
            }
            names.push(path.display().to_string());
        }
    }
    names.sort();
    names
}
