//! What the documents say, held against the tree.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

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
                let shouted = argument.len() > 2
                    && argument.chars().all(|c| c.is_ascii_uppercase() || c == '_');
                if shouted && before.len() < 60 && !argument.starts_with("BAD_") {
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
    for name in named.iter().filter(|name| name.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
    {
        let known = sources.contains(&format!("\"{name}\"")) || name.ends_with('_');
        assert!(known, "the page names {name}, which no code raises");
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

/// Guards the bound on unsafe code: an `expect` elsewhere would let it in.
#[test]
fn unsafe_code_is_in_one_module() {
    let words = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "expect(unsafe_code"];
    let tests = files(&root().join("tests/src"), "rs");
    let found: Vec<PathBuf> = sources()
        .into_iter()
        .chain(tests)
        .filter(|path| {
            let text = fs::read_to_string(path).unwrap();
            words.iter().any(|word| text.contains(word))
        })
        .collect();
    assert_eq!(found, [root().join("common/src/os.rs")]);
    for crate_root in ["donor/src/lib.rs", "donor/engine/src/lib.rs", "recipient/src/lib.rs"] {
        let text = fs::read_to_string(root().join(crate_root)).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{crate_root}");
    }
}

#[test]
fn every_metric_is_in_the_operations_page() {
    let page = fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let mut checked = 0;
    for path in ["donor/src/metrics.rs", "recipient/src/metrics.rs"] {
        let text = fs::read_to_string(root().join(path)).unwrap();
        for name in text.split('"').filter(|word| word.starts_with("marcot_")) {
            assert!(page.contains(&format!("`{name}")), "{name} of {path} is not in the page");
            checked += 1;
        }
    }
    assert!(checked >= 6);
}
