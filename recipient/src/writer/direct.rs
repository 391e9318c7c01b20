//! Writes large files past the page cache, on a thread beside the one that receives.
//!
//! A page that goes through the page cache is copied into it, found dirty, and written back later,
//! while the stream waits in fsync; a server that is started on the clone reads past that cache anyway.
//! Here a stream fills one buffer while the disk takes another. What the disk does not take in this
//! way, an end that is no whole block or a file system without it, is written the ordinary way, by
//! the same thread.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

/// Where a direct write begins, how long it is and where its memory lies are multiples of this: of the
/// logical block of every disk, and of the page of x86-64 and arm64.
const ALIGN: usize = 4096;

/// Bytes of one write: a chunk.
const BUFFER_BYTES: usize = 1 << 20;

/// Buffers of a stream: one fills, one is written, the others even out their pace. Four MiB a stream,
/// in the formula of ARCHITECTURE.md (Memory).
const BUFFERS: usize = 4;

/// Memory that begins at a multiple of `ALIGN`.
#[derive(Debug)]
struct Buffer {
    memory: Vec<u8>,
    begin: usize,
    length: usize,
}

impl Buffer {
    fn new() -> Self {
        let memory = vec![0; BUFFER_BYTES + ALIGN];
        let begin = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        Self { memory, begin, length: 0 }
    }

    /// Takes as much of `bytes` as it has room for.
    fn fill(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(BUFFER_BYTES - self.length);
        let at = self.begin + self.length;
        self.memory[at..at + taken].copy_from_slice(&bytes[..taken]);
        self.length += taken;
        taken
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.begin..self.begin + self.length]
    }
}

/// One file, opened both ways.
#[derive(Debug)]
struct Target {
    direct: File,
    ordinary: File,
}

#[derive(Debug)]
struct Job {
    target: Arc<Target>,
    offset: u64,
    buffer: Buffer,
}

/// A buffer that is free again, and what came of its write.
type Done = (Buffer, io::Result<()>);

/// The disk's side of a stream.
#[derive(Debug)]
pub struct DirectWriter {
    /// Closed first: the thread ends then.
    jobs: Option<SyncSender<Job>>,
    done: Receiver<Done>,
    thread: Option<JoinHandle<()>>,
    target: Option<Arc<Target>>,
    free: Vec<Buffer>,
    /// Of `BUFFERS`, those that were made.
    made: usize,
    /// Those that the thread has.
    out: usize,
    /// What is being filled, and the file's offset of its first byte.
    filling: Option<(u64, Buffer)>,
}

impl DirectWriter {
    /// Starts the thread; its memory comes with the first write.
    pub fn start() -> io::Result<Self> {
        // Neither side ever waits to send: there are no more messages than buffers.
        let (jobs, work) = sync_channel::<Job>(BUFFERS);
        let (sender, done) = sync_channel::<Done>(BUFFERS);
        let thread = std::thread::Builder::new().name("disk".to_owned()).spawn(move || {
            while let Ok(Job { target, offset, mut buffer }) = work.recv() {
                let result = write(&target, offset, buffer.bytes());
                buffer.length = 0;
                if sender.send((buffer, result)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self {
            jobs: Some(jobs),
            done,
            thread: Some(thread),
            target: None,
            free: Vec::new(),
            made: 0,
            out: 0,
            filling: None,
        })
    }

    /// Turns to another file. What a unit that failed has left is written, or not; nobody counts on it.
    pub fn begin(&mut self, direct: File, ordinary: File) {
        self.filling = None;
        self.settle().ok();
        self.target = Some(Arc::new(Target { direct, ordinary }));
    }

    /// Takes the next bytes; an error may be that of an earlier write to the same file.
    pub fn write(&mut self, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.filling.as_ref().is_some_and(|(at, b)| at + b.length as u64 != offset) {
                self.submit()?;
            }
            if self.filling.is_none() {
                self.filling = Some((offset, self.take()?));
            }
            let Some((_, buffer)) = &mut self.filling else { continue };
            let taken = buffer.fill(bytes);
            bytes = &bytes[taken..];
            offset += taken as u64;
            if buffer.length == BUFFER_BYTES {
                self.submit()?;
            }
        }
        Ok(())
    }

    /// Waits until all that it has taken is with the kernel. It is not durable yet.
    pub fn settle(&mut self) -> io::Result<()> {
        let mut result = self.submit();
        while self.out > 0 {
            let written = self.receive().map(|buffer| self.free.push(buffer));
            result = result.and(written);
        }
        result
    }

    fn submit(&mut self) -> io::Result<()> {
        let Some((offset, buffer)) = self.filling.take() else { return Ok(()) };
        let (Some(jobs), Some(target)) = (&self.jobs, &self.target) else { return Err(gone()) };
        jobs.send(Job { target: Arc::clone(target), offset, buffer }).map_err(|_| gone())?;
        self.out += 1;
        Ok(())
    }

    /// A buffer to fill; waits for the disk when it has all of them.
    fn take(&mut self) -> io::Result<Buffer> {
        if let Some(buffer) = self.free.pop() {
            return Ok(buffer);
        }
        if self.made < BUFFERS {
            self.made += 1;
            return Ok(Buffer::new());
        }
        self.receive()
    }

    fn receive(&mut self) -> io::Result<Buffer> {
        let Ok((buffer, result)) = self.done.recv() else {
            self.out = 0;
            return Err(gone());
        };
        self.out -= 1;
        match result {
            Ok(()) => Ok(buffer),
            Err(e) => {
                self.free.push(buffer);
                Err(e)
            }
        }
    }
}

impl Drop for DirectWriter {
    /// Nothing is written to staging after the stream's end.
    fn drop(&mut self) {
        self.filling = None;
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn gone() -> io::Error {
    io::Error::other("the thread that writes has ended")
}

/// Writes whole blocks past the page cache, the rest through it.
fn write(target: &Target, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let whole = bytes.len() / ALIGN * ALIGN;
    let mut at = 0;
    if offset.is_multiple_of(ALIGN as u64) {
        while at < whole {
            match target.direct.write_at(&bytes[at..whole], offset + at as u64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => at += written,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Larger blocks than ours, or none written in this way after all.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => break,
                Err(e) => return Err(e),
            }
        }
    }
    target.ordinary.write_all_at(&bytes[at..], offset + at as u64)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt as _;

    use proptest::prelude::*;

    use super::*;

    fn open(path: &std::path::Path) -> (File, File) {
        let ordinary =
            File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        let mut options = File::options();
        options.write(true);
        let direct = options.clone().custom_flags(libc::O_DIRECT).open(path);
        (direct.unwrap_or_else(|_| options.open(path).unwrap()), ordinary)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        /// Guards that every byte lands in its place, whatever the pieces and gaps are.
        #[test]
        fn every_byte_lands_in_its_place(
            pieces in proptest::collection::vec((0..3_u64, 1..900_000_usize), 1..14),
            begin in prop_oneof![Just(0_u64), Just(4096), 1..9000_u64],
        ) {
            let home = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            let path = home.path().join("f");
            let (direct, ordinary) = open(&path);
            let mut writer = DirectWriter::start().unwrap();
            writer.begin(direct, ordinary);
            let mut expected = vec![0; begin as usize];
            for (n, (gap, length)) in pieces.into_iter().enumerate() {
                let gap = gap * 4096 * 3;
                expected.resize(expected.len() + gap as usize, 0);
                let piece: Vec<u8> = (0..length).map(|i| (i * 7 + n) as u8 | 1).collect();
                writer.write(expected.len() as u64, &piece).unwrap();
                expected.extend(piece);
            }
            writer.settle().unwrap();
            prop_assert!(std::fs::read(&path).unwrap() == expected);
        }
    }

    /// Guards the report of a failed write: it may come late, and not later than `settle`.
    #[test]
    fn a_write_that_fails_is_told() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("f");
        std::fs::write(&path, "").unwrap();
        let read_only = || File::open(&path).unwrap();
        let mut writer = DirectWriter::start().unwrap();
        writer.begin(read_only(), read_only());
        let written = writer.write(0, &[7; 10 << 20]);
        let settled = writer.settle();
        let error = written.and(settled).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        // The next file is none the worse for it.
        let (direct, ordinary) = open(&path);
        writer.begin(direct, ordinary);
        writer.write(0, &[8; 5000]).unwrap();
        writer.settle().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), [8; 5000]);
    }
}
