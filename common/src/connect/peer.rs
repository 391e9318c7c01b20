//! What a peer is, by the first bytes that it sends, when it is no server of Marcot.

/// Says what the peer is, to follow its address in a sentence.
pub(super) fn describe(seen: &[u8]) -> String {
    describe_if_known(seen).unwrap_or_else(|| {
        if seen.is_empty() {
            "closed the connection without a word; it is no Marcot donor".to_owned()
        } else {
            let shown = seen[..seen.len().min(16)].escape_ascii();
            format!("is no Marcot donor: it began with `{shown}`")
        }
    })
}

/// The same, for peers that are known.
pub(super) fn describe_if_known(seen: &[u8]) -> Option<String> {
    if let Some(version) = mysql_greeting(seen) {
        return Some(format!(
            "is a MySQL or MariaDB server ({version}), no Marcot donor; name the donor's port"
        ));
    }
    if mysql_error(seen) {
        let text = "is a MySQL or MariaDB server that refuses this host, no Marcot donor";
        return Some(text.to_owned());
    }
    if is_x_protocol(seen) {
        let text = "speaks MySQL's X Protocol; it is no Marcot donor; name the donor's port";
        return Some(text.to_owned());
    }
    if seen.starts_with(b"HTTP/") {
        return Some("is an HTTP server, no Marcot donor".to_owned());
    }
    if is_http2(seen) {
        let text = "speaks HTTP/2 without TLS; if it is a Marcot server behind a proxy, connect \
                    without TLS (REQUIRE NO SSL)";
        return Some(text.to_owned());
    }
    if seen.starts_with(b"SSH-") {
        return Some("is an SSH server, no Marcot donor".to_owned());
    }
    if matches!(seen, [0x15 | 0x16, 3, ..]) {
        return Some("speaks TLS, but not HTTP/2; it is no Marcot donor".to_owned());
    }
    None
}

/// A SETTINGS frame on stream 0: some HTTP/2 servers send it before the client has said a word.
pub(super) fn is_http2(seen: &[u8]) -> bool {
    matches!(seen, [0, 0, _, 4, 0, 0, 0, 0, 0, ..])
}

/// Handshake packet of the classic protocol: length, sequence 0, protocol 10, version string.
/// MySQL Router greets in the same way, for the server behind it.
fn mysql_greeting(seen: &[u8]) -> Option<String> {
    let [_, _, 0, 0, 10, version @ ..] = seen else {
        return None;
    };
    let end = version.iter().position(|&b| b == 0).unwrap_or(version.len());
    let version = &version[..end];
    (!version.is_empty() && version.iter().all(|b| (0x20..0x7f).contains(b)))
        .then(|| String::from_utf8_lossy(version).into_owned())
}

/// Error packet instead of a greeting: length, sequence 0, 0xff.
fn mysql_error(seen: &[u8]) -> bool {
    matches!(seen, [_, _, 0, 0, 0xff, ..])
}

/// First message of the X Protocol: a NOTICE (type 11) with its length in little-endian.
fn is_x_protocol(seen: &[u8]) -> bool {
    matches!(seen, [length, 0, 0, 0, 11 | 1, ..] if *length > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_peers_are_told_as_what_they_are() {
        let greeting = b"\x5d\x00\x00\x00\x0a10.11.19-MariaDB\x00rest";
        let cases: [(&[u8], &str); 7] = [
            (greeting, "MySQL or MariaDB server (10.11.19-MariaDB)"),
            (b"\x48\x00\x00\x00\xff\x6a\x04Host is blocked", "refuses this host"),
            (b"\x05\x00\x00\x00\x0b\x08\x05\x1a\x00", "X Protocol"),
            (b"HTTP/1.1 400 Bad Request", "HTTP server"),
            (b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00", "HTTP/2 without TLS"),
            (b"SSH-2.0-OpenSSH_9.2", "SSH server"),
            (b"\x15\x03\x01\x00\x02\x02\x46", "speaks TLS"),
        ];
        for (seen, expected) in cases {
            let text = describe(seen);
            assert!(text.contains(expected), "{text}");
        }
        assert!(describe(b"").contains("without a word"));
        assert!(describe(b"\x00\x01").contains("\\x00\\x01"));
    }
}
