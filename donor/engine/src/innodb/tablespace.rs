//! Reads a tablespace page by page while the server writes it, and checks each.
//!
//! Invariants:
//! * No byte of a page leaves here before the whole page, as read at once, has its checksum, its
//!   number and its space id right (R3), but for the doublewrite buffer, which the copy has empty.
//! * All bytes of one page come from one read of it. Ranges begin and end at pages.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use marcot_common::{failure::Failure, path::RelativePath};
use rustix::fs::{Advice, SeekFrom};
use tonic::Code;

use super::flavor::Flavor;
use super::page::{self, FormatError, PageError, PageFormat, PageState};
use super::sabotage;
use crate::{
    Content, FileReader, Span,
    files::tree::{Identity, LOOK, Tree, changed, failure, vanished},
};

/// Pages are read and checked this many bytes at a time: a multiple of every page size.
const WINDOW_BYTES: usize = 1 << 20;

/// How often a page is read again that was met while the server wrote it. A write of a page takes
/// microseconds; on a stalled disk it can take long, so the later looks wait.
const READS_MAX: u32 = 100;

/// Looks without a pause; each later one waits a little longer, 2.5 s in all.
const READS_AT_ONCE: u32 = 10;

/// The largest page.
const FIRST_PAGE_BYTES_MAX: usize = 64 << 10;

/// Blocks that a file system can leave out.
const BLOCK_BYTES: usize = 4096;

/// What pages of a snapshot have been through.
#[derive(Debug, Default)]
pub(super) struct PageCounts {
    /// Pages whose checks all held.
    pub(super) checked: AtomicU64,
    /// Pages read again.
    pub(super) read_again: AtomicU64,
    /// LSN of the newest page: the server had flushed its log that far.
    pub(super) newest: AtomicU64,
}

/// What a page-checked file is.
#[derive(Debug, Clone)]
pub(super) struct TablespaceOf {
    /// Format of its pages.
    pub(super) format: Arc<PageFormat>,
    /// Number of its first page: not 0 for later files of the system tablespace.
    pub(super) first_page: u32,
    /// Pages, by their numbers, that are empty in the copy: the doublewrite buffer.
    pub(super) empty: [std::ops::Range<u32>; 2],
}

/// Reads one tablespace file.
#[derive(Debug)]
pub(super) struct TablespaceReader {
    file: File,
    path: RelativePath,
    shown: PathBuf,
    size: u64,
    /// End of its last whole page. What is beyond was being added when it was listed: redo has it.
    pages_end: u64,
    of: TablespaceOf,
    page_bytes: usize,
    /// Pages below this LSN are as an earlier round has them.
    since: Option<u64>,
    window: Vec<u8>,
    /// First byte of the window in the file, and its bytes.
    window_at: (u64, usize),
    counts: Arc<PageCounts>,
}

/// Opens a file if it is still the inode that was listed.
pub(super) fn open_inode(
    tree: &Tree,
    path: &RelativePath,
    listed: &Identity,
) -> Result<File, Failure> {
    let file = open_any(tree, path)?;
    let stat = rustix::fs::fstat(&file)
        .map_err(|e| failure("read attributes of", &tree.shown(Some(path)), e))?;
    if !listed.is_same_inode(&Identity::of(&stat)) {
        return Err(changed(path));
    }
    Ok(file)
}

/// Opens whatever regular file is at `path`.
pub(super) fn open_any(tree: &Tree, path: &RelativePath) -> Result<File, Failure> {
    let fd = tree.open_at(path, LOOK).map_err(|error| match error {
        rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR => vanished(path),
        rustix::io::Errno::LOOP | rustix::io::Errno::NXIO => changed(path),
        other => failure("open", &tree.shown(Some(path)), other),
    })?;
    Ok(File::from(fd))
}

impl TablespaceOf {
    /// Looks at the first page of a tablespace, which must be of `space`; `unwritten` is what the
    /// server says of it while that page is not written.
    pub(super) fn look(
        file: &File,
        path: &RelativePath,
        shown: &Path,
        space: u32,
        flavor: Flavor,
        unwritten: Option<PageFormat>,
    ) -> Result<Self, Failure> {
        let of = |format| Self { format: Arc::new(format), first_page: 0, empty: [0..0, 0..0] };
        match (first_page(file, path, shown, flavor)?, unwritten) {
            (Some(format), _) if format.space_id() == space => Ok(of(format)),
            (None, Some(format)) => Ok(of(format)),
            // Another tablespace has taken its place: the next walk finds it.
            _ => Err(changed(path)),
        }
    }
}

/// What the first page of a tablespace says, once it is right; nothing while it is not written. It is
/// read again while it is not right: it may be met while the server writes it.
pub(super) fn first_page(
    file: &File,
    path: &RelativePath,
    shown: &Path,
    flavor: Flavor,
) -> Result<Option<PageFormat>, Failure> {
    let mut page = vec![0; FIRST_PAGE_BYTES_MAX];
    let mut reads = 1;
    loop {
        let filled = file.read_at(&mut page, 0);
        let filled = filled.map_err(|e| Failure::io("read tablespace", shown, &e))?;
        let format = match flavor {
            Flavor::MariaDb => PageFormat::from_first_page(&page[..filled]),
            Flavor::MySql => PageFormat::from_first_page_of_mysql(&page[..filled]),
        };
        match format {
            Ok(format) => return Ok(Some(format)),
            Err(FormatError::ZeroPage) => return Ok(None),
            Err(error) if reads >= READS_MAX => {
                return Err(Failure::new(
                    Code::DataLoss,
                    "PAGE_CORRUPT",
                    format!(
                        "page 0 of {} stays wrong after {READS_MAX} reads: {error}; check the table, \
                         and the disk; a file that the server does not use belongs elsewhere",
                        shown.display()
                    ),
                )
                .with("path", path)
                .with("page", 0));
            }
            Err(_) => {
                reads += 1;
                std::thread::sleep(Duration::from_micros(500));
            }
        }
    }
}

impl TablespaceReader {
    /// Reads `size` bytes of an open file; a last piece that is no whole page reads as zero.
    pub(super) fn new(
        file: File,
        path: RelativePath,
        shown: PathBuf,
        size: u64,
        of: TablespaceOf,
        counts: Arc<PageCounts>,
    ) -> Self {
        // Advice only.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::Sequential);
        let page_bytes = of.format.physical_page_size();
        Self {
            file,
            path,
            shown,
            size,
            pages_end: size - size % page_bytes as u64,
            of,
            page_bytes,
            since: None,
            window: Vec::new(),
            window_at: (0, 0),
            counts,
        }
    }

    /// Gives only pages changed at or after `lsn`.
    pub(super) fn since(mut self, lsn: u64) -> Self {
        self.since = Some(lsn);
        self
    }

    fn page_number(&self, offset: u64) -> Result<u32, Failure> {
        let number = offset / self.page_bytes as u64 + u64::from(self.of.first_page);
        u32::try_from(number).map_err(|_| Failure::bug(format!("page {number} of {}", self.path)))
    }

    /// Makes the window hold `offset`, which is the start of a page or already in it.
    fn load(&mut self, offset: u64) -> Result<(), Failure> {
        let (start, bytes) = self.window_at;
        if (start..start + bytes as u64).contains(&offset) {
            return Ok(());
        }
        if !offset.is_multiple_of(self.page_bytes as u64) {
            return Err(Failure::invalid(
                "BAD_RANGE",
                format!(
                    "a range of {} begins at {offset}, which is within a page of {} bytes",
                    self.path, self.page_bytes
                ),
            ));
        }
        let left = usize::try_from(self.pages_end - offset).unwrap_or(WINDOW_BYTES);
        let bytes = left.min(WINDOW_BYTES);
        self.window.resize(bytes, 0);
        self.window_at = (0, 0);
        read_or_zero(&self.file, &mut self.window, offset)
            .map_err(|e| self.read_failure(offset, &e))?;
        let mut newest = 0;
        for at in (0..bytes).step_by(self.page_bytes) {
            newest = newest.max(self.check_page(at, offset + at as u64)?);
        }
        self.counts.newest.fetch_max(newest, Ordering::Relaxed);
        self.window_at = (offset, bytes);
        Ok(())
    }

    /// Checks the page at `at` of the window; reads it again while it is not right. Its LSN, 0 for
    /// one that says none.
    fn check_page(&mut self, at: usize, offset: u64) -> Result<u64, Failure> {
        let number = self.page_number(offset)?;
        let end = at + self.page_bytes;
        if self.of.empty.iter().any(|range| range.contains(&number)) {
            self.window[at..end].fill(0);
            return Ok(0);
        }
        let mut reads = 1;
        loop {
            match self.of.format.check(&self.window[at..end], number) {
                Ok(PageState::Unchecked { .. }) => {
                    if reads >= READS_MAX {
                        return Err(changed(&self.path));
                    }
                    let mut again = vec![0; self.page_bytes];
                    let read = read_or_zero(&self.file, &mut again, offset);
                    read.map_err(|e| self.read_failure(offset, &e))?;
                    if again == self.window[at..end] {
                        return Ok(0);
                    }
                    reads += 1;
                    self.window[at..end].copy_from_slice(&again);
                }
                Ok(state) => {
                    self.counts.checked.fetch_add(1, Ordering::Relaxed);
                    return Ok(if let PageState::Valid { lsn } = state { lsn } else { 0 });
                }
                Err(error) if reads >= READS_MAX => return Err(self.corrupt(number, &error)),
                Err(_) => {
                    if reads > READS_AT_ONCE {
                        let wait = 50 * u64::from(reads - READS_AT_ONCE) / 8;
                        std::thread::sleep(Duration::from_micros(wait * 100));
                    }
                    reads += 1;
                    self.counts.read_again.fetch_add(1, Ordering::Relaxed);
                    let read = read_or_zero(&self.file, &mut self.window[at..end], offset);
                    read.map_err(|e| self.read_failure(offset, &e))?;
                }
            }
        }
    }

    fn corrupt(&self, number: u32, error: &PageError) -> Failure {
        Failure::new(
            Code::DataLoss,
            "PAGE_CORRUPT",
            format!(
                "page {number} of {} stays wrong after {READS_MAX} reads: {error}; check the table, \
                 and the disk",
                self.shown.display()
            ),
        )
        .with("path", &self.path)
        .with("page", number)
    }

    fn read_failure(&self, offset: u64, error: &io::Error) -> Failure {
        if error.raw_os_error() == Some(libc::EIO) {
            return Failure::new(
                Code::DataLoss,
                "READ_ERROR",
                format!(
                    "{} cannot be read at offset {offset}: {error}; check the disk",
                    self.shown.display()
                ),
            )
            .with("path", &self.path)
            .with("offset", offset);
        }
        Failure::io("read", &self.shown, error).with("path", &self.path)
    }

    /// What stands at `offset` of the window.
    fn content(&self, offset: u64) -> Content {
        let at = usize::try_from(offset - self.window_at.0).unwrap_or(0);
        let start = at / self.page_bytes * self.page_bytes;
        let page = &self.window[start..start + self.page_bytes];
        let number = (self.window_at.0 + start as u64) / self.page_bytes as u64;
        if sabotage::is("skip-pages") && number > 3 && number.is_multiple_of(7) {
            return Content::Hole;
        }
        if let Some(since) = self.since {
            if is_zero(page) {
                return Content::Hole;
            }
            if page::lsn(page) < since {
                return Content::Unchanged;
            }
        }
        // Only such tables leave parts of pages out; elsewhere zero pages are room set aside.
        let is_left_out = self.of.format.leaves_out_parts(page)
            && is_zero(&self.window[at..(at + BLOCK_BYTES).min(self.window.len())]);
        if is_left_out { Content::Hole } else { Content::Data }
    }

    /// Whether the file system holds nothing for the whole pages from `offset` on; how far.
    fn hole_until(&self, offset: u64) -> Option<u64> {
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => self.pages_end,
            Err(_) => return None,
        };
        let page = self.page_bytes as u64;
        let until = data.min(self.pages_end) / page * page;
        (until > offset).then_some(until)
    }
}

impl FileReader for TablespaceReader {
    fn size(&self) -> u64 {
        self.size
    }

    fn unit(&self) -> u64 {
        self.page_bytes as u64
    }

    fn span(&mut self, offset: u64, end: u64) -> Result<Span, Failure> {
        if offset >= self.pages_end {
            return Ok(Span { end, content: Content::Hole });
        }
        let (start, bytes) = self.window_at;
        let is_loaded = (start..start + bytes as u64).contains(&offset);
        // What was a hole at the look and is none any more was written since: redo has it.
        if !is_loaded
            && self.since.is_none()
            && offset.is_multiple_of(self.page_bytes as u64)
            && let Some(until) = self.hole_until(offset)
        {
            return Ok(Span { end: until.min(end), content: Content::Hole });
        }
        self.load(offset)?;
        let (start, bytes) = self.window_at;
        let window_end = start + bytes as u64;
        let content = self.content(offset);
        let mut until = offset;
        while until < window_end.min(end) && self.content(until) == content {
            let step =
                if self.of.format.is_page_compressed() { BLOCK_BYTES } else { self.page_bytes };
            until += (step as u64).min(window_end - until);
        }
        Ok(Span { end: until.min(end), content })
    }

    fn read_exact_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            if at >= self.pages_end {
                buffer[done..].fill(0);
                break;
            }
            self.load(at)?;
            let (start, bytes) = self.window_at;
            let from = usize::try_from(at - start).unwrap_or(0);
            let length = (bytes - from).min(buffer.len() - done);
            buffer[done..done + length].copy_from_slice(&self.window[from..from + length]);
            done += length;
        }
        Ok(())
    }

    fn check_unchanged(&mut self) -> Result<(), Failure> {
        // Redo brings every page up to the point; what bypasses redo is found when the tree is
        // listed again.
        Ok(())
    }

    fn file(&self) -> Option<&File> {
        None
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&b| b == 0)
}

/// Fills a buffer; what lies beyond the end reads as zero: a tablespace that was truncated since it
/// was listed (undo) has redo for that, and for all that comes after.
fn read_or_zero(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => {
                buffer[filled..].fill(0);
                return Ok(());
            }
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Reads a file as it is: a tablespace whose first page says nothing yet. It is read again under
/// the locks.
#[derive(Debug)]
pub(super) struct RawReader {
    file: File,
    path: RelativePath,
    shown: PathBuf,
    size: u64,
}

impl RawReader {
    /// Reads `size` bytes of an open file.
    pub(super) fn new(file: File, path: RelativePath, shown: PathBuf, size: u64) -> Self {
        Self { file, path, shown, size }
    }
}

impl FileReader for RawReader {
    fn size(&self) -> u64 {
        self.size
    }

    fn span(&mut self, _: u64, end: u64) -> Result<Span, Failure> {
        Ok(Span { end, content: Content::Data })
    }

    fn read_exact_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        read_or_zero(&self.file, buffer, offset)
            .map_err(|e| Failure::io("read", &self.shown, &e).with("path", &self.path))
    }

    fn check_unchanged(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    fn file(&self) -> Option<&File> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 16384;

    /// The first page of a full_crc32 tablespace.
    fn first_page() -> Vec<u8> {
        let mut page = vec![0; PAGE];
        page[34..38].copy_from_slice(&7_u32.to_be_bytes());
        page[38..42].copy_from_slice(&7_u32.to_be_bytes());
        page[54..58].copy_from_slice(&0x15_u32.to_be_bytes());
        let checksum = crc32c::crc32c(&page[..PAGE - 4]);
        page[PAGE - 4..].copy_from_slice(&checksum.to_be_bytes());
        page
    }

    /// Guards a listed size that is no whole number of pages: a file that grew while it was listed.
    /// Without `pages_end` the piece is checked as a page, and every clone of such a file fails.
    #[test]
    fn a_piece_of_a_page_at_the_end_reads_as_zero() {
        let directory = tempfile::tempdir().unwrap();
        let shown = directory.path().join("t.ibd");
        let piece = 3072;
        let size = (2 * PAGE + piece) as u64;
        let content = [first_page(), vec![0; PAGE], vec![9; piece]].concat();
        std::fs::write(&shown, content).unwrap();
        let path = RelativePath::new(b"db/t.ibd").unwrap();
        let file = File::open(&shown).unwrap();
        let of = TablespaceOf::look(&file, &path, &shown, 7, Flavor::MariaDb, None).unwrap();
        let counts = Arc::default();
        let mut reader = TablespaceReader::new(file, path, shown, size, of, counts);
        assert_eq!(reader.size(), size);
        let data = Span { end: 2 * PAGE as u64, content: Content::Data };
        assert_eq!(reader.span(0, size).unwrap(), data);
        let hole = Span { end: size, content: Content::Hole };
        assert_eq!(reader.span(2 * PAGE as u64, size).unwrap(), hole);
        let mut read = vec![1; usize::try_from(size).unwrap()];
        reader.read_exact_at(&mut read, 0).unwrap();
        assert_eq!(read[..PAGE], first_page());
        assert!(is_zero(&read[PAGE..]));
    }

    /// A page of the tablespace, with some content.
    fn page(number: u32) -> Vec<u8> {
        let mut page = vec![number as u8; PAGE];
        page[..38].fill(0);
        page[4..8].copy_from_slice(&number.to_be_bytes());
        page[34..38].copy_from_slice(&7_u32.to_be_bytes());
        // The LSN's lower half once more.
        page[PAGE - 8..].fill(0);
        let checksum = crc32c::crc32c(&page[..PAGE - 4]);
        page[PAGE - 4..].copy_from_slice(&checksum.to_be_bytes());
        page
    }

    /// A tablespace whose page 1 is torn, and a reader of it; of another file where one is given.
    fn torn(
        directory: &Path,
        file: Option<&str>,
    ) -> (File, TablespaceReader, Arc<PageCounts>, Vec<u8>) {
        let shown = directory.join("t.ibd");
        let right = page(1);
        let mut torn = right.clone();
        torn[PAGE / 2..PAGE - 8].fill(9);
        std::fs::write(&shown, [first_page(), torn].concat()).unwrap();
        let path = RelativePath::new(b"db/t.ibd").unwrap();
        let writer = File::options().write(true).open(&shown).unwrap();
        let own = File::open(&shown).unwrap();
        let of = TablespaceOf::look(&own, &path, &shown, 7, Flavor::MariaDb, None).unwrap();
        let counts: Arc<PageCounts> = Arc::default();
        let file = file.map_or(own, |other| File::open(other).unwrap());
        let size = 2 * PAGE as u64;
        let reader = TablespaceReader::new(file, path, shown, size, of, Arc::clone(&counts));
        (writer, reader, counts, right)
    }

    /// Guards the second look: a page that was met while the server wrote it is whole a moment later.
    /// With READS_MAX 1 every busy table fails its clone.
    #[test]
    fn a_torn_page_is_read_again_until_it_is_whole() {
        let directory = tempfile::tempdir().unwrap();
        let (writer, mut reader, counts, right) = torn(directory.path(), None);
        let seen = Arc::clone(&counts);
        let whole = right.clone();
        let mends = std::thread::spawn(move || {
            while seen.read_again.load(Ordering::Relaxed) < 3 {
                std::thread::yield_now();
            }
            writer.write_all_at(&whole, PAGE as u64).unwrap();
        });
        let mut read = vec![0; PAGE];
        reader.read_exact_at(&mut read, PAGE as u64).unwrap();
        mends.join().unwrap();
        assert!(read == right && counts.read_again.load(Ordering::Relaxed) >= 3);
    }

    /// Guards the bound, and that nothing of such a page leaves here.
    #[test]
    fn a_page_that_stays_torn_is_named_with_both_checksums() {
        let directory = tempfile::tempdir().unwrap();
        let (_writer, mut reader, counts, right) = torn(directory.path(), None);
        let mut read = vec![0; PAGE];
        let failure = reader.read_exact_at(&mut read, PAGE as u64).unwrap_err();
        assert_eq!(failure.reason, "PAGE_CORRUPT");
        assert!(is_zero(&read));
        assert_eq!(counts.read_again.load(Ordering::Relaxed), u64::from(READS_MAX) - 1);
        let mut torn = right;
        torn[PAGE / 2..PAGE - 8].fill(9);
        let stored = u32::from_be_bytes(*torn[PAGE - 4..].first_chunk().unwrap());
        let computed = crc32c::crc32c(&torn[..PAGE - 4]);
        for text in ["page 1 ", "t.ibd", &format!("{stored:08x}"), &format!("{computed:08x}")] {
            assert!(failure.message.contains(text), "{failure}");
        }
    }

    /// Guards READ_ERROR of a tablespace: /proc/self/mem answers EIO at offset 0, as a bad disk does.
    #[test]
    fn a_disk_that_cannot_be_read_is_named_with_file_and_offset() {
        let directory = tempfile::tempdir().unwrap();
        let (_writer, mut reader, _, _) = torn(directory.path(), Some("/proc/self/mem"));
        let failure = reader.read_exact_at(&mut [0; PAGE], 0).unwrap_err();
        assert_eq!((failure.code, &*failure.reason), (Code::DataLoss, "READ_ERROR"));
        for text in ["t.ibd", "offset 0"] {
            assert!(failure.message.contains(text), "{failure}");
        }
    }
}
