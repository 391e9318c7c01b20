//! Kills a recipient that replaces a real server's data after every step of the install and at
//! random moments, and cuts its power, and looks at what stands there after the next start.
//!
//! `make crash-matrix` runs it. Settings come by the environment: KILLS (at random moments, in each
//! form), CUTS (of power, at random moments, in each form), SEED, FORMS, STEPS (names to look at), ENDS
//! (kill, cut), FILE_SYSTEM (whose power is cut: ext4, btrfs).
//!
//! A kill is right when the server starts on one tree, all of it old or all of it new, as the rule of
//! its step says; every table is checked, and what an install adds to the tables (`standing`). A kill at
//! a random moment counts when a clone or an install ran; at least half of those must fall between an
//! install's first and last step, and both trees must come of them, in each form. The last line of
//! standard output is `right K/K`.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a program of the tests")]

mod ground;
mod outcomes;
mod standing;

use std::{process::ExitCode, time::Duration};

use marcot_tests::{bench::number, disk::FileSystem, random::Random};

use crate::{ground::Ground, outcomes::Outcomes};

/// Steps on the way to a clone that is open, by form, and what stands after a kill there.
const INSTALL: [(&str, &[(&str, &str)]); 2] = [
    (
        "exchange",
        &[
            ("staged", "new"),
            ("stopped", "old"),
            ("exchanging", "old"),
            ("in_place", "new"),
            ("started", "new"),
            ("healthy", "new"),
            ("opened", "new"),
        ],
    ),
    (
        "move",
        &[
            ("staged", "new"),
            ("stopped", "old"),
            ("setting_aside", "old"),
            ("putting_in", "old"),
            ("in_place", "new"),
            ("started", "new"),
            ("healthy", "new"),
            ("opened", "new"),
        ],
    ),
];

/// Steps after that, each with the call that leads there.
const AFTER: [(&str, &[(&str, &str)]); 2] = [
    ("exchange", &[("accepted", "new"), ("exchanging_back", "old"), ("rolled_back", "old")]),
    (
        "move",
        &[
            ("accepted", "new"),
            ("taking_out", "old"),
            ("putting_back", "old"),
            ("rolled_back", "old"),
        ],
    ),
];

/// How the recipient ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    /// It and its server are killed.
    Kill,
    /// It is killed; its server is left to itself.
    KillAlone,
    /// The machine loses power.
    PowerCut,
}

impl End {
    /// As it is counted at random moments.
    fn group(self) -> &'static str {
        match self {
            Self::Kill | Self::KillAlone => "killed",
            Self::PowerCut => "power cut",
        }
    }
}

/// When it ends.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// When this step is in the journal.
    Step(&'static str),
    /// So long after the clone was accepted.
    After(Duration),
}

#[tokio::main]
async fn main() -> ExitCode {
    let seed = number("SEED", u64::from(std::process::id()));
    println!("SEED={seed}");
    let mut random = Random(seed);
    let mut outcomes = Outcomes::default();
    let wanted = std::env::var("STEPS").unwrap_or_default();
    let is_wanted = |step: &str| wanted.is_empty() || wanted.split(',').any(|name| name == step);
    let setting = |name: &str, default: &str| {
        std::env::var(name)
            .ok()
            .filter(|text| !text.is_empty())
            .unwrap_or_else(|| default.to_owned())
    };
    let (forms, ends) = (setting("FORMS", "exchange,move"), setting("ENDS", "kill,cut"));
    let file_system = FileSystem::of(&setting("FILE_SYSTEM", "ext4"));
    for (name, end) in [("kill", End::Kill), ("cut", End::PowerCut)] {
        if !ends.contains(name) {
            continue;
        }
        for form in ["exchange", "move"].into_iter().filter(|form| forms.contains(form)) {
            let ground = Ground::new(form, (end == End::PowerCut).then_some(file_system));
            let steps = of(&INSTALL, form).iter().chain(of(&AFTER, form));
            for &(step, expected) in steps.filter(|(step, _)| is_wanted(step)) {
                let moment = Moment::Step(step);
                ground.run(&mut outcomes, end, moment, Some(expected), &mut random).await;
            }
            let (name, whole) = match end {
                End::PowerCut => ("CUTS", Duration::from_millis(4500)),
                _ => ("KILLS", Duration::from_millis(3500)),
            };
            let (mut counted, mut tried) = (0, 0);
            let count = number(name, 0);
            while counted < count && tried < count * 2 {
                tried += 1;
                let moment = Moment::After(whole.mul_f64(random.fraction()));
                let end = match end {
                    End::Kill if random.fraction() < 0.5 => End::KillAlone,
                    end => end,
                };
                if ground.run(&mut outcomes, end, moment, None, &mut random).await {
                    counted += 1;
                }
            }
        }
    }
    outcomes.print();
    let is_spread = outcomes.spread();
    println!("right {}/{}", outcomes.right, outcomes.all);
    if outcomes.right == outcomes.all && outcomes.all > 0 && is_spread {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn of(
    table: &[(&'static str, &'static [(&'static str, &'static str)])],
    form: &str,
) -> &'static [(&'static str, &'static str)] {
    table.iter().find(|(name, _)| *name == form).map(|(_, steps)| *steps).unwrap()
}
