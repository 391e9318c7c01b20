//! What a clone was when it was finished: every entry, every block's digest, and where it came from.
//!
//! A text file in the clone's own root, `.marcot-certificate`:
//!
//! ```text
//! marcot certificate 1
//! {                                           a summary, JSON
//!   "clone": "clones/...", ...
//! }
//! tree
//! d 0750 app                                  directory: mode, path
//! f 0660 2097252 app/t.ibd                    regular file: mode, size, path
//!  5891b5b522d5df08...                        its blocks of 1 MiB: BLAKE3-256,
//!  zero 1                                     so many blocks of zeros
//! l app/link<TAB>t.ibd                        symbolic link and its target
//! h app/other<TAB>app/t.ibd                   hard link, and another name of its file
//! root 2cf24dba5fb0a30e...                    BLAKE3-256 of all lines after `tree`
//! all 9f86d081884c7d65...                     BLAKE3-256 of all lines above, the summary among them
//! signature ed25519 KEY SIGNATURE             where a key is configured; over the same lines
//! ```
//! Paths are escaped as in Rust's byte strings; entries come in the order of the donor's list. Where
//! the summary says `"digests": "none"` (CLONE LOCAL copies by the file system) files have no blocks.
//!
//! It tells of the tree before its first start: a server changes it, which is no damage.

pub mod check;
pub mod digests;
pub mod read;
pub mod signature;
pub mod table;

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufWriter, Write},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use marcot_common::{
    entry::{Attributes, Entry, FileId, Kind},
    failure::Failure,
    path::RelativePath,
};
use serde::{Deserialize, Serialize};

use self::{
    digests::{BLOCK_BYTES, Digest, blocks_of, zero_digest},
    signature::Signer,
    table::DigestTable,
};
use crate::{list::FileList, staging::Staging};

/// Its name in the clone's root.
pub const FILE_NAME: &str = ".marcot-certificate";

/// Its first line.
const FIRST_LINE: &str = "marcot certificate 1";

/// The line after which the tree comes.
const TREE_LINE: &str = "tree";

/// First word of the line that covers all lines above it.
const ALL: &str = "all ";

/// Where a clone came from, and how much of it there is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Summary {
    /// Name of the clone.
    pub clone: String,
    /// The statement that says the same, its secret hidden.
    pub statement: String,
    /// `HOST:PORT` of the donor, or `LOCAL INSTANCE`.
    pub source: String,
    /// SHA-256 of the donor's certificate, hexadecimal; empty without TLS.
    pub donor_fingerprint: String,
    /// Version of the donor service.
    pub donor_version: String,
    /// Version of the recipient that wrote this.
    pub recipient_version: String,
    /// RFC 3339.
    pub begin_time: String,
    /// When this was written, RFC 3339.
    pub certificate_time: String,
    /// What the tree is consistent with, e.g. `transactional`.
    pub consistency_level: String,
    /// Where it stands in its database's history.
    pub coordinates: Option<CertifiedCoordinates>,
    /// Entries in the tree, but for this file.
    pub entries: u64,
    /// Regular files among them.
    pub files: u64,
    /// Their sizes, bytes.
    pub size_bytes: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Digest of blocks: `BLAKE3-256`, or `none`.
    pub digests: String,
}

/// As `Coordinates` in the API.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CertifiedCoordinates {
    /// See there.
    pub binlog_file: String,
    /// See there.
    pub binlog_position: u64,
    /// See there.
    pub gtid_executed: String,
    /// See there.
    pub lsn: u64,
    /// See there.
    pub server_uuid: String,
    /// See there.
    pub server_id: u32,
    /// See there.
    pub server_version: String,
    /// See there.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub binlog_lacks_replicated: bool,
}

/// Digest of the blocks, in a summary.
pub const BLAKE3_256: &str = "BLAKE3-256";

/// No digests, in a summary.
pub const NO_DIGESTS: &str = "none";

/// Whether a tree is what a clone, `clones/{id}`, has brought: its certificate says so.
#[must_use]
pub fn is_of(tree: &Path, clone: &str) -> bool {
    read::Certificate::open(&tree.join(FILE_NAME)).is_ok_and(|found| found.summary.clone == clone)
}

/// Writes the certificate of a staged tree, not yet durable; returns its root digest. Without a
/// `table` it has no digests. `stop` is asked between entries.
pub fn write(
    staging: &Staging,
    list: &FileList,
    table: Option<&DigestTable>,
    summary: &Summary,
    signer: Option<&Signer>,
    stop: &dyn Fn() -> Result<(), Failure>,
) -> Result<Digest, Failure> {
    let path = staging.tree().join(FILE_NAME);
    let failed = |e: io::Error| Failure::io("write", &path, &e);
    remove(staging)?;
    let file = File::options().write(true).create_new(true).mode(0o600).open(&path);
    let file = file.map_err(failed)?;
    let mut out = Hashing { inner: BufWriter::new(&file), all: blake3::Hasher::new(), tree: None };
    let json = serde_json::to_string_pretty(summary)
        .map_err(|e| Failure::bug(format!("a certificate's summary: {e}")))?;
    write!(out, "{FIRST_LINE}\n{json}\n{TREE_LINE}\n").map_err(failed)?;
    out.tree = Some(blake3::Hasher::new());
    let targets = list.link_targets()?;
    for entry in list.entries()? {
        stop()?;
        let entry = entry?;
        write_entry(&mut out, &entry, &targets).map_err(failed)?;
        if let (Some(table), Some(Kind::Regular { size, .. })) = (table, &entry.kind) {
            write_blocks(&mut out, staging, table, &entry, *size, &path)?;
        }
    }
    let root = out.tree.take().map(|tree| *tree.finalize().as_bytes()).unwrap_or_default();
    writeln!(out, "root {}", hexadecimal(&root)).map_err(failed)?;
    let all = *out.all.finalize().as_bytes();
    writeln!(out, "{ALL}{}", hexadecimal(&all)).map_err(failed)?;
    if let Some(signer) = signer {
        let line = signer.line(&all);
        writeln!(out, "{line}").map_err(failed)?;
    }
    out.inner.flush().map_err(failed)?;
    drop(out);
    // Whoever may read the data may read what they were.
    file.set_permissions(std::fs::Permissions::from_mode(0o640)).map_err(failed)?;
    staging.give(&file).map_err(failed)?;
    Ok(root)
}

/// Removes the certificate of a staged tree, if it has one.
pub fn remove(staging: &Staging) -> Result<(), Failure> {
    let path = staging.tree().join(FILE_NAME);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Failure::io("remove", &path, &e)),
        _ => Ok(()),
    }
}

fn write_entry(
    out: &mut impl Write,
    entry: &Entry,
    targets: &HashMap<FileId, RelativePath>,
) -> io::Result<()> {
    let path = entry.path.as_bytes().escape_ascii();
    let Attributes { mode, .. } = &entry.attributes;
    match &entry.kind {
        Some(Kind::Directory) => writeln!(out, "d {mode:04o} {path}"),
        Some(Kind::Regular { size, .. }) => writeln!(out, "f {mode:04o} {size} {path}"),
        Some(Kind::Symlink { target }) => writeln!(out, "l {path}\t{}", target.escape_ascii()),
        Some(Kind::HardLink { file_id }) => {
            let target = targets.get(file_id).map(|path| path.as_bytes()).unwrap_or_default();
            writeln!(out, "h {path}\t{}", target.escape_ascii())
        }
        None => Ok(()),
    }
}

fn write_blocks(
    out: &mut impl Write,
    staging: &Staging,
    table: &DigestTable,
    entry: &Entry,
    size: u64,
    path: &Path,
) -> Result<(), Failure> {
    let failed = |e: io::Error| Failure::io("write", path, &e);
    let mut file = None;
    let mut zeros = 0_u64;
    for block in 0..blocks_of(size) {
        let digest = match table.get(entry.file_id, block)? {
            Some(digest) => digest,
            None => {
                let file = match &file {
                    Some(file) => file,
                    None => file.insert(staging.read_file(&entry.path)?),
                };
                let length = BLOCK_BYTES.min(size - block * BLOCK_BYTES);
                hash_block(file, block * BLOCK_BYTES, length)
                    .map_err(|e| Failure::io("read", entry.path.as_path(), &e))?
            }
        };
        let is_zero = digest == zero_digest();
        if is_zero {
            zeros += 1;
            continue;
        }
        write_zeros(out, &mut zeros).map_err(failed)?;
        writeln!(out, " {}", hexadecimal(&digest)).map_err(failed)?;
    }
    write_zeros(out, &mut zeros).map_err(failed)
}

fn write_zeros(out: &mut impl Write, zeros: &mut u64) -> io::Result<()> {
    match std::mem::take(zeros) {
        0 => Ok(()),
        count => writeln!(out, " zero {count}"),
    }
}

/// The digest of what a file holds there.
fn hash_block(file: &File, offset: u64, length: u64) -> io::Result<Digest> {
    let mut buffer = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut buffer, offset)?;
    Ok(*blake3::hash(&buffer).as_bytes())
}

/// Bytes as lower-case hexadecimal digits.
#[must_use]
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes, and hashes what it writes: all of it, and the tree's lines.
struct Hashing<W> {
    inner: W,
    all: blake3::Hasher,
    tree: Option<blake3::Hasher>,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.all.update(&bytes[..written]);
        if let Some(tree) = &mut self.tree {
            tree.update(&bytes[..written]);
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests;
