//! Kills a recipient that replaces a real server's data after every step of the install and at
//! random moments, and cuts its power, and looks at what stands there after the next start.
//!
//! `make crash-matrix` runs it. Settings come by the environment: KILLS (at random moments, in each
//! form), CUTS (of power, at random moments, in each form), SEED, FORMS, STEPS (names to look at).
//!
//! A kill is right when the server starts on one tree, all of it old or all of it new, as the rule of
//! its step says; every table is checked. The last line of standard output is `right K/K`.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a program of the tests")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use marcot_proto::recipient::v1::{
    AcceptCloneRequest, Clone, CloneOptions, GetCloneRequest, RollbackCloneRequest, State,
    recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{
    Recipient,
    bench::number,
    killer::Blow,
    recipient,
    site::{Site, copy_tree},
    volume::{run, unmount},
};
use tonic::transport::Channel;

/// Rest at every step when the moment is random, so that most kills fall between two of them.
const STEP_PAUSE_MS: &str = "150";

/// Bytes of the file system whose power is cut.
const VOLUME_BYTES: &str = "300M";

/// Steps on the way to a clone that is open, by form, and what stands after a kill there.
const INSTALL: [(&str, &[(&str, &str)]); 2] = [
    (
        "exchange",
        &[
            ("staged", "old"),
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
            ("staged", "old"),
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
    println!("right {}/{}", outcomes.right, outcomes.all);
    if outcomes.right == outcomes.all && outcomes.all > 0 {
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

/// Where all runs of one form happen: made once, and set back before each.
struct Ground {
    form: &'static str,
    site: Site,
    /// The old data, to set back from.
    saved: PathBuf,
    volume: Option<Volume>,
}

impl Ground {
    fn new(form: &'static str, on_volume: bool) -> Self {
        let mut site = Site::new();
        let saved = site.path("saved");
        copy_tree(&site.data, &saved);
        let volume = on_volume.then(|| Volume::new(site.home.path()));
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
        match moment {
            Moment::Step(step) => {
                let call = self.lead_to(step, clone.name.clone(), client.clone());
                self.wait_for_step(&recipient_1, step).await;
                drop(call);
            }
            Moment::After(delay) => {
                // Some of them during a roll-back or an accept that follows at once.
                let after = ["rolled_back", "accepted", ""][random.below(3)];
                drop(self.lead_to(after, clone.name.clone(), client.clone()));
                tokio::time::sleep(delay.saturating_sub(begun.elapsed())).await;
            }
        }
        let log = recipient_1.0.log();
        self.end(end, &mut recipient_1);
        drop(recipient_1);
        let steps = steps_in(&log);
        let last = steps.last().cloned().unwrap_or_else(|| "before".to_owned());
        drop(std::fs::remove_file(&hold));
        let verdict = self.look(&clone.name, &log).await;
        let key = (format!("{end:?}"), self.form.to_owned(), last.clone());
        // Before the first step there is no install to kill.
        let counts = !steps.is_empty();
        if expected.is_none() && !counts {
            return false;
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
        if let Some(clone) = clone {
            let state = clone.state();
            let agrees = match mark.as_str() {
                "old" => matches!(state, State::Failed | State::RolledBack | State::Cancelled),
                _ => state == State::Completed,
            };
            if !agrees {
                return Err(format!("{mark} stands and the clone says {state:?}\n{log}"));
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

/// The steps that a log tells of.
fn steps_in(log: &str) -> Vec<String> {
    log.lines()
        .filter(|line| line.contains("replacement: install"))
        .filter_map(|line| line.split_once("step=\"")?.1.split('"').next().map(str::to_owned))
        .collect()
}

/// An ext4 file system in an image on a file system that shares blocks, so that a copy of the image
/// at one moment is what a disk holds after a power cut at that moment.
struct Volume {
    shared: PathBuf,
    image: PathBuf,
    after: PathBuf,
    mount_point: PathBuf,
}

impl Volume {
    fn new(home: &Path) -> Self {
        let (backing, shared) = (home.join("backing.xfs"), home.join("shared"));
        let mount_point = home.join("volume");
        for directory in [&shared, &mount_point] {
            std::fs::create_dir_all(directory).unwrap();
        }
        run("truncate", &["-s", "1500M", text(&backing)]);
        run("mkfs.xfs", &["-q", "-m", "reflink=1", text(&backing)]);
        run("mount", &["-o", "loop", text(&backing), text(&shared)]);
        let (image, after) = (shared.join("now.img"), shared.join("after.img"));
        Self { shared, image, after, mount_point }
    }

    fn format(&self) {
        self.unmount();
        drop(std::fs::remove_file(&self.image));
        drop(std::fs::remove_file(&self.after));
        run("truncate", &["-s", VOLUME_BYTES, text(&self.image)]);
        run("mkfs.ext4", &["-q", "-F", text(&self.image)]);
    }

    fn mount(&self, image: &Path) {
        run("mount", &["-o", "loop", text(image), text(&self.mount_point)]);
    }

    /// What the disk holds at this moment.
    fn cut(&self) {
        run("cp", &["--reflink=always", text(&self.image), text(&self.after)]);
    }

    fn unmount(&self) {
        // Processes that were killed may still be closing their files.
        unmount(&self.mount_point);
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.unmount();
        run("umount", &[text(&self.shared)]);
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A small generator whose numbers follow from its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }
}
