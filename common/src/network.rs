//! An address, or a network of them in CIDR form, and which addresses are no other host's.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// All addresses that begin with so many bits of one; a single address has all of its bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

/// Bits of an IPv6 address before the IPv4 one that it stands for (::ffff:0:0/96).
const MAPPED_BITS: u8 = 96;

/// A text that is neither an address nor a network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is neither an address nor a network: write 10.0.0.1, 10.0.0.0/8, fd00::1 or fd00::/8"
)]
pub struct BadNetwork(String);

impl Network {
    /// Whether an address is of this network. An IPv4 address written as an IPv6 one is itself.
    #[must_use]
    pub fn holds(&self, ip: IpAddr) -> bool {
        let shares = |ip: u128, network: u128, width: u32| {
            let rest = width - u32::from(self.bits);
            // A shift by all bits would not be one.
            ip.checked_shr(rest).unwrap_or(0) == network.checked_shr(rest).unwrap_or(0)
        };
        match (ip.to_canonical(), self.address) {
            (IpAddr::V4(ip), IpAddr::V4(network)) => {
                shares(ip.to_bits().into(), network.to_bits().into(), 32)
            }
            (IpAddr::V6(ip), IpAddr::V6(network)) => shares(ip.to_bits(), network.to_bits(), 128),
            _ => false,
        }
    }

    /// Whether it is this one address and no other.
    #[must_use]
    pub fn is_only(&self, ip: IpAddr) -> bool {
        self.is_single() && self.address == ip.to_canonical()
    }

    /// Whether it is a single address.
    #[must_use]
    pub fn is_single(&self) -> bool {
        self.bits == width(self.address)
    }

    /// Whether all of it is loopback.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        // No network is wider than what all of its addresses share: 127.0.0.0/8 and ::1.
        let least = if self.address.is_ipv4() { 8 } else { 128 };
        self.address.is_loopback() && self.bits >= least
    }
}

impl FromStr for Network {
    type Err = BadNetwork;

    fn from_str(text: &str) -> Result<Self, BadNetwork> {
        let bad = || BadNetwork(text.chars().take(120).collect());
        let (address, bits) = text.split_once('/').map_or((text, None), |(a, b)| (a, Some(b)));
        let address = address.trim().parse::<IpAddr>().map_err(|_| bad())?;
        let Some(bits) = bits else {
            let address = address.to_canonical();
            return Ok(Self { address, bits: width(address) });
        };
        let bits = bits.parse().ok().filter(|&bits: &u8| bits <= width(address)).ok_or_else(bad)?;
        match (address, address.to_canonical()) {
            (IpAddr::V6(_), mapped @ IpAddr::V4(_)) if bits >= MAPPED_BITS => {
                Ok(Self { address: mapped, bits: bits - MAPPED_BITS })
            }
            _ => Ok(Self { address, bits }),
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.address)?;
        if self.is_single() { Ok(()) } else { write!(f, "/{}", self.bits) }
    }
}

fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Addresses that only this host or its provider answers on, or nobody: link-local ones, among them
/// the metadata services of clouds, and unspecified, broadcast and multicast ones.
#[must_use]
pub fn is_nobodys(ip: IpAddr) -> bool {
    /// Where AWS and others answer for a machine's metadata in IPv6, and where Google Cloud does.
    const METADATA_V6: [Ipv6Addr; 2] = [
        Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
        Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
    ];
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            ip.is_link_local()
                || ip.is_unspecified()
                || ip.is_broadcast()
                || ip.is_multicast()
                // Alibaba's metadata service.
                || ip == Ipv4Addr::new(100, 100, 100, 200)
        }
        IpAddr::V6(ip) => {
            ip.is_unicast_link_local()
                || ip.is_unspecified()
                || ip.is_multicast()
                || METADATA_V6.contains(&ip)
                || translated(ip).is_some_and(|ip| is_nobodys(ip.into()) || ip.is_loopback())
        }
    }
}

/// The IPv4 address that a NAT64 gateway translates this one to (RFC 6052's well-known prefix).
fn translated(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let [0x64, 0xff9b, 0, 0, 0, 0, high, low] = ip.segments() else { return None };
    Some(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)))
}

/// Whom a bound for each peer counts as one: an IPv4 address, or a /64 of IPv6, for whoever has one
/// address of it has all.
#[must_use]
pub fn of_peer(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(ip) => IpAddr::V4(ip),
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn holds(network: &str, ip: &str) -> bool {
        network.parse::<Network>().unwrap().holds(ip.parse().unwrap())
    }

    #[test]
    fn a_network_holds_what_begins_with_its_bits() {
        for (network, ip, expected) in [
            ("10.0.0.1", "10.0.0.1", true),
            ("10.0.0.1", "10.0.0.2", false),
            ("10.0.0.1", "::ffff:10.0.0.1", true),
            ("::ffff:10.0.0.1", "10.0.0.1", true),
            ("::ffff:10.0.0.0/104", "10.1.0.1", true),
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("10.0.0.0/31", "10.0.0.2", false),
            ("0.0.0.0/0", "203.0.113.9", true),
            ("0.0.0.0/0", "fd00::1", false),
            ("::/0", "fd00::1", true),
            ("::/0", "10.0.0.1", false),
            ("fd00::/8", "fdff::2", true),
            ("fd00::/8", "fe00::2", false),
        ] {
            assert_eq!(holds(network, ip), expected, "{network} {ip}");
        }
    }

    #[test]
    fn slips_are_no_networks() {
        for text in ["", "10.0.0", "10.0.0.0/33", "10.0.0.0/-1", "fd00::/129", "db", "10.0.0.0/"] {
            text.parse::<Network>().unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn a_network_is_read_as_it_is_shown(bits: u8, address: IpAddr) {
            let network = format!("{address}/{bits}").parse::<Network>();
            prop_assert_eq!(network.is_ok(), bits <= width(address));
            if let Ok(network) = network {
                // ::ffff:10.0.0.1/64 is no network of IPv4 addresses.
                let is_wider = bits < MAPPED_BITS && address.to_canonical() != address;
                prop_assert_eq!(network.holds(address), !is_wider);
                prop_assert_eq!(network.to_string().parse(), Ok(network));
            }
        }
    }
}
