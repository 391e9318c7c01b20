//! Keeps reads of earlier rounds away from the point (R1).
//!
//! A recipient asks for the point when it has read everything. One that was killed meanwhile, and
//! started again, may read on while its first call, of which it knows nothing, still fixes the point: a
//! page or redo of later than the point would come to the clone.

use std::{
    fs::File,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, TryLockError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use marcot_common::failure::Failure;
use tonic::Code;

use crate::{FileReader, Span};

/// Between two looks at reads that have not ended yet.
const LOOK_PAUSE: Duration = Duration::from_millis(1);

/// The gate.
#[derive(Debug, Default)]
pub(super) struct ReadGate {
    closed: AtomicBool,
    /// Held by each read that has passed.
    reads: RwLock<()>,
}

/// A read that has passed; the gate is not closed before it has ended.
pub(super) struct Passed<'a>(#[expect(dead_code, reason = "it is held")] RwLockReadGuard<'a, ()>);

/// A closed gate; dropped, it opens.
#[derive(Debug)]
pub(super) struct Closed<'a>(Option<&'a ReadGate>);

impl ReadGate {
    /// Lets a read pass; an error, with which to try again, while it is closed.
    pub(super) fn pass(&self) -> Result<Passed<'_>, Failure> {
        // Held first: what looks then, and finds it open, is waited for.
        let held = self.reads.read().unwrap_or_else(PoisonError::into_inner);
        if self.closed.load(Ordering::SeqCst) {
            return Err(Failure::new(
                Code::Unavailable,
                "STAGE_ADVANCING",
                "an earlier call of this clone fixes its point just now, no page is read \
                 meanwhile; try again",
            ));
        }
        Ok(Passed(held))
    }

    /// Closes it, and returns when the reads that have passed have ended: each is of one buffer. `waits` is
    /// called until then, and ends it by an error.
    pub(super) fn close(
        &self,
        waits: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<Closed<'_>, Failure> {
        let closed = Closed(Some(self));
        self.closed.store(true, Ordering::SeqCst);
        while let Err(TryLockError::WouldBlock) = self.reads.try_write().map(drop) {
            waits()?;
            std::thread::sleep(LOOK_PAUSE);
        }
        Ok(closed)
    }
}

impl Closed<'_> {
    /// Keeps it closed: the point stands.
    pub(super) fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        if let Some(gate) = self.0.take() {
            gate.closed.store(false, Ordering::SeqCst);
        }
    }
}

/// Reads a file of an earlier round, through the gate. Within a page it is not asked: a caller that is
/// refused there could not go on, and all of a page is read from the disk at once.
#[derive(Debug)]
pub(super) struct GatedReader {
    pub(super) gate: Arc<ReadGate>,
    pub(super) reader: Box<dyn FileReader>,
}

impl GatedReader {
    fn asks_at(&self, offset: u64) -> bool {
        offset.is_multiple_of(self.reader.unit().max(1))
    }
}

impl FileReader for GatedReader {
    fn size(&self) -> u64 {
        self.reader.size()
    }

    fn unit(&self) -> u64 {
        self.reader.unit()
    }

    fn is_growing(&self) -> bool {
        self.reader.is_growing()
    }

    fn span(&mut self, offset: u64, end: u64) -> Result<Span, Failure> {
        let _passed = self.asks_at(offset).then(|| self.gate.pass()).transpose()?;
        self.reader.span(offset, end)
    }

    fn read_exact_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        let _passed = self.asks_at(offset).then(|| self.gate.pass()).transpose()?;
        self.reader.read_exact_at(buffer, offset)
    }

    fn check_unchanged(&mut self) -> Result<(), Failure> {
        self.reader.check_unchanged()
    }

    fn file(&self) -> Option<&File> {
        self.reader.file()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards a cut that fails: what was refused meanwhile is read after it. With the gate left closed
    /// a clone whose first cut met a lost connection reads nothing any more.
    #[test]
    fn a_gate_opens_again_unless_the_point_stands() {
        let gate = ReadGate::default();
        let is_open = || gate.pass().is_ok();
        assert!(is_open());
        let closed = gate.close(&mut || Ok(())).unwrap();
        assert_eq!(gate.pass().map(drop).unwrap_err().reason, "STAGE_ADVANCING");
        drop(closed);
        assert!(is_open());
        gate.close(&mut || Ok(())).unwrap().keep();
        assert!(!is_open());
    }

    /// Guards T: what has passed reads before it. And guards the locks against a read that hangs: their
    /// holder is kept awake, and may end the wait.
    #[test]
    fn a_gate_is_closed_when_the_last_read_has_ended() {
        let gate = ReadGate::default();
        let mut reads = Some(gate.pass().unwrap());
        let mut waits = 0;
        let closed = gate.close(&mut || {
            waits += 1;
            assert!(gate.pass().is_err(), "nothing more passes");
            if waits == 3 {
                drop(reads.take());
            }
            Ok(())
        });
        drop(closed.unwrap());
        assert_eq!(waits, 3);
        let read = gate.pass().unwrap();
        let lost = gate.close(&mut || Err(Failure::bug("the connection is lost")));
        assert!(lost.is_err() && gate.pass().is_ok(), "it is open again");
        drop(read);
    }
}
