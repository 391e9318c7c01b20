//! A clone that is held at a moment, for somebody or something to come in between.

use std::path::PathBuf;

use marcot_proto::recipient::v1::{
    CancelCloneRequest, Clone, CloneOptions, GetCloneRequest,
    recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{
    Recipient, client::wait_for_end, recipient, site::Site, volume::Mounted, wait_for,
};
use tonic::transport::Channel;

/// A replacing clone that is held at a moment until `go_on`.
pub(crate) struct Held {
    pub(crate) client: RecipientServiceClient<Channel>,
    /// As it was accepted.
    pub(crate) clone: Clone,
    hold: PathBuf,
    pub(crate) at: Recipient,
    /// What the data directory lies on, where that is a file system of its own.
    pub(crate) volume: Option<Mounted>,
    /// Last: what is in it is shown when a test fails.
    pub(crate) site: Site,
}

impl Held {
    /// At a moment of an install, with more options of the recipient.
    pub(crate) async fn at(moment: &str, settings: &[&str]) -> Self {
        Self::with(moment, settings, CloneOptions::default()).await
    }

    /// As `at`, with options of the clone.
    pub(crate) async fn with(moment: &str, settings: &[&str], options: CloneOptions) -> Self {
        Self::on(Site::new(), None, moment, settings, options).await
    }

    /// As `with`, on a site that has been made.
    pub(crate) async fn on(
        site: Site,
        volume: Option<Mounted>,
        moment: &str,
        settings: &[&str],
        options: CloneOptions,
    ) -> Self {
        let hold = hold_file(&site);
        let wish = format!("{moment}:{}", hold.display());
        let at = site.supervise_with(settings, &[("MARCOT_TEST_HOLD_AT", &wish)]);
        let mut client = recipient(&at).await;
        let clone = site.begin(&mut client, options).await.expect("accepted");
        wait_for_moment(&at, moment);
        Self { client, clone, hold, at, volume, site }
    }

    pub(crate) fn id(&self) -> &str {
        self.clone.name.rsplit('/').next().expect("an id")
    }

    pub(crate) fn go_on(&self) {
        std::fs::remove_file(&self.hold).expect("our own file");
    }

    pub(crate) async fn cancel(&mut self) -> Clone {
        let request = CancelCloneRequest { name: self.clone.name.clone() };
        let answer = self.client.cancel_clone(request).await.expect("it is cancelled");
        answer.into_inner().clone.expect("a clone")
    }

    pub(crate) async fn end(&mut self) -> Clone {
        wait_for_end(&mut self.client, &self.clone.name).await
    }
}

/// A file that holds whatever is to wait until it has gone.
pub(crate) fn hold_file(site: &Site) -> PathBuf {
    let hold = site.path("hold");
    std::fs::write(&hold, "").expect("writable");
    hold
}

/// Waits until something is held there.
pub(crate) fn wait_for_moment(at: &Recipient, moment: &str) {
    let line = format!("at=\"{moment}\"");
    wait_for(moment, || at.0.log().contains(&line).then_some(()));
}

pub(crate) async fn get(client: &mut RecipientServiceClient<Channel>, name: &str) -> Clone {
    let request = GetCloneRequest { name: name.to_owned() };
    client.get_clone(request).await.expect("it is known").into_inner().clone.expect("a clone")
}
