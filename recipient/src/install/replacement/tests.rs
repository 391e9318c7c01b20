use std::path::PathBuf;

use super::*;
use crate::{
    copy_journal::{
        CopyJournal,
        record::{Begun, SnapshotOpened},
    },
    install::recorded::all_recorded,
};

struct Ground {
    home: tempfile::TempDir,
    replacement: Replacement,
}

impl Ground {
    /// A data directory and a staged tree, at step `Staged`.
    fn new(form: Form) -> Self {
        let home = tempfile::tempdir().unwrap();
        let data = home.path().join("data");
        make_tree(&data, "old");
        let id = uuid::Uuid::now_v7().to_string();
        let place = Place::new(form, &data, &id);
        std::fs::create_dir_all(&place.staging).unwrap();
        make_tree(&place.new_tree(), "new");
        let wishes = Wishes {
            clone: id,
            waits: false,
            had_data: true,
            attaches: false,
            keep_old: Some(Duration::from_secs(60)),
        };
        Self { replacement: Replacement::create(place, &wishes, &Arc::default()).unwrap(), home }
    }

    fn data(&self) -> PathBuf {
        self.home.path().join("data")
    }

    fn mark(&self) -> String {
        std::fs::read_to_string(self.data().join("schema/t.ibd")).unwrap()
    }

    /// Somebody moves the data directory away and puts another in its place.
    fn swap_for_another(&self) {
        rustix::fs::rename(self.data(), self.home.path().join("moved")).unwrap();
        make_tree(&self.data(), "another");
    }
}

fn make_tree(path: &Path, mark: &str) {
    std::fs::create_dir_all(path.join("schema")).unwrap();
    for file in ["ibdata1", "schema/t.ibd"] {
        std::fs::write(path.join(file), mark).unwrap();
    }
}

/// Guards the only good tree: once somebody has moved the trees, nothing is moved or removed any
/// more, at whatever step and whoever asks.
#[test]
fn nothing_is_touched_where_trees_stand_as_no_step_has_put_them() {
    for opened in [false, true] {
        let ground = Ground::new(Form::Exchange);
        let install = &ground.replacement;
        install.put_in_place().unwrap();
        install.unlock_trees();
        if opened {
            install.record(Step::Opened).unwrap();
        }
        ground.swap_for_another();
        assert_eq!(install.action().unwrap(), Action::Refuse);
        for result in [install.put_back("REQUESTED"), install.accept(), install.let_go()] {
            assert_eq!(result.unwrap_err().reason, "TREES_MOVED");
        }
        assert_eq!(ground.mark(), "another");
        let kept = std::fs::read_to_string(install.place.old_tree().join("schema/t.ibd"));
        assert_eq!(kept.unwrap(), "old");
        assert_eq!(install.step(), if opened { Step::Opened } else { Step::InPlace });
    }
}

/// Guards the same against a person who has exchanged the trees by hand: the kept tree is the clone
/// then, and to accept would remove it under the old one's name.
#[test]
fn an_exchange_by_hand_is_noticed_before_anything_is_removed() {
    let ground = Ground::new(Form::Exchange);
    let install = &ground.replacement;
    install.put_in_place().unwrap();
    install.unlock_trees();
    install.record(Step::Opened).unwrap();
    trees::exchange(&ground.data(), &install.place.old_tree(), "").unwrap();
    for result in [install.accept(), install.let_go(), install.put_back("REQUESTED")] {
        assert_eq!(result.unwrap_err().reason, "TREES_MOVED");
    }
    assert!(install.place.old_tree().is_dir());
    assert_eq!(ground.mark(), "old");
}

#[test]
fn a_data_directory_that_has_gone_is_no_reason_to_remove_the_other_tree() {
    let ground = Ground::new(Form::Exchange);
    std::fs::remove_dir_all(ground.data()).unwrap();
    let install = &ground.replacement;
    assert_eq!(install.action().unwrap(), Action::Refuse);
    assert_eq!(install.let_go().unwrap_err().reason, "TREES_MOVED");
    assert!(install.place.new_tree().is_dir());
}

/// Guards a tree that a server runs on: it is not removed, whatever the journal says.
#[test]
fn a_tree_that_a_server_runs_on_is_not_removed() {
    for form in [Form::Exchange, Form::Move] {
        let ground = Ground::new(form);
        let install = &ground.replacement;
        install.put_in_place().unwrap();
        install.unlock_trees();
        install.record(Step::Opened).unwrap();
        let server = TreeLocks::take(&install.place.old_tree()).unwrap();
        assert_eq!(install.accept().unwrap_err().reason, "SERVER_RUNNING");
        assert!(install.place.old_tree().join("ibdata1").exists());
        drop(server);
        install.accept().unwrap();
        assert!(!install.place.staging.exists());
        assert_eq!(ground.mark(), "new");
    }
}

/// Guards the second try: what could not be locked leaves no lock of this process's behind.
#[test]
fn locks_that_could_not_be_had_are_not_in_the_way_of_a_second_try() {
    for form in [Form::Exchange, Form::Move] {
        let ground = Ground::new(form);
        let install = &ground.replacement;
        let server = TreeLocks::take(&install.place.new_tree()).unwrap();
        for _ in 0..2 {
            assert_eq!(install.put_in_place().unwrap_err().reason, "SERVER_RUNNING");
        }
        // Nothing has moved: no lock is needed to say so.
        install.put_back("REQUESTED").unwrap();
        assert_eq!((install.step(), ground.mark()), (Step::RolledBack, "old".to_owned()));
        drop(server);
        install.let_go().unwrap();
        assert_eq!(ground.mark(), "old");
    }
}

#[test]
fn what_is_noted_is_there_when_it_is_opened_again() {
    let Ground { home: _home, replacement } = Ground::new(Form::Move);
    replacement.put_in_place().unwrap();
    replacement.record(Step::Opened).unwrap();
    let until = replacement.keep_until().unwrap();
    assert_eq!(replacement.first_start(), FirstStart::Opened);
    replacement.note_replicates().unwrap();
    assert_eq!(replacement.first_start(), FirstStart::Replica);
    let place = replacement.place.clone();
    let data = place.data_directory.clone();
    assert!(all_recorded(&data).unwrap()[0].is_pending());
    drop(replacement);
    let again = Replacement::open(place, &Arc::default()).unwrap().unwrap();
    assert_eq!((again.step(), again.first_start()), (Step::Opened, FirstStart::Replica));
    let apart = until.duration_since(again.keep_until().unwrap()).unwrap_or_default();
    assert!(apart < Duration::from_secs(2));
    // A roll-back that could not begin records the step again; the time counts from the first.
    again.record(Step::Opened).unwrap();
    assert_eq!(again.keep_until().map(|t| t <= until), Some(true));
}

/// Guards a crash before the first record: what is there is a copy, not an install that nobody can
/// read.
#[test]
fn a_journal_has_its_name_once_it_tells_something() {
    let ground = Ground::new(Form::Exchange);
    let place = ground.replacement.place.clone();
    drop(ground.replacement);
    rustix::fs::rename(place.journal(), place.staging.join("journal-new")).unwrap();
    assert!(Place::all(&place.data_directory).is_empty());
    assert!(all(&place.data_directory, &Arc::default()).unwrap().is_empty());
}

/// Guards the data against half a clone: once one is given up, a start does not install what a stop has
/// left of it, also where it had not been touched when it was given up. (Without the step the next start
/// installs a tree of which half is gone.)
#[test]
fn what_was_given_up_is_never_installed() {
    for form in [Form::Exchange, Form::Move] {
        let ground = Ground::new(form);
        let install = &ground.replacement;
        assert_eq!(install.action().unwrap(), Action::Install);
        // Something keeps it from being removed to its end.
        let server = TreeLocks::take(&install.place.new_tree()).unwrap();
        assert_eq!(install.let_go().unwrap_err().reason, "SERVER_RUNNING");
        drop(server);
        let place = install.place.clone();
        drop(ground.replacement);
        let again = Replacement::open(place, &Arc::default()).unwrap().unwrap();
        assert_eq!(again.action().unwrap(), Action::LetGo);
        assert!(!again.is_pending());
        assert_eq!(again.put_in_place().unwrap_err().reason, "NOT_WAITING");
        again.let_go().unwrap();
        assert!(!again.place.staging.exists());
        let mark = std::fs::read_to_string(ground.home.path().join("data/schema/t.ibd"));
        assert_eq!(mark.unwrap(), "old");
    }
}

/// Guards the old data after an install that was neither made nor undone: it does not wait to be
/// installed again, for the journal would then say that the old tree stands, and what is given up
/// would be that tree.
#[test]
fn an_install_that_was_not_undone_does_not_wait_again() {
    let ground = Ground::new(Form::Move);
    let install = &ground.replacement;
    install.wait_again().unwrap();
    for step in [Step::Stopped, Step::SettingAside, Step::PuttingIn, Step::PuttingBack] {
        install.record(step).unwrap();
        assert_eq!(install.wait_again().unwrap_err().reason, "INSTALL_UNFINISHED");
        assert_eq!(install.step(), step);
    }
    install.record(Step::RolledBack).unwrap();
    install.wait_again().unwrap();
    assert_eq!((install.step(), install.action().unwrap()), (Step::Staged, Action::Install));
}

/// Guards a clone whose recipient was killed before its install's first record: it is begun again.
#[test]
fn an_install_begins_where_an_earlier_one_had_no_record() {
    let ground = Ground::new(Form::Exchange);
    let place = ground.replacement.place.clone();
    let wishes = Wishes {
        clone: ground.replacement.plan.clone.clone(),
        waits: false,
        had_data: true,
        attaches: false,
        keep_old: None,
    };
    drop(ground.replacement);
    rustix::fs::rename(place.journal(), place.staging.join("journal-new")).unwrap();
    let again = Replacement::create(place, &wishes, &Arc::default()).unwrap();
    assert_eq!(again.step(), Step::Staged);
}

/// Guards a recipient beside another one: the neighbour's install, whose journal its own recipient has
/// open, is nobody else's business.
#[test]
fn a_neighbours_install_is_passed_by() {
    let ground = Ground::new(Form::Exchange);
    let neighbour = ground.home.path().join("neighbour");
    make_tree(&neighbour, "another");
    let begun = std::time::Instant::now();
    assert!(all(&neighbour, &Arc::default()).unwrap().is_empty());
    assert!(begun.elapsed() < Duration::from_secs(1), "it has waited for the journal");
    let own = all(&ground.data(), &Arc::default()).unwrap_err();
    assert_eq!(own.reason, "JOURNAL_IN_USE");
}

/// Guards a recipient, and so its server, beside another one whose install cannot be read: the journal of
/// the copy says whose it is. Without that look the start of each of them ends in JOURNAL_CORRUPT.
#[test]
fn a_neighbours_install_that_cannot_be_read_is_passed_by() {
    let ground = Ground::new(Form::Exchange);
    let (place, data) = (ground.replacement.place.clone(), ground.data());
    let neighbour = ground.home.path().join("neighbour");
    make_tree(&neighbour, "another");
    drop(ground.replacement);
    let mut bytes = std::fs::read(place.journal()).unwrap();
    bytes[..16].fill(7);
    std::fs::write(place.journal(), bytes).unwrap();
    let of = |directory: &Path| all(directory, &Arc::default()).map(|found| found.len());
    assert!(of(&neighbour).is_err() && of(&data).is_err(), "it may be anybody's");
    let begun = Begun { target: data.as_os_str().as_bytes().to_vec(), ..Begun::default() };
    drop(CopyJournal::create(&place.staging, &begun, &SnapshotOpened::default()).unwrap());
    assert_eq!(of(&neighbour).unwrap(), 0);
    assert!(of(&data).is_err(), "its own is not lost sight of");
}

/// Guards the tree that a roll-back has set aside against an accept that comes late, and the old data
/// against the reverse: the journal would say that what stands has gone.
#[test]
fn what_was_rolled_back_is_not_accepted_and_what_was_accepted_is_not_let_go() {
    let ground = Ground::new(Form::Exchange);
    let install = &ground.replacement;
    install.put_in_place().unwrap();
    install.record(Step::Opened).unwrap();
    install.put_back("REQUESTED").unwrap();
    assert_eq!(install.step(), Step::RolledBack);
    assert_eq!(install.accept().unwrap_err().reason, "TREES_MOVED");
    assert_eq!(install.step(), Step::RolledBack);
    let ground = Ground::new(Form::Exchange);
    let install = &ground.replacement;
    install.put_in_place().unwrap();
    install.record(Step::Opened).unwrap();
    install.record(Step::Accepted).unwrap();
    assert_eq!(install.let_go().unwrap_err().reason, "TREES_MOVED");
    assert!(install.place.old_tree().is_dir());
    install.unlock_trees();
    install.accept().unwrap();
}

/// Guards the trees against a cut of power that no file system at hand makes: without any one of the syncs
/// of `trees`, of the journal's name, or of `sync_places`, what a record says of the trees may not stand.
#[test]
fn names_are_durable_before_anything_counts_on_them() {
    for form in [Form::Exchange, Form::Move] {
        drop(order::take());
        let ground = Ground::new(form);
        let install = &ground.replacement;
        install.put_in_place().unwrap();
        install.unlock_trees();
        install.record(Step::Opened).unwrap();
        install.put_back("REQUESTED").unwrap();
        let events = order::take();
        let appends = events.iter().filter(|e| format!("{e:?}").starts_with("Appended")).count();
        assert!(appends > 5 && format!("{events:?}").contains("Renamed"), "{events:?}");
        order::check(&events, &["aria_log_control", "ibdata1"]);
        assert_eq!(ground.mark(), "old");
    }
}

/// Guards what another process has moved just before the power was cut: its record is made here, once
/// the names are durable.
#[test]
fn what_a_crash_has_cut_is_durable_before_its_record() {
    let ground = Ground::new(Form::Exchange);
    let (install, data) = (&ground.replacement, ground.data());
    let places = [data.parent().unwrap().to_owned(), install.place.staging.clone()];
    let synced = |events: &[_]| places.iter().for_each(|p| order::synced_before_append(events, p));
    drop(order::take());
    install.put_back("REQUESTED").unwrap();
    synced(&order::take());
    let ground = Ground::new(Form::Exchange);
    let (install, data) = (&ground.replacement, ground.data());
    let places = [data.parent().unwrap().to_owned(), install.place.staging.clone()];
    install.record(Step::Stopped).unwrap();
    install.record(Step::Exchanging).unwrap();
    trees::exchange(&data, &install.place.new_tree(), "").unwrap();
    drop(order::take());
    install.note_in_place().unwrap();
    let events = order::take();
    places.iter().for_each(|place| order::synced_before_append(&events, place));
}

/// Guards that an install is seen from outside: each step once, with the time at the one before it,
/// but a wait for a person; and the roll-back with its reason.
#[test]
fn steps_and_roll_backs_are_counted() {
    let ground = Ground::new(Form::Exchange);
    let install = &ground.replacement;
    install.put_in_place().unwrap();
    install.record(Step::Opened).unwrap();
    install.put_back("REQUESTED").unwrap();
    let counts = &install.counts;
    for step in Step::ALL {
        let reached = !matches!(
            step,
            Step::SettingAside
                | Step::PuttingIn
                | Step::Started
                | Step::Healthy
                | Step::Accepted
                | Step::TakingOut
                | Step::PuttingBack
                | Step::LettingGo
        );
        let count = counts.install_steps.get_or_create(&[("step", step.name())]).get();
        assert_eq!(count, u64::from(reached), "{}", step.name());
    }
    let rolled_back = counts.rollbacks.get_or_create(&[("reason", "REQUESTED")]).get();
    assert_eq!(rolled_back, 1);
    let mut registry = prometheus_client::registry::Registry::default();
    registry.register("took", "How long", counts.install_step_durations.clone());
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for (step, count) in [("staged", Some(1)), ("exchanging", Some(1)), ("opened", None)] {
        let line = format!("took_count{{step=\"{step}\"}} ");
        let found = text.lines().find_map(|l| l.strip_prefix(&line)?.parse::<u32>().ok());
        assert_eq!(found, count, "{step}: {text}");
    }
}

/// Guards a server that was opened: it is not stopped again to be opened, and still started again where it
/// has not come up, also by a later process.
#[test]
fn a_server_that_was_opened_is_not_closed_and_may_be_away() {
    let Ground { home: _home, mut replacement } = Ground::new(Form::Exchange);
    replacement.note_open().unwrap();
    assert!(!replacement.is_away(), "it was never stopped for it");
    replacement.note_away().unwrap();
    replacement.put_in_place().unwrap();
    replacement.record(Step::Opened).unwrap();
    assert!(replacement.may_be_closed());
    replacement.note_open().unwrap();
    for _ in 0..2 {
        assert!(!replacement.may_be_closed());
        assert!(replacement.is_away() && replacement.is_reopened());
        let place = replacement.place.clone();
        drop(replacement);
        replacement = Replacement::open(place, &Arc::default()).unwrap().unwrap();
    }
}
