//! Where kills happen, and how.

use std::{
    any::Any,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use futures::FutureExt as _;
use marcot_proto::recipient::v1::{
    AcceptCloneRequest, Clone, CloneOptions, DeleteLeftoverRequest, GetCloneRequest,
    InstallCloneRequest, InstallStep, RollbackCloneRequest, State,
    recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{
    Recipient,
    disk::{Disk, FileSystem},
    killer::Blow,
    random::Random,
    recipient,
    site::{Site, copy_tree},
    volume::run,
    wait_for,
};
use tonic::transport::Channel;

use crate::{
    AFTER, DISCARD_STOPPED, End, Moment, of,
    outcomes::{BEFORE, Outcomes},
    standing,
};

/// Rest at every step when the moment is random, so that most kills fall between two of them.
const STEP_PAUSE_MS: &str = "150";

/// Longest start of the server after that: its recovery takes a second.
const ANSWER_MAX: Duration = Duration::from_secs(90);

/// Bytes of the file system whose power is cut, and of what holds it and its copy.
fn sizes(file_system: FileSystem) -> (&'static str, &'static str) {
    match file_system {
        FileSystem::Ext4 => ("300M", "1500M"),
        // It has two copies of its metadata, and sets room aside in large pieces.
        FileSystem::Btrfs => ("1G", "3G"),
    }
}

/// Where all runs of one form happen: made once, and set back before each.
pub(crate) struct Ground {
    form: &'static str,
    site: Site,
    /// The old data, to set back from.
    saved: PathBuf,
    volume: Option<Disk>,
}

impl Ground {
    pub(crate) fn new(form: &'static str, file_system: Option<FileSystem>) -> Self {
        let mut site = Site::with_donor_changed_by(standing::prepare_donor);
        standing::prepare_old(&site.data);
        let saved = site.path("saved");
        copy_tree(&site.data, &saved);
        let volume = file_system.map(|file_system| {
            let (size, backing_size) = sizes(file_system);
            Disk::with(site.home.path(), file_system, size, backing_size)
        });
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
        self.site.end_servers();
        wait_for("the servers to end", || self.site.server_pid().is_none().then_some(()));
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

    /// Starts the server, and a recipient.
    fn start(&self, environment: &[(&str, &str)]) -> Recipient {
        match self.form {
            "hooks" => {
                self.site.start_server();
                self.site.with_hooks(&[], environment)
            }
            "person" => {
                self.site.start_server();
                self.site.unmanaged(&[], environment)
            }
            form => self.site.supervise_with(&["--install-form", form], environment),
        }
    }

    /// Starts a recipient after one that was killed.
    fn start_again(&self) -> Recipient {
        match self.form {
            "hooks" => self.site.with_hooks(&[], &[]),
            "person" => self.site.unmanaged(&[], &[]),
            form => self.site.supervise_stopped(&["--install-form", form]),
        }
    }

    /// One run; tells whether it counts.
    pub(crate) async fn run(
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
        let discard_old_data_first = matches!(moment, Moment::Step(DISCARD_STOPPED));
        let options = CloneOptions { discard_old_data_first, ..Default::default() };
        let clone = self.site.begin(&mut client, options).await.unwrap();
        let begun = Instant::now();
        let call = match moment {
            Moment::Step(step) => {
                if self.installs(step) {
                    let waiting = settled(&mut client, &clone.name).await.unwrap();
                    assert_eq!(waiting.map(|clone| clone.state()), Some(State::AwaitingInstall));
                    self.site.shut_server_down();
                }
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
        let last = match moment {
            Moment::Step(step) => step,
            Moment::After(_) => steps.last().map_or(BEFORE, String::as_str),
        };
        drop(std::fs::remove_file(&hold));
        // A recipient or a server that does not come up is what this is about, and no end of it.
        let verdict = AssertUnwindSafe(self.look(&clone.name, &log)).catch_unwind().await;
        let verdict = verdict.unwrap_or_else(|panic| Err(said(&*panic)));
        if expected.is_none() {
            if !runs {
                // There was nothing to kill.
                return false;
            }
            outcomes.at_random(end, self.form, !steps.is_empty());
        }
        outcomes.take(end, self.form, last, expected, verdict);
        true
    }

    /// Whether the clone has not come to its end.
    async fn runs(&self, client: &mut RecipientServiceClient<Channel>, name: &str) -> bool {
        let request = GetCloneRequest { name: name.to_owned() };
        let clone = client.get_clone(request).await.unwrap().into_inner().clone.unwrap();
        clone.state() == State::InProgress
    }

    /// Whether a person has to install the clone to come to a step.
    fn installs(&self, step: &str) -> bool {
        self.form == "person" && step != "staged"
    }

    /// Asks for what leads to a step after `opened`, or to one of a person's install.
    fn lead_to(
        &self,
        step: &str,
        name: String,
        mut client: RecipientServiceClient<Channel>,
    ) -> tokio::task::JoinHandle<()> {
        let is_accept = step == "accepted";
        let is_back = of(&AFTER, self.form).iter().any(|(name, _)| *name == step) && !is_accept;
        let is_let_go = step == "letting_go";
        let installs = self.installs(step);
        tokio::spawn(async move {
            if installs {
                drop(client.install_clone(InstallCloneRequest { name: name.clone() }).await);
            }
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
                let leftover = name.replacen("clones/", "leftovers/", 1);
                let request = RollbackCloneRequest { name, discard_writes: true };
                let answer = client.rollback_clone(request).await;
                if answer.is_ok() && is_let_go {
                    let request = DeleteLeftoverRequest { name: leftover };
                    drop(client.delete_leftover(request).await);
                }
            }
        })
    }

    async fn wait_for_step(&self, recipient: &Recipient, step: &str) {
        let lines = [format!("step=\"{step}\""), format!("at=\"{step}\"")];
        let begun = Instant::now();
        while !lines.iter().any(|line| recipient.0.log().contains(line)) {
            assert!(begun.elapsed() < Duration::from_secs(300), "{step}: {}", recipient.0.log());
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
        let mut recipient_2 = self.start_again();
        let mut client = recipient(&recipient_2).await;
        let mut clone = settled(&mut client, name).await?;
        if self.form == "person" {
            self.act(&mut client, &mut clone).await?;
        }
        self.site.wait_for_server_within(ANSWER_MAX)?;
        let mark = self.site.mark();
        let damaged = self.site.damaged_tables();
        if !damaged.is_empty() {
            return Err(damaged);
        }
        if !self.site.takes_connections() {
            return Err(format!("{mark} stands, and its server is closed"));
        }
        let told = self.site.told();
        if told.contains("twice") {
            return Err(format!("a server that ran was started: {told}"));
        }
        let id = name.rsplit('/').next().unwrap_or_default();
        standing::check(&self.site, &self.saved, &mark, id)?;
        let came_to = |step: &str| log.contains(&format!("step=\"{step}\""));
        if let Some(clone) = &clone {
            let state = clone.state();
            let agrees = match mark.as_str() {
                // Once it was open only a person brings the old data back.
                "old" if came_to(self.proven()) => state == State::RolledBack,
                "old" => state == State::Failed,
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
        // What is kept is kept for a reason: the old data until they are accepted, or a clone that was
        // open when a person gave it up.
        let left = self.site.leftovers();
        let keeps = match mark.as_str() {
            "new" => !came_to("accepted") && !log.contains(DISCARD_STOPPED),
            _ => came_to(self.proven()) && !came_to("letting_go"),
        };
        // With the power a record may have gone that was told to nobody: what was staged is nobody's then.
        let is_unknown = clone.is_none() && left.len() <= 1;
        if left.len() != usize::from(keeps) && !is_unknown {
            return Err(format!(
                "{mark} stands, one is kept: {keeps}, and there is left: {left:?}"
            ));
        }
        recipient_2.0.terminate();
        Ok(mark)
    }

    /// The step from which on somebody may have written to the clone.
    fn proven(&self) -> &'static str {
        if self.form == "person" { "in_place" } else { "opened" }
    }

    /// What a person does: installs a clone that waits, and starts the server.
    async fn act(
        &self,
        client: &mut RecipientServiceClient<Channel>,
        clone: &mut Option<Clone>,
    ) -> Result<(), String> {
        if let Some(waiting) = clone.take_if(|clone| clone.state() == State::AwaitingInstall) {
            self.site.shut_server_down();
            let answer = client.install_clone(InstallCloneRequest { name: waiting.name }).await;
            *clone = answer.map_err(|status| status.to_string())?.into_inner().clone;
        }
        if self.site.server_pid().is_none() {
            self.site.start_server();
        }
        Ok(())
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
        if begun.elapsed() > Duration::from_secs(300) {
            return Err(format!("it does not end: {clone:?}"));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What a panic has said.
fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it stopped").lines().next().unwrap_or_default().to_owned()
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
