//! Digests of blocks, made of a file's bytes as they are written.
//!
//! BLAKE3, 256 bits: nobody can make other bytes with the same digest, and one core does some GiB in
//! a second. A block that has not been seen whole is unknown; `read_unknown` hashes it from the staged
//! file as soon as its part is written.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use marcot_common::failure::Failure;

/// Bytes of a block: a digest then costs 32 bytes for 1 MiB, and hashing is at its best speed.
pub const BLOCK_BYTES: u64 = 1 << 20;

/// Bytes of a digest.
pub const DIGEST_BYTES: usize = 32;

/// A block's digest.
pub type Digest = [u8; DIGEST_BYTES];

/// Blocks in a row of one file.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DigestRun {
    /// The file's id on the donor.
    #[prost(uint64, tag = "1")]
    pub file_id: u64,
    /// First block.
    #[prost(uint64, tag = "2")]
    pub first: u64,
    /// Digests, one after another; empty when the blocks are all of the next kind.
    #[prost(bytes = "vec", tag = "3")]
    pub digests: Vec<u8>,
    /// Blocks of `BLOCK_BYTES` that read as zero.
    #[prost(uint64, tag = "4")]
    pub zero_blocks: u64,
    /// Blocks that were not seen whole; what was known of them is so no more.
    #[prost(uint64, tag = "5")]
    pub unknown_blocks: u64,
}

impl DigestRun {
    /// Blocks that it speaks of.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        (self.digests.len() / DIGEST_BYTES) as u64 + self.zero_blocks + self.unknown_blocks
    }
}

/// What becomes of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Known(Digest),
    Zero,
    Unknown,
    /// As an earlier round has left it.
    Kept,
}

/// Hashes a part of a file, from its first byte to its last.
#[derive(Debug)]
pub struct PartHasher {
    file_id: u64,
    file_size: u64,
    at: u64,
    /// Of the present block.
    hasher: blake3::Hasher,
    /// Whether bytes of the present block were not seen, and whether any was.
    missed: bool,
    seen: bool,
    /// Bytes of the present block that an older copy has given, and its digest if all were.
    reused: u64,
    reused_digest: Option<Digest>,
    runs: Vec<DigestRun>,
}

impl PartHasher {
    /// Begins at `offset` of a file.
    #[must_use]
    pub fn new(file_id: u64, file_size: u64, offset: u64) -> Self {
        Self {
            file_id,
            file_size,
            at: offset,
            hasher: blake3::Hasher::new(),
            // A block whose begin another part writes is seen whole by neither.
            missed: !offset.is_multiple_of(BLOCK_BYTES),
            seen: false,
            reused: 0,
            reused_digest: None,
            runs: Vec::new(),
        }
    }

    /// The next bytes.
    pub fn data(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let length = self.left().min(bytes.len() as u64);
            let (now, later) = bytes.split_at(usize::try_from(length).unwrap_or(bytes.len()));
            if !self.missed {
                self.hasher.update(now);
            }
            self.seen = true;
            bytes = later;
            self.advance(length);
        }
    }

    /// The next bytes read as zero.
    pub fn zeros(&mut self, mut length: u64) {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        while length > 0 {
            if self.at.is_multiple_of(BLOCK_BYTES) && length >= BLOCK_BYTES {
                let blocks = length / BLOCK_BYTES;
                self.push(Block::Zero, blocks);
                self.at += blocks * BLOCK_BYTES;
                length -= blocks * BLOCK_BYTES;
                continue;
            }
            let some = self.left().min(length).min(ZEROS.len() as u64);
            self.data(&ZEROS[..usize::try_from(some).unwrap_or(0)]);
            length -= some;
        }
    }

    /// The next bytes are those of an older copy; `digest_of` tells the digest that a block of it had
    /// when it was compared.
    pub fn reused(&mut self, mut length: u64, digest_of: impl Fn(u64) -> Option<Digest>) {
        while length > 0 {
            let some = self.left().min(length);
            self.missed = true;
            self.seen = true;
            self.reused += some;
            self.reused_digest = digest_of(self.at / BLOCK_BYTES);
            length -= some;
            self.advance(some);
        }
    }

    /// The next bytes stay as an earlier round has left them.
    pub fn kept(&mut self, mut length: u64) {
        while length > 0 {
            let some = self.left().min(length);
            // A block at the end of a file may have been another one before its size changed.
            let is_whole = some == BLOCK_BYTES && self.at + BLOCK_BYTES <= self.file_size;
            if is_whole && self.at.is_multiple_of(BLOCK_BYTES) {
                self.at += some;
                self.push(Block::Kept, 1);
            } else {
                self.missed = true;
                self.seen = true;
                self.advance(some);
            }
            length -= some;
        }
    }

    /// Blocks that have been seen so far; those of a block that is not whole come later.
    pub fn take_runs(&mut self) -> Vec<DigestRun> {
        std::mem::take(&mut self.runs)
    }

    /// Ends the part.
    #[must_use]
    pub fn finish(mut self) -> Vec<DigestRun> {
        if !self.at.is_multiple_of(BLOCK_BYTES) && self.seen {
            // The rest of the block is another part's.
            if self.at != self.file_size {
                self.missed = true;
                self.reused_digest = None;
            }
            self.end_block();
        }
        self.runs
    }

    /// Bytes to the end of the present block.
    fn left(&self) -> u64 {
        BLOCK_BYTES - self.at % BLOCK_BYTES
    }

    fn advance(&mut self, length: u64) {
        self.at += length;
        if self.at.is_multiple_of(BLOCK_BYTES) {
            self.end_block();
        }
    }

    /// The block that ends at `at`, or is cut there.
    fn end_block(&mut self) {
        let first = (self.at - 1) / BLOCK_BYTES;
        let is_all_reused = self.reused == self.at - first * BLOCK_BYTES;
        let block = match self.reused_digest.take().filter(|_| is_all_reused) {
            Some(digest) => Block::Known(digest),
            None if self.missed => Block::Unknown,
            None => Block::Known(*self.hasher.finalize().as_bytes()),
        };
        self.hasher.reset();
        (self.missed, self.seen, self.reused) = (false, false, 0);
        self.push_at(first, block, 1);
    }

    fn push(&mut self, block: Block, count: u64) {
        self.push_at(self.at / BLOCK_BYTES, block, count);
    }

    fn push_at(&mut self, first: u64, block: Block, count: u64) {
        if block == Block::Kept {
            return;
        }
        let file_id = self.file_id;
        let next = |run: &DigestRun| run.first + run.blocks();
        if self.runs.last().is_none_or(|last| next(last) != first || !is_of_kind(last, block)) {
            self.runs.push(DigestRun { file_id, first, ..DigestRun::default() });
        }
        let Some(run) = self.runs.last_mut() else { return };
        match block {
            Block::Known(digest) => run.digests.extend(digest),
            Block::Zero => run.zero_blocks += count,
            Block::Unknown => run.unknown_blocks += count,
            Block::Kept => {}
        }
    }
}

fn is_of_kind(run: &DigestRun, block: Block) -> bool {
    match block {
        Block::Known(_) => run.zero_blocks + run.unknown_blocks == 0,
        Block::Zero => run.digests.is_empty() && run.unknown_blocks == 0,
        Block::Unknown => run.digests.is_empty() && run.zero_blocks == 0,
        Block::Kept => false,
    }
}

/// Hashes the unknown blocks of `runs` that end within the first `end` bytes of a file, or with the
/// file: all of such a block is there.
pub fn read_unknown(
    file: &File,
    file_size: u64,
    end: u64,
    runs: Vec<DigestRun>,
) -> io::Result<Vec<DigestRun>> {
    let mut read = Vec::with_capacity(runs.len());
    let mut buffer = Vec::new();
    for run in runs {
        if run.unknown_blocks == 0 {
            read.push(run);
            continue;
        }
        let (file_id, blocks) = (run.file_id, run.first..run.first + run.unknown_blocks);
        for first in blocks {
            let begin = first * BLOCK_BYTES;
            let length = BLOCK_BYTES.min(file_size.saturating_sub(begin));
            let mut run = DigestRun { file_id, first, unknown_blocks: 1, ..DigestRun::default() };
            if length > 0 && begin + length <= end {
                buffer.resize(usize::try_from(length).unwrap_or(0), 0);
                file.read_exact_at(&mut buffer, begin)?;
                run.unknown_blocks = 0;
                run.digests = blake3::hash(&buffer).as_bytes().to_vec();
            }
            read.push(run);
        }
    }
    Ok(read)
}

/// Blocks of a file of that size.
#[must_use]
pub fn blocks_of(size: u64) -> u64 {
    size.div_ceil(BLOCK_BYTES)
}

/// The digest of a whole block of zeros.
#[must_use]
pub fn zero_digest() -> Digest {
    static ZERO: std::sync::OnceLock<Digest> = std::sync::OnceLock::new();
    *ZERO.get_or_init(|| {
        let mut hasher = blake3::Hasher::new();
        for _ in 0..BLOCK_BYTES >> 10 {
            hasher.update(&[0; 1 << 10]);
        }
        *hasher.finalize().as_bytes()
    })
}

/// Reads a run that a journal holds; its counts must fit.
pub fn check_run(run: &DigestRun) -> Result<(), Failure> {
    let kinds = [!run.digests.is_empty(), run.zero_blocks > 0, run.unknown_blocks > 0];
    let is_one = kinds.iter().filter(|kind| **kind).count() == 1;
    if is_one && run.digests.len().is_multiple_of(DIGEST_BYTES) {
        return Ok(());
    }
    Err(Failure::new(
        tonic::Code::DataLoss,
        "JOURNAL_CORRUPT",
        format!("a record of digests of file {} holds no right run", run.file_id),
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the blocks of a file are after parts have been written, each as (kind, bytes).
    fn table(size: u64, parts: &[(u64, Vec<(u8, u64)>)], content: &[u8]) -> Vec<Option<Digest>> {
        let mut table = vec![None; usize::try_from(blocks_of(size)).unwrap()];
        for (offset, pieces) in parts {
            let mut hasher = PartHasher::new(1, size, *offset);
            let mut at = *offset;
            for (kind, length) in pieces {
                let end = at + length;
                match kind {
                    0 => hasher.data(&content[at as usize..end as usize]),
                    1 => hasher.zeros(*length),
                    // An older copy that has a digest of every second block.
                    2 => hasher.reused(*length, |block| {
                        let begin = (block * BLOCK_BYTES) as usize;
                        let end = content.len().min(begin + BLOCK_BYTES as usize);
                        let digest = *blake3::hash(&content[begin..end]).as_bytes();
                        (block % 2 == 0).then_some(digest)
                    }),
                    _ => hasher.kept(*length),
                }
                at = end;
            }
            for run in hasher.finish() {
                check_run(&run).unwrap();
                for n in 0..run.blocks() {
                    let block = usize::try_from(run.first + n).unwrap();
                    let digest = run.digests.chunks_exact(DIGEST_BYTES).nth(n as usize);
                    table[block] = match (digest, run.zero_blocks) {
                        (Some(digest), _) => Some(digest.try_into().unwrap()),
                        (None, 0) => None,
                        (None, _) => Some(zero_digest()),
                    };
                }
            }
        }
        table
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        /// Guards every digest that is told: it is that of the block's bytes, however the bytes came.
        #[test]
        fn a_known_digest_is_that_of_the_blocks_bytes(
            pieces in proptest::collection::vec((0..3_u8, 1..700_000_u64), 1..12),
            more in 0..2_000_000_u64,
            cut in 0..3_u64,
        ) {
            let length: u64 = pieces.iter().map(|piece| piece.1).sum();
            let size = if cut == 0 { length } else { length + more };
            let mut content: Vec<u8> = (0..size).map(|n| (n * 31 / 7 % 253) as u8).collect();
            let mut at = 0;
            for (kind, length) in &pieces {
                if *kind == 1 {
                    content[at..at + *length as usize].fill(0);
                }
                at += *length as usize;
            }
            let table = table(size, &[(0, pieces.clone())], &content);
            for (block, digest) in table.iter().enumerate() {
                let begin = block * BLOCK_BYTES as usize;
                let end = (begin + BLOCK_BYTES as usize).min(content.len());
                if let Some(digest) = digest {
                    let expected = blake3::hash(&content[begin..end]);
                    prop_assert_eq!(digest, expected.as_bytes(), "block {}", block);
                }
            }
            if pieces.iter().all(|piece| piece.0 < 2) && size == length {
                prop_assert!(table.iter().all(Option::is_some), "all was seen");
            }
        }
    }

    /// Guards a later round: a block of which only some bytes are new is not the old one.
    #[test]
    fn a_patched_block_is_unknown_and_one_beside_it_is_as_it_was() {
        let size = 3 * BLOCK_BYTES;
        let content = vec![7; size as usize];
        let first = (0, vec![(0, size)]);
        let page = 16 << 10;
        let second = (0, vec![(3, page), (0, page), (3, size - 2 * page)]);
        let whole = Some(*blake3::hash(&content[..BLOCK_BYTES as usize]).as_bytes());
        assert_eq!(table(size, &[first, second], &content), [None, whole, whole]);
    }

    /// Guards a file whose size changes: its last block is another one.
    #[test]
    fn a_short_last_block_that_is_kept_is_unknown() {
        let size = BLOCK_BYTES + 100;
        let content = vec![7; size as usize];
        let known = table(size, &[(0, vec![(0, size)]), (0, vec![(3, size)])], &content);
        assert_eq!((known[0].is_some(), known[1]), (true, None));
    }

    /// Guards what an older copy gives: a block that all comes from it has the digest that was compared,
    /// one that it gives in part has none.
    #[test]
    fn a_block_that_all_was_reused_has_the_digest_of_the_comparison() {
        let page = 16 << 10;
        let told = |block: u64| Some([u8::try_from(block).unwrap() + 1; DIGEST_BYTES]);
        let mut hasher = PartHasher::new(1, 2 * BLOCK_BYTES + page, 0);
        hasher.reused(page, told);
        hasher.reused(BLOCK_BYTES, told);
        hasher.data(&vec![7; page as usize]);
        hasher.reused(BLOCK_BYTES - page, told);
        let [a, b, c] = &hasher.finish()[..] else { panic!("three runs") };
        assert_eq!((a.first, &a.digests[..]), (0, &[1; DIGEST_BYTES][..]));
        assert_eq!((b.first, b.unknown_blocks), (1, 1));
        assert_eq!((c.first, &c.digests[..]), (2, &[3; DIGEST_BYTES][..]));
    }

    /// Guards parts that meet within a block.
    #[test]
    fn a_block_of_two_parts_is_unknown() {
        let size = 2 * BLOCK_BYTES;
        let content = vec![7; size as usize];
        let half = BLOCK_BYTES / 2;
        let parts = [(0, vec![(0, half)]), (half, vec![(0, size - half)])];
        let known = table(size, &parts, &content);
        assert_eq!((known[0], known[1].is_some()), (None, true));
    }
}
