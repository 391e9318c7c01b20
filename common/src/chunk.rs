//! Sizes and bounds of what travels.

/// Raw bytes of a chunk unless asked otherwise: large enough that per-chunk costs vanish, small
/// enough that a message stays well under gRPC's customary 4 MiB.
pub const CHUNK_BYTES: u64 = 1 << 20;

/// Most raw bytes that a chunk may hold. With its headers a message stays under 4 MiB.
pub const CHUNK_BYTES_MAX: u64 = 2 << 20;

/// Fewest raw bytes of a chunk that a caller may ask for.
pub const CHUNK_BYTES_MIN: u64 = 64 << 10;

/// Most extents in one chunk: bounds what a recipient holds for one message.
pub const EXTENTS_MAX: usize = 8192;

/// Most ranges in one ReadRanges call: at 30 bytes each the request stays under 256 KiB.
pub const RANGES_MAX: usize = 8192;

/// Largest ReadRanges request that a donor takes: the most ranges, and the digests of a unit's blocks,
/// are three quarters of it.
pub const READ_REQUEST_BYTES_MAX: usize = 1 << 20;

/// Payload bytes after which a ReadRanges call ends unless asked otherwise, so that drains and
/// proxies with connection limits are no failure.
pub const CALL_BYTES_MAX: u64 = 1 << 30;

/// Largest message that either side accepts, headers included.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Bytes of entries in one ListFiles message: a thousand and more, which are ten times as many bytes in
/// memory, in each of the messages that wait for a caller.
pub const LIST_MESSAGE_BYTES: usize = 64 << 10;

/// Capability of a donor that compares blocks with digests of what its caller has.
pub const KNOWN_BLOCKS: &str = "known_blocks";

/// Capability of a donor that ends a snapshot's ReadRanges calls at their next chunk when it is asked to.
pub const END_READS: &str = "end_reads";

/// Bytes of a block's digest: the first ones of its BLAKE3. 128 bits that nobody can find two
/// blocks for, not even who may write to the database.
pub const DIGEST_BYTES: usize = 16;

/// Smallest and largest block that digests speak of.
pub const BLOCK_BYTES_MIN: u64 = 4 << 10;
/// See `BLOCK_BYTES_MIN`.
pub const BLOCK_BYTES_MAX: u64 = 1 << 20;
