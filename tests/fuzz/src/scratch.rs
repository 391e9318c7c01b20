//! Files for parsers that open theirs by a path: in a directory of this process and target, below
//! TMPDIR, which `fuzz.sh` puts into memory and removes.

use std::{
    fs::{self, File, Permissions},
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    sync::{Mutex, OnceLock, PoisonError},
};

/// Of the target that runs; a program of one target alone has none.
static TARGET: Mutex<&str> = Mutex::new("");
static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();

/// Names the target that runs from now on: what a file is to one is a directory to another.
pub fn enter(target: &'static str) {
    *TARGET.lock().unwrap_or_else(PoisonError::into_inner) = target;
    fs::create_dir_all(directory()).expect("a directory for files");
}

/// The directory.
pub fn directory() -> PathBuf {
    let make = || {
        let directory = std::env::temp_dir().join(format!("marcot-fuzz-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory for files");
        directory
    };
    let target = *TARGET.lock().unwrap_or_else(PoisonError::into_inner);
    DIRECTORY.get_or_init(make).join(target)
}

/// A file of this content, which its owner alone may read.
pub fn file(name: &str, content: &[u8]) -> PathBuf {
    let path = directory().join(name);
    let mut file = File::create(&path).expect("room for a file");
    file.set_permissions(Permissions::from_mode(0o600)).expect("the owner may set a mode");
    file.write_all(content).expect("room for a file");
    path
}
