//! How long old data are kept.

use marcot_proto::recipient::v1::{GetCloneRequest, InstallStep, State};
use marcot_tests::{recipient, site::Site};

/// Guards the time to live: it counts from the opening, and a restart neither stops nor resets it.
#[tokio::test(flavor = "multi_thread")]
async fn old_data_go_when_their_time_is_over_also_after_a_restart() {
    let site = Site::new();
    let mut at = site.supervise(&["--keep-old-data", "4s"]);
    let (_, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    let install = clone.install.expect("an install");
    let until = install.keep_until.expect("a time");
    let opened = install.step_time.expect("a time");
    assert_eq!(until.seconds - opened.seconds, 4);
    assert_eq!(site.leftovers().len(), 1);
    at.0.kill();
    // A longer time is for later installs; this one's is in its journal.
    let at = site.supervise(&["--keep-old-data", "until-accepted"]);
    let mut client = recipient(&at).await;
    let begun = std::time::Instant::now();
    loop {
        let request = GetCloneRequest { name: clone.name.clone() };
        let now = client.get_clone(request).await.expect("it is known").into_inner();
        let step = now.clone.expect("a clone").install.expect("an install").step();
        if step == InstallStep::Accepted {
            break;
        }
        assert_eq!(step, InstallStep::Opened);
        assert!(begun.elapsed().as_secs() < 60, "the old data stay");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    assert!(now.as_secs() >= until.seconds.unsigned_abs(), "too early");
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
    assert_eq!(site.mark(), "new");
}
