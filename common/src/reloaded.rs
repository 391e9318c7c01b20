//! Files that are read again when they have changed, also when a link on their way was exchanged,
//! as Kubernetes does with the files of a Secret.

use std::{
    fmt, fs,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

/// What changes when a file is replaced or written: inode, time of its last change, size; `None`
/// while it is not there.
type Stamp = Option<(u64, i64, i64, u64)>;

/// What was read from some files.
pub struct Reloaded<T, E> {
    paths: Vec<PathBuf>,
    read: Box<dyn Fn() -> Result<T, E> + Send + Sync>,
    loaded: Mutex<Loaded<T>>,
}

struct Loaded<T> {
    value: Arc<T>,
    /// Of the files that `value` was read from.
    stamps: Vec<Stamp>,
    /// Of the files that were found wrong, so that they are read and complained of once.
    wrong: Option<Vec<Stamp>>,
}

impl<T, E> fmt::Debug for Reloaded<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reloaded").field(&self.paths).finish()
    }
}

impl<T, E> Reloaded<T, E> {
    /// Reads the files, which must be right at the start.
    pub fn open(
        paths: Vec<PathBuf>,
        read: impl Fn() -> Result<T, E> + Send + Sync + 'static,
    ) -> Result<Self, E> {
        // Before the files: a change that comes in between is seen the next time.
        let stamps = stamps(&paths);
        let value = Arc::new(read()?);
        let loaded = Mutex::new(Loaded { value, stamps, wrong: None });
        Ok(Self { paths, read: Box::new(read), loaded })
    }

    /// A value of no file, which never changes.
    pub fn fixed(value: T) -> Self
    where
        T: Clone + Send + Sync + 'static,
    {
        let again = value.clone();
        let loaded = Loaded { value: Arc::new(value), stamps: Vec::new(), wrong: None };
        Self {
            paths: Vec::new(),
            read: Box::new(move || Ok(again.clone())),
            loaded: Mutex::new(loaded),
        }
    }

    /// What the files say now; files that have become wrong are an error.
    pub fn current(&self) -> Result<Arc<T>, E> {
        let now = stamps(&self.paths);
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.stamps != now {
            *loaded = Loaded { value: Arc::new((self.read)()?), stamps: now, wrong: None };
        }
        Ok(Arc::clone(&loaded.value))
    }

    /// What the files said when they were last right, and what is wrong with them, once.
    pub fn last_right(&self) -> (Arc<T>, Changed<E>) {
        let now = stamps(&self.paths);
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.stamps == now || loaded.wrong.as_ref() == Some(&now) {
            return (Arc::clone(&loaded.value), Changed::No);
        }
        let changed = match (self.read)() {
            Ok(value) => {
                *loaded = Loaded { value: Arc::new(value), stamps: now, wrong: None };
                Changed::Yes
            }
            Err(error) => {
                loaded.wrong = Some(now);
                Changed::Wrong(error)
            }
        };
        (Arc::clone(&loaded.value), changed)
    }
}

/// Whether files have changed since they were last looked at.
#[derive(Debug, PartialEq, Eq)]
pub enum Changed<E> {
    /// They have not, or this was told before.
    No,
    /// They have, and were read.
    Yes,
    /// They have, and are wrong.
    Wrong(E),
}

fn stamps(paths: &[PathBuf]) -> Vec<Stamp> {
    let stamp = |path: &PathBuf| {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.ino(), metadata.ctime(), metadata.ctime_nsec(), metadata.size()))
    };
    paths.iter().map(stamp).collect()
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, path::Path};

    use super::*;

    fn number(path: &Path) -> Reloaded<u32, String> {
        let file = path.to_owned();
        let read = move || fs::read_to_string(&file).unwrap_or_default().trim().parse::<u32>();
        Reloaded::open(vec![path.to_owned()], move || read().map_err(|e| e.to_string())).unwrap()
    }

    /// Guards the swap of a link, by which Kubernetes changes all files of a Secret at once.
    #[test]
    fn an_exchanged_link_is_a_change() {
        let home = tempfile::tempdir().unwrap();
        let path = |name: &str| home.path().join(name);
        for (name, text) in [("v1", "1"), ("v2", "2")] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("n"), text).unwrap();
        }
        symlink("v1", path("..data")).unwrap();
        symlink("..data/n", path("n")).unwrap();
        let file = number(&path("n"));
        assert_eq!((*file.current().unwrap(), file.last_right().1), (1, Changed::No));
        symlink("v2", path("..data_tmp")).unwrap();
        rustix::fs::rename(path("..data_tmp"), path("..data")).unwrap();
        assert_eq!((*file.last_right().0, *file.current().unwrap()), (2, 2));
    }

    #[test]
    fn files_that_become_wrong_are_an_error_or_keep_what_was_right_as_is_asked() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("n");
        fs::write(&path, "1").unwrap();
        let file = number(&path);
        fs::write(&path, "one").unwrap();
        file.current().unwrap_err();
        let (value, changed) = file.last_right();
        assert!(*value == 1 && matches!(changed, Changed::Wrong(_)), "{changed:?}");
        assert_eq!(file.last_right().1, Changed::No, "told once");
        fs::remove_file(&path).unwrap();
        file.current().unwrap_err();
        assert!(matches!(file.last_right().1, Changed::Wrong(_)));
        fs::write(&path, "22").unwrap();
        let (value, changed) = file.last_right();
        assert_eq!((*value, changed), (22, Changed::Yes));
    }
}
