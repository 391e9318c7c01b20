//! Which donors a recipient may clone from (clone_valid_donor_list), and where their names lead.
//!
//! Invariants:
//! * What is not listed is refused; an empty list lists nothing.
//! * A name is looked up once, its addresses are matched, and those very addresses are connected
//!   to: a name that leads elsewhere a moment later leads nowhere.
//! * Addresses that are no other host's (link-local ones, among them the metadata services of
//!   clouds, unspecified, broadcast and multicast ones) are refused unless the very address is
//!   listed; loopback is, unless `localhost` or a loopback address is.

mod file;

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use tonic::Code;

pub use self::file::{DonorFileError, Donors};
use crate::{
    failure::Failure,
    network::{Network, is_nobodys},
};

/// Most entries: each connection goes through all of them.
const ENTRIES_MAX: usize = 1000;

/// How a statement's host is compared with the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum DonorMatch {
    /// Names by name, addresses and networks by the addresses that the host leads to.
    #[default]
    Address,
    /// As the plugin: host and port as they stand in the statement, and nothing else.
    Exact,
}

/// Donors that may be cloned from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DonorList {
    entries: Vec<DonorEntry>,
    matching: DonorMatch,
}

/// An entry of a list: `HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DonorEntry {
    host: HostPattern,
    ports: PortPattern,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum HostPattern {
    /// Labels of a name, lower-case; `*` stands for one label.
    Name(Vec<String>),
    /// An address or a network.
    Network(Network),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PortPattern {
    Any,
    Range(u16, u16),
}

/// Why a list cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DonorListError {
    /// No port.
    #[error(
        "donor `{0}` has no port: write HOST:PORT, e.g. db-0.db:4407, 10.0.0.0/8:4407, \
         [fd00::/8]:4407 or *.db.svc:*"
    )]
    NoPort(String),
    /// Something that is no port.
    #[error("donor `{0}`: `{1}` is no port: write 1 to 65535, a range as 4400-4410, or *")]
    BadPort(String, String),
    /// Something that is no host.
    #[error(
        "donor `{0}`: `{1}` is no host: write a name, of which a label may be *, an address, or a \
         network as 10.0.0.0/8"
    )]
    BadHost(String, String),
    /// What the plugin's way has no word for.
    #[error(
        "donor `{0}` stands for several donors, and --donor-match=exact compares the statement's \
         host and port with single ones: list each of them, or leave --donor-match out"
    )]
    NotExact(String),
    /// Too many.
    #[error("{0} donors are listed, at most {ENTRIES_MAX} are allowed")]
    TooMany(usize),
}

impl DonorList {
    /// A list of these entries.
    pub fn new(entries: Vec<DonorEntry>, matching: DonorMatch) -> Result<Self, DonorListError> {
        if entries.len() > ENTRIES_MAX {
            return Err(DonorListError::TooMany(entries.len()));
        }
        if matching == DonorMatch::Exact
            && let Some(entry) = entries.iter().find(|entry| !entry.is_single())
        {
            return Err(DonorListError::NotExact(entry.to_string()));
        }
        Ok(Self { entries, matching })
    }

    /// Whether nothing is listed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Refuses what no look-up of the host could allow: it is told before a clone is accepted.
    pub fn check_name(&self, host: &str, port: u16) -> Result<(), Failure> {
        let mut fitting = self.entries.iter().filter(|entry| entry.ports.holds(port));
        let may_fit = match self.matching {
            DonorMatch::Exact => fitting.any(|entry| entry.host.is_named(host)),
            DonorMatch::Address => fitting.any(|entry| {
                matches!(entry.host, HostPattern::Network(_)) || entry.host.is_named(host)
            }),
        };
        match host.parse::<IpAddr>() {
            _ if !may_fit => Err(self.not_listed(host, port, &[])),
            Ok(ip) => self.allowed(host, &[SocketAddr::new(ip, port)]).map(|_| ()),
            Err(_) => Ok(()),
        }
    }

    /// Of the addresses that a host leads to, those that may be connected to; an error when there
    /// are none.
    pub fn allowed(
        &self,
        host: &str,
        addresses: &[SocketAddr],
    ) -> Result<Vec<SocketAddr>, Failure> {
        let allowed: Vec<_> =
            addresses.iter().filter(|a| self.allows(host, **a)).copied().collect();
        if allowed.is_empty() {
            let port = addresses.first().map_or(0, SocketAddr::port);
            return Err(self.not_listed(host, port, addresses));
        }
        Ok(allowed)
    }

    fn allows(&self, host: &str, address: SocketAddr) -> bool {
        let (ip, is_named) =
            (address.ip().to_canonical(), |entry: &&DonorEntry| entry.host.is_named(host));
        let fitting = || self.entries.iter().filter(|entry| entry.ports.holds(address.port()));
        if self.matching == DonorMatch::Exact && !fitting().any(|entry| is_named(&entry)) {
            return false;
        }
        fitting().any(|entry| match &entry.host {
            HostPattern::Network(network) if is_nobodys(ip) => network.is_only(ip),
            HostPattern::Network(network) if ip.is_loopback() => {
                network.is_loopback() && network.holds(ip)
            }
            HostPattern::Network(network) => network.holds(ip),
            HostPattern::Name(_) if is_nobodys(ip) => false,
            HostPattern::Name(_) if ip.is_loopback() => is_named(&entry) && is_localhost(host),
            HostPattern::Name(_) => is_named(&entry),
        })
    }

    /// The plugin's words, and what to do.
    fn not_listed(&self, host: &str, port: u16, addresses: &[SocketAddr]) -> Failure {
        let donor =
            if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let leads = |a: &&SocketAddr| a.ip().to_string() != host;
        let addresses: Vec<_> =
            addresses.iter().filter(leads).map(|a| a.ip().to_string()).collect();
        let leads_to = match addresses.is_empty() {
            true => String::new(),
            false => format!(" (it leads to {})", addresses.join(", ")),
        };
        let action = if self.is_empty() {
            "no donor may be cloned from until the recipient is started with --donor-list"
        } else {
            "add it to --donor-list of the recipient (loopback and link-local addresses must be \
             listed themselves)"
        };
        Failure::new(
            Code::FailedPrecondition,
            "DONOR_NOT_LISTED",
            format!(
                "Clone system configuration: {donor} is not found in clone_valid_donor_list: \
                 {self}{leads_to}; {action}"
            ),
        )
        .mysql(3869)
    }
}

impl fmt::Display for DonorList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("NULL");
        }
        for (n, entry) in self.entries.iter().enumerate() {
            write!(f, "{}{entry}", if n == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl DonorEntry {
    /// Whether it stands for one host and one port.
    fn is_single(&self) -> bool {
        let is_one_host = match &self.host {
            HostPattern::Name(labels) => labels.iter().all(|label| label != "*"),
            HostPattern::Network(network) => network.is_single(),
        };
        is_one_host && matches!(self.ports, PortPattern::Range(first, last) if first == last)
    }
}

impl FromStr for DonorEntry {
    type Err = DonorListError;

    fn from_str(text: &str) -> Result<Self, DonorListError> {
        let text = text.trim();
        let shown = || text.chars().take(300).collect::<String>();
        let no_port = || DonorListError::NoPort(shown());
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => rest.split_once("]:").ok_or_else(no_port)?,
            None => text.rsplit_once(':').ok_or_else(no_port)?,
        };
        let ports = PortPattern::parse(port)
            .ok_or_else(|| DonorListError::BadPort(shown(), port.chars().take(80).collect()))?;
        let host = HostPattern::parse(host)
            .ok_or_else(|| DonorListError::BadHost(shown(), host.chars().take(300).collect()))?;
        Ok(Self { host, ports })
    }
}

impl fmt::Display for DonorEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            HostPattern::Name(labels) => write!(f, "{}:", labels.join("."))?,
            HostPattern::Network(network) => {
                let network = network.to_string();
                if network.contains(':') {
                    write!(f, "[{network}]:")?;
                } else {
                    write!(f, "{network}:")?;
                }
            }
        }
        match self.ports {
            PortPattern::Any => f.write_str("*"),
            PortPattern::Range(first, last) if first == last => write!(f, "{first}"),
            PortPattern::Range(first, last) => write!(f, "{first}-{last}"),
        }
    }
}

impl HostPattern {
    fn parse(text: &str) -> Option<Self> {
        if let Ok(network) = text.parse() {
            return Some(Self::Network(network));
        }
        let labels = labels(text)?;
        // What looks like an address and is none is a slip, not a name.
        let is_number = |label: &String| label.bytes().all(|byte| byte.is_ascii_digit());
        (!labels.iter().all(is_number)).then_some(Self::Name(labels))
    }

    /// Whether a statement's host is this one by its name, or by the very literal.
    fn is_named(&self, host: &str) -> bool {
        match self {
            Self::Name(pattern) => labels(host).is_some_and(|labels| {
                labels.len() == pattern.len()
                    && pattern.iter().zip(&labels).all(|(p, label)| p == "*" || p == label)
            }),
            Self::Network(network) => host.parse().is_ok_and(|ip| network.is_only(ip)),
        }
    }
}

impl PortPattern {
    fn parse(text: &str) -> Option<Self> {
        let number = |text: &str| text.parse().ok().filter(|&port: &u16| port > 0);
        if text == "*" {
            return Some(Self::Any);
        }
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let (first, last) = (number(first)?, number(last)?);
        (first <= last).then_some(Self::Range(first, last))
    }

    fn holds(self, port: u16) -> bool {
        match self {
            Self::Any => true,
            Self::Range(first, last) => (first..=last).contains(&port),
        }
    }
}

/// Labels of a name, lower-case, without the dot at its end.
fn labels(name: &str) -> Option<Vec<String>> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_right = |label: &str| {
        let letters = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        label == "*" || ((1..=63).contains(&label.len()) && label.bytes().all(letters))
    };
    let labels: Vec<String> = name.split('.').map(str::to_ascii_lowercase).collect();
    (name.len() <= 253 && labels.iter().all(|label| is_right(label))).then_some(labels)
}

/// Names that lead to loopback by definition (RFC 6761); any other that does was made to.
fn is_localhost(host: &str) -> bool {
    labels(host).is_some_and(|labels| labels.last().is_some_and(|label| label == "localhost"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entries(text: &str) -> Result<Vec<DonorEntry>, DonorListError> {
        text.split(',').filter(|entry| !entry.is_empty()).map(str::parse).collect()
    }

    fn list(text: &str) -> DonorList {
        DonorList::new(entries(text).unwrap(), DonorMatch::Address).unwrap()
    }

    fn allows(text: &str, host: &str, address: &str) -> bool {
        let address: SocketAddr = address.parse().unwrap();
        let allowed = list(text).allowed(host, &[address]);
        if let Err(failure) = &allowed {
            assert_eq!(
                (failure.mysql_error, failure.reason.as_ref()),
                (Some(3869), "DONOR_NOT_LISTED")
            );
        }
        allowed.is_ok()
    }

    /// Guards every form of an entry, and that what is not listed is refused.
    #[test]
    fn what_is_listed_is_allowed_and_nothing_else() {
        for (text, host, address, allowed) in [
            ("", "db", "10.0.0.1:4406", false),
            ("db:4406", "db", "10.0.0.1:4406", true),
            ("DB:4406", "db.", "10.0.0.1:4406", true),
            ("db:4406", "db", "10.0.0.1:4407", false),
            ("db:4406", "db2", "10.0.0.1:4406", false),
            ("other:1, db:4400-4410", "db", "10.0.0.1:4406", true),
            ("db:*", "db", "10.0.0.1:1", true),
            ("*.db.svc:4406", "db-0.db.svc", "10.0.0.1:4406", true),
            ("*.db.svc:4406", "a.db-0.db.svc", "10.0.0.1:4406", false),
            ("*.db.svc:4406", "db.svc", "10.0.0.1:4406", false),
            ("db-0.*.svc:4406", "db-0.x.svc", "10.0.0.1:4406", true),
            ("10.0.0.1:4406", "db", "10.0.0.1:4406", true),
            ("10.0.0.1:4406", "db", "[::ffff:10.0.0.1]:4406", true),
            ("10.0.0.0/8:4406", "db", "10.255.0.1:4406", true),
            ("10.0.0.0/8:4406", "db", "11.0.0.1:4406", false),
            ("0.0.0.0/0:4406", "db", "11.0.0.1:4406", true),
            ("[fd00::1]:4406", "db", "[fd00::1]:4406", true),
            ("[fd00::/8]:4406", "db", "[fdff::2]:4406", true),
            ("[fd00::/8]:4406", "db", "[fe00::2]:4406", false),
            ("[fd00::/8]:4406", "db", "10.0.0.1:4406", false),
        ] {
            assert_eq!(allows(text, host, address), allowed, "{text}: {host} at {address}");
        }
    }

    /// Guards hosts inside a network against a recipient that is used to reach them: a listed name
    /// that leads to a metadata service, or to the recipient itself, leads nowhere.
    #[test]
    fn addresses_of_nobody_are_refused_unless_they_are_listed_themselves() {
        for address in ["169.254.169.254", "100.100.100.200", "0.0.0.0", "224.0.0.1", "127.0.0.1"] {
            let socket = format!("{address}:4406");
            assert!(!allows("db:*,0.0.0.0/0:*,*:*", "db", &socket), "{address}");
            assert!(!allows("0.0.0.0/0:*", address, &socket), "{address}");
            assert!(allows(&format!("{address}:4406"), "db", &socket), "{address}");
        }
        let translated = ["64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1"];
        let metadata = ["fd00:ec2::254", "fd20:ce::254", "::ffff:169.254.169.254"];
        let plain = ["fe80::1", "::", "ff02::1", "::1"];
        for address in plain.iter().chain(&metadata).chain(&translated) {
            let socket = format!("[{address}]:4406");
            assert!(!allows("db:*,[::/0]:*,0.0.0.0/0:*", "db", &socket), "{address}");
        }
        assert!(allows("localhost:*", "localhost", "127.0.0.1:1"));
        assert!(allows("localhost:*", "localhost", "[::1]:1"));
        assert!(allows("127.0.0.0/8:*", "db", "127.0.1.1:1"));
        assert!(!allows("*:*", "db", "127.0.1.1:1"));
    }

    /// Guards the plugin's way: a name is no address, and an address no name.
    #[test]
    fn the_plugins_way_compares_what_stands_in_the_statement() {
        let entries = entries("localhost:3306,10.0.0.1:3306,db:3306").unwrap();
        let list = DonorList::new(entries, DonorMatch::Exact).unwrap();
        for (host, port, address, allowed) in [
            ("LOCALHOST", 3306, "127.0.0.1", true),
            ("127.0.0.1", 3306, "127.0.0.1", false),
            ("localhost", 3307, "127.0.0.1", false),
            ("10.0.0.1", 3306, "10.0.0.1", true),
            ("other", 3306, "10.0.0.1", false),
            ("db", 3306, "10.0.0.2", true),
            ("db", 3306, "169.254.169.254", false),
        ] {
            let address = SocketAddr::new(address.parse().unwrap(), port);
            assert_eq!(list.allowed(host, &[address]).is_ok(), allowed, "{host}:{port}");
        }
        for text in ["*.db:1", "db:*", "db:1-2", "10.0.0.0/8:1"] {
            let error =
                DonorList::new(self::entries(text).unwrap(), DonorMatch::Exact).unwrap_err();
            assert!(matches!(error, DonorListError::NotExact(_)), "{text}: {error}");
        }
    }

    #[test]
    fn what_no_look_up_could_allow_is_told_at_once() {
        for (text, host, passes) in [
            ("", "db", false),
            ("other:*", "db", false),
            ("db:1", "db", false),
            ("db:4406", "db", true),
            ("10.0.0.0/8:4406", "db", true),
            ("10.0.0.0/8:4406", "11.0.0.1", false),
            ("10.0.0.0/8:4406", "10.0.0.1", true),
        ] {
            assert_eq!(list(text).check_name(host, 4406).is_ok(), passes, "{text} {host}");
        }
        let text = list("").check_name("db", 4406).unwrap_err().message;
        assert!(text.contains("db:4406 is not found in clone_valid_donor_list: NULL"), "{text}");
        assert!(text.contains("--donor-list"), "{text}");
        let text = list("a:1").check_name("fd00::1", 4406).unwrap_err().message;
        assert!(
            text.contains("[fd00::1]:4406 is not found in clone_valid_donor_list: a:1"),
            "{text}"
        );
    }

    #[test]
    fn slips_are_named() {
        for (text, part) in [
            ("db", "no port"),
            ("db:0", "`0` is no port"),
            ("db:70000", "is no port"),
            ("db:9-1", "is no port"),
            ("10.0.0:1", "is no host"),
            ("10.0.0.0/40:1", "is no host"),
            ("d b:1", "is no host"),
            ("[fd00::1:4406", "no port"),
            ("a..b:1", "is no host"),
        ] {
            let error = entries(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let many = entries(&"a:1,".repeat(1001)).unwrap();
        DonorList::new(many, DonorMatch::Address).unwrap_err();
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic_and_shown_as_it_is_read(text in "[a-z0-9*./:\\[\\]-]*|.*") {
            if let Ok(entry) = text.parse::<DonorEntry>() {
                prop_assert_eq!(entry.to_string().parse::<DonorEntry>().unwrap(), entry);
            }
        }
    }
}
