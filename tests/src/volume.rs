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
        let volume = Self { mount_point: mount_point.to_owned() };
        volume.mount_image();
        volume
    }

    fn mount_image(&self) {
        let image = self.mount_point.with_extension("img");
        run("mount", &["-o", "loop", text(&image), text(&self.mount_point)]);
    }

    /// From now on an ext4 can only be read, whatever is open on it: as after an error of its disk. What it
    /// has not synced is lost.
    pub fn make_read_only(&self) {
        run("mount", &["-o", "remount,abort", text(&self.mount_point)]);
    }

    /// Mounts an image anew, to be written again.
    pub fn mount_again(&self) {
        unmount(&self.mount_point);
        self.mount_image();
    }

    /// A directory over itself: a mount point on the same file system.
    #[must_use]
    pub fn over_itself(directory: &Path) -> Self {
        run("mount", &["--bind", text(directory), text(directory)]);
        Self { mount_point: directory.to_owned() }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.mount_point);
    }
}

/// A file that can be neither moved nor removed until this is dropped.
#[derive(Debug)]
pub struct Immutable {
    file: PathBuf,
}

impl Immutable {
    /// Makes a file so.
    #[must_use]
    pub fn new(file: &Path) -> Self {
        run("chattr", &["+i", text(file)]);
        Self { file: file.to_owned() }
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        // A test that has failed has said why; nothing else could remove its directory.
        drop(Command::new("chattr").arg("-i").arg(&self.file).output());
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}
