//! Stops an install at a step, for tests that look at it there.

use std::{path::Path, time::Duration};

use tracing::warn;

/// Holds an install at a step that is in the journal and not acted on, for tests that kill the
/// recipient there: `STEP:FILE`, which waits until FILE has gone.
const HOLD_VARIABLE: &str = "MARCOT_TEST_HOLD_AT";

/// Milliseconds of rest at every step, for tests that kill the recipient at any moment.
const PAUSE_VARIABLE: &str = "MARCOT_TEST_STEP_PAUSE";

/// Waits where a test has asked for it, on the calling thread.
pub fn hold(at: &str) {
    let pause = std::env::var(PAUSE_VARIABLE).ok().and_then(|text| text.parse().ok());
    std::thread::sleep(Duration::from_millis(pause.unwrap_or(0)));
    let Ok(wish) = std::env::var(HOLD_VARIABLE) else { return };
    let Some((name, file)) = wish.split_once(':') else { return };
    if name != at {
        return;
    }
    warn!(at, "held by {HOLD_VARIABLE}");
    while Path::new(file).exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
}
