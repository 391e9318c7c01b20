//! Tables and schemas that come and go, change their names, columns, keys and engines. The storm
//! knows which tables there are, so that no statement of it may fail but by a conflict.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use mysql::{Conn, prelude::Queryable as _};

use super::{Random, Shared, errors::CHANGES};

/// Tables at one time: enough for a list to hold some of each kind, few enough to meet again.
const TABLES: u64 = 40;

/// Columns and keys that a table gains before it is dropped: below the server's bounds.
const GROWN_MAX: u32 = 12;

/// What a storm does. A row that is about DDL asserts that each was done.
pub const KINDS: [&str; 11] = [
    "create",
    "drop",
    "rename",
    "truncate",
    "alter copy",
    "alter inplace",
    "alter instant",
    "alter engine",
    "create database",
    "drop database",
    "exchange names",
];

/// A number that no other load of this process has had.
pub(super) fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

struct Table {
    engine: &'static str,
    grown: u32,
}

type Tables = BTreeMap<u64, Table>;

fn pick(tables: &Tables, random: &mut Random) -> Option<u64> {
    let count = tables.len() as u64;
    (count > 0).then(|| *tables.keys().nth(random.below(count) as usize).expect("below the count"))
}

/// Statements of one step: kind and SQL. Rows have the kind "".
type Step = Vec<(&'static str, String)>;

pub(super) fn change_tables(shared: &Shared, conn: &mut Conn) {
    let mut random = Random(5 + next_number());
    let mut tables = Tables::new();
    // An earlier load's storm has left its own.
    for number in 0..TABLES {
        let sql = format!("DROP TABLE IF EXISTS ddl.t{number}");
        if let Err(error) = conn.query_drop(&sql) {
            shared.may_meet("storm", CHANGES, &sql, &error);
            return;
        }
    }
    let mut number = 0;
    while !shared.stopped() {
        if shared.ddl_rests.load(Ordering::Relaxed) {
            std::thread::park_timeout(Duration::from_millis(50));
            continue;
        }
        number += 1;
        for (kind, sql) in step(shared, &mut tables, &mut random, number) {
            match conn.query_drop(&sql) {
                Ok(()) if kind.is_empty() => {}
                Ok(()) => shared.done(kind),
                Err(error) => {
                    if !shared.may_meet("storm", CHANGES, &sql, &error) || !kind.is_empty() {
                        // What the storm knows of its tables is no longer so.
                        return shared.problem(format!("storm: {sql:.200}: {error}"));
                    }
                }
            }
        }
    }
}

fn step(shared: &Shared, tables: &mut Tables, random: &mut Random, number: u64) -> Step {
    let picked = pick(tables, random);
    let free = (0..TABLES).find(|n| !tables.contains_key(n));
    match (random.below(11), picked, free) {
        (0..=2, _, Some(free)) | (_, None, Some(free)) => {
            tables.insert(free, Table { engine: "InnoDB", grown: 0 });
            let rows = 1 + random.below(3000);
            vec![(
                "create",
                format!(
                    "CREATE TABLE ddl.t{free} (id INT PRIMARY KEY, v VARCHAR(100), w INT, KEY (v)) \
                     ENGINE=InnoDB AS SELECT seq id, MD5(CONCAT(seq)) v, seq w FROM {}",
                    shared.sequence(rows)
                ),
            )]
        }
        (0..=3, Some(old), _) => {
            tables.remove(&old);
            vec![("drop", format!("DROP TABLE ddl.t{old}"))]
        }
        (4, Some(from), Some(to)) => {
            let table = tables.remove(&from).expect("picked");
            tables.insert(to, table);
            vec![
                ("rename", format!("RENAME TABLE ddl.t{from} TO ddl.t{to}")),
                ("", format!("INSERT INTO ddl.t{to} (id) VALUES (-{number})")),
            ]
        }
        (5, Some(one), _) => {
            // Each takes the other's name: a list by name sees two files that were swapped.
            let other = pick(tables, random).expect("there is one");
            if one == other {
                return Vec::new();
            }
            let table = tables.remove(&one).expect("picked");
            let second = tables.insert(other, table).expect("picked");
            tables.insert(one, second);
            let names = format!(
                "RENAME TABLE ddl.t{one} TO ddl.swap, ddl.t{other} TO ddl.t{one}, ddl.swap TO \
                 ddl.t{other}"
            );
            vec![("exchange names", names)]
        }
        (6, Some(n), _) => vec![
            ("truncate", format!("TRUNCATE TABLE ddl.t{n}")),
            ("", format!("INSERT INTO ddl.t{n} (id) VALUES (-{number})")),
        ],
        (7, Some(n), _) => change_engine(shared, n, tables, random),
        (8, ..) => {
            let schema = number % 3;
            vec![
                ("create database", format!("CREATE DATABASE ddl{schema}")),
                ("", format!("CREATE TABLE ddl{schema}.x (id INT) ENGINE=InnoDB")),
                ("", format!("INSERT INTO ddl{schema}.x VALUES (1)")),
                ("drop database", format!("DROP DATABASE ddl{schema}")),
            ]
        }
        (_, Some(n), _) => alter(n, tables, random, number),
        (_, None, None) => Vec::new(),
    }
}

fn change_engine(shared: &Shared, n: u64, tables: &mut Tables, random: &mut Random) -> Step {
    let engine = match shared.version.is_mysql() {
        true => "InnoDB",
        false => ["Aria", "InnoDB", "MyISAM"][random.below(3) as usize],
    };
    tables.get_mut(&n).expect("picked").engine = engine;
    vec![
        ("alter engine", format!("ALTER TABLE ddl.t{n} ENGINE={engine}")),
        ("", format!("UPDATE ddl.t{n} SET w = w + 1 LIMIT 100")),
    ]
}

fn alter(n: u64, tables: &mut Tables, random: &mut Random, number: u64) -> Step {
    let table = tables.get_mut(&n).expect("picked");
    if table.grown >= GROWN_MAX {
        tables.remove(&n);
        return vec![("drop", format!("DROP TABLE ddl.t{n}"))];
    }
    let copy = format!("ALTER TABLE ddl.t{n} FORCE, ALGORITHM=COPY");
    match (random.below(3), table.engine) {
        (0, _) => vec![("alter copy", copy)],
        (1, "InnoDB") => {
            table.grown += 1;
            let sql = format!("ALTER TABLE ddl.t{n} ADD INDEX i{number} (w), ALGORITHM=INPLACE");
            vec![("alter inplace", sql)]
        }
        (2, "InnoDB") => {
            table.grown += 1;
            let column = format!("c{number} INT DEFAULT 5");
            vec![
                (
                    "alter instant",
                    format!("ALTER TABLE ddl.t{n} ADD COLUMN {column}, ALGORITHM=INSTANT"),
                ),
                ("", format!("UPDATE ddl.t{n} SET c{number} = id LIMIT 50")),
            ]
        }
        _ => vec![("alter copy", copy)],
    }
}
