//! A stream of CLONE LOCAL: the engine in process, and copies by the file system where it can.

use std::{
    fs::File,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use marcot_common::failure::Failure;
use marcot_engine::{Content, FileReader, Snapshot};
use rustix::io::Errno;

use super::{FOLLOW_BYTES, FOLLOW_PAUSE, FetchContext, Seat, end_batch, stopped};
use crate::{
    growing::GrowingWriter,
    plan::Part,
    writer::{ChunkSink as _, UnitWriter},
};

/// Bytes of one copy_file_range call: short enough that a cancel is felt at once.
const COPY_BYTES: u64 = 16 << 20;

/// Bytes of one read where the file system cannot copy.
const READ_BYTES: u64 = 1 << 20;

/// Between two looks whether the round has ended.
const LOOK_PAUSE: Duration = Duration::from_millis(10);

/// How this stream copies; each way is given up for good once the file system refuses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Reflink,
    CopyFileRange,
    ReadWrite,
}

/// Copies units until the plan has no more.
pub fn copy_units(
    snapshot: &Arc<dyn Snapshot>,
    context: &FetchContext,
    seat: Seat,
) -> Result<(), Failure> {
    let mut way = Way::Reflink;
    let mut disk = FetchContext::disk();
    while let Some(unit) = context.next_unit(seat)? {
        let writer = UnitWriter::new(&context.staging, &context.progress, &unit);
        let writer = writer.with_disk(disk.as_mut());
        let (span, mut bytes) = (context.unit_span("", &unit), 0);
        let result =
            span.in_scope(|| copy_unit(snapshot.as_ref(), context, writer, &mut way, &mut bytes));
        end_batch(&span, bytes, &result);
        result?;
    }
    Ok(())
}

/// Reads files that grow until all else of the round is copied.
pub fn follow(snapshot: &Arc<dyn Snapshot>, context: &FetchContext) -> Result<(), Failure> {
    loop {
        let is_last = context.copied.is_cancelled();
        for file in context.growing.growing() {
            let mut reader = snapshot.open_file(context.position, file.file_id)?;
            let (file_id, mut at) = (file.file_id.0, file.durable);
            let length = reader.size().saturating_sub(at).min(FOLLOW_BYTES);
            let end = at + length;
            let (staging, progress) = (&context.staging, &context.progress);
            let mut writer =
                GrowingWriter::open(staging, progress, &context.growing, file, length)?;
            while at < end {
                let length = (end - at).min(READ_BYTES);
                let mut buffer = vec![0; usize::try_from(length).unwrap_or(0)];
                reader.read_exact_at(&mut buffer, at)?;
                writer.write(file_id, at, length, &[Bytes::from(buffer)])?;
                context.progress.verified_bytes.add(length);
                let stops = || context.stop.is_cancelled();
                context.limits.pass_blocking(length, &context.progress, stops);
                at += length;
            }
            writer.finish(&context.growing, context.journal.as_deref())?;
        }
        if is_last {
            return Ok(());
        }
        let wake = Instant::now() + FOLLOW_PAUSE;
        while Instant::now() < wake && !context.copied.is_cancelled() {
            if context.stop.is_cancelled() {
                return Err(stopped());
            }
            std::thread::sleep(LOOK_PAUSE);
        }
    }
}

fn copy_unit(
    snapshot: &dyn Snapshot,
    context: &FetchContext,
    mut writer: UnitWriter<'_>,
    way: &mut Way,
    bytes: &mut u64,
) -> Result<(), Failure> {
    while let Some((part, _)) = writer.awaited()? {
        if let Err(failure) = copy_part(snapshot, context, part, &mut writer, way) {
            match failure.reason.as_ref() {
                "FILE_VANISHED" | "FILE_CHANGED" => writer.give_up(part.file_id.0, failure)?,
                _ => return Err(failure),
            }
        }
        *bytes = writer.data_bytes();
    }
    context.finish(writer)
}

fn copy_part(
    snapshot: &dyn Snapshot,
    context: &FetchContext,
    part: &Part,
    writer: &mut UnitWriter<'_>,
    way: &mut Way,
) -> Result<(), Failure> {
    let mut reader = snapshot.open_file(context.position, part.file_id)?;
    if *way == Way::Reflink
        && part.length == part.size
        && reflink(part, reader.as_ref(), writer, way)?
    {
        reader.check_unchanged()?;
        context.progress.verified_bytes.add(part.length);
        return writer.copied(part.length);
    }
    let end = part.offset + part.length;
    let mut offset = part.offset;
    while offset < end {
        context.gate.pass_blocking(&context.stop);
        if context.stop.is_cancelled() {
            return Err(stopped());
        }
        let span = reader.span(offset, end)?;
        if span.content != Content::Data {
            // Checked before the last byte is counted: after it the file is closed.
            if span.end == end {
                reader.check_unchanged()?;
            }
            let length = span.end - offset;
            match span.content {
                Content::Hole => writer.skip_hole(part.file_id.0, offset, length)?,
                _ => writer.keep(part.file_id.0, offset, length)?,
            }
            offset = span.end;
            continue;
        }
        let copied = copy_some(part, reader.as_mut(), offset, span.end, end, writer, way)?;
        context.progress.verified_bytes.add(copied);
        let stops = || context.stop.is_cancelled();
        context.limits.pass_blocking(copied, &context.progress, stops);
        offset += copied;
    }
    Ok(())
}

fn reflink(
    part: &Part,
    reader: &dyn FileReader,
    writer: &mut UnitWriter<'_>,
    way: &mut Way,
) -> Result<bool, Failure> {
    let (Some(source), Some(target)) = (reader.file(), writer.file()?) else {
        return Ok(false);
    };
    match rustix::fs::ioctl_ficlone(target, source) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => {
            *way = Way::CopyFileRange;
            Ok(false)
        }
        Err(e) => Err(Failure::io("clone to", part.path.as_path(), &e.into())),
    }
}

/// Copies the next bytes of a span of data; returns how many.
fn copy_some(
    part: &Part,
    reader: &mut dyn FileReader,
    offset: u64,
    span_end: u64,
    end: u64,
    writer: &mut UnitWriter<'_>,
    way: &mut Way,
) -> Result<u64, Failure> {
    if *way <= Way::CopyFileRange {
        if let Some(copied) = copy_range(part, reader, offset, span_end, writer)? {
            if offset + copied == end {
                reader.check_unchanged()?;
            }
            writer.copied(copied)?;
            return Ok(copied);
        }
        *way = Way::ReadWrite;
    }
    let length = (span_end - offset).min(READ_BYTES);
    let mut buffer = vec![0; usize::try_from(length).unwrap_or(0)];
    reader.read_exact_at(&mut buffer, offset)?;
    if offset + length == end {
        reader.check_unchanged()?;
    }
    writer.write(part.file_id.0, offset, length, &[Bytes::from(buffer)])?;
    Ok(length)
}

/// Copies by the file system; `None` when it cannot.
fn copy_range(
    part: &Part,
    reader: &dyn FileReader,
    offset: u64,
    end: u64,
    writer: &mut UnitWriter<'_>,
) -> Result<Option<u64>, Failure> {
    let (Some(source), Some(target)) = (reader.file(), writer.file()?) else {
        return Ok(None);
    };
    let length = usize::try_from((end - offset).min(COPY_BYTES)).unwrap_or(usize::MAX);
    match copy_file_range(source, target, offset, length) {
        Ok(0) => Err(Failure::new(
            tonic::Code::Aborted,
            "FILE_CHANGED",
            format!("{} ended at byte {offset} while it was copied", part.path),
        )),
        Ok(copied) => Ok(Some(copied)),
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOSYS) => Ok(None),
        Err(e) => Err(Failure::io("copy to", part.path.as_path(), &e.into())),
    }
}

fn copy_file_range(source: &File, target: &File, offset: u64, length: usize) -> Result<u64, Errno> {
    let (mut from, mut to) = (offset, offset);
    let copied =
        rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), length);
    copied.map(|n| n as u64)
}
