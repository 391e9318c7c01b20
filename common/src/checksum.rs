//! Checksums of what travels beside data: without TLS a flipped bit in a name, a size or a position
//! would go unnoticed, for TCP's own checksum is weak and protobuf has none.
//!
//! A sum is the CRC-32C of the fields in the order below: numbers as 8 bytes, little-endian; byte
//! strings and lists after their length. Fields that a later version adds are not in it, so that
//! versions understand each other.

use marcot_proto::{common::v1 as pbc, donor::v1 as pb};

use crate::entry::{Attributes, Change, Entry, Kind};

/// A sum that grows.
#[derive(Debug, Default, Clone, Copy)]
struct Sum(u32);

impl Sum {
    fn number(&mut self, n: u64) {
        self.0 = crc32c::crc32c_append(self.0, &n.to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0 = crc32c::crc32c_append(self.0, bytes);
    }

    fn attributes(&mut self, attributes: &Attributes) {
        self.number(attributes.mode.into());
        self.number(attributes.modify_time.0.cast_unsigned());
        self.number(attributes.modify_time.1.into());
        self.number(attributes.uid.into());
        self.number(attributes.gid.into());
        self.number(attributes.extended.len() as u64);
        for (name, value) in &attributes.extended {
            self.bytes(name);
            self.bytes(value);
        }
    }

    fn entry(&mut self, entry: &Entry) {
        self.number(entry.number);
        self.number(entry.file_id.0);
        self.number(match entry.change {
            Change::Add => 1,
            Change::Replace => 2,
            Change::Rename => 3,
            Change::Truncate => 4,
            Change::Remove => 5,
            Change::Patch => 6,
        });
        self.bytes(entry.path.as_bytes());
        match &entry.kind {
            None => self.number(0),
            Some(Kind::Regular { size, allocated }) => {
                self.number(1);
                self.number(*size);
                self.number(*allocated);
            }
            Some(Kind::Directory) => self.number(2),
            Some(Kind::Symlink { target }) => {
                self.number(3);
                self.bytes(target);
            }
            Some(Kind::HardLink { file_id }) => {
                self.number(4);
                self.number(file_id.0);
            }
        }
        self.attributes(&entry.attributes);
        self.number(entry.growing.into());
    }
}

/// Of the entries of one message of a list.
#[must_use]
pub fn of_entries(entries: &[Entry]) -> u32 {
    let mut sum = Sum::default();
    for entry in entries {
        sum.entry(entry);
    }
    sum.0
}

/// Of a chunk's stage, round and extents: what its data's own checksum says nothing of.
#[must_use]
pub fn of_chunk_header(chunk: &pb::Chunk) -> u32 {
    let mut sum = Sum::default();
    sum.number(u64::from(chunk.stage.cast_unsigned()));
    sum.number(chunk.round.into());
    for extent in &chunk.extents {
        sum.number(extent.file_id);
        sum.number(extent.offset);
        sum.number(extent.length);
        sum.number(extent.hole.into());
        sum.number(extent.unchanged.into());
    }
    sum.0
}

/// Of where a snapshot has moved on to; `root` is `advanced.root`, checked.
#[must_use]
pub fn of_advanced(advanced: &pb::Advanced, root: Option<&Attributes>) -> u32 {
    let mut sum = Sum::default();
    sum.number(u64::from(advanced.stage.cast_unsigned()));
    sum.number(advanced.round.into());
    let totals = advanced.totals.unwrap_or_default();
    for n in [totals.entries, totals.files, totals.size_bytes, totals.allocated_bytes] {
        sum.number(n);
    }
    sum.number(u64::from(advanced.consistency_level.cast_unsigned()));
    match &advanced.coordinates {
        None => sum.number(0),
        Some(coordinates) => {
            sum.number(1);
            of_coordinates(&mut sum, coordinates);
        }
    }
    match root {
        None => sum.number(0),
        Some(root) => {
            sum.number(1);
            sum.attributes(root);
        }
    }
    sum.0
}

fn of_coordinates(sum: &mut Sum, coordinates: &pbc::Coordinates) {
    sum.bytes(&coordinates.binlog_file);
    sum.number(coordinates.binlog_position);
    sum.bytes(coordinates.gtid_executed.as_bytes());
    sum.number(coordinates.lsn);
    sum.bytes(coordinates.server_uuid.as_bytes());
    sum.number(coordinates.server_id.into());
    sum.bytes(coordinates.server_version.as_bytes());
    sum.number(coordinates.sources.len() as u64);
    for source in &coordinates.sources {
        sum.bytes(source.channel.as_bytes());
        sum.bytes(&source.binlog_file);
        sum.number(source.binlog_position);
        sum.bytes(source.gtid_executed.as_bytes());
    }
}
