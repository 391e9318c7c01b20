use std::path::PathBuf;

use super::*;
use crate::install::recorded::all_recorded;

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
        Self { replacement: Replacement::create(place, &wishes).unwrap(), home }
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
        for result in [install.put_back(), install.accept(), install.let_go()] {
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
    trees::exchange(&ground.data(), &install.place.old_tree()).unwrap();
    for result in [install.accept(), install.let_go(), install.put_back()] {
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
        install.put_back().unwrap();
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
    let again = Replacement::open(place).unwrap().unwrap();
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
    assert!(all(&place.data_directory).unwrap().is_empty());
}
