//! A disk whose power can be cut. Needs root.

use std::path::{Path, PathBuf};

use crate::volume::{run, unmount};

/// What is on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// Whatever is synced takes all names and attributes from before it along.
    Ext4,
    /// What is synced comes alone: nothing else is durable by it.
    Btrfs,
}

impl FileSystem {
    /// By its name.
    #[must_use]
    pub fn of(name: &str) -> Self {
        match name {
            "ext4" => Self::Ext4,
            "btrfs" => Self::Btrfs,
            other => panic!("FILE_SYSTEM is '{other}', ext4 and btrfs are there"),
        }
    }

    fn mkfs(self) -> &'static [&'static str] {
        match self {
            Self::Ext4 => &["mkfs.ext4", "-q", "-F"],
            Self::Btrfs => &["mkfs.btrfs", "-q", "-f"],
        }
    }
}

/// A file system in an image on a file system that shares blocks, so that a copy of the image at one
/// moment is what a disk holds after a power cut at that moment.
#[derive(Debug)]
pub struct Disk {
    file_system: FileSystem,
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
    /// An ext4 disk of `size`, as truncate takes it, not yet formatted; `backing` bytes hold it and its
    /// copies.
    #[must_use]
    pub fn new(home: &Path, size: &str, backing_size: &str) -> Self {
        Self::with(home, FileSystem::Ext4, size, backing_size)
    }

    /// As `new`, with another file system.
    #[must_use]
    pub fn with(home: &Path, file_system: FileSystem, size: &str, backing_size: &str) -> Self {
        let (backing, shared) = (home.join("backing.xfs"), home.join("shared"));
        let mount_point = home.join("volume");
        for directory in [&shared, &mount_point] {
            std::fs::create_dir_all(directory).expect("writable");
        }
        run("truncate", &["-s", backing_size, text(&backing)]);
        run("mkfs.xfs", &["-q", "-f", "-m", "reflink=1", text(&backing)]);
        run("mount", &["-o", "loop", text(&backing), text(&shared)]);
        let (image, after) = (shared.join("now.img"), shared.join("after.img"));
        let size = size.to_owned();
        Self { file_system, shared, image, after, mount_point, size }
    }

    /// Makes an empty file system, not mounted.
    pub fn format(&self) {
        self.unmount();
        drop(std::fs::remove_file(&self.image));
        drop(std::fs::remove_file(&self.after));
        run("truncate", &["-s", &self.size, text(&self.image)]);
        let mkfs = self.file_system.mkfs();
        run(mkfs[0], &[&mkfs[1..], &[text(&self.image)]].concat());
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
