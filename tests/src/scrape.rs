//! What a daemon's /metrics says, read as a scraper reads it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::TcpStream,
};

use crate::process::Daemon;

/// One answer.
#[derive(Debug, Clone, Default)]
pub struct Scrape {
    /// In Prometheus's text format.
    pub text: String,
    /// Type of each family, by name.
    pub types: BTreeMap<String, String>,
    samples: Vec<Sample>,
}

#[derive(Debug, Clone)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

/// Asks a daemon's admin port for a path; the answer without its head.
#[must_use]
pub fn get(daemon: &Daemon, path: &str) -> String {
    let admin = daemon.admin.expect("it has an admin port");
    let mut stream = TcpStream::connect(admin).expect("it listens");
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("it answers");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    body.to_owned()
}

impl Scrape {
    /// Asks a daemon.
    #[must_use]
    pub fn of(daemon: &Daemon) -> Self {
        Self::parse(get(daemon, "/metrics"))
    }

    fn parse(text: String) -> Self {
        let mut scrape = Self::default();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("a type");
                scrape.types.insert(name.to_owned(), kind.to_owned());
            } else if !line.starts_with('#') {
                scrape.samples.push(sample(line));
            }
        }
        scrape.text = text;
        scrape
    }

    /// The sum of all samples of that name that have these labels.
    #[must_use]
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let has = |sample: &&Sample| {
            let found = |(key, value): &(&str, &str)| {
                sample.labels.get(*key).is_some_and(|other| other == value)
            };
            sample.name == name && labels.iter().all(found)
        };
        let found: Vec<f64> = self.samples.iter().filter(has).map(|sample| sample.value).collect();
        assert!(!found.is_empty(), "no {name} {labels:?} in\n{}", self.text);
        found.iter().sum()
    }

    /// Names of the labels of a family's samples, those of buckets left out.
    #[must_use]
    pub fn labels(&self, family: &str) -> BTreeSet<String> {
        let is_of = |sample: &&Sample| {
            let rest = sample.name.strip_prefix(family);
            rest.is_some_and(|rest| matches!(rest, "" | "_bucket" | "_sum" | "_count"))
        };
        let labels = self.samples.iter().filter(is_of).flat_map(|sample| sample.labels.keys());
        labels.filter(|label| *label != "le").cloned().collect()
    }
}

fn sample(line: &str) -> Sample {
    let (series, value) = line.rsplit_once(' ').expect("a value");
    let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
    let labels = labels.strip_suffix('}').expect("labels end");
    // No value of ours has a comma or a quote in it.
    let labels = labels.split(',').filter(|label| !label.is_empty()).map(|label| {
        let (key, value) = label.split_once('=').expect("a label");
        (key.to_owned(), value.trim_matches('"').to_owned())
    });
    Sample {
        name: name.to_owned(),
        labels: labels.collect(),
        value: value.parse().expect("a number"),
    }
}
