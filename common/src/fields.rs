//! A look at an encoded message before it is decoded: two bytes of an empty element become a hundred
//! and more in memory, so what repeats is counted first.

/// How often a field stands in an encoded message, not below it; `None`: these bytes are no message.
#[must_use]
pub fn count(message: &[u8], field: u64) -> Option<usize> {
    let mut left = message;
    let mut found = 0;
    while !left.is_empty() {
        let key = varint(&mut left)?;
        found += usize::from(key >> 3 == field);
        let length = match key & 7 {
            0 => {
                varint(&mut left)?;
                0
            }
            1 => 8,
            2 => usize::try_from(varint(&mut left)?).ok()?,
            5 => 4,
            _ => return None,
        };
        left = left.get(length..)?;
    }
    Some(found)
}

fn varint(left: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = left.split_first()?;
        *left = rest;
        if shift == 63 && byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use marcot_proto::donor::v1 as pb;
    use prost::Message as _;

    use super::*;

    #[test]
    fn elements_are_counted_without_being_made() {
        let ranges = vec![pb::Range { file_id: 1 << 40, ..Default::default() }; 300];
        let request = pb::ReadRangesRequest {
            snapshot: "snapshots/1".to_owned(),
            round: 1,
            ranges,
            bytes_max: u64::MAX,
            ..Default::default()
        };
        let bytes = request.encode_to_vec();
        assert_eq!(count(&bytes, 4), Some(300));
        assert_eq!((count(&bytes, 1), count(&bytes, 6)), (Some(1), Some(0)));
        assert_eq!(count(&[], 4), Some(0));
        let list = pb::ListFilesResponse { entries_crc32c: Some(7), ..Default::default() };
        assert_eq!(count(&list.encode_to_vec(), 3), Some(1));
    }

    #[test]
    fn what_is_no_message_is_told() {
        for bytes in [&b"\x0a"[..], b"\x0a\x05abc", b"\x0f", &[0xff; 11], b"\x09\0\0"] {
            assert_eq!(count(bytes, 1), None, "{bytes:?}");
        }
    }
}
