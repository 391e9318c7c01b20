//! A running clone on standard error: a bar on a terminal, plain lines elsewhere.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use marcot_common::shown::{self, clean};
use marcot_proto::{
    common::v1::Stage,
    recipient::v1::{Clone, StageProgress, State},
};

use crate::told;

/// Least time between two plain lines of one stage.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

/// Parts of a bar; the last one is reached only by the end.
const BAR_LENGTH: u64 = 10_000;

/// What is shown.
pub(super) struct Shown {
    bar: Option<ProgressBar>,
    last_line: Option<(i32, u32, Instant)>,
}

impl Shown {
    pub(super) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let target = ProgressDrawTarget::stderr();
            let bar = ProgressBar::with_draw_target(Some(BAR_LENGTH), target);
            let style = ProgressStyle::with_template("{prefix:11} [{bar:30}] {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Self { bar, last_line: None }
    }

    /// How often the clone is asked for.
    pub(super) fn interval(&self) -> Duration {
        if self.bar.is_some() { Duration::from_millis(250) } else { Duration::from_secs(1) }
    }

    pub(super) fn show(&mut self, clone: &Clone) {
        let Some(row) = running_row(clone) else { return };
        let text = describe(clone, row);
        if let Some(bar) = &self.bar {
            bar.set_prefix(shown::stage(row.stage));
            bar.set_message(text);
            bar.set_position(position(row));
            return;
        }
        let (stage, round, now) = (row.stage, row.round, Instant::now());
        let due = self.last_line.is_none_or(|(last_stage, last_round, at)| {
            (last_stage, last_round) != (stage, round) || now - at >= LINE_INTERVAL
        });
        if due {
            self.last_line = Some((stage, round, now));
            eprintln!("{}: {text}", shown::stage(row.stage));
        }
    }

    pub(super) fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    /// Nothing more will be shown, though the clone goes on.
    pub(super) fn leave(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    pub(super) fn finish(&self, clone: &Clone) {
        let Some(bar) = &self.bar else { return };
        if clone.state() == State::Completed {
            bar.set_position(BAR_LENGTH);
        }
        bar.finish_and_clear();
    }
}

fn running_row(clone: &Clone) -> Option<&StageProgress> {
    clone.stages.iter().find(|row| row.state() == State::InProgress)
}

/// Never the whole bar: the end of the last stage is the end of the clone.
fn position(row: &StageProgress) -> u64 {
    if row.stage() == Stage::FileSync {
        return BAR_LENGTH - 1;
    }
    if row.estimate_bytes == 0 {
        return 0;
    }
    let part = u128::from(row.data_bytes) * u128::from(BAR_LENGTH) / u128::from(row.estimate_bytes);
    u64::try_from(part).unwrap_or(BAR_LENGTH).min(BAR_LENGTH - 1)
}

fn describe(clone: &Clone, row: &StageProgress) -> String {
    if row.stage() == Stage::FileSync {
        return "making everything durable and checking it".to_owned();
    }
    let estimate = shown::bytes(row.estimate_bytes.max(row.data_bytes));
    let mut text = format!(
        "{} of {}{estimate}, {}/s",
        shown::bytes(row.data_bytes),
        if row.estimate_growing { "at least " } else { "" },
        shown::bytes(row.data_speed)
    );
    if row.round > 1 {
        text.push_str(&format!(", round {}", row.round));
    }
    if let Some(eta) = &clone.eta {
        text.push_str(&format!(", {} left", shown::seconds(eta.seconds.unsigned_abs())));
    }
    if let Some(effort) = told::effort(clone) {
        text.push_str(&format!(", {}", clean(&effort)));
    }
    if !clone.held_back_reason.is_empty() {
        text.push_str(&format!(", {}", clean(&clone.held_back_reason)));
    }
    if !clone.stall_reason.is_empty() {
        text.push_str(&format!(", {}", clean(&clone.stall_reason)));
    }
    text
}
