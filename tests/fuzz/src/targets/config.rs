//! A daemon's configuration: no panic, what `--check-config` prints is a file that says the same, and
//! no error shows a secret; values with units and limits are within their bounds.
//!
//! Input, between NULs: a file, then variables as `$NAME=VALUE` and arguments.

use std::{collections::HashMap, ffi::OsString, net::SocketAddr, time::Duration};

use clap::Parser;
use marcot_common::{
    config::{
        ConfigOptions, load, loopback_or_authenticated, parse_bytes, parse_duration,
        parse_listen_address,
    },
    donor_list::{DonorEntry, DonorMatch},
    network::{Network, is_nobodys, of_peer},
};
use marcot_proto::recipient::v1::CloneLimits;
use marcot_recipient::limits::{LimitDefaults, Limits};

use crate::{parts, scratch};

/// The parser's files.
pub const FILES: &[&str] = &[
    "common/src/config.rs",
    "common/src/config/file.rs",
    "common/src/config/units.rs",
    "common/src/network.rs",
];

/// A value that is wrong where it stands, and must not be shown.
const SECRET: &str = "hush7f3kq1";

/// Arguments of a daemon in small: one of each kind.
#[derive(Debug, Clone, Parser)]
#[command(name = "fuzz", version = "1")]
struct Arguments {
    #[command(flatten)]
    config: ConfigOptions,
    #[arg(long, env = "F_LISTEN", value_parser = parse_listen_address, default_value = "[::1]:7700")]
    listen: Vec<SocketAddr>,
    #[arg(long, env = "F_BYTES", value_parser = parse_bytes, default_value = "64MiB")]
    bytes: u64,
    #[arg(long, value_parser = parse_duration)]
    timeout: Option<Duration>,
    #[arg(long, env = "F_TLS")]
    tls: bool,
    #[arg(long, value_enum, default_value_t)]
    donor_match: DonorMatch,
    #[arg(long, value_delimiter = ',')]
    donor_list: Vec<DonorEntry>,
    #[arg(long)]
    allow_from: Vec<Network>,
    #[arg(long, requires = "timeout")]
    name: Option<String>,
    #[arg(long, env = "F_SECRET", hide_env_values = true)]
    secret: Option<u64>,
}

impl Arguments {
    /// All that a file may say again.
    fn shown(&self) -> String {
        let mut same = self.clone();
        same.config = ConfigOptions::default();
        same.secret = None;
        format!("{same:?}")
    }
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let mut texts = parts(data).map(|part| String::from_utf8_lossy(part).into_owned());
    let file = texts.next().unwrap_or_default();
    let (mut arguments, mut variables) = (Vec::new(), HashMap::new());
    for text in texts.take(20) {
        values(&text);
        match text.strip_prefix('$').and_then(|text| text.split_once('=')) {
            Some((name, value)) => drop(variables.insert(name.to_owned(), value.to_owned())),
            None => arguments.push(OsString::from(text)),
        }
    }
    let has_secret = variables.contains_key("secret");
    if has_secret {
        variables.insert("F_SECRET".to_owned(), SECRET.to_owned());
    }
    let path = scratch::file("config.toml", file.as_bytes());
    let argv = |path: std::path::PathBuf, rest: Vec<OsString>| {
        [OsString::from("fuzz"), "--config".into(), path.into()].into_iter().chain(rest)
    };
    let env = |name: &std::ffi::OsStr| variables.get(name.to_str()?).map(OsString::from);
    match load::<Arguments>(argv(path, arguments), env) {
        Ok(loaded) => {
            let path = scratch::file("effective.toml", loaded.effective.as_bytes());
            let again = load::<Arguments>(argv(path, Vec::new()), |_| None);
            let again = again.unwrap_or_else(|error| panic!("{error}\n{}", loaded.effective));
            assert_eq!(loaded.args.shown(), again.args.shown(), "{}", loaded.effective);
        }
        Err(error) => {
            let text = error.render().to_string();
            let elsewhere = data.windows(SECRET.len()).any(|part| part == SECRET.as_bytes());
            assert!(!has_secret || elsewhere || !text.contains(SECRET), "{text}");
        }
    }
}

/// A value as it stands on a command line.
fn values(text: &str) {
    let text = text.split_once('=').map_or(text, |(_, value)| value);
    if let Ok(bytes) = parse_bytes(text) {
        assert_eq!(parse_bytes(&format!(" {bytes} b")), Ok(bytes));
        limits(bytes);
    }
    if let Ok(duration) = parse_duration(text) {
        assert_eq!(parse_duration(&format!("{}MS", duration.as_millis())), Ok(duration));
    }
    if let Ok(address) = parse_listen_address(text) {
        assert_eq!(parse_listen_address(&address.to_string()), Ok(address));
        assert_eq!(loopback_or_authenticated(address, true), Ok(()));
        if let Err(error) = loopback_or_authenticated(address, false) {
            assert!(!address.ip().is_loopback() && error.to_string().contains("--accounts FILE"));
        }
        let (ip, canonical) = (address.ip(), address.ip().to_canonical());
        assert_eq!(is_nobodys(ip), is_nobodys(canonical));
        assert_eq!(of_peer(ip), of_peer(canonical));
    }
    if let Ok(network) = text.parse::<Network>() {
        assert_eq!(network.to_string().parse(), Ok(network));
        let first = network.to_string();
        let first = first.split('/').next().and_then(|address| address.parse().ok());
        let first: std::net::IpAddr = first.expect("a network begins with an address");
        // An IPv4 address in IPv6's form is itself, of no network that is wider.
        assert!(network.holds(first) || first != first.to_canonical(), "{network}");
        assert_eq!(network.is_only(first), network.is_single());
        assert!(!network.is_loopback() || first.is_loopback());
    }
}

fn limits(bytes: u64) {
    let asked = CloneLimits {
        concurrency_max: u32::try_from(bytes).ok(),
        data_bytes_per_second_max: Some(bytes),
        network_bytes_per_second_max: None,
        autotune_concurrency: None,
    };
    let defaults = LimitDefaults { concurrency: Some(4), ..LimitDefaults::default() };
    if let Ok(limits) = Limits::new(&asked, &defaults) {
        assert!((1..=128).contains(&limits.concurrency()));
        assert_eq!(limits.to_wire().data_bytes_per_second_max, Some(bytes));
    }
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    [
        "listen = [\"127.0.0.1:1\", \"localhost:2\"]\nbytes = \"2 GiB\"\ntimeout = \"5min\"\n\
         tls = true\ndonor-match = \"exact\"\ndonor-list = [\"db-0:4407\", \"10.0.0.0/8:*\"]\n\
         allow-from = [\"fd00::/8\"]\nname = \"a\\n\\\"b\"\nsecret = 5\n",
        "bytes = 4096\ntls = false\nname = '007'\ntimeout='0'",
        "bytes = 0x10\n\0$F_TLS=yes\0$F_BYTES=1MB\0--tls",
        "\0--listen\0[::1]:80\0--bytes=1KiB\0$F_BYTES=7\0--allow-from=10.0.0.1\0--allow-from=::1/128",
        "name = 1.5\n[t]\nx = 1\n",
        "nam = 'x'\nbytes = [1, 2]\nbytse = 2\n",
        "listen = [\n",
        "secret = 'x'\n\0$secret=\0--secret=12",
        "\0$secret=\0--name=x\0--timeout=1h",
        "donor-list = 'a:1,b:2-3'\n\0--donor-list=c:*",
        "tls = 'on'\n\0$F_TLS=off\0$F_LISTEN=localhost:1\0::ffff:10.0.0.0/104\0::ffff:1.2.3.4",
        "\0--help",
        "\0--timeout=1d\0--donor-match=addres\0--timeout=5\0--timeout=5x\0--timeout=-1",
        "\0x=99999999999999999999\0x=16777216TiB\0x=\0x=10.0.0.0/33\0x=65536\0x=169.254.0.0/16",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
