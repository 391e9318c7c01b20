//! A directory against its certificate: everything is read from the disk again.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::File,
    io,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use marcot_common::{failure::Failure, path::RelativePath};
use marcot_proto::recipient::v1 as pb;
use rustix::fs::{Advice, SeekFrom};

use super::{
    FILE_NAME, NO_DIGESTS,
    digests::{BLOCK_BYTES, Digest, blocks_of, zero_digest},
    read::{Certificate, Line},
};
use crate::install::{generation, locks::server_on};

/// Most differences that are told: enough to see what has happened.
pub const DIFFERENCES_MAX: usize = 100;

/// Names in a data directory that a server makes, and no clone has: that they are there says that
/// one has run.
const SERVER_FILES: [&str; 10] = [
    "ib_buffer_pool",
    "ibtmp1",
    "#innodb_temp",
    "auto.cnf",
    "mysqld-auto.cnf",
    "ddl_recovery.log",
    "tc.log",
    "multi-master.info",
    "mysql_upgrade_info",
    "mariadb_upgrade_info",
];

/// Ends of such names.
const SERVER_ENDINGS: [&str; 3] = [".pid", ".sock", ".index"];

/// What a check has found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Report {
    /// The first differences, at most `DIFFERENCES_MAX`.
    pub differences: Vec<String>,
    /// Names that say that a server has run on the directory since.
    pub evidence: Vec<String>,
    /// Files that were read.
    pub files: u64,
    /// Bytes that were read; holes are not.
    pub bytes: u64,
}

impl Report {
    /// Whether all is as the certificate says.
    #[must_use]
    pub fn is_intact(&self) -> bool {
        self.differences.is_empty()
    }

    /// Whether a server has changed it, which is no damage.
    #[must_use]
    pub fn is_modified_by_server(&self) -> bool {
        !self.is_intact() && !self.evidence.is_empty()
    }

    fn differs(&mut self, what: String) {
        if self.differences.len() < DIFFERENCES_MAX {
            self.differences.push(what);
        }
    }
}

/// What a check says, as the API says it. A process that runs a server on the directory is told as
/// well.
#[must_use]
pub fn answer(
    directory: &Path,
    certificate: &Certificate,
    report: Report,
) -> pb::VerifyCloneResponse {
    let mut report = report;
    if let Some(pid) = server_on(directory) {
        report.evidence.push(format!("process {pid} runs a server on it"));
    }
    pb::VerifyCloneResponse {
        intact: report.is_intact(),
        modified_by_server: report.is_modified_by_server(),
        differences: report.differences,
        server_evidence: report.evidence,
        files: report.files,
        bytes: report.bytes,
        certificate_digest: bytes::Bytes::copy_from_slice(&certificate.root),
        signer: certificate.signer.clone().unwrap_or_default(),
    }
}

/// Compares a directory with its certificate, past the page cache. `stop` is asked between files and
/// every 64 MiB.
pub fn check(
    directory: &Path,
    certificate: &Certificate,
    stop: &dyn Fn() -> Result<(), Failure>,
) -> Result<Report, Failure> {
    let mut report = Report::default();
    let mut walk = Walk::new(directory)?;
    let mut lines = certificate.tree()?;
    let mut file: Option<Open> = None;
    let has_digests = certificate.summary.digests != NO_DIGESTS;
    loop {
        let line = lines.line()?;
        if let (Some(open), Some(Line::Block(_) | Line::Zeros(_))) = (&mut file, &line) {
            match line {
                Some(Line::Block(digest)) => open.compare(&digest, &mut report, stop)?,
                Some(Line::Zeros(count)) => open.compare_zeros(count, &mut report, stop)?,
                _ => {}
            }
            continue;
        }
        if let Some(open) = file.take() {
            open.end(has_digests, &mut report);
        }
        stop()?;
        match line {
            None => break,
            // Of a file that is not there, or is none.
            Some(Line::Block(_) | Line::Zeros(_)) => {}
            Some(line) => file = compare_entry(&line, &mut walk, directory, &mut report)?,
        }
    }
    while let Some(extra) = walk.next()? {
        note_extra(&extra.path, &mut report);
    }
    Ok(report)
}

/// Brings the walk to the line's path, and looks at what is there.
fn compare_entry(
    line: &Line,
    walk: &mut Walk,
    directory: &Path,
    report: &mut Report,
) -> Result<Option<Open>, Failure> {
    let (Line::Directory { path, .. }
    | Line::File { path, .. }
    | Line::Symlink { path, .. }
    | Line::HardLink { path, .. }) = line
    else {
        return Ok(None);
    };
    while walk.peek()?.is_some_and(|found| found.path < *path) {
        if let Some(extra) = walk.next()? {
            note_extra(&extra.path, report);
        }
    }
    let found = match walk.peek()? {
        Some(found) if found.path == *path => walk.next()?,
        _ => None,
    };
    let Some(found) = found else {
        report.differs(format!("{path} is not there"));
        return Ok(None);
    };
    let metadata = &found.metadata;
    let full = directory.join(path.as_path());
    match line {
        Line::Directory { mode, .. } => {
            if metadata.is_dir() {
                compare_mode(path, *mode, metadata, report);
            } else {
                report.differs(format!("{path} is no directory any more"));
            }
        }
        Line::Symlink { target, .. } => {
            let now = std::fs::read_link(&full).ok();
            if now.as_ref().map(|now| now.as_os_str().as_bytes()) != Some(target) {
                report.differs(format!("{path} is no symbolic link to what it was"));
            }
        }
        Line::HardLink { target, .. } => {
            let other = directory.join(target.as_path()).symlink_metadata();
            let identity = |m: &std::fs::Metadata| (m.dev(), m.ino());
            if other.ok().as_ref().map(identity) != Some(identity(metadata)) {
                report.differs(format!("{path} is not {target} under another name any more"));
            }
        }
        Line::File { mode, size, .. } => {
            if !metadata.is_file() {
                report.differs(format!("{path} is no regular file any more"));
                return Ok(None);
            }
            compare_mode(path, *mode, metadata, report);
            if metadata.len() != *size {
                report.differs(format!("{path} has {} bytes, it had {size}", metadata.len()));
            }
            report.files += 1;
            return Open::new(path, &full, metadata.len(), *size).map(Some);
        }
        Line::Block(_) | Line::Zeros(_) => {}
    }
    Ok(None)
}

fn compare_mode(path: &RelativePath, mode: u32, metadata: &std::fs::Metadata, report: &mut Report) {
    let now = metadata.mode() & 0o7777;
    if now != mode {
        report.differs(format!("{path} has mode {now:04o}, it had {mode:04o}"));
    }
}

fn note_extra(path: &RelativePath, report: &mut Report) {
    let name = String::from_utf8_lossy(path.as_bytes());
    let is_servers = SERVER_FILES.contains(&&*name)
        || (path.parent().is_none() && SERVER_ENDINGS.iter().any(|end| name.ends_with(end)));
    if is_servers && report.evidence.len() < DIFFERENCES_MAX {
        report.evidence.push(name.into_owned());
    }
    report.differs(format!("{path} was not there"));
}

/// A file that is being compared.
#[derive(Debug)]
struct Open {
    path: RelativePath,
    full: PathBuf,
    file: File,
    /// Its size now, and as certified.
    now: u64,
    size: u64,
    /// The block that is next.
    block: u64,
    buffer: Vec<u8>,
}

impl Open {
    fn new(path: &RelativePath, full: &Path, now: u64, size: u64) -> Result<Self, Failure> {
        let file = File::open(full).map_err(|e| Failure::io("open", full, &e))?;
        // What the kernel still holds of it is not what the disk holds.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
        let (path, full) = (path.clone(), full.to_owned());
        Ok(Self { path, full, file, now, size, block: 0, buffer: Vec::new() })
    }

    fn compare(
        &mut self,
        digest: &Digest,
        report: &mut Report,
        stop: &dyn Fn() -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        if self.block.is_multiple_of(64) {
            stop()?;
        }
        let offset = self.block * BLOCK_BYTES;
        self.block += 1;
        let length = BLOCK_BYTES.min(self.now.saturating_sub(offset));
        if length == 0 {
            // Its size has been told.
            return Ok(());
        }
        let found = self.hash(offset, length, report)?;
        if found != *digest {
            let end = offset + length;
            report.differs(format!("{} differs in bytes {offset} to {end}", self.path));
        }
        Ok(())
    }

    fn compare_zeros(
        &mut self,
        count: u64,
        report: &mut Report,
        stop: &dyn Fn() -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let end = self.block.saturating_add(count).min(blocks_of(self.now.max(self.size)));
        while self.block < end {
            let offset = self.block * BLOCK_BYTES;
            // A hole need not be read.
            match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
                Ok(data) if data >= offset + BLOCK_BYTES => {
                    self.block = (data / BLOCK_BYTES).min(end);
                    continue;
                }
                Err(rustix::io::Errno::NXIO) => {
                    self.block = end;
                    continue;
                }
                _ => self.compare(&zero_digest(), report, stop)?,
            }
        }
        self.block = end;
        Ok(())
    }

    fn hash(&mut self, offset: u64, length: u64, report: &mut Report) -> Result<Digest, Failure> {
        self.buffer.resize(usize::try_from(length).unwrap_or(0), 0);
        match self.file.read_exact_at(&mut self.buffer, offset) {
            Ok(()) => report.bytes += length,
            // It is being cut: that is told as a difference.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => self.buffer.clear(),
            Err(e) => return Err(Failure::io("read", &self.full, &e)),
        }
        let _ = rustix::fs::fadvise(
            &self.file,
            offset,
            std::num::NonZeroU64::new(length),
            Advice::DontNeed,
        );
        Ok(*blake3::hash(&self.buffer).as_bytes())
    }

    fn end(self, has_digests: bool, report: &mut Report) {
        let expected = blocks_of(self.size);
        if has_digests && self.block != expected && self.now == self.size {
            report.differs(format!(
                "{}: the certificate speaks of {} blocks, {expected} make {} bytes",
                self.path, self.block, self.size
            ));
        }
    }
}

/// Something in the directory.
#[derive(Debug)]
struct Found {
    path: RelativePath,
    metadata: std::fs::Metadata,
}

/// All that is in a directory, in the order of a certificate: by components, as bytes.
#[derive(Debug)]
struct Walk {
    root: PathBuf,
    /// Of each open directory: its path, and the names that are left, the next one last.
    open: Vec<(Option<RelativePath>, Vec<OsString>)>,
    next: Option<Found>,
}

impl Walk {
    fn new(root: &Path) -> Result<Self, Failure> {
        let mut names = names(root)?;
        // What belongs to no clone: this file, and what an install keeps.
        names.retain(|name| !is_own(name));
        Ok(Self { root: root.to_owned(), open: vec![(None, names)], next: None })
    }

    fn peek(&mut self) -> Result<Option<&Found>, Failure> {
        if self.next.is_none() {
            self.next = self.advance()?;
        }
        Ok(self.next.as_ref())
    }

    fn next(&mut self) -> Result<Option<Found>, Failure> {
        self.peek()?;
        Ok(self.next.take())
    }

    fn advance(&mut self) -> Result<Option<Found>, Failure> {
        loop {
            let Some((parent, names)) = self.open.last_mut() else {
                return Ok(None);
            };
            let Some(name) = names.pop() else {
                self.open.pop();
                continue;
            };
            let bytes = match parent {
                Some(parent) => [parent.as_bytes(), b"/", name.as_bytes()].concat(),
                None => name.as_bytes().to_vec(),
            };
            let full = self.root.join(std::ffi::OsStr::from_bytes(&bytes));
            let Ok(path) = RelativePath::new(&bytes) else {
                return Err(Failure::io("look at", &full, &io::ErrorKind::InvalidFilename.into()));
            };
            let metadata = match full.symlink_metadata() {
                Ok(metadata) => metadata,
                // Gone since it was listed, as a running server's files are.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(Failure::io("look at", &full, &e)),
            };
            if metadata.is_dir() {
                self.open.push((Some(path.clone()), self::names(&full)?));
            }
            return Ok(Some(Found { path, metadata }));
        }
    }
}

fn is_own(name: &std::ffi::OsStr) -> bool {
    name == FILE_NAME || name == generation::FILE || name.as_bytes().starts_with(b".marcot-")
}

/// Names in a directory, the first one last.
fn names(directory: &Path) -> Result<Vec<OsString>, Failure> {
    let failed = |e: io::Error| Failure::io("read directory", directory, &e);
    let mut names = BTreeSet::new();
    match std::fs::read_dir(directory) {
        Ok(entries) => {
            for entry in entries {
                names.insert(entry.map_err(failed)?.file_name());
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e)),
    }
    Ok(names.into_iter().rev().collect())
}
