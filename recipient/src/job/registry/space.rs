//! What trees take on the disk: looked at beside the clones, for a walk may take seconds.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, PoisonError},
};

use super::{Clones, installs::is_kept};
use crate::{source::blocking, staging::allocated_bytes};

/// What was found at the last look.
#[derive(Debug, Clone, Default)]
pub struct Space {
    /// Trees that clones have staged and that none of them works on, by path. They do not change, so
    /// each is walked once.
    staged: BTreeMap<PathBuf, u64>,
    /// The same of data from before clones.
    old_data: BTreeMap<PathBuf, u64>,
    /// Free for the clone that runs.
    free: Option<u64>,
}

impl Space {
    /// What is staged, and nobody works on.
    #[must_use]
    pub fn staged_bytes(&self) -> u64 {
        self.staged.values().sum()
    }

    /// What is kept of the data from before clones.
    #[must_use]
    pub fn old_data_bytes(&self) -> u64 {
        self.old_data.values().sum()
    }

    /// What is free where the clone that runs is staged.
    #[must_use]
    pub fn free_bytes(&self) -> Option<u64> {
        self.free
    }
}

impl Clones {
    /// As at the last look.
    #[must_use]
    pub fn space(&self) -> Space {
        self.space.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks again.
    pub(super) async fn measure_space(self: &Arc<Self>) {
        let (clones, known) = (Arc::clone(self), self.space());
        let measured = blocking(move || Ok(clones.look_at_trees(known)));
        // The thread cannot fail; a process that ends needs no figures.
        if let Ok(space) = measured.await {
            *self.space.lock().unwrap_or_else(PoisonError::into_inner) = space;
        }
    }

    fn look_at_trees(&self, known: Space) -> Space {
        let mut found = Space::default();
        let (staged, old, parent) = {
            let table = self.lock();
            let running = table.running.clone();
            let running_id = running.as_ref().map(|running| running.id.as_str());
            let is_old = |id: &str| {
                table.installs.get(&format!("clones/{id}")).is_some_and(|install| is_kept(install))
            };
            let left = self.left(&table).into_iter();
            let left = left.filter(|(id, _)| Some(id.as_str()) != running_id);
            let (old, staged): (Vec<_>, Vec<_>) = left.partition(|(id, _)| is_old(id));
            let job = running.and_then(|running| running.job);
            (staged, old, job.map(|job| job.request.staging_parent()))
        };
        for (left, known, found) in
            [(staged, known.staged, &mut found.staged), (old, known.old_data, &mut found.old_data)]
        {
            for path in left.into_iter().flat_map(|(_, left)| left.directories) {
                let size = known.get(&path).copied();
                let size = size.unwrap_or_else(|| allocated_bytes(&path));
                found.insert(path, size);
            }
        }
        let stat = parent.and_then(|parent| rustix::fs::statvfs(&parent).ok());
        found.free = stat.map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize));
        found
    }
}
