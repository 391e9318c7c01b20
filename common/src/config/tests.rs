//! Precedence and messages, with a daemon's arguments in small.

use std::{io::Write as _, net::SocketAddr, time::Duration};

use super::*;

#[derive(Debug, clap::Parser)]
#[command(name = "daemon", version = VERSION_WITH_COMMIT)]
struct Args {
    #[command(flatten)]
    config: ConfigOptions,
    #[arg(long, env = "T_LISTEN", default_value = "127.0.0.1:7700", value_parser = parse_listen_address)]
    listen: SocketAddr,
    #[arg(long, env = "T_DATA_DIRECTORY")]
    data_directory: PathBuf,
    #[arg(long, env = "T_MEMORY", default_value = "64MiB", value_parser = parse_bytes)]
    memory: u64,
    #[arg(long, default_value = "5s", value_parser = parse_duration)]
    grace: Duration,
    #[arg(long, env = "T_REQUIRE_TLS")]
    require_tls: bool,
    #[arg(long, requires = "tls_key", env = "T_CERT")]
    tls_cert: Option<PathBuf>,
    #[arg(long, requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    #[arg(long = "allow-directory", env = "T_ALLOW")]
    allow: Vec<PathBuf>,
    #[arg(long, env = "T_PORTS", value_delimiter = ',')]
    ports: Vec<u16>,
    #[arg(long, env = "T_PASSWORD", hide_env_values = true, value_parser = short)]
    password: Option<String>,
    #[arg(long, value_enum, default_value_t)]
    colour: Colour,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, clap::ValueEnum)]
enum Colour {
    #[default]
    Dark,
    Light,
}

fn short(text: &str) -> Result<String, String> {
    (text.len() < 9).then(|| text.to_owned()).ok_or_else(|| format!("{text} is too long"))
}

/// Parses with a file of this text (none if empty), these variables and these flags.
fn parse(file: &str, env: &[(&str, &str)], flags: &[&str]) -> Result<Loaded<Args>, String> {
    let mut config = tempfile::NamedTempFile::new().unwrap();
    config.write_all(file.as_bytes()).unwrap();
    let mut argv = vec![OsString::from("daemon")];
    if !file.is_empty() {
        argv.push("--config".into());
        argv.push(config.path().into());
    }
    argv.extend(flags.iter().map(OsString::from));
    let name = config.path().display().to_string();
    load(argv, |key| env.iter().find(|(name, _)| *name == key).map(|(_, value)| value.into()))
        .map_err(|error| error.to_string().replace(&name, "FILE"))
}

/// Guards the delimiter where values are checked alone: without it `1,2` is no number.
#[test]
fn a_list_in_one_text_is_read_from_every_source() {
    for (file, env, flags) in [
        ("data-directory = \"/d\"\nports = \"1,2\"", &[][..], &[][..]),
        ("data-directory = \"/d\"\nports = [1, 2]", &[], &[]),
        ("data-directory = \"/d\"", &[("T_PORTS", "1,2")], &[]),
        ("data-directory = \"/d\"", &[("T_PORTS", "3")], &["--ports", "1,2"]),
    ] {
        let loaded = parse(file, env, flags);
        assert_eq!(loaded.unwrap().args.ports, [1, 2], "{file} {env:?} {flags:?}");
    }
}

#[test]
fn flag_beats_environment_beats_file_beats_default() {
    let file = "data-directory = '/file'\nmemory = '1KiB'";
    let env = [("T_MEMORY", "2KiB")];
    let memory = |file: &str, env: &[_], flags: &[_]| parse(file, env, flags).unwrap().args.memory;
    assert_eq!(memory("data-directory = '/file'", &[], &[]), 64 << 20);
    assert_eq!(memory(file, &[], &[]), 1 << 10);
    assert_eq!(memory(file, &env, &[]), 2 << 10);
    assert_eq!(memory(file, &env, &["--memory", "3KiB"]), 3 << 10);
    assert_eq!(memory(file, &[("T_MEMORY", "")], &[]), 1 << 10);
}

#[test]
fn the_file_may_be_named_by_the_environment_and_the_flag_wins() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"data-directory = '/env'").unwrap();
    let path = file.path().to_str().unwrap();
    let env = [("MARCOT_CONFIG", path)];
    assert_eq!(parse("", &env, &[]).unwrap().args.data_directory, PathBuf::from("/env"));
    let loaded = parse("data-directory = '/flag'", &env, &[]).unwrap();
    assert_eq!(loaded.args.data_directory, PathBuf::from("/flag"));
}

#[test]
fn a_flag_replaces_the_files_list() {
    let file = "data-directory = '/d'\nallow-directory = ['/a', '/b']";
    let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect::<Vec<_>>();
    assert_eq!(parse(file, &[], &[]).unwrap().args.allow, paths(&["/a", "/b"]));
    assert_eq!(parse(file, &[("T_ALLOW", "/e")], &[]).unwrap().args.allow, paths(&["/e"]));
    let flags = ["--allow-directory", "/c"];
    assert_eq!(parse(file, &[], &flags).unwrap().args.allow, paths(&["/c"]));
}

#[test]
fn a_switch_may_be_set_anywhere_and_cleared_by_a_stronger_layer() {
    let on = "data-directory = '/d'\nrequire-tls = true";
    assert!(parse(on, &[], &[]).unwrap().args.require_tls);
    assert!(!parse(on, &[("T_REQUIRE_TLS", "no")], &[]).unwrap().args.require_tls);
    let off = "data-directory = '/d'\nrequire-tls = false";
    assert!(!parse(off, &[], &[]).unwrap().args.require_tls);
    assert!(parse(off, &[], &["--require-tls"]).unwrap().args.require_tls);
    let error = parse(on, &[("T_REQUIRE_TLS", "maybe")], &[]).unwrap_err();
    assert!(error.contains("environment T_REQUIRE_TLS: --require-tls is a switch"), "{error}");
}

#[test]
fn what_one_option_requires_may_come_from_another_layer() {
    let file = "data-directory = '/d'\ntls-cert = '/cert'";
    assert!(parse(file, &[], &["--tls-key", "/key"]).is_ok());
    let error = parse(file, &[], &[]).unwrap_err();
    assert!(error.contains("--tls-key"), "{error}");
    let error = parse("", &[], &[]).unwrap_err();
    assert!(error.contains("--data-directory"), "{error}");
}

#[test]
fn an_unknown_key_is_told_with_file_line_and_nearest_key() {
    let error = parse("data-directory = '/d'\n\nlisten-adr = 'x'", &[], &[]).unwrap_err();
    assert!(error.contains("FILE:3: unknown key `listen-adr`"), "{error}");
    let error = parse("data-directory = '/d'\nrequire_tls = true", &[], &[]).unwrap_err();
    assert!(error.contains("nearest known key is `require-tls`"), "{error}");
    let error = parse("config = 'other.toml'", &[], &[]).unwrap_err();
    assert!(error.contains("unknown key `config`"), "{error}");
}

#[test]
fn all_problems_of_file_and_environment_are_told_at_once() {
    let file = "memry = 1\nmemory = '64MB'\ngrace = 5\ncolour = 'grey'\nlisten = ['a', 'b']\n\
                data-directory = 1.5\n[tls]\ncert = 'c'";
    let error = parse(file, &[("T_LISTEN", "here")], &[]).unwrap_err();
    for part in [
        "the configuration has 8 problems:",
        "FILE:1: unknown key `memry`; the nearest known key is `memory`",
        "FILE:2: `memory` has a wrong value `64MB`: unknown unit `MB`",
        "FILE:3: `grace` has a wrong value `5`: `5` needs a unit",
        "FILE:4: `colour` has a wrong value `grey`; it is one of dark, light",
        "FILE:5: `listen` takes one value, not a list",
        "FILE:6: `data-directory` is a float",
        "FILE:7: unknown key `tls`",
        "environment T_LISTEN: --listen has a wrong value `here`",
    ] {
        assert!(error.contains(part), "{part}\n{error}");
    }
}

#[test]
fn a_file_that_is_no_toml_or_not_there_is_named() {
    let error = parse("listen = \nmemory = = 1", &[], &[]).unwrap_err();
    assert!(error.contains("FILE:1:") && error.contains("FILE:2:"), "{error}");
    let error = parse("", &[("MARCOT_CONFIG", "/no/such.toml")], &[]).unwrap_err();
    assert!(error.contains("/no/such.toml: No such file"), "{error}");
}

#[test]
fn a_wrong_value_under_a_stronger_layer_is_still_a_problem() {
    let file = "data-directory = '/d'\nmemory = 'much'";
    let error = parse(file, &[], &["--memory", "1KiB"]).unwrap_err();
    assert!(error.contains("FILE:2: `memory` has a wrong value `much`"), "{error}");
}

#[test]
fn the_effective_configuration_is_a_file_that_sets_the_same() {
    let file =
        "data-directory = '/with \"quote\"'\nallow-directory = ['/a', '/b']\nrequire-tls = true";
    let env = [("T_MEMORY", "2KiB"), ("T_PASSWORD", "hush")];
    let loaded = parse(file, &env, &["--grace", "9s", "--check-config"]).unwrap();
    assert!(loaded.args.config.check_config);
    assert_eq!(loaded.args.password.as_deref(), Some("hush"));
    let text = &loaded.effective;
    for part in ["memory = \"2KiB\"  # environment T_MEMORY", "# command line", "# default", ":1\n"]
    {
        assert!(text.contains(part), "{part}\n{text}");
    }
    assert!(!text.contains("hush") && !text.contains("check-config"), "{text}");
    let again = parse(text, &[], &[]).unwrap().args;
    assert_eq!(again.data_directory, loaded.args.data_directory);
    assert_eq!(again.allow, loaded.args.allow);
    assert_eq!((again.memory, again.grace), (loaded.args.memory, loaded.args.grace));
    assert!(again.require_tls);
}

#[test]
fn no_message_shows_a_secret() {
    let env = [("T_PASSWORD", "hush-hush-hush")];
    let error = parse("data-directory = '/d'", &env, &[]).unwrap_err();
    assert!(error.contains("environment T_PASSWORD") && !error.contains("hush"), "{error}");
}

#[test]
fn help_and_version_need_no_right_configuration() {
    let env = [("MARCOT_CONFIG", "/no/such.toml"), ("T_MEMORY", "much")];
    assert!(parse("", &env, &["--version"]).unwrap_err().contains(COMMIT));
    assert!(parse("", &env, &["--help"]).unwrap_err().contains("T_MEMORY"));
}

#[test]
fn arguments_are_well_formed() {
    use clap::CommandFactory as _;
    Args::command().debug_assert();
}
