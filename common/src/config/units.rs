//! Values with units, for command lines, environment and files alike: `64MiB`, `5min`, `[::1]:80`.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    time::Duration,
};

/// Units of sizes, in bytes. Powers of two only: a `MB` would mean two things.
const BYTE_UNITS: [(&str, u64); 5] =
    [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

/// Units of durations, in milliseconds.
const TIME_UNITS: [(&str, u64); 5] =
    [("ms", 1), ("s", 1000), ("min", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

/// Why a text is no value with a unit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// No digits in front.
    #[error("expected a whole number, then a unit ({units})")]
    NoNumber {
        /// The units there are.
        units: String,
    },
    /// A number without the unit it needs.
    #[error("`{number}` needs a unit: {units}")]
    NoUnit {
        /// The number.
        number: String,
        /// The units there are.
        units: String,
    },
    /// No such unit.
    #[error("unknown unit `{unit}`; use {units}")]
    UnknownUnit {
        /// What stood there.
        unit: String,
        /// The units there are.
        units: String,
    },
    /// More than fits.
    #[error("`{0}` is too large")]
    TooLarge(String),
    /// A duration that is not allowed here.
    #[error("{found:?} is not {least:?} to {most:?}")]
    NotWithin {
        /// What stood there.
        found: Duration,
        /// The shortest.
        least: Duration,
        /// The longest.
        most: Duration,
    },
}

/// Reads a size in bytes: a whole number, alone or with B, KiB, MiB, GiB or TiB.
pub fn parse_bytes(text: &str) -> Result<u64, UnitError> {
    parse_scaled(text, &BYTE_UNITS, Some(1))
}

/// Reads a duration: a whole number with ms, s, min, h or d; `0` needs no unit.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let bare = (text.trim() == "0").then_some(1);
    parse_scaled(text, &TIME_UNITS, bare).map(Duration::from_millis)
}

/// As `parse_duration`, within bounds.
pub fn parse_duration_within(
    text: &str,
    allowed: RangeInclusive<Duration>,
) -> Result<Duration, UnitError> {
    let found = parse_duration(text)?;
    if !allowed.contains(&found) {
        let (least, most) = allowed.into_inner();
        return Err(UnitError::NotWithin { found, least, most });
    }
    Ok(found)
}

/// Multiplies the number in `text` by its unit; `bare` is the scale of a number without one.
fn parse_scaled(text: &str, units: &[(&str, u64)], bare: Option<u64>) -> Result<u64, UnitError> {
    let text = text.trim();
    let names = || units.iter().map(|&(name, _)| name).collect::<Vec<_>>().join(", ");
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = (&text[..end], text[end..].trim_start());
    if number.is_empty() {
        return Err(UnitError::NoNumber { units: names() });
    }
    let scale = if unit.is_empty() {
        bare.ok_or_else(|| UnitError::NoUnit { number: number.to_owned(), units: names() })?
    } else {
        units
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(unit))
            .map(|&(_, scale)| scale)
            .ok_or_else(|| UnitError::UnknownUnit { unit: unit.to_owned(), units: names() })?
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(scale))
        .ok_or_else(|| UnitError::TooLarge(text.to_owned()))
}

/// A text that is no listen address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no address to listen on; write ADDRESS:PORT, as 127.0.0.1:7700 or [::]:7700")]
pub struct ListenAddressError(String);

/// Reads an address to listen on. Of names only `localhost` is known: others may resolve to an
/// address that somebody else chose.
pub fn parse_listen_address(text: &str) -> Result<SocketAddr, ListenAddressError> {
    let wrong = || ListenAddressError(text.to_owned());
    match text.strip_prefix("localhost:") {
        Some(port) => {
            let port = port.parse().map_err(|_| wrong())?;
            Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
        }
        None => text.parse().map_err(|_| wrong()),
    }
}

/// A service that anyone on the network could use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "--listen {listen} is not a loopback address and no accounts are configured: anyone who \
     reaches the port could use it; pass --accounts FILE or --identities FILE (a donor also \
     --database-accounts), or listen on loopback, as --listen {}", loopback(.listen)
)]
pub struct ExposedWithoutAuthentication {
    /// Where the service would listen.
    pub listen: SocketAddr,
}

/// Refuses to serve the network without authentication.
pub fn loopback_or_authenticated(
    listen: SocketAddr,
    has_authentication: bool,
) -> Result<(), ExposedWithoutAuthentication> {
    // `::ffff:127.0.0.1` is loopback too.
    if has_authentication || listen.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    Err(ExposedWithoutAuthentication { listen })
}

/// The loopback address with the same port and of the same family.
fn loopback(listen: &SocketAddr) -> SocketAddr {
    let ip = match listen {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        SocketAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
    };
    SocketAddr::new(ip, listen.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units_or_none() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("7B", 7),
            ("64MiB", 64 << 20),
            ("1 GiB", 1 << 30),
            ("2tib", 2 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for (text, part) in [
            ("", "whole number"),
            ("MiB", "whole number"),
            ("-1", "whole number"),
            ("1.5GiB", "unknown unit `.5GiB`"),
            ("64MB", "unknown unit `MB`; use B, KiB, MiB, GiB, TiB"),
            ("18446744073709551616", "too large"),
            ("16777216TiB", "too large"),
        ] {
            let error = parse_bytes(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        for (text, millis) in [
            ("250ms", 250),
            ("5s", 5000),
            ("5min", 300_000),
            ("1h", 3_600_000),
            ("2d", 172_800_000),
            ("0", 0),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for (text, part) in [
            ("5", "`5` needs a unit: ms, s, min, h, d"),
            ("5m", "unknown unit `m`"),
            ("s", "whole number"),
            ("99999999999999999d", "too large"),
        ] {
            let error = parse_duration(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn listen_addresses_are_numbers_or_localhost() {
        for (text, address) in [
            ("127.0.0.1:7700", "127.0.0.1:7700"),
            ("[::1]:0", "[::1]:0"),
            ("localhost:80", "127.0.0.1:80"),
        ] {
            assert_eq!(parse_listen_address(text).unwrap(), address.parse().unwrap());
        }
        for text in ["7700", ":7700", "127.0.0.1", "::1:7700", "db.example:7700", "[::1]:65536"] {
            let error = parse_listen_address(text).unwrap_err().to_string();
            assert!(error.contains(text) && error.contains("ADDRESS:PORT"), "{error}");
        }
    }

    #[test]
    fn refuses_the_network_without_accounts_and_names_both_ways_on() {
        for listen in ["127.0.0.1:1", "127.8.8.8:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
            assert_eq!(loopback_or_authenticated(listen.parse().unwrap(), false), Ok(()));
        }
        let network: SocketAddr = "[::]:7700".parse().unwrap();
        assert_eq!(loopback_or_authenticated(network, true), Ok(()));
        let error = loopback_or_authenticated(network, false).unwrap_err().to_string();
        for part in ["--listen [::]:7700", "--accounts FILE", "--listen [::1]:7700"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
