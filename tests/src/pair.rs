//! A donor and a recipient in a directory of their own, and a client of the recipient.

use std::path::{Path, PathBuf};

use marcot_proto::recipient::v1::recipient_service_client::RecipientServiceClient;
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::{Donor, Recipient, client, new_directory, tree};

/// A pair; its processes end and its directory goes when it is dropped.
pub struct Pair {
    /// A client of the recipient.
    pub client: RecipientServiceClient<Channel>,
    /// The recipient.
    pub recipient: Recipient,
    /// The donor.
    pub donor: Donor,
    home: TempDir,
}

impl Pair {
    /// A pair on a tree of every kind of entry.
    pub async fn start(donor_options: &[&str], recipient_options: &[&str]) -> Self {
        Self::start_with(donor_options, recipient_options, tree::make).await
    }

    /// A pair whose data directory `fill` makes. In options, `{home}` stands for the pair's directory.
    pub async fn start_with(
        donor_options: &[&str],
        recipient_options: &[&str],
        fill: impl FnOnce(&Path),
    ) -> Self {
        Self::start_in(&[], donor_options, recipient_options, fill).await
    }

    /// As `start_with`, with more variables in both environments.
    pub async fn start_in(
        environment: &[(&str, &str)],
        donor_options: &[&str],
        recipient_options: &[&str],
        fill: impl FnOnce(&Path),
    ) -> Self {
        let home = new_directory();
        let data = home.path().join("data");
        std::fs::create_dir(&data).expect("a writable home");
        fill(&data);
        let here = home.path().display().to_string();
        let filled = |options: &[&str]| -> Vec<String> {
            options.iter().map(|option| option.replace("{home}", &here)).collect()
        };
        let (donor_options, recipient_options) = (filled(donor_options), filled(recipient_options));
        let donor = Donor::start_with(home.path(), &data, &borrow(&donor_options), environment);
        let options = borrow(&recipient_options);
        let recipient = Recipient::start_with(home.path(), &options, environment);
        let client = client::recipient(&recipient).await;
        Self { client, recipient, donor, home }
    }

    /// The directory that all of it is in.
    #[must_use]
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// The donor's data directory.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.home().join("data")
    }
}

fn borrow(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}
