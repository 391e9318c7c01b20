//! Big-endian fields of a page. Past the end everything reads as zero, so that no input panics.

pub(super) fn u16_at(page: &[u8], offset: usize) -> u16 {
    u16::from_be_bytes(array_at(page, offset))
}

pub(super) fn u32_at(page: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes(array_at(page, offset))
}

pub(super) fn u64_at(page: &[u8], offset: usize) -> u64 {
    u64::from_be_bytes(array_at(page, offset))
}

/// Bytes of a range, cut at the page's end.
pub(super) fn range(page: &[u8], range: std::ops::Range<usize>) -> &[u8] {
    let end = range.end.min(page.len());
    page.get(range.start..end).unwrap_or_default()
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // Whole blocks without a branch inside: the compiler uses vectors.
    let (blocks, rest) = bytes.as_chunks::<64>();
    blocks.iter().all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

fn array_at<const N: usize>(page: &[u8], offset: usize) -> [u8; N] {
    page.get(offset..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}
