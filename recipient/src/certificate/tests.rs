use std::path::PathBuf;

use marcot_common::{entry::Totals, position::Position};

use super::{
    check::{Report, check},
    digests::PartHasher,
    read::Certificate,
    *,
};
use crate::{list::ListReceiver, staging::Owners};

/// A staged tree of known content, and its list.
struct Staged {
    _home: tempfile::TempDir,
    staging: Staging,
    list: FileList,
}

const BLOCK: usize = 1 << 20;

fn content() -> Vec<(&'static str, Vec<u8>)> {
    let many: Vec<u8> = (0..2 * BLOCK + 77).map(|n| (n * 7 / 5 % 251) as u8).collect();
    let mut sparse = vec![0; 4 * BLOCK + 5];
    sparse[2 * BLOCK + 9] = 1;
    vec![("a\nb", b"x".to_vec()), ("empty", Vec::new()), ("many", many), ("sparse", sparse)]
}

fn staged() -> Staged {
    let home = tempfile::tempdir().unwrap();
    let owners = Owners::Preserved;
    let staging = Staging::create(home.path(), "x", owners).unwrap();
    let mut receiver = ListReceiver::create(staging.directory(), Position::FIRST, 99).unwrap();
    let mut totals = Totals::default();
    let mut push = |path: &str, kind: Kind| {
        let number = totals.entries;
        let entry = Entry {
            number,
            file_id: FileId(number + 1),
            change: marcot_common::entry::Change::Add,
            path: RelativePath::new(path.as_bytes()).unwrap(),
            kind: Some(kind),
            attributes: Attributes { mode: 0o640, ..Attributes::default() },
            growing: false,
        };
        totals.add(&entry);
        receiver.push(&entry).unwrap();
        entry
    };
    for (path, bytes) in content() {
        let size = bytes.len() as u64;
        let entry = push(path, Kind::Regular { size, allocated: size });
        let file = staging.open_file(&entry.path, size).unwrap();
        for (block, bytes) in bytes.chunks(BLOCK).enumerate() {
            if bytes.iter().any(|byte| *byte != 0) {
                file.write_all_at(bytes, (block * BLOCK) as u64).unwrap();
            }
        }
        file.set_permissions(std::fs::Permissions::from_mode(0o640)).unwrap();
    }
    let link = push("to", Kind::Symlink { target: b"many".to_vec().into() });
    staging.make(&link).unwrap();
    let list = receiver.finish(totals).unwrap();
    Staged { _home: home, staging, list }
}

impl Staged {
    fn tree(&self) -> PathBuf {
        self.staging.tree()
    }

    fn certify(&self, table: Option<&DigestTable>) -> Certificate {
        let digests = if table.is_some() { BLAKE3_256 } else { NO_DIGESTS }.to_owned();
        let summary = Summary { clone: "clones/x".to_owned(), digests, ..Summary::default() };
        write(&self.staging, &self.list, table, &summary, None, &|| Ok(())).unwrap();
        Certificate::open(&self.tree().join(FILE_NAME)).unwrap()
    }

    fn table(&self) -> DigestTable {
        DigestTable::create(self.staging.directory(), &self.list).unwrap()
    }

    fn check(&self, certificate: &Certificate) -> Report {
        check(&self.tree(), certificate, &|| Ok(())).unwrap()
    }
}

/// Guards digests that were made on arrival: they say the same as those made of the staged files.
#[test]
fn digests_of_what_arrived_are_those_of_what_is_staged() {
    let staged = staged();
    let from_disk = staged.certify(Some(&staged.table())).root;
    let table = staged.table();
    for (number, (_, bytes)) in content().iter().enumerate() {
        let mut hasher = PartHasher::new(number as u64 + 1, bytes.len() as u64, 0);
        for piece in bytes.chunks(300_000) {
            if piece.iter().all(|byte| *byte == 0) {
                hasher.zeros(piece.len() as u64);
            } else {
                hasher.data(piece);
            }
        }
        hasher.finish().iter().for_each(|run| table.take(run).unwrap());
    }
    assert_eq!(staged.certify(Some(&table)).root, from_disk);
}

/// Guards every kind of damage: each is named, and an intact tree has none.
#[test]
fn every_difference_is_named() {
    let staged = staged();
    let certificate = staged.certify(Some(&staged.table()));
    assert_eq!(staged.check(&certificate).differences, [""; 0]);
    let tree = staged.tree();
    let one = |what: &str, change: &dyn Fn(&Path), back: &dyn Fn(&Path)| {
        change(&tree);
        let report = staged.check(&certificate);
        assert_eq!(report.differences, [what]);
        assert!(!report.is_modified_by_server());
        back(&tree);
    };
    let flip = |name: &'static str, at: u64| {
        move |tree: &Path| {
            let file = File::options().read(true).write(true).open(tree.join(name)).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        }
    };
    let in_many = flip("many", (BLOCK + 5) as u64);
    one("`many` differs in bytes 1048576 to 2097152", &in_many, &in_many);
    let in_last = flip("many", (2 * BLOCK + 76) as u64);
    one("`many` differs in bytes 2097152 to 2097229", &in_last, &in_last);
    let in_hole = flip("sparse", (3 * BLOCK + 1) as u64);
    one("`sparse` differs in bytes 3145728 to 4194304", &in_hole, &in_hole);
    let rename = |from: &'static str, to: &'static str| {
        move |tree: &Path| rustix::fs::rename(tree.join(from), tree.join(to)).unwrap()
    };
    let aside = |tree: &Path| rustix::fs::rename(tree.join("empty"), tree.join("../e")).unwrap();
    let again = |tree: &Path| rustix::fs::rename(tree.join("../e"), tree.join("empty")).unwrap();
    one("`empty` is not there", &aside, &again);
    let add = |tree: &Path| std::fs::write(tree.join("later"), "").unwrap();
    let remove = |tree: &Path| std::fs::remove_file(tree.join("later")).unwrap();
    one("`later` was not there", &add, &remove);
    let mode = |bits: u32| {
        move |tree: &Path| {
            let permissions = std::fs::Permissions::from_mode(bits);
            std::fs::set_permissions(tree.join("many"), permissions).unwrap();
        }
    };
    one("`many` has mode 0600, it had 0640", &mode(0o600), &mode(0o640));
    let longer = |tree: &Path| {
        File::options().write(true).open(tree.join("empty")).unwrap().set_len(9).unwrap();
    };
    let shorter = |tree: &Path| {
        File::options().write(true).open(tree.join("empty")).unwrap().set_len(0).unwrap();
    };
    one("`empty` has 9 bytes, it had 0", &longer, &shorter);
    rename("to", "too")(&tree);
    let report = staged.check(&certificate);
    assert_eq!(report.differences, ["`to` is not there", "`too` was not there"]);
}

#[test]
fn a_server_that_ran_is_told_from_damage() {
    let staged = staged();
    let certificate = staged.certify(Some(&staged.table()));
    std::fs::write(staged.tree().join("ib_buffer_pool"), "0,1").unwrap();
    let report = staged.check(&certificate);
    assert!(report.is_modified_by_server());
    assert_eq!(report.evidence, ["ib_buffer_pool"]);
}

/// Guards the certificate itself: no bit of it can flip unseen.
#[test]
fn a_flipped_bit_in_the_certificate_is_seen() {
    let staged = staged();
    staged.certify(Some(&staged.table()));
    let path = staged.tree().join(FILE_NAME);
    let right = std::fs::read(&path).unwrap();
    for at in 0..right.len() {
        let mut bytes = right.clone();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(Certificate::open(&path).is_err(), "byte {at}");
    }
}

/// Guards the signature: over summary and tree, by the key that it names.
#[test]
fn a_signature_holds_for_the_whole_certificate() {
    let staged = staged();
    let key = staged.staging.directory().join("key.pem");
    let pair = aws_lc_rs::signature::Ed25519KeyPair::generate().unwrap();
    use aws_lc_rs::encoding::AsDer as _;
    let der: aws_lc_rs::encoding::Pkcs8V1Der<'_> = pair.as_der().unwrap();
    std::fs::write(&key, pem(der.as_ref())).unwrap();
    let signer = Signer::open(&key).unwrap();
    let summary = Summary { clone: "clones/x".to_owned(), ..Summary::default() };
    let table = staged.table();
    write(&staged.staging, &staged.list, Some(&table), &summary, Some(&signer), &|| Ok(()))
        .unwrap();
    let path = staged.tree().join(FILE_NAME);
    let signed = Certificate::open(&path).unwrap();
    assert_eq!(signed.signer.unwrap().len(), 64);
    let text = std::fs::read_to_string(&path).unwrap();
    // Whoever changes it can make its digest right, and has no key.
    let changed = text.replace("clones/x", "clones/y");
    std::fs::write(&path, &changed).unwrap();
    assert_eq!(Certificate::open(&path).unwrap_err().reason, "CERTIFICATE_CORRUPT");
    let (above, rest) = changed.split_once("\nall ").unwrap();
    let all = hexadecimal(blake3::hash(format!("{above}\n").as_bytes()).as_bytes());
    std::fs::write(&path, format!("{above}\nall {all}{}", &rest[64..])).unwrap();
    assert_eq!(Certificate::open(&path).unwrap_err().reason, "CERTIFICATE_SIGNATURE");
    std::fs::write(&key, "no key").unwrap();
    assert_eq!(Signer::open(&key).unwrap_err().reason, "BAD_CERTIFICATE_KEY");
}

fn pem(der: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("-----BEGIN PRIVATE KEY-----\n");
    for three in der.chunks(3) {
        let word = three.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte));
        let word = word << (8 * (3 - three.len()));
        for place in 0..4 {
            let digit = DIGITS[(word >> (18 - 6 * place) & 63) as usize];
            text.push(if place <= three.len() { digit as char } else { '=' });
        }
    }
    text.push_str("\n-----END PRIVATE KEY-----\n");
    text
}
