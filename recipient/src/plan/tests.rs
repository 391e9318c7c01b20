//! Units against the list that they were cut from.

use marcot_common::{
    entry::{Attributes, Totals},
    position::Position,
};
use proptest::prelude::*;

use super::*;
use crate::list::ListReceiver;

/// A list of regular files, by size and allocated bytes.
fn list(sizes: &[(u64, u64)]) -> FileList {
    let directory = std::env::temp_dir();
    let mut receiver = ListReceiver::create(&directory, Position::FIRST, 100_000).unwrap();
    let mut totals = Totals::default();
    for (number, &(size, allocated)) in sizes.iter().enumerate() {
        let entry = Entry {
            number: number as u64,
            file_id: FileId(number as u64 + 1),
            change: Change::Add,
            path: RelativePath::new(format!("{number:06}").as_bytes()).unwrap(),
            kind: Some(Kind::Regular { size, allocated }),
            attributes: Attributes::default(),
            growing: false,
        };
        totals.add(&entry);
        receiver.push(&entry).unwrap();
    }
    receiver.finish(totals).unwrap()
}

fn units(sizes: &[(u64, u64)], cut: Cut) -> Vec<Unit> {
    units_but(sizes, cut, 1, FinishedUnits::default())
}

fn units_but(sizes: &[(u64, u64)], cut: Cut, streams: usize, finished: FinishedUnits) -> Vec<Unit> {
    let plan = FetchPlan::new(&list(sizes), &Arc::default(), cut, streams, finished).unwrap();
    std::iter::from_fn(|| plan.next().unwrap()).collect()
}

/// Guards resume: what was finished is passed over, all else is planned, and units that were cut
/// otherwise (for another number of streams) are planned again, not half of them.
#[test]
fn finished_units_are_passed_over_and_others_are_not() {
    let mut sizes = dense(&[0, 5, 3 * SEGMENT_BYTES + 1, 9, SMALL_BYTES_MAX + 1]);
    sizes.extend(dense(&[7; 3000]));
    let all = units_but(&sizes, Cut::Segments, 2, FinishedUnits::default());
    let key = |unit: &Unit| (unit.first, unit.last, unit.offset(), unit.length());
    let mut finished = FinishedUnits::default();
    for unit in all.iter().step_by(2) {
        finished.insert(crate::copy_journal::unit_record(unit));
    }
    let left = units_but(&sizes, Cut::Segments, 2, finished.clone());
    let expected: Vec<_> = all.iter().skip(1).step_by(2).map(key).collect();
    assert_eq!(left.iter().map(key).collect::<Vec<_>>(), expected);
    let segment = |unit: &Unit| unit.parts.len() == 1 && unit.parts[0].size > SEGMENT_BYTES;
    let others = units_but(&sizes, Cut::Segments, 1, finished);
    let bytes: u64 = others.iter().filter(|unit| segment(unit)).map(Unit::length).sum();
    assert_eq!(bytes, 3 * SEGMENT_BYTES + 1, "no segment of one stream is one of two streams");
}

/// Guards what is copied again after a kill: 48 MiB of large files in all, unless parts would be shorter
/// than 8 MiB, or units of small files, which are not divided.
#[test]
fn what_streams_have_under_way_is_bounded() {
    let of_parts = |streams: usize| (segment_bytes_max(streams) * streams as u64) >> 20;
    assert_eq!([1, 2, 5, 6, 8, 32].map(of_parts), [48, 48, 45, 48, 64, 256]);
    assert_eq!([1, 2, 8, 32].map(|streams| under_way_bytes_max(streams) >> 20), [48, 48, 136, 544]);
}

fn dense(sizes: &[u64]) -> Vec<(u64, u64)> {
    sizes.iter().map(|&size| (size, size)).collect()
}

#[test]
fn small_files_travel_together_and_a_large_one_in_segments() {
    let small = SMALL_BYTES_MAX;
    let sizes = dense(&[0, 1, small, small + 1, 2 * SEGMENT_BYTES + 5, 7]);
    let units = units(&sizes, Cut::Segments);
    let shape: Vec<Vec<(u64, u64, u64)>> = units
        .iter()
        .map(|unit| unit.parts.iter().map(|p| (p.file_id.0, p.offset, p.length)).collect())
        .collect();
    assert_eq!(
        shape,
        [
            vec![(1, 0, 0), (2, 0, 1), (3, 0, small)],
            vec![(4, 0, small + 1)],
            vec![(5, 0, SEGMENT_BYTES)],
            vec![(5, SEGMENT_BYTES, SEGMENT_BYTES)],
            vec![(5, 2 * SEGMENT_BYTES, 5)],
            vec![(6, 0, 7)],
        ]
    );
    let whole: Vec<_> = units.iter().flat_map(|u| &u.parts).map(|p| p.whole.is_some()).collect();
    assert_eq!(whole, [true, true, true, true, false, false, false, true]);
}

/// Guards what is hashed at one time, and the size of a request with its digests: a part of a file of
/// holes is long, and has an end.
#[test]
fn a_file_of_holes_is_few_units_and_a_local_one_is_one() {
    let sparse = [(1 << 40, 4096)];
    let parts = units(&sparse, Cut::Segments);
    assert_eq!(parts.len(), 2185);
    assert!(parts.iter().all(|unit| unit.length() <= SEGMENT_SPAN_MAX));
    assert_eq!(units(&sparse, Cut::WholeFiles).len(), 1);
    let half = [(1 << 32, 1 << 31)];
    assert_eq!(units(&half, Cut::Segments).len(), 43);
}

#[test]
fn a_unit_of_small_files_is_bounded() {
    let many = vec![(100, 100); UNIT_FILES_MAX + 1];
    let counts: Vec<_> = units(&many, Cut::Segments).iter().map(|u| u.parts.len()).collect();
    assert_eq!(counts, [UNIT_FILES_MAX, 1]);
    let heavy = vec![(SMALL_BYTES_MAX, SMALL_BYTES_MAX); 40];
    let counts: Vec<_> = units(&heavy, Cut::Segments).iter().map(|u| u.parts.len()).collect();
    assert_eq!(counts, [16, 16, 8]);
}

proptest! {
    /// Every byte of every file is in exactly one part, in order.
    #[test]
    fn the_parts_are_the_files(sizes in prop::collection::vec(
        prop_oneof![0u64..3_000_000, 60_000_000u64..200_000_000], 0..40))
    {
        let mut done = vec![0; sizes.len()];
        let mut seen = vec![false; sizes.len()];
        for unit in units(&dense(&sizes), Cut::Segments) {
            for part in unit.parts {
                let index = usize::try_from(part.file_id.0).unwrap() - 1;
                prop_assert_eq!(part.offset, done[index]);
                prop_assert_eq!(part.size, sizes[index]);
                done[index] += part.length;
                seen[index] = true;
            }
        }
        prop_assert_eq!(done, sizes);
        prop_assert!(seen.into_iter().all(|seen| seen));
    }
}

/// Guards memory: a unit holds the entries of its files, which a donor may make 68 KiB each.
#[test]
fn a_unit_ends_at_its_bytes_of_paths_and_attributes() {
    let mut receiver =
        ListReceiver::create(&std::env::temp_dir(), Position::FIRST, 10_000).unwrap();
    let value = vec![7; 60 << 10].into_boxed_slice();
    let extended = vec![(b"user.x".to_vec().into_boxed_slice(), value)];
    let mut totals = Totals::default();
    for number in 0..200 {
        let entry = Entry {
            number,
            file_id: FileId(number + 1),
            change: Change::Add,
            path: RelativePath::new(format!("{number:06}").as_bytes()).unwrap(),
            kind: Some(Kind::Regular { size: 1, allocated: 1 }),
            attributes: Attributes { extended: extended.clone(), ..Attributes::default() },
            growing: false,
        };
        totals.add(&entry);
        receiver.push(&entry).unwrap();
    }
    let list = receiver.finish(totals).unwrap();
    let plan =
        FetchPlan::new(&list, &Arc::default(), Cut::Segments, 1, FinishedUnits::default()).unwrap();
    let units: Vec<_> = std::iter::from_fn(|| plan.next().unwrap()).collect();
    assert_eq!(units.iter().map(|unit| unit.parts.len()).sum::<usize>(), 200);
    assert!(units.iter().all(|unit| unit.parts.len() <= 36), "{}", units.len());
}

/// Guards a unit of which every file has changed meanwhile: what its record says fits into one of the
/// journal's. Without the bound on paths, or on why, the clone ends in an internal error.
#[test]
fn the_record_of_a_unit_of_files_that_all_have_changed_fits_into_the_journal() {
    use crate::{
        certificate::digests::DigestRun, copy_journal::record::Unread, journal::PAYLOAD_BYTES_MAX,
        writer::Unfinished,
    };
    for path_bytes in [120, 190, 4000] {
        let later = Position { round: 2, ..Position::FIRST };
        let mut receiver = ListReceiver::create(&std::env::temp_dir(), later, 100_000).unwrap();
        let mut totals = Totals::default();
        let directories = vec!["d".repeat(150); path_bytes / 151].join("/");
        for number in 0..4000 {
            let name = format!("{directories}/{number:0width$}", width = path_bytes % 151 + 4);
            let entry = Entry {
                number,
                file_id: FileId(u64::MAX - number),
                change: Change::Replace,
                path: RelativePath::new(name.trim_start_matches('/').as_bytes()).unwrap(),
                kind: Some(Kind::Regular { size: 1, allocated: 1 }),
                attributes: Attributes::default(),
                growing: false,
            };
            totals.add(&entry);
            receiver.push(&entry).unwrap();
        }
        let list = receiver.finish(totals).unwrap();
        let none = FinishedUnits::default();
        let plan = FetchPlan::new(&list, &Arc::default(), Cut::Segments, 1, none).unwrap();
        let mut count = 0;
        while let Some(unit) = plan.next().unwrap() {
            let mut record = crate::copy_journal::unit_record(&unit);
            for part in &unit.parts {
                // Longer than any donor's that is honest, in characters of several bytes.
                let failure = Failure::bug("\u{e4}".repeat(2000));
                record.unfinished.push(Unread::from(&Unfinished { part: part.clone(), failure }));
                let file_id = part.file_id.0;
                record.digests.push(DigestRun {
                    file_id,
                    digests: vec![1; 32],
                    ..Default::default()
                });
            }
            count += unit.parts.len();
            let bytes = prost::Message::encoded_len(&record);
            assert!(bytes <= PAYLOAD_BYTES_MAX, "{bytes} bytes, of paths of {path_bytes}");
        }
        assert_eq!(count, 4000);
    }
}
