//! Caps that follow the configuration file while the donor runs.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use clap::Error;
use marcot_common::{
    config::{Loaded, load},
    reloaded::{Changed, Reloaded},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Caps;
use crate::server::Settings;

/// Between two looks at the file: a person who has changed it waits no longer than that.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Options that take effect at once.
const LIVE: [&str; 2] = ["max-data-bandwidth", "max-network-bandwidth"];

/// Sets the caps to what the configuration says whenever its file has changed, until `stop`. Flags and
/// environment go before the file, as at the start. A file that has become wrong changes nothing.
pub async fn follow(caps: Arc<Caps>, file: PathBuf, stop: CancellationToken) {
    let read = || load::<Settings>(std::env::args_os(), |name| std::env::var_os(name));
    let configuration = match Reloaded::open(vec![file], read) {
        Ok(configuration) => Arc::new(configuration),
        Err(error) => {
            complain(&error);
            return;
        }
    };
    let started = configuration.last_right().0;
    let mut tick = tokio::time::interval(LOOK_INTERVAL);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let looks = Arc::clone(&configuration);
        let Ok((now, changed)) = tokio::task::spawn_blocking(move || looks.last_right()).await
        else {
            return;
        };
        match changed {
            Changed::No => {}
            Changed::Yes => apply(&caps, &started, &now),
            Changed::Wrong(error) => complain(&error),
        }
    }
}

fn complain(error: &Error) {
    let error = error.to_string();
    warn!(error = error.trim(), "the configuration file is wrong, the caps stay as they are");
}

fn apply(caps: &Caps, started: &Loaded<Settings>, now: &Loaded<Settings>) {
    let wanted = (now.args.max_data_bandwidth, now.args.max_network_bandwidth);
    if caps.bytes_per_second() != wanted {
        caps.set(wanted.0, wanted.1);
        info!(max_data_bandwidth = wanted.0, max_network_bandwidth = wanted.1, "caps changed");
    }
    let waiting = changed_keys(&started.effective, &now.effective);
    if !waiting.is_empty() {
        warn!(options = waiting.join(" "), "changed in the configuration file, and need a restart");
    }
}

/// Keys of which two configurations differ in their values, wherever these come from, but for those
/// that take effect at once.
fn changed_keys(then: &str, now: &str) -> Vec<String> {
    fn lines(text: &str) -> BTreeSet<&str> {
        text.lines().map(|line| line.rsplit_once("  # ").map_or(line, |(value, _)| value)).collect()
    }
    let (then, now) = (lines(then), lines(now));
    let keys = then.symmetric_difference(&now).filter_map(|line| {
        line.trim_start_matches("# ").split(' ').next().filter(|key| !LIVE.contains(key))
    });
    keys.map(str::to_owned).collect::<BTreeSet<_>>().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_needs_a_restart_is_named_once() {
        let then = "listen = \"a\"  # default\nmax-data-bandwidth = 0  # default\n# accounts is not set\n\
                    engine = \"files\"  # default\n";
        let now = "listen = \"b\"  # c.toml, line 1\nmax-data-bandwidth = 9  # c.toml, line 2\n\
                   accounts = \"f\"  # c.toml, line 3\nengine = \"files\"  # c.toml, line 4\n";
        assert_eq!(changed_keys(then, now), ["accounts", "listen"]);
        assert!(changed_keys(now, now).is_empty());
    }
}
