//! User XA transactions, prepared for a while, some of them across the cut. Each notes its moments,
//! so that what a copy has prepared can be judged.

use std::time::{Duration, Instant};

use mysql::{Conn, prelude::Queryable as _};

use super::{Moment, Random, Shared, errors::NONE, lock};
use crate::database::Database;

/// How long transactions stay prepared, and which rows they change: each client has its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    pub(super) name: &'static str,
    prepared_millis: (u64, u64),
    first_row: u64,
}

/// Many, so that some are being prepared or decided at the cut.
pub(super) const SHORT: Kind = Kind { name: "short", prepared_millis: (0, 200), first_row: 1 };

/// Longer than a small clone takes: one is prepared before, at and after the cut.
pub(super) const LONG: Kind = Kind { name: "long", prepared_millis: (2000, 5000), first_row: 11 };

/// Rows of each kind.
const ROWS: u64 = 10;

/// One transaction's moments, as its client saw them.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// Its name.
    pub xid: String,
    /// Before XA PREPARE was sent.
    pub asked: Instant,
    /// XA PREPARE was acknowledged.
    pub prepared: Option<Instant>,
    /// Before XA COMMIT or XA ROLLBACK was sent.
    pub deciding: Option<Instant>,
    /// That was acknowledged.
    pub decided: Option<Instant>,
}

pub(super) fn run(shared: &Shared, conn: &mut Conn, kind: Kind) {
    let mut random = Random(7 + kind.first_row);
    let mut number = 0;
    // Several loads run on one server, one after the other.
    let load = std::process::id() as u64 * 1000 + super::storm::next_number();
    while !shared.stopped() {
        number += 1;
        let xid = format!("{}-{load}-{number}", kind.name);
        let row = kind.first_row + random.below(ROWS);
        let is_rolled_back = random.below(4) == 0;
        let mut execute = |sql: String| match conn.query_drop(&sql) {
            Ok(()) => true,
            Err(error) => shared.may_meet("xa", NONE, &sql, &error),
        };
        let begun = execute(format!("XA START '{xid}'"))
            && execute(format!("UPDATE bank.xa SET n = n + 1 WHERE id = {row}"))
            && execute(format!("XA END '{xid}'"));
        if !begun {
            return;
        }
        let index = {
            let mut all = lock(&shared.prepared);
            let (asked, xid) = (Instant::now(), xid.clone());
            all.push(Prepared { xid, asked, prepared: None, deciding: None, decided: None });
            all.len() - 1
        };
        let note = |write: fn(&mut Prepared)| write(&mut lock(&shared.prepared)[index]);
        if !execute(format!("XA PREPARE '{xid}'")) {
            return;
        }
        note(|one| one.prepared = Some(Instant::now()));
        let (least, most) = kind.prepared_millis;
        shared.rest(Duration::from_millis(least + random.below(most - least)));
        note(|one| one.deciding = Some(Instant::now()));
        let verb = if is_rolled_back { "ROLLBACK" } else { "COMMIT" };
        if !execute(format!("XA {verb} '{xid}'")) {
            return;
        }
        note(|one| one.decided = Some(Instant::now()));
    }
}

/// Checks what a copy has prepared: only what its donor may have had prepared between two moments,
/// and all that the donor had prepared at both.
pub fn check_prepared(copy: &Database, all: &[Prepared], before: &Moment, ended: &Moment) -> usize {
    let recovered = copy.query("XA RECOVER");
    let found: Vec<&str> =
        recovered.lines().filter_map(|line| line.split('\t').next_back()).collect();
    for xid in &found {
        let one = all.iter().find(|one| one.xid == *xid);
        let one = one.unwrap_or_else(|| panic!("{xid} is prepared, the donor never had it"));
        assert!(one.asked <= ended.at, "{xid} is prepared, it was not begun before the end");
        let was_decided = one.decided.is_some_and(|at| at < before.at);
        assert!(!was_decided, "{xid} is prepared, it was decided before the clone began");
    }
    for one in all {
        let before_it = one.prepared.is_some_and(|at| at < before.at);
        let after_it = one.deciding.is_none_or(|at| at > ended.at);
        let xid = &one.xid;
        assert!(
            !(before_it && after_it) || found.contains(&xid.as_str()),
            "{xid} was prepared all the time, the copy does not have it: {recovered}"
        );
    }
    found.len()
}
