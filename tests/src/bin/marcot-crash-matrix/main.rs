//! Kills a recipient that replaces a real server's data after every step of the install and at
//! random moments, and cuts its power, and looks at what stands there after the next start.
//!
//! `make crash-matrix` runs it. Settings come by the environment: KILLS (at random moments, in each
//! form), CUTS (of power, at random moments, in each form), SEED, FORMS, STEPS (names to look at), ENDS
//! (kill, cut), FILE_SYSTEM (whose power is cut: ext4, btrfs).
//!
//! In the forms `exchange` and `move` the recipient supervises the server. `hooks` and `person` are form
//! `exchange` with a server that commands stop and start, or a person: it outlives the recipient, which is
//! killed alone, after each step.
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

/// The server is stopped, and its data are about to go before the first byte comes: the clone goes on.
const DISCARD_STOPPED: &str = "discard_stopped";

/// Steps on the way to a clone that is open, by form, and what stands after a kill there: when a step is
/// recorded and nothing is done, when half of its entries have moved, when its rename is made and not
/// recorded.
const INSTALL: [(&str, &[(&str, &str)]); 4] = [
    (
        "exchange",
        &[
            ("staged", "new"),
            ("stopped", "old"),
            ("exchanging", "old"),
            ("exchanged", "new"),
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
            ("setting_aside_half", "old"),
            ("putting_in", "old"),
            ("putting_in_half", "old"),
            ("in_place", "new"),
            ("started", "new"),
            ("healthy", "new"),
            ("opened", "new"),
        ],
    ),
    (
        "hooks",
        &[
            (DISCARD_STOPPED, "new"),
            ("staged", "new"),
            ("server_stopped", "new"),
            ("stopped", "old"),
            ("exchanging", "old"),
            ("exchanged", "new"),
            ("in_place", "new"),
            ("server_started", "new"),
            ("started", "new"),
            ("healthy", "new"),
            ("opened", "new"),
            ("opening", "new"),
            ("server_open", "new"),
        ],
    ),
    (
        "person",
        &[
            ("staged", "new"),
            ("stopped", "old"),
            ("exchanging", "old"),
            ("exchanged", "new"),
            ("in_place", "new"),
        ],
    ),
];

/// Forms in which the recipient runs the server: it is killed with it, and its power is cut.
const SUPERVISED: [&str; 2] = ["exchange", "move"];

/// Steps after that, each with the call that leads there.
const AFTER: [(&str, &[(&str, &str)]); 4] = [
    (
        "exchange",
        &[
            ("accepted", "new"),
            ("exchanging_back", "old"),
            ("exchanged_back", "old"),
            ("rolled_back", "old"),
            ("letting_go", "old"),
        ],
    ),
    (
        "move",
        &[
            ("accepted", "new"),
            ("taking_out", "old"),
            ("taking_out_half", "old"),
            ("putting_back", "old"),
            ("putting_back_half", "old"),
            ("rolled_back", "old"),
            ("letting_go", "old"),
        ],
    ),
    (
        "hooks",
        &[
            ("accepted", "new"),
            ("stopped_for_roll_back", "new"),
            ("exchanging_back", "old"),
            ("exchanged_back", "old"),
            ("rolled_back", "old"),
            ("letting_go", "old"),
        ],
    ),
    (
        "person",
        &[
            ("accepted", "new"),
            ("exchanging_back", "old"),
            ("exchanged_back", "old"),
            ("rolled_back", "old"),
        ],
    ),
];

/// What is expected to stand where one tree is as right as the other.
const EITHER: &str = "either";

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
    let forms = setting("FORMS", "exchange,move,hooks,person");
    let ends = setting("ENDS", "kill,cut");
    let mut falls_short = false;
    let file_system = FileSystem::of(&setting("FILE_SYSTEM", "ext4"));
    for (name, end) in [("kill", End::Kill), ("cut", End::PowerCut)] {
        if !ends.contains(name) {
            continue;
        }
        let all = INSTALL.iter().map(|(form, _)| *form);
        for form in all.filter(|form| forms.split(',').any(|wanted| wanted == *form)) {
            let is_supervised = SUPERVISED.contains(&form);
            if end == End::PowerCut && !is_supervised {
                continue;
            }
            let end = if is_supervised { end } else { End::KillAlone };
            let ground = Ground::new(form, (end == End::PowerCut).then_some(file_system));
            let steps = of(&INSTALL, form).iter().chain(of(&AFTER, form));
            for &(step, expected) in steps.filter(|(step, _)| is_wanted(step)) {
                // A rename that no sync has followed is or is not there after a power cut.
                let is_either = step == "exchanged" && end == End::PowerCut;
                let expected = if is_either { EITHER } else { expected };
                let moment = Moment::Step(step);
                ground.run(&mut outcomes, end, moment, Some(expected), &mut random).await;
            }
            let (name, whole) = match end {
                End::PowerCut => ("CUTS", Duration::from_millis(4500)),
                _ => ("KILLS", Duration::from_millis(3500)),
            };
            let (mut counted, mut tried) = (0, 0);
            let count = if is_supervised { number(name, 0) } else { 0 };
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
            if counted < count {
                println!("{form}: {counted} of {count} {name} counted, in {tried} tries");
                falls_short = true;
            }
        }
    }
    outcomes.print();
    let is_spread = outcomes.spread();
    println!("right {}/{}", outcomes.right, outcomes.all);
    if outcomes.right == outcomes.all && outcomes.all > 0 && is_spread && !falls_short {
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
