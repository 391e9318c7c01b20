//! Which lines have run, by what the compiler puts into Marcot's crates for libFuzzer: a counter and
//! an address for each block (SanitizerCoverage). llvm-cov of the compiler's own version is in no
//! Debian, so lines come from the program's debug information instead: those of the addresses from
//! one block to the next, inlined code by where it was written.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    sync::atomic::{AtomicU8, Ordering},
};

use addr2line::Context;
use gimli::{Dwarf, EndianSlice, NativeEndian, SectionId};
use object::{Object as _, ObjectSection as _};

use crate::linked::{Place, program_start, tables};

/// All blocks of a program.
pub struct Blocks {
    counters: &'static [AtomicU8],
    places: &'static [Place],
    program_start: usize,
}

/// By file, from the project's root: a block and a line of it.
pub type Lines = BTreeMap<String, Vec<(usize, u32)>>;

impl Blocks {
    /// Those of the program that asks.
    pub fn of_this_program() -> io::Result<Self> {
        let (counters, places) = tables();
        if counters.len() != places.len() || counters.is_empty() {
            let text = format!("{} counters of {} blocks", counters.len(), places.len());
            return Err(io::Error::other(text));
        }
        Ok(Self { counters, places, program_start: program_start() })
    }

    /// Forgets what has run.
    pub fn forget(&self) {
        self.counters.iter().for_each(|counter| counter.store(0, Ordering::Relaxed));
    }

    /// Blocks that have run since the last call.
    pub fn take_hit(&self) -> Vec<usize> {
        let hit = |(number, counter): (usize, &AtomicU8)| {
            (counter.swap(0, Ordering::Relaxed) != 0).then_some(number)
        };
        self.counters.iter().enumerate().filter_map(hit).collect()
    }

    /// Lines of all blocks.
    pub fn lines(&self) -> io::Result<Lines> {
        let failed =
            |e: &dyn std::fmt::Display| io::Error::other(format!("debug information: {e}"));
        let bytes = std::fs::read(std::env::current_exe()?)?;
        let program = object::File::parse(&bytes[..]).map_err(|e| failed(&e))?;
        let section = |id: SectionId| {
            let section = program.section_by_name(id.name());
            let bytes = section.map_or(Ok(&[][..]), |section| section.data())?;
            Ok(EndianSlice::new(bytes, NativeEndian))
        };
        let debug = Dwarf::load(section).map_err(|e: object::Error| failed(&e))?;
        let context = Context::from_dwarf(debug).map_err(|e| failed(&e))?;
        // Blocks that were found to be dead have an address that is none.
        let is_there = |number: &usize| self.places[*number].address > self.program_start;
        let address = |number: usize| (self.places[number].address - self.program_start) as u64;
        let mut order: Vec<(u64, usize)> = (0..self.places.len())
            .filter(is_there)
            .map(|number| (address(number), number))
            .collect();
        order.sort_unstable();
        let (Some((first, _)), Some((last, _))) = (order.first(), order.last()) else {
            return Err(io::Error::other("no block has an address"));
        };
        let rows = context.find_location_range(*first, last + 1).map_err(|e| failed(&e))?;
        let root = project_root();
        // By the program's name of a file: there are few, and millions of rows.
        let mut files: HashMap<&str, Option<BTreeSet<(usize, u32)>>> = HashMap::new();
        for (start, bytes, location) in rows {
            let (Some(file), Some(line)) = (location.file, location.line) else { continue };
            let is_ours = || within(file, &root).map(|_| BTreeSet::new());
            let Some(lines) = files.entry(file).or_insert_with(is_ours) else { continue };
            // From the block that the row begins in to the one that it ends in.
            let from = order.partition_point(|(at, _)| *at <= start).saturating_sub(1);
            let until = order.partition_point(|(at, _)| *at < start + bytes);
            let blocks = order.get(from..until).unwrap_or_default();
            lines.extend(blocks.iter().filter(|_| line > 0).map(|(_, block)| (*block, line)));
        }
        let mut lines = BTreeMap::<String, BTreeSet<(usize, u32)>>::new();
        for (file, of_file) in files {
            let Some(file) = within(file, &root) else { continue };
            lines.entry(file).or_default().extend(of_file.into_iter().flatten());
        }
        let without_types = |(file, lines): (String, BTreeSet<(usize, u32)>)| {
            let text = std::fs::read_to_string(format!("{root}{file}"))?;
            let types = lines_of_types(&text);
            let lines = lines.into_iter().filter(|(_, line)| !types.contains(line));
            Ok((file, lines.collect()))
        };
        lines.into_iter().map(without_types).collect()
    }
}

/// Lines of structs and enums, with what stands before them: the code there is derived, `Debug` of
/// errors above all, and no parser's.
fn lines_of_types(text: &str) -> BTreeSet<u32> {
    let mut lines = BTreeSet::new();
    let mut before = Vec::new();
    let mut end: Option<String> = None;
    for (number, line) in (1..).zip(text.lines()) {
        let code = line.trim_start();
        let indent = &line[..line.len() - code.len()];
        if let Some(last) = &end {
            lines.insert(number);
            if line == last {
                end = None;
            }
            continue;
        }
        let mut words = code.split([' ', '(']).filter(|word| !word.is_empty());
        let is_type = words.by_ref().take(3).any(|word| matches!(word, "struct" | "enum"))
            && !code.starts_with("//");
        if is_type {
            lines.extend(before.drain(..));
            lines.insert(number);
            if !code.ends_with(';') && !code.ends_with('}') {
                end = Some(format!("{indent}{}", if code.ends_with('(') { ");" } else { "}" }));
            }
        } else if code.is_empty() || code.ends_with([';', '{', '}']) {
            before.clear();
        } else {
            // Attributes and documentation, if a type comes next.
            before.push(number);
        }
    }
    lines
}

/// Where the project was when this was built.
fn project_root() -> String {
    let here = env!("CARGO_MANIFEST_DIR");
    here.strip_suffix("tests/fuzz").unwrap_or(here).to_owned()
}

/// A file of the project by its path from the root; some are named through `tests/fuzz/../..`.
fn within(file: &str, root: &str) -> Option<String> {
    let mut parts = Vec::new();
    for part in file.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "." => {}
            part => parts.push(part),
        }
    }
    Some(parts.join("/").strip_prefix(root)?.to_owned())
}
