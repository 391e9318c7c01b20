//! A disk whose power can be cut. Needs root.

use std::path::{Path, PathBuf};

use crate::volume::{run, unmount};

/// An ext4 file system in an image on a file system that shares blocks, so that a copy of the image
/// at one moment is what a disk holds after a power cut at that moment.
#[derive(Debug)]
pub struct Disk {
    shared: PathBuf,
    /// The file system's image.
    pub image: PathBuf,
    /// Its copy of the moment of the cut.
    pub after: PathBuf,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    size: String,
}

impl Disk {
    /// A disk of `size`, as truncate takes it, not yet formatted; `backing` bytes hold it and its
    /// copies.
    #[must_use]
    pub fn new(home: &Path, size: &str, backing_size: &str) -> Self {
        let (backing, shared) = (home.join("backing.xfs"), home.join("shared"));
        let mount_point = home.join("volume");
        for directory in [&shared, &mount_point] {
            std::fs::create_dir_all(directory).expect("writable");
        }
        run("truncate", &["-s", backing_size, text(&backing)]);
        run("mkfs.xfs", &["-q", "-f", "-m", "reflink=1", text(&backing)]);
        run("mount", &["-o", "loop", text(&backing), text(&shared)]);
        let (image, after) = (shared.join("now.img"), shared.join("after.img"));
        Self { shared, image, after, mount_point, size: size.to_owned() }
    }

    /// Makes an empty file system, not mounted.
    pub fn format(&self) {
        self.unmount();
        drop(std::fs::remove_file(&self.image));
        drop(std::fs::remove_file(&self.after));
        run("truncate", &["-s", &self.size, text(&self.image)]);
        run("mkfs.ext4", &["-q", "-F", text(&self.image)]);
    }

    /// Mounts an image.
    pub fn mount(&self, image: &Path) {
        run("mount", &["-o", "loop", text(image), text(&self.mount_point)]);
    }

    /// What the disk holds at this moment.
    pub fn cut(&self) {
        run("cp", &["--reflink=always", text(&self.image), text(&self.after)]);
    }

    /// Unmounts it, once nobody uses it any more.
    pub fn unmount(&self) {
        // Processes that were killed may still be closing their files.
        unmount(&self.mount_point);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.unmount();
        run("umount", &[text(&self.shared)]);
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}
