//! The order in which names change and become durable, for tests to look at.
//!
//! A cut of power shows only some of what a missing fsync costs: ext4, XFS and btrfs keep the order of
//! renames of their own accord, and the next sync of any file takes earlier ones with it. So that order
//! is held against rules as well.

use std::path::Path;

#[cfg(test)]
pub(crate) use self::seen::{check, synced_before_append, take};

/// An entry has another name.
pub(crate) fn renamed(_from: &Path, _to: &Path) {
    #[cfg(test)]
    seen::note(seen::Event::Renamed(_from.to_owned(), _to.to_owned()));
}

/// A file or a directory was made.
pub(crate) fn made(_path: &Path) {
    #[cfg(test)]
    seen::note(seen::Event::Made(_path.to_owned()));
}

/// A directory was removed.
pub(crate) fn removed(_path: &Path) {
    #[cfg(test)]
    seen::note(seen::Event::Removed(_path.to_owned()));
}

/// What a file or a directory holds is durable.
pub(crate) fn synced(_path: &Path) {
    #[cfg(test)]
    seen::note(seen::Event::Synced(_path.to_owned()));
}

/// A journal has a record more, durable.
pub(crate) fn appended(_journal: &Path) {
    #[cfg(test)]
    seen::note(seen::Event::Appended(_journal.to_owned()));
}

#[cfg(test)]
mod seen {
    use std::{
        cell::RefCell,
        path::{Path, PathBuf},
    };

    #[derive(Debug, Clone, PartialEq, Eq)]
    pub(crate) enum Event {
        Renamed(PathBuf, PathBuf),
        Made(PathBuf),
        Removed(PathBuf),
        Synced(PathBuf),
        Appended(PathBuf),
    }

    thread_local! {
        static EVENTS: RefCell<Vec<Event>> = const { RefCell::new(Vec::new()) };
    }

    pub(super) fn note(event: Event) {
        EVENTS.with_borrow_mut(|events| events.push(event));
    }

    /// What this thread has done since it was asked last.
    pub(crate) fn take() -> Vec<Event> {
        EVENTS.take()
    }

    /// Fails where a name could be lost that something later counts on:
    /// * what was renamed or made is durable before the next record of the journal;
    /// * a directory is durable before an entry moves into it;
    /// * a guard is durable before another entry moves out of its directory, and all that has moved in is
    ///   before the guard goes.
    ///
    /// `guards` are the names of guards.
    pub(crate) fn check(events: &[Event], guards: &[&str]) {
        let is_guard = |path: &Path| guards.iter().any(|guard| path.ends_with(guard));
        for (at, event) in events.iter().enumerate() {
            let before = |end: usize, directory: &Path| {
                let synced = Event::Synced(directory.to_owned());
                assert!(
                    events[at..end].contains(&synced),
                    "{synced:?} after {event:?}: {events:#?}"
                );
            };
            let next = |is: &dyn Fn(&Event) -> bool| {
                events.iter().skip(at + 1).position(is).map(|found| at + 1 + found)
            };
            let append = next(&|e| matches!(e, Event::Appended(_))).unwrap_or(events.len());
            match event {
                Event::Renamed(from, to) => {
                    before(append, parent(from));
                    before(append, parent(to));
                    let goes = next(&|e| matches!(e, Event::Removed(g) if parent(g) == parent(to)));
                    if let Some(goes) = goes.filter(|_| !is_guard(to)) {
                        before(goes, parent(to));
                    }
                }
                Event::Made(path) => {
                    before(append, parent(path));
                    let uses = |e: &Event| match e {
                        Event::Renamed(from, to) => {
                            parent(to) == path
                                || (is_guard(path)
                                    && parent(from) == parent(path)
                                    && !is_guard(from))
                        }
                        _ => false,
                    };
                    if let Some(uses) = next(&uses) {
                        before(uses, parent(path));
                    }
                }
                _ => {}
            }
        }
    }

    /// Fails unless the directory was made durable before the first record of the journal.
    pub(crate) fn synced_before_append(events: &[Event], directory: &Path) {
        let append = events.iter().position(|e| matches!(e, Event::Appended(_)));
        let append = append.expect("a record");
        let synced = Event::Synced(directory.to_owned());
        assert!(events[..append].contains(&synced), "no {synced:?}: {events:#?}");
    }

    fn parent(path: &Path) -> &Path {
        path.parent().expect("below a test's directory")
    }
}
