//! What the documents say, held against the tree.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use marcot_common::failure::reasons::REASONS;
use serde::Deserialize;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found
}

fn sources() -> Vec<PathBuf> {
    let crates = ["common/src", "donor/src", "donor/engine/src", "recipient/src"];
    crates.iter().flat_map(|name| files(&root().join(name), "rs")).collect()
}

fn documents() -> Vec<PathBuf> {
    let mut documents = files(&root().join("docs"), "md");
    let top = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"];
    documents.extend(top.map(|name| root().join(name)));
    documents
}

/// Words in back quotes, and targets of links.
fn quoted(text: &str) -> Vec<&str> {
    let ticks = text.split('`').skip(1).step_by(2);
    let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    ticks.chain(links).collect()
}

#[test]
fn documents_name_only_paths_that_exist() {
    let roots = ["proto/", "common/", "donor/", "recipient/", "tests/", "docs/", "deploy/", ".ci/"];
    let mut checked = 0;
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for word in quoted(&text) {
            let link = word.ends_with(".md") && !word.contains("://");
            if !link && !roots.iter().any(|start| word.starts_with(start)) {
                continue;
            }
            let beside = document.parent().unwrap().join(word);
            let exists = root().join(word).exists() || beside.exists();
            assert!(exists, "{} names {word}", document.display());
            checked += 1;
        }
    }
    assert!(checked > 10, "only {checked} paths were found");
}

/// Whether a word is written as a reason is.
fn is_shouted(word: &str) -> bool {
    let is_letter = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    word.len() > 2
        && word.starts_with(|c: char| c.is_ascii_uppercase())
        && word.chars().all(is_letter)
}

/// Reasons that the code raises, those of a wrong field (`BAD_`) left out.
fn reasons() -> BTreeSet<String> {
    let mut reasons = BTreeSet::new();
    for source in sources() {
        let text = fs::read_to_string(&source).unwrap();
        let text = text.split("#[cfg(test)]").next().unwrap();
        for start in ["Failure::new(", "Failure::invalid(", "Failure::precondition(", "Self::new("]
        {
            for call in text.split(start).skip(1) {
                let argument = call.split('"').nth(1).unwrap_or_default();
                let before = call.split('"').next().unwrap_or_default();
                if is_shouted(argument) && before.len() < 60 && !argument.starts_with("BAD_") {
                    reasons.insert(argument.to_owned());
                }
            }
        }
    }
    reasons
}

#[test]
fn every_reason_is_in_the_troubleshooting_page() {
    let page = fs::read_to_string(root().join("docs/troubleshooting.md")).unwrap();
    let named: BTreeSet<&str> = quoted(&page).into_iter().collect();
    let reasons = reasons();
    assert!(reasons.len() > 50, "{reasons:?}");
    let missing: Vec<_> = reasons.iter().filter(|r| !named.contains(r.as_str())).collect();
    assert_eq!(missing, Vec::<&String>::new(), "reasons that the page lacks");
    let sources: String = sources().iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    for name in named.iter().filter(|name| is_shouted(name)) {
        let known = sources.contains(&format!("\"{name}\"")) || name.ends_with('_');
        assert!(known, "the page names {name}, which no code raises");
    }
}

/// Guards the threat model: an attack that no test shows harmless is a claim.
#[test]
fn every_threat_has_tests_and_they_exist() {
    let page = fs::read_to_string(root().join("docs/security.md")).unwrap();
    let (_, threats) = page.split_once("## Threats").unwrap();
    let directories = ["common", "donor", "recipient", "tests/tests"];
    let tests = directories.iter().flat_map(|name| files(&root().join(name), "rs"));
    let tests: String = tests.map(|path| fs::read_to_string(path).unwrap()).collect();
    let rows: Vec<&str> = threats.lines().filter(|line| line.starts_with("| ")).skip(1).collect();
    assert!(rows.len() > 30, "{rows:?}");
    for row in rows {
        let cells: Vec<&str> = row.split(" | ").collect();
        let [_, _, shown] = cells[..] else { panic!("not three cells: {row}") };
        let named = quoted(shown);
        assert!(!named.is_empty(), "nothing shows it: {row}");
        for name in named {
            assert!(tests.contains(&format!("fn {name}(")), "there is no test {name}");
        }
    }
}

#[test]
fn donor_and_recipient_never_name_each_other() {
    for (directory, forbidden) in [
        ("donor", &["marcot_recipient"][..]),
        ("recipient", &["marcot_donor"]),
        ("common", &["marcot_recipient", "marcot_donor", "marcot_engine"]),
        ("donor/engine", &["marcot_recipient", "marcot_donor"]),
    ] {
        for source in files(&root().join(directory).join("src"), "rs") {
            let text = fs::read_to_string(&source).unwrap();
            for name in forbidden {
                // A filter of logs is no import.
                let used = text.contains(&format!("{name}::")) && !text.contains("=debug");
                assert!(!used, "{} names {name}", source.display());
            }
        }
    }
}

/// Guards the bound on unsafe code, in tests as well as in what ships: an `expect` elsewhere would let it in.
#[test]
fn unsafe_code_is_in_one_module() {
    let words = [
        "unsafe {",
        "unsafe fn",
        "unsafe impl",
        "unsafe trait",
        "unsafe extern",
        "unsafe(",
        "expect(unsafe_code",
        "allow(unsafe_code",
        "warn(unsafe_code",
    ];
    let own = root().join("tests/tests/tidy.rs");
    let crates = ["common", "donor", "proto", "recipient", "tests"];
    let all = crates.iter().flat_map(|name| files(&root().join(name), "rs"));
    let found: Vec<PathBuf> = all
        .filter(|path| *path != own && !path.components().any(|part| part.as_os_str() == "target"))
        .filter(|path| {
            let text = fs::read_to_string(path).unwrap();
            words.iter().any(|word| text.contains(word))
        })
        .collect();
    let allowed = ["common/src/os.rs", "tests/fuzz/src/linked.rs"];
    assert_eq!(found, allowed.map(|path| root().join(path)));
    for crate_root in [
        "donor/src/lib.rs",
        "donor/engine/src/lib.rs",
        "recipient/src/lib.rs",
        "tests/src/lib.rs",
        "tests/fuzz/src/lib.rs",
    ] {
        let text = fs::read_to_string(root().join(crate_root)).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{crate_root}");
    }
}

/// Guards the labels of metrics: a reason that is not on the list is counted as OTHER.
#[test]
fn every_reason_is_a_label_of_metrics() {
    let page = fs::read_to_string(root().join("docs/troubleshooting.md")).unwrap();
    let is_reason = |word: &&str| is_shouted(word) && !word.ends_with('_');
    let named: BTreeSet<&str> = quoted(&page).into_iter().filter(is_reason).collect();
    let known: BTreeSet<&str> = REASONS.iter().copied().collect();
    let missing: Vec<_> = named.difference(&known).collect();
    assert_eq!(missing, Vec::<&&str>::new(), "reasons that common/src/failure/reasons.rs lacks");
    // What a status without a reason is told as.
    let made_up = BTreeSet::from(["DEADLINE_EXCEEDED", "PEER_ERROR", "PEER_LACKS_METHOD"]);
    let gone: BTreeSet<&str> = known.difference(&named).copied().collect();
    assert_eq!(gone, made_up, "reasons that nothing raises any more");
}

/// tests/removals.toml: see its head, and `make removals`.
#[derive(Deserialize)]
struct Removals {
    removal: Vec<Removal>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Removal {
    name: String,
    what: String,
    file: String,
    find: String,
    replace: String,
    #[serde(default)]
    also: Vec<Edit>,
    stories: Vec<String>,
    #[serde(default, rename = "hangs")]
    _hangs: bool,
    /// The list that it is of.
    #[serde(skip)]
    list: &'static str,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Edit {
    file: String,
    find: String,
    replace: String,
}

/// Where the tests of a nextest binary are: its root file, and the directory of its modules.
fn test_files(binary: &str) -> (PathBuf, PathBuf) {
    let (package, name) = match binary.split_once("::") {
        Some((package, name)) => (package, Some(name)),
        None if binary.starts_with("marcot-") => (binary, None),
        None => ("marcot-tests", Some(binary)),
    };
    let directory = match package {
        "marcot-engine" => "donor/engine",
        package => package.trim_start_matches("marcot-"),
    };
    let directory = root().join(directory);
    let Some(name) = name else {
        return (directory.join("src/lib.rs"), directory.join("src"));
    };
    let single = directory.join(format!("tests/{name}.rs"));
    let modules = directory.join("tests").join(name);
    let file = if single.is_file() { single } else { modules.join("main.rs") };
    (file, modules)
}

/// Whether a story is where its name says: `innodb matrix::a_name`.
fn is_there(story: &str) -> bool {
    let Some((binary, path)) = story.split_once(' ') else { return false };
    let (mut file, mut directory) = test_files(binary);
    let mut parts: Vec<&str> = path.split("::").collect();
    let test = parts.pop().unwrap_or_default();
    for module in parts {
        let own = directory.join(format!("{module}.rs"));
        directory.push(module);
        // A module of tests may be in the file that it tests.
        if own.is_file() {
            file = own;
        }
    }
    let text = fs::read_to_string(file).unwrap_or_default();
    text.contains(&format!("fn {test}("))
}

/// Guards the list of removals: each finds its place, and its stories, as the code is now.
#[test]
fn every_removal_fits_the_code_and_names_stories_that_exist() {
    let read = |list: &'static str| -> Vec<Removal> {
        let text = fs::read_to_string(root().join(list)).unwrap();
        let removals: Removals = toml::from_str(&text).unwrap();
        removals.removal.into_iter().map(move |removal| Removal { list, ..removal }).collect()
    };
    let seen = read("tests/removals.toml");
    assert!(seen.len() > 100, "only {} removals", seen.len());
    let (mut names, mut taken) = (BTreeSet::new(), Vec::new());
    for removal in seen.into_iter().chain(read("tests/removals-untried.toml")) {
        let name = removal.name;
        let is_plain =
            name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        assert!(is_plain && names.insert(name.clone()), "{name} is there twice, or no switch");
        assert!(!removal.what.is_empty() && !removal.stories.is_empty(), "{name} says too little");
        let own = (&removal.file, &removal.find, &removal.replace);
        let also = removal.also.iter().map(|edit| (&edit.file, &edit.find, &edit.replace));
        for (file, find, replace) in std::iter::once(own).chain(also) {
            let text = fs::read_to_string(root().join(file)).unwrap_or_default();
            let places = text.matches(find.as_str()).count();
            assert_eq!(places, 1, "{name}: places in {file} of: {find}");
            assert!(replace.contains("REMOVED"), "{name}: a replacement in {file} has no switch");
            let start = text.find(find.as_str()).unwrap();
            taken.push((removal.list, file.clone(), start..start + find.len(), name.clone()));
        }
        for story in &removal.stories {
            assert!(is_there(story), "{name}: there is no story `{story}`");
        }
    }
    // Those of one list are built at once.
    taken.sort_by_key(|(list, file, place, _)| (*list, file.clone(), place.start));
    for pair in taken.windows(2) {
        let [(list, file, place, name), (next_list, next_file, next_place, next)] = pair else {
            panic!("pairs");
        };
        let apart = list != next_list || file != next_file || place.end <= next_place.start;
        assert!(apart, "{name} and {next} change the same place of {file}");
    }
}

#[derive(Deserialize)]
struct Lock {
    package: Vec<Locked>,
}

#[derive(Deserialize, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Locked {
    name: String,
    version: String,
}

/// What is fuzzed is what ships, and `make fuzz` finds its dependencies built: its workspace is one of
/// its own, with a lock of its own.
#[test]
fn fuzz_targets_are_built_with_the_versions_of_the_workspace() {
    let read = |path: &str| {
        let text = fs::read_to_string(root().join(path)).unwrap();
        let lock: Lock = toml::from_str(&text).unwrap();
        lock.package
    };
    let (own, fuzz) = (read("Cargo.lock"), read("tests/fuzz/Cargo.lock"));
    let is_shared = |package: &&Locked| own.iter().any(|other| other.name == package.name);
    let shared: Vec<&Locked> = fuzz.iter().filter(is_shared).collect();
    assert!(shared.len() > 100, "only {} packages are in both", shared.len());
    let others: Vec<&&Locked> = shared.iter().filter(|package| !own.contains(package)).collect();
    assert!(
        others.is_empty(),
        "tests/fuzz/Cargo.lock has other versions than Cargo.lock: {others:?}; do: cp Cargo.lock \
         tests/fuzz && cargo metadata --format-version 1 --manifest-path tests/fuzz/Cargo.toml >/dev/null"
    );
}
