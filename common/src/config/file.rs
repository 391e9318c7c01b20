//! The configuration file: a flat TOML table, read with the place of every key.

use std::{ffi::OsStr, fs::File, io, io::Read as _, path::Path};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

/// Longest file, bytes: a thousand lines are a tenth of it; a wrong path may lead to a disk image.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// One key of the file.
#[derive(Debug)]
pub(super) struct Entry {
    /// File and line, for messages.
    pub(super) place: String,
    pub(super) key: String,
    pub(super) values: Vec<String>,
    pub(super) is_list: bool,
}

/// Reads the file's text.
pub(super) fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        let message = format!("it has more than {FILE_BYTES_MAX} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(text)
}

/// Returns all keys that are right, and adds a line to `problems` for each other one.
pub(super) fn parse(
    path: &Path,
    text: &str,
    known: &[&str],
    problems: &mut Vec<String>,
) -> Vec<Entry> {
    let place = |offset: usize| {
        let line = text.bytes().take(offset).filter(|&b| b == b'\n').count() + 1;
        format!("{}:{line}", path.display())
    };
    let (table, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        // What was recovered after an error may not be what was meant: only the errors are told.
        problems.extend(errors.iter().map(|error| {
            let offset = error.span().map_or(0, |span| span.start);
            format!("{}: {}", place(offset), error.message())
        }));
        return Vec::new();
    }
    let mut keys: Vec<_> = table.get_ref().iter().collect();
    keys.sort_by_key(|(key, _)| key.span().start);
    let mut entries = Vec::new();
    for (key, value) in keys {
        let place = place(key.span().start);
        let name = key.get_ref().as_ref();
        if !known.contains(&name) {
            problems.push(format!("{place}: unknown key `{name}`{}", hint(name, known)));
            continue;
        }
        match values(value) {
            Some((values, is_list)) => {
                entries.push(Entry { place, key: name.to_owned(), values, is_list });
            }
            None => problems.push(format!(
                "{place}: `{name}` is a {}; a value is a string, a whole number, true or false, \
                 or a list of these",
                value.get_ref().type_str()
            )),
        }
    }
    entries
}

/// The values as flags would carry them, and whether they stood in an array.
fn values(value: &Spanned<DeValue<'_>>) -> Option<(Vec<String>, bool)> {
    match value.get_ref() {
        DeValue::Array(items) => {
            let items: Option<Vec<_>> = items.iter().map(|item| scalar(item.get_ref())).collect();
            Some((items?, true))
        }
        one => Some((vec![scalar(one)?], false)),
    }
}

fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Boolean(value) => Some(value.to_string()),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .ok()
            .map(|number| number.to_string()),
        _ => None,
    }
}

/// Names the known key that is nearest to a wrong one.
fn hint(name: &str, known: &[&str]) -> String {
    // A guess for every typing error; none that only says which of the names is shortest.
    known
        .iter()
        .map(|&key| (distance(name, key), key))
        .min()
        .map(|(_, key)| format!("; the nearest known key is `{key}`"))
        .unwrap_or_default()
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Writes values as TOML; `None` if one is no UTF-8.
pub(super) fn print(values: &[&OsStr], as_list: bool) -> Option<String> {
    let printed: Option<Vec<String>> = values
        .iter()
        .map(|value| {
            let text = value.to_str()?;
            let number = text.parse::<i64>().ok().filter(|number| number.to_string() == text);
            let value = match number {
                Some(number) => toml::Value::Integer(number),
                None => toml::Value::String(text.to_owned()),
            };
            Some(value.to_string())
        })
        .collect();
    let printed = printed?;
    Some(if as_list { format!("[{}]", printed.join(", ")) } else { printed.join(" ") })
}
