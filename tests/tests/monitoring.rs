//! deploy/monitoring: rules by promtool, dashboards as they are made, and nothing that nobody tells.
//! `make dashboards` asks a real Prometheus the same queries.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

fn run(program: &Path, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(root().join("deploy/monitoring"))
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}; run tests/tools/setup.sh test", program.display()));
    let said = [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned());
    assert!(output.status.success(), "{}", said.concat());
}

fn promtool(arguments: &[&str]) {
    run(&root().join(".tools/servers/prometheus/usr/bin/promtool"), arguments);
}

/// Names of ours in a text, with what a recording rule makes.
fn names(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == ':';
    let words = text.split(|c| !is_part(c));
    let starts = ["marcot_", "marcot:", "process_", "rpc_server_"];
    words.filter(|word| starts.iter().any(|s| word.starts_with(s))).map(str::to_owned).collect()
}

/// Values of a key in a YAML file of ours, where each stands on a line of its own.
fn values<'a>(text: &'a str, key: &str) -> Vec<&'a str> {
    let prefix = format!("{key}: ");
    let value = |line: &'a str| {
        line.trim_start().trim_start_matches("- ").strip_prefix(prefix.as_str()).map(str::trim)
    };
    text.lines().filter_map(value).collect()
}

#[test]
fn promtool_takes_the_rules_and_each_fires_where_it_should_and_nowhere_else() {
    promtool(&["check", "rules", "alerts.yaml"]);
    promtool(&["test", "rules", "alerts_test.yaml"]);
    let (rules, tests) =
        (read("deploy/monitoring/alerts.yaml"), read("deploy/monitoring/alerts_test.yaml"));
    for alert in values(&rules, "alert") {
        let cases: Vec<&str> = tests.split("\n  - name: ").skip(1).collect();
        let of = |case: &&&str| values(case, "alertname").contains(&alert);
        let fires = cases.iter().filter(of).filter(|case| case.contains("exp_labels")).count();
        let rests = cases.iter().filter(of).filter(|case| case.contains("exp_alerts: []")).count();
        assert!(fires >= 1 && rests >= 1, "{alert}: fires in {fires} cases, not in {rests}");
    }
}

#[test]
fn dashboards_are_what_their_script_makes() {
    run(Path::new("python3"), &["dashboards.py", "--check"]);
    run(Path::new("python3"), &["prometheusrule.py", "--check"]);
}

/// Guards against a query that is for ever empty: what nobody tells is in no dashboard and no rule;
/// and a metric that no dashboard, no rule shows would be told for nobody.
#[test]
fn dashboards_and_rules_name_what_the_page_has_and_all_of_it() {
    let page = read("docs/metrics.md");
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let listed: BTreeSet<String> =
        rows.map(|row| row.split('`').nth(1).unwrap().to_owned()).collect();
    let rules = read("deploy/monitoring/alerts.yaml");
    let recorded: BTreeSet<&str> = values(&rules, "record").into_iter().collect();
    let mut shown = BTreeSet::new();
    for file in ["alerts.yaml", "dashboards/marcot-operators.json", "dashboards/marcot-clone.json"]
    {
        for name in names(&read(&format!("deploy/monitoring/{file}"))) {
            if recorded.contains(name.as_str()) {
                continue;
            }
            let family =
                ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            let family = family.filter(|family| listed.contains(*family)).unwrap_or(&name);
            assert!(listed.contains(family), "{file} asks for {name}, which nobody tells");
            shown.insert(family.to_owned());
        }
    }
    let hidden: Vec<_> = listed.difference(&shown).collect();
    assert_eq!(hidden, Vec::<&String>::new(), "metrics that no dashboard and no rule shows");
}

/// A heading's anchor, as it is made of Markdown.
fn anchor(heading: &str) -> String {
    let kept =
        heading.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.collect::<String>().trim().to_ascii_lowercase().replace(' ', "-")
}

#[test]
fn each_alert_has_a_section_of_the_runbook_and_each_section_an_alert() {
    let page = read("docs/alerts.md");
    let sections: BTreeSet<String> =
        page.lines().filter_map(|line| line.strip_prefix("## ")).map(anchor).collect();
    let rules = read("deploy/monitoring/alerts.yaml");
    let alerts = values(&rules, "alert");
    let urls = values(&rules, "runbook_url");
    assert!(alerts.len() > 20 && alerts.len() == urls.len(), "{alerts:?}");
    let mut reached = BTreeSet::new();
    for (alert, url) in alerts.into_iter().zip(urls) {
        let (path, anchor) = url.split_once('#').unwrap();
        assert_eq!(path, "docs/alerts.md", "{alert}");
        assert_eq!(anchor, alert.to_ascii_lowercase());
        assert!(sections.contains(anchor), "{alert} has no section #{anchor}");
        reached.insert(anchor.to_owned());
    }
    assert_eq!(reached, sections, "sections without an alert");
}
