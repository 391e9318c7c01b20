//! File systems in images, mounted for a test. Needs root.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::wait_for;

/// Runs a program of the system to its end.
pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}; `make test` installs it"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
}

/// Unmounts whatever is mounted there, once nobody uses it any more.
pub fn unmount(mount_point: &Path) {
    let mounts = || std::fs::read_to_string("/proc/self/mountinfo").expect("it is there");
    let is_mounted = || mounts().contains(&format!(" {} ", mount_point.display()));
    wait_for("a volume to be unmounted", || {
        if is_mounted() {
            drop(Command::new("umount").arg(mount_point).output());
        }
        (!is_mounted()).then_some(())
    });
}

/// Something that is mounted until it is dropped.
#[derive(Debug)]
pub struct Mounted {
    /// Where.
    pub mount_point: PathBuf,
}

impl Mounted {
    /// A new file system: `mkfs` is its program and arguments.
    #[must_use]
    pub fn image(mount_point: &Path, size: &str, mkfs: &[&str]) -> Self {
        let image = mount_point.with_extension("img");
        let image = image.to_str().expect("a plain path");
        run("truncate", &["-s", size, image]);
        run(mkfs[0], &[&mkfs[1..], &[image]].concat());
        std::fs::create_dir_all(mount_point).expect("writable");
        run("mount", &["-o", "loop", image, mount_point.to_str().expect("a plain path")]);
        Self { mount_point: mount_point.to_owned() }
    }

    /// A directory over itself: a mount point on the same file system.
    #[must_use]
    pub fn over_itself(directory: &Path) -> Self {
        let text = directory.to_str().expect("a plain path");
        run("mount", &["--bind", text, text]);
        Self { mount_point: directory.to_owned() }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.mount_point);
    }
}
