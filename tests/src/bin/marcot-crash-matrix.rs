//! Kills a recipient that replaces a real server's data after every step of the install and at
//! random moments, and cuts its power, and looks at what stands there after the next start.
//!
//! `make crash-matrix` runs it. Settings come by the environment: KILLS (at random moments, in each
//! form), CUTS (of power, at random moments, in each form), SEED, FORMS, STEPS (names to look at).
//!
//! A kill is right when the server starts on one tree, all of it old or all of it new, as the rule of
//! its step says; every table is checked. A kill at a random moment counts when a clone or an install
//! ran; at least half of those must fall between an install's first and last step, and both trees must
//! come of them, in each form. The last line of standard output is `right K/K`.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a program of the tests")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use marcot_proto::recipient::v1::{
    AcceptCloneRequest, Clone, CloneOptions, GetCloneRequest, InstallStep, RollbackCloneRequest,
    State, recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{
    Recipient,
    bench::number,
    disk::Disk,
    killer::Blow,
    random::Random,
    recipient,
    site::{Site, copy_tree},
    volume::run,
};
use tonic::transport::Channel;

/// Rest at every step when the moment is random, so that most kills fall between two of them.
const STEP_PAUSE_MS: &str = "150";

/// So many kills at random moments must show both trees.
const MANY: u64 = 10;

/// Bytes of the file system whose power is cut.
const VOLUME_BYTES: &str = "300M";

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It and its server are killed.
    Kill,
    /// It is killed; its server is left to itself.
    KillAlone,
    /// The machine loses power.
    PowerCut,
}

/// When it ends.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// When this step is in the journal.
    Step(&'static str),
    /// So long after the clone was accepted.
    After(Duration),
}

#[derive(Default)]
struct Outcomes {
    right: u64,
    all: u64,
    /// At random moments, by how and form: all, and those between an install's first and last step.
    random: BTreeMap<(String, String), (u64, u64)>,
    /// By how it was ended, form and last step: old, new.
    table: BTreeMap<(String, String, String), (u64, u64)>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let seed = number("SEED", u64::from(std::process::id()));
    println!("SEED={seed}");
    let mut random = Random(seed);
    let mut outcomes = Outcomes::default();
    let wanted = std::env::var("STEPS").unwrap_or_default();
    let is_wanted = |step: &str| wanted.is_empty() || wanted.split(',').any(|name| name == step);
    let forms = std::env::var("FORMS").unwrap_or_else(|_| "exchange,move".to_owned());
    for end in [End::Kill, End::PowerCut] {
        for form in ["exchange", "move"].into_iter().filter(|form| forms.contains(form)) {
            let ground = Ground::new(form, end == End::PowerCut);
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
    println!("end  form  last step  old  new");
    let mut between = BTreeMap::<(String, String), (u64, u64)>::new();
    for ((end, form, step), (old, new)) in &outcomes.table {
        println!("{end:<10} {form:<9} {step:<16} {old:>4} {new:>4}");
        let sums = between.entry((end.clone(), form.clone())).or_default();
        sums.0 += old;
        sums.1 += new;
    }
    for ((end, form), (old, new)) in between {
        println!("{end:<10} {form:<9} {:<16} {old:>4} {new:>4}", "all");
    }
    let is_spread = outcomes.spread();
    println!("right {}/{}", outcomes.right, outcomes.all);
    if outcomes.right == outcomes.all && outcomes.all > 0 && is_spread {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

impl Outcomes {
    /// Whether random moments were where they had to be.
    fn spread(&self) -> bool {
        let mut is_spread = true;
        for ((how, form), (all, between)) in &self.random {
            println!("{how:<10} {form:<9} at random: {between} of {all} between two steps");
            let (mut old, mut new) = (0, 0);
            for ((end, of, _), counts) in &self.table {
                if of == form && (end == how || (how == "Kill" && end == "KillAlone")) {
                    old += counts.0;
                    new += counts.1;
                }
            }
            if between * 2 < *all || (*all >= MANY && (old == 0 || new == 0)) {
                println!("TOO FEW {how} {form}: {between} of {all} between, {old} old, {new} new");
                is_spread = false;
            }
        }
        is_spread
    }
}

fn of(
    table: &[(&'static str, &'static [(&'static str, &'static str)])],
    form: &str,
) -> &'static [(&'static str, &'static str)] {
    table.iter().find(|(name, _)| *name == form).map(|(_, steps)| *steps).unwrap()
}

/// Where all runs of one form happen: made once, and set back before each.
struct Ground {
    form: &'static str,
    site: Site,
    /// The old data, to set back from.
    saved: PathBuf,
    volume: Option<Disk>,
}

impl Ground {
    fn new(form: &'static str, on_volume: bool) -> Self {
        let mut site = Site::new();
        let saved = site.path("saved");
        copy_tree(&site.data, &saved);
        let volume = on_volume.then(|| Disk::new(site.home.path(), VOLUME_BYTES, "1500M"));
        if let Some(volume) = &volume {
            // In form `move` the data directory is the mount point itself.
            // The history lies beside it where there is room.
            (site.data, site.state) = match form {
                "move" => (volume.mount_point.clone(), site.path("state")),
                _ => (volume.mount_point.join("own"), volume.mount_point.join("state")),
            };
        }
        Self { form, site, saved, volume }
    }

    /// Sets the old data back, and forgets all clones.
    fn reset(&self) {
        if let Some(volume) = &self.volume {
            volume.format();
            volume.mount(&volume.image);
        }
        for path in self.site.leftovers() {
            drop(std::fs::remove_dir_all(path));
        }
        drop(std::fs::remove_dir_all(&self.site.state));
        if self.form == "move" && self.volume.is_some() {
            let from = self.saved.join(".");
            run("cp", &["-a", text(&from), text(&self.site.data)]);
        } else {
            drop(std::fs::remove_dir_all(&self.site.data));
            copy_tree(&self.saved, &self.site.data);
        }
        if self.volume.is_some() {
            // A cut of power must find old data that were durable before the clone began.
            run("sync", &["-f", text(&self.site.data)]);
        }
    }

    fn start(&self, environment: &[(&str, &str)]) -> Recipient {
        self.site.supervise_with(&["--install-form", self.form], environment)
    }

    /// One run; tells whether it counts.
    async fn run(
        &self,
        outcomes: &mut Outcomes,
        end: End,
        moment: Moment,
        expected: Option<&str>,
        random: &mut Random,
    ) -> bool {
        self.reset();
        let hold = self.site.path("hold");
        std::fs::write(&hold, "").unwrap();
        let wish = match moment {
            Moment::Step(step) => format!("{step}:{}", hold.display()),
            Moment::After(_) => String::new(),
        };
        let pause = if wish.is_empty() { STEP_PAUSE_MS } else { "0" };
        let environment = [("MARCOT_TEST_HOLD_AT", &*wish), ("MARCOT_TEST_STEP_PAUSE", pause)];
        let mut recipient_1 = self.start(&environment);
        let mut client = recipient(&recipient_1).await;
        let clone = self.site.begin(&mut client, CloneOptions::default()).await.unwrap();
        let begun = Instant::now();
        let call = match moment {
            Moment::Step(step) => {
                let call = self.lead_to(step, clone.name.clone(), client.clone());
                self.wait_for_step(&recipient_1, step).await;
                call
            }
            Moment::After(delay) => {
                // Some of them during a roll-back or an accept that follows at once.
                let after = ["rolled_back", "accepted", ""][random.below(3)];
                let call = self.lead_to(after, clone.name.clone(), client.clone());
                tokio::time::sleep(delay.saturating_sub(begun.elapsed())).await;
                call
            }
        };
        let runs = !call.is_finished() || self.runs(&mut client, &clone.name).await;
        let log = recipient_1.0.log();
        self.end(end, &mut recipient_1);
        drop(recipient_1);
        let steps = steps_in(&log);
        let last = steps.last().cloned().unwrap_or_else(|| "before".to_owned());
        drop(std::fs::remove_file(&hold));
        let verdict = self.look(&clone.name, &log).await;
        let key = (format!("{end:?}"), self.form.to_owned(), last.clone());
        if expected.is_none() {
            if !runs {
                // There was nothing to kill.
                return false;
            }
            let how = if end == End::PowerCut { "PowerCut" } else { "Kill" };
            let sums = outcomes.random.entry((how.to_owned(), self.form.to_owned())).or_default();
            sums.0 += 1;
            sums.1 += u64::from(!steps.is_empty());
        }
        outcomes.all += 1;
        match verdict {
            Ok(mark) if expected.is_none_or(|expected| expected == mark) => {
                outcomes.right += 1;
                let cell = outcomes.table.entry(key).or_default();
                if mark == "old" { cell.0 += 1 } else { cell.1 += 1 }
            }
            Ok(mark) => println!("WRONG {key:?}: {mark}, expected {expected:?}"),
            Err(why) => println!("WRONG {key:?}: {why}"),
        }
        true
    }

    /// Whether the clone has not come to its end.
    async fn runs(&self, client: &mut RecipientServiceClient<Channel>, name: &str) -> bool {
        let request = GetCloneRequest { name: name.to_owned() };
        let clone = client.get_clone(request).await.unwrap().into_inner().clone.unwrap();
        clone.state() == State::InProgress
    }

    /// Asks for what leads to a step after `opened`.
    fn lead_to(
        &self,
        step: &str,
        name: String,
        mut client: RecipientServiceClient<Channel>,
    ) -> tokio::task::JoinHandle<()> {
        let is_accept = step == "accepted";
        let is_back = of(&AFTER, self.form).iter().any(|(name, _)| *name == step) && !is_accept;
        tokio::spawn(async move {
            if !is_accept && !is_back {
                return;
            }
            loop {
                let request = GetCloneRequest { name: name.clone() };
                let Ok(answer) = client.get_clone(request).await else { return };
                if answer.into_inner().clone.unwrap().state() == State::Completed {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            // The answer may never come: that is what this is about.
            if is_accept {
                drop(client.accept_clone(AcceptCloneRequest { name }).await);
            } else {
                let request = RollbackCloneRequest { name, discard_writes: true };
                drop(client.rollback_clone(request).await);
            }
        })
    }

    async fn wait_for_step(&self, recipient: &Recipient, step: &str) {
        let line = format!("step=\"{step}\"");
        let begun = Instant::now();
        while !recipient.0.log().contains(&line) {
            assert!(begun.elapsed() < Duration::from_secs(60), "{step}: {}", recipient.0.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn end(&self, end: End, recipient: &mut Recipient) {
        if let (End::PowerCut, Some(volume)) = (end, &self.volume) {
            volume.cut();
        }
        let server = self.site.server_pid();
        recipient.0.kill();
        if end != End::KillAlone
            && let Some(pid) = server
        {
            Blow::Kill.strike(pid);
        }
        if let (End::PowerCut, Some(volume)) = (end, &self.volume) {
            volume.unmount();
            volume.mount(&volume.after);
        }
    }

    /// Starts again, and says which tree stands, or what is wrong.
    async fn look(&self, name: &str, log: &str) -> Result<String, String> {
        let mut recipient_2 = self.start(&[]);
        let mut client = recipient(&recipient_2).await;
        let clone = settled(&mut client, name).await?;
        self.site.wait_for_server();
        let mark = self.site.mark();
        let damaged = self.site.damaged_tables();
        if !damaged.is_empty() {
            return Err(damaged);
        }
        if mark != "old" && mark != "new" {
            return Err(mark);
        }
        if let Some(clone) = &clone {
            let state = clone.state();
            let agrees = match mark.as_str() {
                "old" => matches!(state, State::Failed | State::RolledBack | State::Cancelled),
                _ => state == State::Completed,
            };
            if !agrees {
                return Err(format!("{mark} stands and the clone says {state:?}\n{log}"));
            }
        }
        if let (Some(step), true) = (step_of(&clone), self.site.leftovers().is_empty()) {
            let keeps = matches!(step, InstallStep::InPlace | InstallStep::Opened);
            if keeps {
                return Err(format!("nothing is kept and the clone says {step:?}"));
            }
        }
        // What is kept is kept for a reason: the old data, or a clone that a person has given up.
        let left = self.site.leftovers();
        if left.len() > 1 {
            return Err(format!("{mark} stands and there is left: {left:?}"));
        }
        recipient_2.0.terminate();
        Ok(mark)
    }
}

/// Waits until nothing more becomes of the clone by itself.
async fn settled(
    client: &mut RecipientServiceClient<Channel>,
    name: &str,
) -> Result<Option<Clone>, String> {
    let begun = Instant::now();
    loop {
        let request = GetCloneRequest { name: name.to_owned() };
        let clone = match client.get_clone(request).await {
            Ok(answer) => answer.into_inner().clone.unwrap(),
            // A power cut may have taken a record that was not told to anybody yet.
            Err(status) if status.code() == tonic::Code::NotFound => return Ok(None),
            Err(status) => return Err(status.to_string()),
        };
        if clone.state() != State::InProgress {
            return Ok(Some(clone));
        }
        if begun.elapsed() > Duration::from_secs(60) {
            return Err(format!("it does not end: {clone:?}"));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn step_of(clone: &Option<Clone>) -> Option<InstallStep> {
    Some(clone.as_ref()?.install.as_ref()?.step())
}

/// The steps that a log tells of.
fn steps_in(log: &str) -> Vec<String> {
    log.lines()
        .filter(|line| line.contains("replacement: install"))
        .filter_map(|line| line.split_once("step=\"")?.1.split('"').next().map(str::to_owned))
        .collect()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
