//! Configuration of the daemons: flag over environment over TOML file over default.
//!
//! Invariants:
//! * A value counts as given wherever it came from, so `requires` and `conflicts_with` hold across
//!   the layers: values of environment and file go to clap as flags in front of the real ones.
//! * All problems of file and environment are told at once, each with its source and key.
//! * A value of an argument with `hide_env_values` is a secret: no error and no print shows it.
//!
//! Keys of the file are the long names of the flags: strings, whole numbers and booleans, and an
//! array for a flag that may be repeated. A flag replaces the file's whole list. An empty variable
//! counts as not set, as orchestrators pass it.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fmt::Write as _,
    path::PathBuf,
};

use clap::{
    Arg, ArgAction, ArgMatches, Command, Error, Parser, builder::Resettable, error::ErrorKind,
    parser::ValueSource,
};

mod file;
mod pages;
mod units;

pub use units::{
    ExposedWithoutAuthentication, ListenAddressError, UnitError, loopback_or_authenticated,
    parse_bytes, parse_duration, parse_duration_within, parse_listen_address,
};

/// The version, and the commit it was built from: `0.1.0 (7e89f1b)`.
pub const VERSION_WITH_COMMIT: &str =
    concat!(env!("CARGO_PKG_VERSION"), " (", env!("MARCOT_BUILD_COMMIT"), ")");

/// The commit that was built; "debug" in a debug build, "unknown" where nothing tells.
pub const COMMIT: &str = env!("MARCOT_BUILD_COMMIT");

/// Flags that lead to the configuration and cannot stand in it.
const NOT_IN_FILE: [&str; 4] = ["config", "check-config", "help", "version"];

/// The flags of the configuration itself, to be flattened into a daemon's arguments.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ConfigOptions {
    /// Read options from this TOML file; its keys are the long names of the flags.
    #[arg(long, value_name = "FILE", env = "MARCOT_CONFIG")]
    pub config: Option<PathBuf>,

    /// Check the configuration, print it as it takes effect, and exit.
    #[arg(long)]
    pub check_config: bool,
}

/// Arguments with what was merged into them.
#[derive(Debug)]
pub struct Loaded<A> {
    /// The checked arguments.
    pub args: A,
    /// The configuration in effect as a TOML file, each key with its source, secrets redacted.
    pub effective: String,
}

/// Where a value came from.
#[derive(Debug, Clone)]
enum Source {
    Environment(String),
    File(String),
}

/// A value for one argument from environment or file.
struct Given {
    source: Source,
    values: Vec<OsString>,
}

/// Reads the arguments of `A` from command line, environment and file.
pub fn parse_layered<A: Parser>(
    argv: impl IntoIterator<Item = OsString>,
    env: impl Fn(&OsStr) -> Option<OsString>,
) -> Result<A, Error> {
    load(argv, env).map(|loaded: Loaded<A>| loaded.args)
}

/// As [`parse_layered`], and says what is in effect, for `--check-config`.
pub fn load<A: Parser>(
    argv: impl IntoIterator<Item = OsString>,
    env: impl Fn(&OsStr) -> Option<OsString>,
) -> Result<Loaded<A>, Error> {
    let argv: Vec<OsString> = argv.into_iter().collect();
    let env = |name: &OsStr| env(name).filter(|value| !value.is_empty());
    // The first pass answers --help and --version, and tells which flags stand on the line; its
    // other errors come again, with all values there, in the second.
    let flags = A::command().ignore_errors(true).try_get_matches_from(&argv)?;
    let on_line = |arg: &Arg| {
        flags.try_contains_id(arg.get_id().as_str()).unwrap_or(false)
            && flags.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine)
    };
    let mut command = A::command();
    let mut problems = Vec::new();
    let mut given = from_file(&command, config_path(&command, &flags, env), &mut problems)?;
    for arg in command.get_arguments().filter(|arg| layered_name(arg).is_some()) {
        let Some((name, value)) = arg.get_env().and_then(|name| Some((name, env(name)?))) else {
            continue;
        };
        let name = name.to_string_lossy().into_owned();
        given.insert(
            arg.get_id().to_string(),
            Given { source: Source::Environment(name), values: vec![value] },
        );
    }
    let mut merged: Vec<OsString> = argv.iter().take(1).cloned().collect();
    for arg in command.get_arguments() {
        let id = arg.get_id().as_str();
        let Some(value) = given.get(id) else { continue };
        match as_flags(arg, value) {
            Ok(_) if on_line(arg) => {
                given.remove(id);
            }
            Ok(flags) => merged.extend(flags),
            Err(problem) => problems.push(problem),
        }
    }
    if !problems.is_empty() {
        return Err(report(&mut command, &problems));
    }
    merged.extend(argv.into_iter().skip(1));
    // Values of the environment are flags by now; clap must not look at it again.
    let mut command = command.mut_args(|arg| arg.env(Resettable::<clap::builder::OsStr>::Reset));
    let mut matches = command.try_get_matches_from_mut(merged)?;
    let effective = effective(&A::command(), &matches, &given);
    let args = A::from_arg_matches_mut(&mut matches).map_err(|e| e.format(&mut command))?;
    Ok(Loaded { args, effective })
}

/// Reads the arguments of this process; ends it, as clap does, on an error or `--help`.
///
/// The caller checks what lies beyond single values, and then answers `--check-config` by
/// printing `effective`.
#[must_use]
pub fn load_or_exit<A: Parser>() -> Loaded<A> {
    if pages::print::<A>() {
        std::process::exit(0);
    }
    load(std::env::args_os(), |name| std::env::var_os(name)).unwrap_or_else(|error| error.exit())
}

/// The long name of an argument that environment and file may set.
fn layered_name(arg: &Arg) -> Option<&str> {
    arg.get_long().filter(|name| !NOT_IN_FILE.contains(name))
}

/// Where the configuration file is, if there is to be one.
fn config_path(
    command: &Command,
    flags: &ArgMatches,
    env: impl Fn(&OsStr) -> Option<OsString>,
) -> Option<PathBuf> {
    let arg = command.get_arguments().find(|arg| arg.get_long() == Some("config"))?;
    let id = arg.get_id().as_str();
    if flags.value_source(id) == Some(ValueSource::CommandLine) {
        return flags.get_raw(id).and_then(|mut raw| raw.next_back()).map(PathBuf::from);
    }
    arg.get_env().and_then(env).map(PathBuf::from)
}

/// What the file sets, by the argument's id.
fn from_file(
    command: &Command,
    path: Option<PathBuf>,
    problems: &mut Vec<String>,
) -> Result<BTreeMap<String, Given>, Error> {
    let Some(path) = path else {
        return Ok(BTreeMap::new());
    };
    let text = file::read(&path).map_err(|error| {
        let message = format!("read configuration file {}: {error}", path.display());
        command.clone().error(ErrorKind::Io, message)
    })?;
    let known: Vec<&str> = command.get_arguments().filter_map(layered_name).collect();
    let entries = file::parse(&path, &text, &known, problems);
    let ids: BTreeMap<&str, &Arg> =
        command.get_arguments().filter_map(|arg| Some((layered_name(arg)?, arg))).collect();
    let mut given = BTreeMap::new();
    for entry in entries {
        let Some(arg) = ids.get(entry.key.as_str()) else {
            continue;
        };
        if entry.is_list && !matches!(arg.get_action(), ArgAction::Append) {
            problems.push(format!("{}: `{}` takes one value, not a list", entry.place, entry.key));
            continue;
        }
        let values = entry.values.into_iter().map(OsString::from).collect();
        let source = Source::File(entry.place);
        given.insert(arg.get_id().to_string(), Given { source, values });
    }
    Ok(given)
}

/// Says the values of environment or file as flags, each checked by the argument's own parser.
fn as_flags(arg: &Arg, given: &Given) -> Result<Vec<OsString>, String> {
    let name = arg.get_long().unwrap_or_default();
    let flag = format!("--{name}");
    let (place, key) = match &given.source {
        Source::Environment(variable) => (format!("environment {variable}"), flag.clone()),
        Source::File(place) => (place.clone(), format!("`{name}`")),
    };
    if let ArgAction::SetTrue | ArgAction::SetFalse = arg.get_action() {
        let value = given
            .values
            .first()
            .and_then(|value| boolean(value))
            .ok_or_else(|| format!("{place}: {key} is a switch; it is true or false"))?;
        let is_given = value == matches!(arg.get_action(), ArgAction::SetTrue);
        return Ok(if is_given { vec![flag.into()] } else { Vec::new() });
    }
    let mut flags = Vec::new();
    for value in &given.values {
        let with_value = |flag: &str| {
            let mut text = OsString::from(format!("{flag}="));
            text.push(value);
            text
        };
        // One argument alone, so that what others require or exclude plays no part here.
        let alone = Arg::new("value")
            .long("value")
            .action(arg.get_action().clone())
            .value_delimiter(arg.get_value_delimiter())
            .value_parser(arg.get_value_parser().clone());
        let checked = Command::new("check")
            .no_binary_name(true)
            .disable_help_flag(true)
            .disable_version_flag(true)
            .arg(alone)
            .try_get_matches_from([with_value("--value")]);
        match checked {
            Ok(_) => flags.push(with_value(&flag)),
            Err(_) if arg.is_hide_env_values_set() => {
                return Err(format!("{place}: {key} has a wrong value (not shown: a secret)"));
            }
            Err(error) => {
                let value = value.to_string_lossy();
                return Err(format!("{place}: {key} has a wrong value `{value}`{}", why(&error)));
            }
        }
    }
    Ok(flags)
}

/// A switch's value as people write it.
fn boolean(value: &OsStr) -> Option<bool> {
    match value.to_str()?.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Some(true),
        "false" | "0" | "no" | "off" => Some(false),
        _ => None,
    }
}

/// The reason inside clap's error, without its flags and hints, which speak of a command line.
fn why(error: &Error) -> String {
    use clap::error::{ContextKind, ContextValue};
    if let Some(source) = std::error::Error::source(error) {
        return format!(": {source}");
    }
    match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(valid)) if !valid.is_empty() => {
            format!("; it is one of {}", valid.join(", "))
        }
        _ => String::new(),
    }
}

/// One error for all problems.
fn report(command: &mut Command, problems: &[String]) -> Error {
    let message = match problems {
        [one] => one.clone(),
        many => {
            let mut text = format!("the configuration has {} problems:", many.len());
            for problem in many {
                let _ = write!(text, "\n  {problem}");
            }
            text
        }
    };
    command.error(ErrorKind::ValueValidation, message)
}

/// The configuration in effect, in the form of a file that would set it.
fn effective(command: &Command, matches: &ArgMatches, given: &BTreeMap<String, Given>) -> String {
    let mut text = String::new();
    for arg in command.get_arguments() {
        let Some(name) = layered_name(arg) else {
            continue;
        };
        let id = arg.get_id().as_str();
        let source = match (given.get(id), matches.value_source(id)) {
            (Some(Given { source: Source::Environment(name), .. }), _) => {
                format!("environment {name}")
            }
            (Some(Given { source: Source::File(place), .. }), _) => place.clone(),
            (None, Some(ValueSource::CommandLine)) => "command line".to_owned(),
            (None, _) => "default".to_owned(),
        };
        let raw: Vec<&OsStr> = matches.get_raw(id).into_iter().flatten().collect();
        let line = match arg.get_action() {
            _ if raw.is_empty() && !matches!(arg.get_action(), ArgAction::SetTrue) => {
                format!("# {name} is not set")
            }
            _ if arg.is_hide_env_values_set() => {
                format!("# {name} is set, not shown: a secret  # {source}")
            }
            ArgAction::SetTrue | ArgAction::SetFalse => {
                format!("{name} = {}  # {source}", matches.get_flag(id))
            }
            action => match file::print(&raw, matches!(action, ArgAction::Append)) {
                Some(value) => format!("{name} = {value}  # {source}"),
                None => format!("# {name} is set, not shown: not UTF-8  # {source}"),
            },
        };
        text.push_str(&line);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests;
