use proptest::prelude::*;

use super::*;

/// A record of `length` bytes after its first one, as `mtr_t::log_write` makes it.
fn record(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind & 0xf0 | 0x20];
    if body.len() < 16 && !body.is_empty() {
        bytes[0] |= u8::try_from(body.len()).unwrap();
    } else {
        // The length counts from its own first byte on, less 15.
        let encode = |n: usize| -> Vec<u8> {
            match n {
                0..0x80 => vec![u8::try_from(n).unwrap()],
                0x80..0x4080 => u16::try_from(0x8000 + n - 0x80).unwrap().to_be_bytes().to_vec(),
                _ => (0x00c0_0000 + u32::try_from(n - 0x4080).unwrap()).to_be_bytes()[1..].to_vec(),
            }
        };
        let head = (1..=3).find(|&head| encode(body.len() + head - 15).len() == head).unwrap();
        bytes.extend(encode(body.len() + head - 15));
    }
    bytes.extend_from_slice(body);
    bytes
}

fn mtr(records: &[Vec<u8>], bit: u8, nonce: Option<[u8; 8]>) -> Vec<u8> {
    let mut bytes = records.concat();
    let nonce = nonce.map(|nonce| nonce.to_vec()).unwrap_or_default();
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes), &nonce);
    bytes.push(bit);
    bytes.extend(nonce);
    bytes.extend(crc.to_be_bytes());
    bytes
}

fn checkpoint_mtr(lsn: u64) -> Vec<u8> {
    let mut bytes = vec![FILE_CHECKPOINT, 0, 0];
    bytes.extend(lsn.to_be_bytes());
    mtr(&[bytes], 1, None)
}

fn header(first_lsn: u64, encrypted: bool) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    let format = if encrypted { FORMAT_ENCRYPTED_11 } else { FORMAT_10_8 };
    bytes[..4].copy_from_slice(&format.to_be_bytes());
    bytes[8..16].copy_from_slice(&first_lsn.to_be_bytes());
    bytes[16..32].copy_from_slice(b"MariaDB 10.11.19");
    let crc = crc32c::crc32c(&bytes[..508]);
    bytes[508..].copy_from_slice(&crc.to_be_bytes());
    bytes
}

/// A FILE_ record of a tablespace.
fn file_record(kind: u8, space: u32, path: &str) -> Vec<u8> {
    let id = match space {
        0..0x80 => vec![u8::try_from(space).unwrap()],
        0x80..0x4080 => (0x8000 + u16::try_from(space - 0x80).unwrap()).to_be_bytes().to_vec(),
        0x4080..0x20_4080 => (0x00c0_0000 + space - 0x4080).to_be_bytes()[1..].to_vec(),
        0x20_4080..0x1020_4080 => (0xe000_0000 + space - 0x20_4080).to_be_bytes().to_vec(),
        _ => [vec![0xf0], (space - 0x1020_4080).to_be_bytes().to_vec()].concat(),
    };
    let mut bytes = record(kind, &[&id[..], &[0], path.as_bytes()].concat());
    bytes[0] = kind | bytes[0] & 0xf;
    bytes
}

/// Guards what an import is found by. A record of the same page as the one before it has the kind of
/// FILE_DELETE as well (INIT_PAGE): taken for one, it would name a table that was never deleted.
#[test]
fn deleted_tablespaces_are_told_from_pages_that_are_made_again() {
    let deleted = |records: &[Vec<u8>], hides_ids| {
        let mut found = Vec::new();
        deleted_spaces(&records.concat(), hides_ids, &mut |id| found.push(id));
        found
    };
    let long = format!("./shop/{}.ibd", "t".repeat(200));
    let ids = [1, 0x7f, 0x80, 0x407f, 0x4080, 0x20_407f, 0x20_4080, 0x1020_407f, 0x1020_4080];
    for id in ids {
        for path in ["./a/b.ibd", "./a/long_enough.ibd", &long] {
            let record = file_record(FILE_DELETE, id, path);
            assert_eq!(deleted(std::slice::from_ref(&record), false), [Some(id)], "{id} {path}");
            assert_eq!(deleted(&[record], true), [None]);
        }
    }
    let named = file_record(FILE_MODIFY, 5, "./a/b.ibd");
    let both = [named.clone(), file_record(FILE_DELETE, 6, "./a/c.ibd")];
    assert_eq!(deleted(&both, false), [Some(6)]);
    assert_eq!(deleted(&[named], false), []);
    let page = record(0x30, &[7, 3, 1, 2, 3]);
    assert_eq!(deleted(&[page, vec![FILE_DELETE | 1, 9]], false), []);
}

/// Guards what tells a page 0 that is not written yet from one that was lost: records of other pages,
/// of other kinds and of files make none.
#[test]
fn tablespaces_whose_first_page_is_made_are_named() {
    let made = |records: &[Vec<u8>]| {
        let mut found: Vec<u32> = Vec::new();
        made_spaces(&records.concat(), &mut |id| found.push(id));
        found
    };
    let init = |space: u32, number: u8| {
        // As in a record of a file: the id, then here the page's number.
        let mut bytes = file_record(0, space, "");
        let last = bytes.len() - 1;
        bytes[last] = number;
        bytes[0] |= INIT_PAGE;
        bytes
    };
    for id in [1, 0x7f, 0x80, 0x4080, 0x20_4080, 0x1020_4080] {
        assert_eq!(made(&[init(id, 0)]), [id]);
        assert!(made(&[init(id, 1)]).is_empty());
        // Written, then made: both of the same page.
        let write = record(0x30, &[&init(id, 0)[1..], &[1, 2]].concat());
        assert!(made(std::slice::from_ref(&write)).is_empty());
        assert_eq!(made(&[write, vec![SAME_PAGE | INIT_PAGE | 1, 9]]), [id]);
    }
    let named = file_record(FILE_MODIFY, 5, "./a/b.ibd");
    assert_eq!(made(&[named.clone(), init(5, 0), init(5, 1), init(6, 0)]), [5, 6]);
    assert!(made(&[named, file_record(FILE_DELETE, 6, "./a/c.ibd")]).is_empty());
}

#[test]
fn a_header_is_read_and_made_for_another_start() {
    let parsed = Header::parse(&header(START_OFFSET, false)).unwrap();
    assert_eq!((parsed.first_lsn(), parsed.is_encrypted()), (START_OFFSET, false));
    assert_eq!(parsed.creator(), "MariaDB 10.11.19");
    let moved = Header::parse(&parsed.starting_at(999_999)).unwrap();
    assert_eq!((moved.first_lsn(), moved.creator()), (999_999, parsed.creator()));
    assert!(Header::parse(&header(START_OFFSET, true)).unwrap().is_encrypted());
}

/// Guards the header's checksum, format and bounds: without each of them its case passes.
#[test]
fn a_wrong_header_is_refused_with_both_values() {
    let mut flipped = header(START_OFFSET, false);
    flipped[40] ^= 1;
    assert!(matches!(Header::parse(&flipped), Err(FormatError::Checksum { .. })));
    let mut old = header(START_OFFSET, false);
    old[..4].copy_from_slice(&0x5048_5953u32.to_be_bytes());
    let error = Header::parse(&old).unwrap_err().to_string();
    assert!(error.contains("0x50485953") && error.contains("0x50687973"), "{error}");
    assert!(matches!(Header::parse(&header(5, false)), Err(FormatError::Value { .. })));
    assert!(matches!(Header::parse(&[0; 100]), Err(FormatError::Short { .. })));
}

/// Guards the choice: a torn block, and the older of two, are not taken.
#[test]
fn the_later_checkpoint_that_is_right_is_taken() {
    let older = Checkpoint { lsn: 20_000, end_lsn: 30_000 };
    let newer = Checkpoint { lsn: 25_000, end_lsn: 31_000 };
    let (a, b) = (older.to_bytes(), newer.to_bytes());
    assert_eq!(Checkpoint::latest([&a, &b], START_OFFSET), Ok(newer));
    assert_eq!(Checkpoint::latest([&b, &a], START_OFFSET), Ok(newer));
    let mut torn = b;
    torn[15] ^= 1;
    assert_eq!(Checkpoint::latest([&a, &torn], START_OFFSET), Ok(older));
    assert!(Checkpoint::latest([&torn, &torn], START_OFFSET).is_err());
    assert!(Checkpoint::latest([&a, &b], 40_000).is_err(), "before the log begins");
    let turned = Checkpoint { lsn: 30_000, end_lsn: 20_000 }.to_bytes();
    assert!(Checkpoint::parse(&turned, START_OFFSET).is_err());
}

#[test]
fn offsets_and_sequence_bits_go_round_with_the_file() {
    let header = Header::parse(&header(START_OFFSET, false)).unwrap();
    let file = START_OFFSET + 1000;
    assert_eq!(header.offset(START_OFFSET + 999, file), START_OFFSET + 999);
    assert_eq!(header.offset(START_OFFSET + 1000, file), START_OFFSET);
    assert_eq!(header.sequence_bit(START_OFFSET + 999, file), 1);
    assert_eq!(header.sequence_bit(START_OFFSET + 1000, file), 0);
    assert_eq!(header.sequence_bit(START_OFFSET + 2000, file), 1, "two laps later it is the same");
}

#[test]
fn a_checkpoints_end_is_files_named_and_then_itself() {
    let modify = mtr(&[record(0, b"x")], 1, None);
    let mut named = vec![FILE_MODIFY | 8, 5, 0];
    named.extend(b"./d/t.");
    named.truncate(9);
    let named = mtr(&[named], 1, None);
    let end = [named.clone(), checkpoint_mtr(77_777)].concat();
    assert_eq!(ends_checkpoint(&end, 77_777, false), Some(true));
    assert_eq!(ends_checkpoint(&end[..end.len() - 1], 77_777, false), None, "more is needed");
    // There may be one of an earlier checkpoint.
    assert_eq!(ends_checkpoint(&end, 88_888, false), None);
    let other = [named, modify].concat();
    assert_eq!(ends_checkpoint(&other, 77_777, false), Some(false));
    assert_eq!(ends_checkpoint(&[0; 50], 77_777, false), Some(false));
}

fn records() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let body = prop_oneof![
        prop::collection::vec(any::<u8>(), 1..16),
        prop::collection::vec(any::<u8>(), 16..300),
        prop::collection::vec(any::<u8>(), 16_500..17_000),
    ];
    prop::collection::vec((any::<u8>(), body).prop_map(|(kind, body)| record(kind, &body)), 1..6)
}

proptest! {
    /// Whatever the server writes is read as written, and its beginnings are never taken for it.
    #[test]
    fn what_is_written_is_read(
        records in records(),
        nonce in prop::option::of(any::<[u8; 8]>()),
        cut in any::<prop::sample::Index>(),
    ) {
        let bytes = mtr(&records, 1, nonce);
        let encrypted = nonce.is_some();
        let whole = Mtr { record_bytes: records.concat().len(), bytes: bytes.len(), sequence_bit: 1 };
        prop_assert_eq!(parse_mtr(&bytes, encrypted), Parsed::Mtr(whole));
        let start = &bytes[..cut.index(bytes.len())];
        prop_assert_eq!(parse_mtr(start, encrypted), Parsed::Cut);
        let walked = walk(&[&bytes[..], &bytes, &[0; 64]].concat(), encrypted);
        prop_assert_eq!((walked.bytes, walked.mtrs), (2 * bytes.len(), 2));
        prop_assert_eq!(walked.then, Parsed::Bad(BadMtr::Empty));
    }

    /// Guards the checksum: without the comparison a changed record passes.
    #[test]
    fn a_changed_byte_is_found(records in records(), at in any::<prop::sample::Index>(), by in 1u8..) {
        let bytes = mtr(&records, 1, None);
        let end = records.concat().len();
        let at = at.index(bytes.len());
        // The byte that ends it is not covered, by design: it changes with the lap.
        prop_assume!(at != end);
        let mut changed = bytes.clone();
        changed[at] ^= by;
        let whole = Mtr { record_bytes: end, bytes: bytes.len(), sequence_bit: 1 };
        prop_assert_ne!(parse_mtr(&changed, false), Parsed::Mtr(whole));
    }

    #[test]
    fn any_bytes_are_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..2000), lsn in any::<u64>()) {
        for encrypted in [false, true] {
            if let Parsed::Mtr(mtr) = parse_mtr(&bytes, encrypted) {
                prop_assert!(mtr.bytes <= bytes.len() && mtr.record_bytes < mtr.bytes);
            }
            prop_assert!(walk(&bytes, encrypted).bytes <= bytes.len());
            deleted_spaces(&bytes, encrypted, &mut |_| ());
            prop_assert!(ends_checkpoint(&bytes, lsn, encrypted) != Some(true) || !bytes.is_empty());
        }
        let parsed = Header::parse(&bytes);
        prop_assert!(parsed.is_err() || bytes.len() >= HEADER_BYTES);
        let checkpoint = Checkpoint::parse(&bytes, lsn);
        prop_assert!(checkpoint.is_err() || bytes.len() >= CHECKPOINT_BYTES);
    }
}
