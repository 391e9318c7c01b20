//! Reads a certificate, line by line, and trusts none of it.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
};

use marcot_common::{failure::Failure, path::RelativePath};
use tonic::Code;

use super::{
    ALL, FIRST_LINE, Summary, TREE_LINE,
    digests::Digest,
    hexadecimal,
    signature::{self, bytes},
};

/// Longest line: a path and a target of 4,095 bytes, each byte escaped as four.
const LINE_BYTES_MAX: u64 = 40 << 10;

/// Longest summary: coordinates with a long GTID set.
const SUMMARY_BYTES_MAX: usize = 1 << 20;

/// A line of a certificate's tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// A directory.
    Directory {
        /// Permission bits.
        mode: u32,
        /// Where it is.
        path: RelativePath,
    },
    /// A regular file; its blocks follow.
    File {
        /// Permission bits.
        mode: u32,
        /// Bytes.
        size: u64,
        /// Where it is.
        path: RelativePath,
    },
    /// The next block of the last file.
    Block(Digest),
    /// The next blocks of the last file are zeros, so many.
    Zeros(u64),
    /// A symbolic link.
    Symlink {
        /// Where it is.
        path: RelativePath,
        /// What it holds.
        target: Vec<u8>,
    },
    /// A hard link.
    HardLink {
        /// Where it is.
        path: RelativePath,
        /// Another name of the file.
        target: RelativePath,
    },
}

/// A certificate that is whole: its digests, and its signature if it has one, are right.
#[derive(Debug)]
pub struct Certificate {
    /// Its summary.
    pub summary: Summary,
    /// BLAKE3-256 of the tree's lines.
    pub root: Digest,
    /// The key that has signed it, hexadecimal; `None` when nobody has.
    pub signer: Option<String>,
    path: PathBuf,
    /// Where the tree's lines begin.
    tree_at: u64,
}

impl Certificate {
    /// Reads all of a certificate once.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let mut lines = Lines::open(path)?;
        let mut all = blake3::Hasher::new();
        let mut take = |lines: &mut Lines| -> Result<Option<String>, Failure> {
            let line = lines.next()?;
            if let Some(line) = &line {
                all.update(line.as_bytes()).update(b"\n");
            }
            Ok(line)
        };
        if take(&mut lines)?.as_deref() != Some(FIRST_LINE) {
            return Err(lines.corrupt(&format!("it does not begin with `{FIRST_LINE}`")));
        }
        let mut json = String::new();
        loop {
            match take(&mut lines)? {
                Some(line) if line == TREE_LINE => break,
                Some(line) if json.len() + line.len() < SUMMARY_BYTES_MAX => {
                    json.push_str(&line);
                    json.push('\n');
                }
                _ => return Err(lines.corrupt("its summary has no end")),
            }
        }
        let summary: Summary = serde_json::from_str(&json)
            .map_err(|e| lines.corrupt(&format!("its summary cannot be read: {e}")))?;
        let tree_at = lines.at;
        let mut tree = blake3::Hasher::new();
        let root = loop {
            let Some(line) = take(&mut lines)? else {
                return Err(lines.corrupt("it ends without its root digest"));
            };
            if let Some(root) = line.strip_prefix("root ") {
                let told = bytes(root, 32).ok_or_else(|| lines.corrupt("a bad root digest"))?;
                let found = *tree.finalize().as_bytes();
                if told != found {
                    return Err(lines.corrupt(&format!(
                        "its lines have root digest {}, it says {root}",
                        hexadecimal(&found)
                    )));
                }
                break found;
            }
            tree.update(line.as_bytes()).update(b"\n");
        };
        let digest = *all.finalize().as_bytes();
        let told = lines.next()?.and_then(|line| bytes(line.strip_prefix(ALL)?, 32));
        if told.as_deref() != Some(&digest[..]) {
            return Err(lines.corrupt(&format!(
                "the lines above it have digest {}, it says another",
                hexadecimal(&digest)
            )));
        }
        let signer = match lines.next()? {
            None => None,
            Some(line) => Some(signature::check(&line, &digest).ok_or_else(|| {
                Failure::new(
                    Code::DataLoss,
                    "CERTIFICATE_SIGNATURE",
                    format!("certificate {}: its signature is not right", path.display()),
                )
            })?),
        };
        if lines.next()?.is_some() {
            return Err(lines.corrupt("something follows its end"));
        }
        Ok(Self { summary, root, signer, path: path.to_owned(), tree_at })
    }

    /// The tree's lines.
    pub fn tree(&self) -> Result<Tree, Failure> {
        let mut lines = Lines::open(&self.path)?;
        while lines.at < self.tree_at {
            lines.next()?;
        }
        Ok(Tree(lines))
    }
}

/// Lines of a tree.
#[derive(Debug)]
pub struct Tree(Lines);

impl Tree {
    /// The next line; `None` at the end.
    pub fn line(&mut self) -> Result<Option<Line>, Failure> {
        let Some(text) = self.0.next()? else {
            return Err(self.0.corrupt("it ends without its root digest"));
        };
        if text.starts_with("root ") {
            return Ok(None);
        }
        let line = parse(&text);
        line.map(Some).ok_or_else(|| self.0.corrupt("a line of its tree cannot be read"))
    }
}

fn parse(text: &str) -> Option<Line> {
    if let Some(rest) = text.strip_prefix(' ') {
        return match rest.strip_prefix("zero ") {
            Some(count) => Some(Line::Zeros(count.parse().ok().filter(|&count| count > 0)?)),
            None => Some(Line::Block(bytes(rest, 32)?.try_into().ok()?)),
        };
    }
    let (kind, rest) = text.split_once(' ')?;
    let mode = |text: &str| u32::from_str_radix(text, 8).ok().filter(|&mode| mode <= 0o7777);
    match kind {
        "d" => {
            let (bits, path) = rest.split_once(' ')?;
            Some(Line::Directory { mode: mode(bits)?, path: relative(path)? })
        }
        "f" => {
            let (bits, rest) = rest.split_once(' ')?;
            let (size, path) = rest.split_once(' ')?;
            let size = size.parse().ok()?;
            Some(Line::File { mode: mode(bits)?, size, path: relative(path)? })
        }
        "l" => {
            let (path, target) = links(rest)?;
            Some(Line::Symlink { path, target })
        }
        "h" => {
            let (path, target) = links(rest)?;
            Some(Line::HardLink { path, target: RelativePath::new(&target).ok()? })
        }
        _ => None,
    }
}

/// Path and target with a tab between them, which neither holds unescaped.
fn links(text: &str) -> Option<(RelativePath, Vec<u8>)> {
    let (path, target) = text.split_once('\t')?;
    Some((relative(path)?, unescape(target)?))
}

fn relative(escaped: &str) -> Option<RelativePath> {
    RelativePath::new(&unescape(escaped)?).ok()
}

/// Takes `escape_ascii` back.
fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        out.push(match bytes.next()? {
            b't' => b'\t',
            b'r' => b'\r',
            b'n' => b'\n',
            b'\'' => b'\'',
            b'"' => b'"',
            b'\\' => b'\\',
            b'x' => {
                let digits = [bytes.next()?, bytes.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            _ => return None,
        });
    }
    Some(out)
}

/// Lines of a file, bounded.
#[derive(Debug)]
struct Lines {
    source: BufReader<File>,
    path: PathBuf,
    number: u64,
    /// Bytes read so far.
    at: u64,
}

impl Lines {
    fn open(path: &Path) -> Result<Self, Failure> {
        let file = File::open(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Failure::new(
                Code::NotFound,
                "NO_CERTIFICATE",
                format!(
                    "{} is not there: nothing says what this directory was when it was cloned",
                    path.display()
                ),
            ),
            _ => Failure::io("open", path, &e),
        })?;
        let source = BufReader::with_capacity(64 << 10, file);
        Ok(Self { source, path: path.to_owned(), number: 0, at: 0 })
    }

    fn next(&mut self) -> Result<Option<String>, Failure> {
        let mut line = Vec::new();
        let read = self.source.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line);
        let read = read.map_err(|e| Failure::io("read", &self.path, &e))?;
        if read == 0 {
            return Ok(None);
        }
        self.number += 1;
        self.at += read as u64;
        if line.pop() != Some(b'\n') {
            return Err(self.corrupt("a line has no end"));
        }
        String::from_utf8(line).map(Some).map_err(|_| self.corrupt("a line is no text"))
    }

    fn corrupt(&self, why: &str) -> Failure {
        Failure::new(
            Code::DataLoss,
            "CERTIFICATE_CORRUPT",
            format!("certificate {}, line {}: {why}", self.path.display(), self.number),
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Guards names of any bytes: what is read is what was written.
        #[test]
        fn an_escaped_name_is_read_back(name in proptest::collection::vec(1_u8.., 1..60)) {
            let escaped = name.escape_ascii().to_string();
            prop_assert_eq!(unescape(&escaped).unwrap(), name);
        }

        #[test]
        fn any_line_is_read_without_a_panic(line in ".*") {
            drop(parse(&line));
        }

        #[test]
        fn any_file_is_read_without_a_panic(bytes: Vec<u8>, begins: bool) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("certificate");
            let head = if begins { "marcot certificate 1\n{}\ntree\n" } else { "" };
            std::fs::write(&path, [head.as_bytes(), &bytes].concat()).unwrap();
            if let Ok(certificate) = Certificate::open(&path) {
                let mut tree = certificate.tree().unwrap();
                while let Ok(Some(_)) = tree.line() {}
            }
        }
    }
}
