//! How long old data are kept.

use std::time::{Duration, Instant, SystemTime};

use marcot_common::time;
use marcot_proto::recipient::v1::{
    InstallStep, State, recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{PATIENCE, killer::Blow, recipient, site::Site, wait_for};
use tonic::transport::Channel;

use crate::held::{Held, get};

async fn step_of(client: &mut RecipientServiceClient<Channel>, name: &str) -> InstallStep {
    get(client, name).await.install.expect("an install").step()
}

/// Guards the time to live: it counts from the opening, and a restart neither stops nor resets it.
#[tokio::test(flavor = "multi_thread")]
async fn old_data_go_when_their_time_is_over_also_after_a_restart() {
    let site = Site::new();
    let keep = Duration::from_secs(40);
    let mut at = site.supervise(&["--keep-old-data", "40s"]);
    let (_, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    let install = clone.install.expect("an install");
    let until = install.keep_until.expect("a time");
    let opened = install.step_time.expect("a time");
    let until = time::system_time(until);
    assert_eq!(until.duration_since(time::system_time(opened)).unwrap(), keep);
    assert_eq!(site.leftovers().len(), 1);
    // Shortly before its time: counted anew from the restart it would be nearly twice as long.
    let early = until - Duration::from_secs(1);
    std::thread::sleep(early.duration_since(SystemTime::now()).unwrap_or_default());
    at.0.kill();
    // A longer time is for later installs; this one's is in its journal.
    let at = site.supervise(&["--keep-old-data", "until-accepted"]);
    let mut client = recipient(&at).await;
    let begun = Instant::now();
    loop {
        let step = step_of(&mut client, &clone.name).await;
        if step == InstallStep::Accepted {
            break;
        }
        assert_eq!(step, InstallStep::Opened);
        assert!(begun.elapsed().as_secs() < 60, "the old data stay");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let late = SystemTime::now().duration_since(until).expect("too early");
    assert!(late < keep - Duration::from_secs(1), "{late:?} late: the time was counted anew");
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
    assert_eq!(site.mark(), "new");
}

/// Guards the old data against the end of their time while the new server cannot recover: it holds its
/// locks then and answers nobody. With the locks alone looked at they go.
#[tokio::test(flavor = "multi_thread")]
async fn old_data_stay_while_the_server_does_not_answer() {
    // Frozen before the clone has ended: until then nothing goes.
    let mut held = Held::at("server_open", &["--keep-old-data", "8s"]).await;
    let server = held.site.server_pid().expect("it runs");
    Blow::Freeze.strike(server);
    held.go_on();
    let clone = held.end().await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    let until = time::system_time(clone.install.expect("an install").keep_until.expect("a time"));
    let left = || until.duration_since(SystemTime::now());
    // Three looks after its end.
    let late = Duration::from_secs(15);
    std::thread::sleep(left().unwrap_or_default() + late);
    assert_eq!(held.site.leftovers().len(), 1, "the old data have gone");
    Blow::Thaw.strike(server);
    wait_for("the old data to go", || held.site.leftovers().is_empty().then_some(()));
    // It is told when they have gone.
    let begun = Instant::now();
    while step_of(&mut held.client, &clone.name).await != InstallStep::Accepted {
        assert!(begun.elapsed() < PATIENCE, "they have gone and are not accepted");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
