//! What a network does to a clone: nothing that it does not notice, and nothing that makes it
//! start again.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod faults;
mod limits;
mod pause;
mod queue;
mod resume;
mod reuse;
mod verify;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use marcot_proto::recipient::v1::{
    Clone, CloneStatementRequest, GetCloneRequest, recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{Donor, Proxy, Recipient, new_directory, process, recipient, wait_for};
use tonic::transport::Channel;

/// A donor of some files, a proxy before it, and a recipient.
struct Net {
    donor: Donor,
    proxy: Proxy,
    recipient: Recipient,
    options: Vec<String>,
    client: RecipientServiceClient<Channel>,
    home: tempfile::TempDir,
}

fn texts(strings: &[String]) -> Vec<&str> {
    strings.iter().map(String::as_str).collect()
}

/// Large files and small ones, of bytes that differ everywhere.
const LARGE: usize = 3;
const LARGE_BYTES: usize = 24 << 20;
const SMALL: usize = 200;
const DATA_BYTES: u64 = (LARGE * LARGE_BYTES) as u64;

impl Net {
    async fn start(options: &[&str]) -> Self {
        Self::start_with(options, |_| Vec::new()).await
    }

    /// With options of the donor, which may need files in the home of it all.
    async fn start_with(
        options: &[&str],
        donor_options: impl FnOnce(&Path) -> Vec<String>,
    ) -> Self {
        let home = new_directory();
        let data = home.path().join("data");
        fs::create_dir_all(data.join("small")).unwrap();
        let mut state = 7_u64;
        let mut bytes = |count: usize| -> Vec<u8> {
            std::iter::repeat_with(|| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 32).to_le_bytes()
            })
            .flatten()
            .take(count)
            .collect()
        };
        for n in 0..LARGE {
            fs::write(data.join(format!("large{n}")), bytes(LARGE_BYTES)).unwrap();
        }
        for n in 0..SMALL {
            fs::write(data.join(format!("small/{n}")), bytes(n * 50)).unwrap();
        }
        let donor = Donor::start(home.path(), &data, &texts(&donor_options(home.path())));
        let proxy = Proxy::start(donor.0.address);
        let waits = ["--donor-timeout", "60s"];
        let options = if options.is_empty() { &waits } else { options };
        let daemon = Recipient::start(home.path(), options);
        let client = recipient(&daemon).await;
        let options = options.iter().map(ToString::to_string).collect();
        Self { donor, proxy, recipient: daemon, options, client, home }
    }

    /// Starts the recipient again, whose end is the caller's.
    async fn start_recipient(&mut self) {
        self.recipient = Recipient::start(self.home.path(), &texts(&self.options));
        self.client = recipient(&self.recipient).await;
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// Starts a clone through the proxy; returns its name.
    async fn begin(&self, target: &str) -> String {
        let statement = process::statement(self.proxy.port(), &self.path(target), "");
        let request = CloneStatementRequest { statement, ..Default::default() };
        let started = self.client.clone().clone_statement(request).await.unwrap();
        started.into_inner().clone.unwrap().name
    }

    async fn get(&self, name: &str) -> Clone {
        let request = GetCloneRequest { name: name.to_owned() };
        self.client.clone().get_clone(request).await.unwrap().into_inner().clone.unwrap()
    }

    /// Waits until the clone is as `condition` wants it.
    async fn until(&self, name: &str, what: &str, condition: impl Fn(&Clone) -> bool) -> Clone {
        let deadline = std::time::Instant::now() + marcot_tests::PATIENCE;
        loop {
            let clone = self.get(name).await;
            if condition(&clone) {
                return clone;
            }
            assert!(std::time::Instant::now() < deadline, "waited for {what}: {clone:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until so many more bytes have come from the donor.
    fn pass_bytes(&self, bytes: u64) {
        let begun = self.proxy.counts().down_bytes;
        wait_for("bytes to pass", || {
            (self.proxy.counts().down_bytes >= begun + bytes).then_some(())
        });
    }
}
