//! What the recipient does by itself beside clones: kept data and staged copies go when their time is
//! over, and a disk that fills up while old data are kept is told of (R12).

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use marcot_common::time;
use marcot_proto::recipient::v1 as pb;
use tracing::{info, warn};

use super::{Clones, installs::is_kept, refuse_if_busy, resumes::staged};

/// How often it is looked.
const LOOK_PAUSE: Duration = Duration::from_secs(5);

/// Free bytes in each thousand of a file system below which kept data are told of.
const FREE_PER_MILLE_MIN: u64 = 50;

impl Clones {
    /// Looks for as long as this process takes new clones.
    pub(super) async fn keep_up(self: Arc<Self>) {
        loop {
            self.remove_outlived().await;
            self.remove_aged().await;
            self.look_at_space();
            self.measure_space().await;
            tokio::select! {
                () = tokio::time::sleep(LOOK_PAUSE) => {}
                () = self.tasks.wait() => return,
            }
        }
    }

    /// Removes the old data of clones that were open for as long as these were to be kept. Where a clone
    /// has failed, or its server does not answer (one that cannot recover holds its locks each time that it
    /// tries), they may be wanted: they stay until somebody decides.
    async fn remove_outlived(self: &Arc<Self>) {
        let now = SystemTime::now();
        let installs: Vec<_> = {
            let table = self.lock();
            if refuse_if_busy(&table).is_err() {
                // It has the one place that removals run in.
                return;
            }
            let is_completed = |name: &str| {
                table.past.get(name).is_some_and(|clone| clone.state() == pb::State::Completed)
            };
            let completed = table.installs.iter().filter(|(name, _)| is_completed(name));
            completed.map(|(name, install)| (name.clone(), Arc::clone(install))).collect()
        };
        let is_over = |until: Option<SystemTime>| until.is_some_and(|until| until <= now);
        for (name, install) in installs {
            if !is_over(install.keep_until()) || !is_kept(&install) {
                continue;
            }
            if self.control.manages()
                && (install.server().is_none() || self.control.answers().await != Some(true))
            {
                continue;
            }
            info!(clone = %name, "the old data have been kept for their time, and go");
            if let Err(failure) = self.accept(&name).await {
                warn!(clone = %name, error = %failure, "the old data stay");
            }
        }
    }

    /// Removes what clones that failed have staged, once nobody has gone on with it for its time, and what a
    /// stop has left of cancelled ones.
    async fn remove_aged(self: &Arc<Self>) {
        let now = SystemTime::now();
        let keep = self.settings.install.keep_staging;
        let is_aged = |clone: &&pb::Clone| {
            let ended = clone.end_time.map(time::system_time);
            clone.state() == pb::State::Cancelled
                || (clone.state() == pb::State::Failed
                    && ended.is_some_and(|ended| ended + keep <= now))
        };
        let aged: Vec<_> = {
            let table = self.lock();
            if refuse_if_busy(&table).is_err() {
                // What runs may need it, and has the one place that removals run in.
                return;
            }
            let aged = table.past.values().filter(is_aged);
            aged.filter(|clone| !table.installs.contains_key(&clone.name))
                .filter(|clone| !table.away.contains(&clone.name))
                .filter(|clone| staged(clone).iter().any(|path| path.is_dir()))
                .map(|clone| clone.name.clone())
                .collect()
        };
        for name in aged {
            info!(clone = %name, "what it has staged is not kept any longer, and goes");
            let leftover = name.replacen("clones/", "leftovers/", 1);
            let clones = Arc::clone(self);
            let removed = crate::source::blocking(move || clones.remove_leftover(&leftover)).await;
            if let Err(failure) = removed {
                warn!(clone = %name, error = %failure, "what it has staged stays");
            }
        }
    }

    /// Nothing is deleted for it: that is a person's decision.
    fn look_at_space(&self) {
        let kept = {
            let table = self.lock();
            table.installs.values().find(|install| is_kept(install)).cloned()
        };
        let low = kept.and_then(|install| {
            let stat = rustix::fs::statvfs(&install.place.data_directory).ok()?;
            let is_low = stat.f_bavail < stat.f_blocks.saturating_mul(FREE_PER_MILLE_MIN) / 1000;
            is_low.then_some((install, stat.f_bavail.saturating_mul(stat.f_frsize)))
        });
        let was_low = self.space_is_low.swap(low.is_some(), Ordering::Relaxed);
        match low {
            Some((install, free)) if !was_low => warn!(
                clone = %install.plan.clone,
                free_bytes = free,
                old_data = %install.place.old_tree().display(),
                "the file system is nearly full while old data are kept: `marcot accept` removes them, \
                 `marcot rollback` brings them back"
            ),
            _ => {}
        }
    }

    /// Whether the file system is nearly full while old data are kept, for metrics.
    #[must_use]
    pub fn space_is_low(&self) -> bool {
        self.space_is_low.load(Ordering::Relaxed)
    }
}
