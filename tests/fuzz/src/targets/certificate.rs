//! A clone's certificate: no panic, what is read is what was written, and a directory is checked
//! against any of them without leaving it.
//!
//! Input: a certificate, read as it is, and with its digests put right: then all behind `tree` is
//! the tree.

use std::{fmt::Write as _, fs, path::PathBuf, sync::OnceLock};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use marcot_recipient::certificate::{
    check::{DIFFERENCES_MAX, answer, check},
    hexadecimal,
    read::{Certificate, Line},
    signature::Signer,
};

use crate::scratch;

/// The parser's files.
pub const FILES: &[&str] = &[
    "recipient/src/certificate/read.rs",
    "recipient/src/certificate/check.rs",
    "recipient/src/certificate/signature.rs",
];

/// What is signed begins with this.
const DOMAIN: &[u8] = b"marcot certificate v1\0";

/// Runs one input.
pub fn run(data: &[u8]) {
    if let Some(certificate) = open(data) {
        look(&certificate, data);
    }
    let Some(mended) = put_right(data) else { return };
    if let Some(certificate) = open(&mended) {
        look(&certificate, &mended);
        let signed = sign(&mended);
        let signed = open(&signed).expect("it was right before it was signed");
        assert_eq!(signed.signer, Some(hexadecimal(key().public_key().as_ref())));
    }
    let key = scratch::file("key.pem", data);
    assert!(Signer::open(&key).is_ok() || data != pem().as_bytes());
}

/// A key of nothing but zeros.
fn key() -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[0; 32]).expect("any 32 bytes are a key")
}

/// The same, as `openssl genpkey` writes it.
fn pem() -> String {
    let zeros = "A".repeat(43);
    format!(
        "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEI{zeros}\n-----END PRIVATE KEY-----\n"
    )
}

/// Adds the line that vouches for all above it.
fn sign(certificate: &[u8]) -> Vec<u8> {
    let end = certificate.len() - "all \n".len() - 64;
    let digest = blake3::hash(&certificate[..end]);
    let signature = key().sign(&[DOMAIN, digest.as_bytes()].concat());
    let (key, signature) =
        (hexadecimal(key().public_key().as_ref()), hexadecimal(signature.as_ref()));
    [certificate, format!("signature ed25519 {key} {signature}\n").as_bytes()].concat()
}

fn open(bytes: &[u8]) -> Option<Certificate> {
    open_as("certificate", bytes)
}

/// A certificate is read from its file whenever its tree is asked for: two need two names.
fn open_as(name: &str, bytes: &[u8]) -> Option<Certificate> {
    let path = scratch::file(name, bytes);
    match Certificate::open(&path) {
        Ok(certificate) => Some(certificate),
        Err(failure) => {
            assert!(failure.reason.starts_with("CERTIFICATE_"), "{failure}");
            None
        }
    }
}

/// With the digests that its lines have.
fn put_right(data: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(data).ok()?;
    let (summary, tree) = text.split_once("\ntree\n")?;
    let tree = match tree.starts_with("root ") {
        true => "",
        false => tree.split("\nroot ").next()?.trim_end_matches('\n'),
    };
    let tree = if tree.is_empty() { String::new() } else { format!("{tree}\n") };
    let root = hexadecimal(blake3::hash(tree.as_bytes()).as_bytes());
    let mut right = format!("{summary}\ntree\n{tree}root {root}\n");
    let all = hexadecimal(blake3::hash(right.as_bytes()).as_bytes());
    let _ = writeln!(right, "all {all}");
    Some(right.into_bytes())
}

/// What must hold of a certificate that was taken.
fn look(certificate: &Certificate, bytes: &[u8]) {
    let text = std::str::from_utf8(bytes).expect("a certificate is text");
    let (_, tree) = text.split_once("\ntree\n").expect("it has a tree");
    let mut lines = certificate.tree().expect("it was there a moment ago");
    let mut printed = String::new();
    let is_whole = loop {
        match lines.line() {
            Ok(Some(line)) => print(&mut printed, &line),
            Ok(None) => break true,
            Err(_) => break false,
        }
    };
    if is_whole {
        let read = again(&printed);
        assert_eq!(read.len(), printed.lines().count());
        assert!(tree.lines().count() > printed.lines().count(), "a line that is not there");
        let mut twice = String::new();
        read.iter().for_each(|line| print(&mut twice, line));
        assert_eq!(twice, printed, "a line is another one when it is read again");
    }
    let directory = directory();
    let report = match check(&directory, certificate, &|| Ok(())) {
        Ok(report) => report,
        Err(failure) => {
            assert!(!is_whole, "a tree that can be read can be compared: {failure}");
            return;
        }
    };
    assert!(report.differences.len() <= DIFFERENCES_MAX && report.bytes < 1 << 24);
    let intact = report.is_intact();
    assert!(!intact || !report.is_modified_by_server());
    let answer = answer(&directory, certificate, report);
    assert_eq!((answer.intact, answer.certificate_digest.len()), (intact, 32));
}

/// Lines as the product would read them from a certificate of nothing else.
fn again(tree: &str) -> Vec<Line> {
    let whole = put_right(format!("marcot certificate 1\n{{}}\ntree\n{tree}").as_bytes());
    let whole = whole.expect("it is text");
    let certificate = open_as("again", &whole).expect("its digests are right");
    let mut lines = certificate.tree().expect("it was there a moment ago");
    std::iter::from_fn(|| lines.line().expect("it was printed")).collect()
}

/// A line as certificates have it.
fn print(out: &mut String, line: &Line) {
    let _ = match line {
        Line::Directory { mode, path } => {
            writeln!(out, "d {mode:04o} {}", path.as_bytes().escape_ascii())
        }
        Line::File { mode, size, path } => {
            writeln!(out, "f {mode:04o} {size} {}", path.as_bytes().escape_ascii())
        }
        Line::Block(digest) => writeln!(out, " {}", hexadecimal(digest)),
        Line::Zeros(count) => writeln!(out, " zero {count}"),
        Line::Symlink { path, target } => {
            writeln!(out, "l {}\t{}", path.as_bytes().escape_ascii(), target.escape_ascii())
        }
        Line::HardLink { path, target } => {
            let target = target.as_bytes().escape_ascii();
            writeln!(out, "h {}\t{target}", path.as_bytes().escape_ascii())
        }
    };
}

/// A directory that certificates are compared with.
fn directory() -> PathBuf {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let directory = scratch::directory().join("cloned");
        fs::create_dir_all(directory.join("app")).expect("room for a directory");
        fs::write(directory.join("app/f"), b"x").expect("room for a file");
        fs::write(directory.join("z"), [0; 9]).expect("room for a file");
        fs::write(directory.join("auto.cnf"), b"").expect("room for a file");
        std::os::unix::fs::symlink("f", directory.join("app/l")).expect("room for a link");
        fs::hard_link(directory.join("app/f"), directory.join("app/h")).expect("room for a link");
        directory
    };
    MADE.get_or_init(make).clone()
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let digest = hexadecimal(blake3::hash(b"x").as_bytes());
    let tree = format!(
        "d 0755 app\nf 0644 1 app/f\n {digest}\nh app/h\tapp/f\nl app/l\tf\nf 0644 9 z\n zero 1\n"
    );
    let whole = |summary: &str, tree: &str| {
        put_right(format!("marcot certificate 1\n{summary}\ntree\n{tree}").as_bytes())
            .unwrap_or_default()
    };
    let summary = "{\n  \"clone\": \"clones/x\",\n  \"coordinates\": {\"lsn\": 7},\n  \
                   \"digests\": \"BLAKE3-256\"\n}";
    let right = whole(summary, &tree);
    let text = |text: &str| text.as_bytes().to_vec();
    vec![
        sign(&right),
        pem().into_bytes(),
        [&right[..], b"signature ed25519 00 11\n"].concat(),
        [&right[..], b"\n"].concat(),
        whole("{\"digests\": \"none\"}", "f 4755 70000 app/\\x00\\n\\'\\\"\\\\\\t\\r\\xff\n"),
        whole("{}", "x 1 2\nd 9 a\nf 0644 a\n zero 0\n 00\n"),
        whole("{}", "d 0755 z\nl app/f\tg\nh app/l\t../x\nf 0600 2097153 app/f\n zero 9\n"),
        whole("{}", "f 0644 1048577 auto.cnf\nf 0644 1 app\nf 0640 2 app/f\n"),
        whole("{", "d 0700 a\n"),
        text("marcot certificate 1\n{}\ntree\nroot 00\n"),
        text("marcot certificate 1\n{}\ntree\n"),
        text("marcot certificate 1\n{}\n"),
        text("marcot certificate 2\n"),
        text(""),
    ]
}
