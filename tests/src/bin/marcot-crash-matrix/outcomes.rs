//! What came of all kills.

use std::collections::BTreeMap;

use crate::{AFTER, EITHER, End, INSTALL};

/// So many kills at random moments must show both trees.
const MANY: u64 = 10;

/// A clone that had no step yet.
pub(crate) const BEFORE: &str = "before";

/// How often the old tree stood, and the new one.
#[derive(Debug, Clone, Copy, Default)]
struct Stood {
    old: u64,
    new: u64,
}

/// What came of all kills.
#[derive(Default)]
pub(crate) struct Outcomes {
    pub(crate) right: u64,
    pub(crate) all: u64,
    /// At random moments, by how and form: all, and those between an install's first and last step.
    random: BTreeMap<(&'static str, &'static str), (u64, u64)>,
    /// By last step, form, and how it was ended.
    table: BTreeMap<(String, &'static str, End), Stood>,
}

impl Outcomes {
    /// A kill at a random moment, which counts.
    pub(crate) fn at_random(&mut self, end: End, form: &'static str, is_between: bool) {
        let sums = self.random.entry((end.group(), form)).or_default();
        sums.0 += 1;
        sums.1 += u64::from(is_between);
    }

    /// A kill, and what stands after the next start.
    pub(crate) fn take(
        &mut self,
        end: End,
        form: &'static str,
        last: &str,
        expected: Option<&str>,
        verdict: Result<String, String>,
    ) {
        self.all += 1;
        match verdict {
            Ok(mark) if expected.is_none_or(|expected| [EITHER, &*mark].contains(&expected)) => {
                self.right += 1;
                let stood = self.table.entry((last.to_owned(), form, end)).or_default();
                if mark == "old" { stood.old += 1 } else { stood.new += 1 }
            }
            Ok(mark) => println!("WRONG {end:?} {form} {last}: {mark}, expected {expected:?}"),
            Err(why) => println!("WRONG {end:?} {form} {last}: {why}"),
        }
    }

    /// Prints the table of what stood, as Markdown.
    pub(crate) fn print(&self) {
        println!("| last step | form | killed | recipient killed | power cut |");
        println!("|---|---|---|---|---|");
        let mut steps = vec![BEFORE];
        // All forms have the same first and last steps.
        for (_, names) in INSTALL.iter().chain(&AFTER) {
            for (name, _) in *names {
                if !steps.contains(name) {
                    steps.push(name);
                }
            }
        }
        for step in steps {
            for (form, _) in INSTALL {
                let of = |end| self.table.get(&(step.to_owned(), form, end)).copied();
                let cells = [End::Kill, End::KillAlone, End::PowerCut].map(of);
                if cells.iter().any(Option::is_some) {
                    let [both, alone, cut] = cells.map(Stood::shown);
                    println!("| `{step}` | {form} | {both} | {alone} | {cut} |");
                }
            }
        }
    }

    /// Whether random moments were where they had to be.
    pub(crate) fn spread(&self) -> bool {
        let mut is_spread = true;
        for (&(how, form), &(all, between)) in &self.random {
            let mut sum = Stood::default();
            for ((_, of, end), stood) in &self.table {
                if *of == form && end.group() == how {
                    sum.old += stood.old;
                    sum.new += stood.new;
                }
            }
            let Stood { old, new } = sum;
            println!("{how}, {form}: {between} of {all} between two steps, {old} old, {new} new");
            if between * 2 < all || (all >= MANY && (old == 0 || new == 0)) {
                println!("TOO FEW {how} {form}");
                is_spread = false;
            }
        }
        is_spread
    }
}

impl Stood {
    fn shown(this: Option<Self>) -> String {
        match this {
            None => String::new(),
            Some(Self { old, new: 0 }) => format!("{old} old"),
            Some(Self { old: 0, new }) => format!("{new} new"),
            Some(Self { old, new }) => format!("{old} old, {new} new"),
        }
    }
}
