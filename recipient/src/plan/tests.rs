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

#[test]
fn a_file_of_holes_is_few_units_and_a_local_one_is_one() {
    let sparse = [(1 << 40, 4096)];
    assert_eq!(units(&sparse, Cut::Segments).len(), 22);
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
