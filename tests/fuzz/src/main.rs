//! What `fuzz.sh` asks beside the targets:
//!
//! ```text
//! marcot-fuzz list                        names of all targets
//! marcot-fuzz seeds DIRECTORY             the seeds of each, in a directory of its name
//! marcot-fuzz coverage DIRECTORY.. TARGET..
//!                                         of each target's files, by the inputs in DIRECTORY/TARGET;
//!                                         a directory has a slash in it. `--lines` lists the lines
//!                                         that no input reaches
//! ```

#![deny(unsafe_code)]

mod coverage;
mod linked;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

// What the counters call, which nothing here needs, is libFuzzer's.
extern crate libfuzzer_sys as _;

use marcot_fuzz::{TARGETS, Target, scratch};

use self::coverage::Blocks;

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let lists_lines = arguments.iter().any(|argument| argument == "--lines");
    arguments.retain(|argument| argument != "--lines");
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["list"] => {
            TARGETS.iter().for_each(|target| println!("{}", target.name));
            Ok(())
        }
        ["seeds", directory] => write_seeds(Path::new(directory)),
        ["coverage", ref words @ ..] => {
            let (directories, names): (Vec<&str>, Vec<&str>) =
                words.iter().copied().partition(|word| word.contains('/'));
            tell_coverage(&directories, &names, lists_lines)
        }
        _ => Err(io::Error::other("list, seeds DIRECTORY or coverage DIRECTORY... TARGET...")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("marcot-fuzz: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write_seeds(directory: &Path) -> io::Result<()> {
    for target in TARGETS {
        let directory = directory.join(target.name);
        fs::create_dir_all(&directory)?;
        for (number, seed) in (target.seeds)().iter().enumerate() {
            fs::write(directory.join(format!("seed-{number:02}")), seed)?;
        }
    }
    Ok(())
}

/// Prints a line for each target: name, lines that were reached, lines that there are, percent.
fn tell_coverage(directories: &[&str], names: &[&str], lists_lines: bool) -> io::Result<()> {
    let wanted = |target: &&Target| names.contains(&target.name);
    if let Some(name) = names.iter().find(|name| !TARGETS.iter().any(|t| t.name == **name)) {
        return Err(io::Error::other(format!("there is no target {name}")));
    }
    let blocks = Blocks::of_this_program()?;
    let lines = blocks.lines()?;
    // A file that several targets share is reached by all of them together.
    let mut reached: BTreeMap<&str, BTreeSet<u32>> = BTreeMap::new();
    let of_wanted: BTreeSet<&str> =
        TARGETS.iter().filter(wanted).flat_map(|target| target.files).copied().collect();
    for target in TARGETS.iter().filter(|t| t.files.iter().any(|file| of_wanted.contains(file))) {
        scratch::enter(target.name);
        blocks.forget();
        let mut hit = BTreeSet::new();
        for directory in directories {
            run_all(target, &Path::new(directory).join(target.name), &blocks, &mut hit)?;
        }
        for file in target.files {
            let lines = lines.get(*file).into_iter().flatten();
            let hit = lines.filter(|(block, _)| hit.contains(block)).map(|(_, line)| *line);
            reached.entry(*file).or_default().extend(hit);
        }
    }
    for target in TARGETS.iter().filter(wanted) {
        let (mut of_all, mut of_reached) = (0, 0);
        for file in target.files {
            let all: BTreeSet<u32> =
                lines.get(*file).into_iter().flatten().map(|(_, line)| *line).collect();
            if all.is_empty() {
                return Err(io::Error::other(format!(
                    "{}: no line of {file} is there",
                    target.name
                )));
            }
            let reached = &reached[file];
            (of_all, of_reached) = (of_all + all.len(), of_reached + reached.len());
            if lists_lines {
                let left: Vec<_> = all.difference(reached).map(u32::to_string).collect();
                println!("  {file}: {} of {}, not {}", reached.len(), all.len(), left.join(" "));
            }
        }
        let percent = 100.0 * of_reached as f64 / of_all as f64;
        println!("{} {of_reached} {of_all} {percent:.1}", target.name);
    }
    Ok(())
}

/// Runs a target over all files of a directory, if it is there; adds the blocks that were reached.
fn run_all(
    target: &Target,
    directory: &Path,
    blocks: &Blocks,
    hit: &mut BTreeSet<usize>,
) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    let paths: io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
    for path in paths? {
        (target.run)(&fs::read(path)?);
        hit.extend(blocks.take_hit());
    }
    Ok(())
}
