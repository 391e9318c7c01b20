//! The list of donors: no panic, an entry is read again from what it prints, and no address is
//! allowed that nobody listed.
//!
//! Input, between NULs: a file, a statement's host, a port, and addresses that the host leads to.

use std::net::{IpAddr, SocketAddr};

use marcot_common::{
    donor_list::{DonorEntry, DonorList, DonorMatch, Donors},
    network::{Network, is_nobodys},
};

use crate::{parts, scratch};

/// The parser's files.
pub const FILES: &[&str] = &["common/src/donor_list.rs", "common/src/donor_list/file.rs"];

/// Runs one input.
pub fn run(data: &[u8]) {
    let texts: Option<Vec<&str>> = parts(data).map(|part| std::str::from_utf8(part).ok()).collect();
    let Some(texts) = texts else { return };
    let (file, rest) = texts.split_first().unwrap_or((&"", &[]));
    let host = rest.first().copied().unwrap_or("db-0");
    let port = rest.get(1).and_then(|text| text.parse().ok()).unwrap_or(4407);
    let mut addresses: Vec<IpAddr> =
        rest.iter().skip(2).take(20).filter_map(|text| text.parse().ok()).collect();
    // A literal leads to itself.
    if let Ok(ip) = host.parse() {
        addresses = vec![ip];
    }
    let words = file.lines().flat_map(|line| line.split('#').next().unwrap_or("").split(','));
    let words = words.map(str::trim).filter(|word| !word.is_empty());
    let entries: Result<Vec<DonorEntry>, _> = words.map(str::parse).collect();
    let path = scratch::file("donors", file.as_bytes());
    for matching in [DonorMatch::Address, DonorMatch::Exact] {
        let donors = Donors::open(Vec::new(), Some(path.as_path()), matching);
        let Ok(entries) = &entries else {
            assert!(donors.is_err());
            continue;
        };
        let list = match DonorList::new(entries.clone(), matching) {
            Ok(list) => list,
            Err(_) => {
                assert!(donors.is_err());
                continue;
            }
        };
        assert_eq!(*donors.expect("what is right by itself is right in a file").current(), list);
        let fixed = Donors::open(entries.clone(), None, matching).expect("right");
        assert_eq!(*fixed.current(), list);
        look(&list, entries, host, port, &addresses);
    }
    for entry in entries.iter().flatten() {
        assert_eq!(entry.to_string().parse().as_ref(), Ok(entry));
    }
}

fn look(list: &DonorList, entries: &[DonorEntry], host: &str, port: u16, addresses: &[IpAddr]) {
    let addresses: Vec<_> = addresses.iter().map(|&ip| SocketAddr::new(ip, port)).collect();
    let may_be = list.check_name(host, port);
    let allowed = match list.allowed(host, &addresses) {
        Ok(allowed) => allowed,
        Err(failure) => {
            assert_eq!(failure.reason, "DONOR_NOT_LISTED");
            return;
        }
    };
    assert!(!list.is_empty() && !allowed.is_empty());
    assert!(may_be.is_ok(), "{host} was refused before it was looked up");
    // Of each entry that is a network: it, and the words behind it.
    let networks: Vec<Network> = entries
        .iter()
        .filter_map(|entry| {
            let text = entry.to_string();
            let (host, _) = text.rsplit_once(':')?;
            host.trim_matches(['[', ']']).parse().ok()
        })
        .collect();
    for address in allowed {
        assert!(addresses.contains(&address));
        let ip = address.ip().to_canonical();
        if is_nobodys(ip) {
            assert!(networks.iter().any(|network| network.is_only(ip)), "{ip}");
        }
        if ip.is_loopback() {
            let is_listed = networks.iter().any(|network| network.holds(ip));
            let host = host.to_ascii_lowercase();
            let host = host.strip_suffix('.').unwrap_or(&host);
            assert!(is_listed || host.split('.').next_back() == Some("localhost"), "{ip}");
        }
    }
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    [
        "# ours\ndb-0:4407, db-1:4407 # both\n\n\0db-0\x004407\x0010.0.0.1\0fd00::1",
        "*.db.svc:4400-4410\n10.0.0.0/8:*,[fd00::/8]:4407\0x.db.svc.\x004401\x0010.1.2.3\x00127.0.0.1",
        "localhost:1\0LOCALHOST\x001\x00127.0.0.1\0::1",
        "127.0.0.0/8:*, ::1:5\0db\x005\x00127.0.0.1",
        "169.254.169.254:80,0.0.0.0/0:*\x00169.254.169.254\x0080",
        "0.0.0.0/0:*\x00169.254.169.254\x0080",
        "[::/0]:*\0x\x001\0fe80::1\0::ffff:127.0.0.1\x0064:ff9b::7f00:1",
        "10.0.0.1:4407\x0010.0.0.1\x004407",
        "db-0:0",
        "db-0",
        "db-0:9-8",
        "[::1",
        "999.1:1",
        "a b:1",
        "-:65536",
        "\0db-0\x004407\x0010.0.0.1",
        "[::1]:7\0::1\x007",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
