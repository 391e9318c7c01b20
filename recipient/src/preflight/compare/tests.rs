//! Each comparison, with values that differ, agree, and are missing.

use marcot_engine::server_facts::{Encryption, Plugin, ServerFacts};
use marcot_proto::recipient::v1::{Finding, FindingStatus};

use super::*;

const VERSION: &str = "10.11.14-MariaDB";

fn plugin(name: &str, kind: &str, library: &str) -> Plugin {
    Plugin { name: name.to_owned(), kind: kind.to_owned(), library: library.to_owned() }
}

fn server() -> ServerFacts {
    let variables = [
        ("version", VERSION),
        ("version_compile_os", "debian-linux-gnu"),
        ("version_compile_machine", std::env::consts::ARCH),
        ("innodb_page_size", "16384"),
        ("character_set_server", "utf8mb4"),
        ("character_set_filesystem", "binary"),
        ("collation_server", "utf8mb4_general_ci"),
        ("lower_case_table_names", "0"),
        ("innodb_data_file_path", "ibdata1:12M:autoextend"),
        ("innodb_undo_tablespaces", "0"),
        ("max_allowed_packet", "16777216"),
        ("aria_encrypt_tables", "OFF"),
        ("encrypt_binlog", "OFF"),
    ];
    ServerFacts {
        variables: variables.map(|(n, v)| (n.to_owned(), v.to_owned())).into(),
        collations: Some(vec!["latin1_swedish_ci".to_owned(), "utf8mb4_general_ci".to_owned()]),
        plugins: Some(vec![plugin("InnoDB", "STORAGE ENGINE", "")]),
        encryption: Some(Encryption::default()),
        undo_files: None,
        keyring_component: None,
    }
}

fn donor() -> DonorFacts {
    DonorFacts {
        engine: "innodb".to_owned(),
        os: "Linux".to_owned(),
        machine: std::env::consts::ARCH.to_owned(),
        server: server(),
    }
}

fn own() -> OwnServer {
    let facts = server();
    let mut own =
        OwnServer { collations: facts.collations, plugins: facts.plugins, ..OwnServer::default() };
    own.add(facts.variables, "of the running server");
    own
}

fn set(donor: &mut DonorFacts, name: &str, value: &str) {
    donor.server.variables.insert(name.to_owned(), value.to_owned());
}

fn found(donor: &DonorFacts, own: &OwnServer) -> Vec<Finding> {
    let mut findings = Findings::default();
    compare(donor, own, &["InnoDB".to_owned()], &mut findings);
    findings.all().to_vec()
}

/// What has failed: check, number, text.
fn failed(donor: &DonorFacts, own: &OwnServer) -> Vec<(String, u32, String)> {
    found(donor, own)
        .into_iter()
        .filter(|f| f.status() == FindingStatus::Failed)
        .map(|f| (f.check.clone(), f.error_number, format!("{}; {}", f.message, f.action)))
        .collect()
}

#[test]
fn equal_servers_pass_every_rule() {
    let bad: Vec<_> = found(&donor(), &own())
        .into_iter()
        .filter(|f| f.status() != FindingStatus::Passed)
        .collect();
    assert_eq!(bad, []);
}

/// Guards against a rule that passes for want of a value: all that a recipient without a server
/// reports is `not checked`, but what its own host decides.
#[test]
fn without_a_server_nothing_passes_but_what_the_host_decides() {
    let own = OwnServer { why_not: "no server".to_owned(), ..OwnServer::default() };
    for finding in found(&donor(), &own) {
        let by_host = ["os", "machine"].contains(&finding.check.as_str());
        // These are the donor's alone.
        let of_donor = (finding.check == "encryption_keys" && finding.message.contains("nothing"))
            || finding.check == "undo_names";
        let expected =
            if by_host || of_donor { FindingStatus::Passed } else { FindingStatus::NotChecked };
        assert_eq!(finding.status(), expected, "{finding:?}");
    }
    let mut silent = donor();
    silent.server = ServerFacts {
        variables: [("version".to_owned(), VERSION.to_owned())].into(),
        ..Default::default()
    };
    for finding in found(&silent, &self::own()) {
        let known = ["os", "machine", "version", "storage_engines", "undo_names"];
        let is_known = known.contains(&finding.check.as_str());
        let expected = if is_known { FindingStatus::Passed } else { FindingStatus::NotChecked };
        assert_eq!(finding.status(), expected, "{finding:?}");
    }
    let files =
        DonorFacts { engine: "files".to_owned(), server: ServerFacts::default(), ..donor() };
    let last = found(&files, &self::own()).pop().unwrap();
    assert_eq!((last.check.as_str(), last.status()), ("server", FindingStatus::NotChecked));
}

#[test]
fn each_difference_has_its_number_both_values_and_what_to_do() {
    for (name, value, check, number) in [
        ("version", "11.8.3-MariaDB", "version", 3864),
        ("version_compile_os", "FreeBSD13", "os", 3865),
        ("version_compile_machine", "riscv64", "machine", 3866),
        ("innodb_page_size", "8192", "innodb_page_size", 3868),
        ("character_set_server", "latin1", "character_set_server", 3868),
        ("character_set_filesystem", "utf8mb4", "character_set_filesystem", 3868),
        ("collation_server", "latin1_swedish_ci", "collation_server", 3868),
        ("lower_case_table_names", "1", "lower_case_table_names", 3868),
        ("innodb_data_file_path", "ibdata1:13M", "innodb_data_file_path", 3869),
        ("max_allowed_packet", "1048576", "max_allowed_packet", 3957),
    ] {
        let mut donor = donor();
        set(&mut donor, name, value);
        let failed = failed(&donor, &own());
        let [(at, no, text)] = &failed[..] else { panic!("{name}: {failed:?}") };
        assert_eq!((at.as_str(), *no), (check, number), "{name}");
        let ours = own().get(name).unwrap().value.clone();
        for part in [value, &ours] {
            assert!(text.contains(part), "{text}");
        }
        let says_what_to_do = ["set ", "run ", "clone between", "raise "];
        assert!(says_what_to_do.iter().any(|word| text.contains(word)), "{text}");
    }
}

#[test]
fn all_differences_are_told_at_once() {
    let mut donor = donor();
    for (name, value) in
        [("version", "11.8.3-MariaDB"), ("innodb_page_size", "8192"), ("collation_server", "x")]
    {
        set(&mut donor, name, value);
    }
    let numbers: Vec<u32> = failed(&donor, &own()).iter().map(|(_, number, _)| *number).collect();
    assert_eq!(numbers, [3864, 3868, 3868]);
}

#[test]
fn names_of_one_system_and_machine_are_the_same() {
    let mut donor = donor();
    set(&mut donor, "version_compile_os", "Linux");
    let alias = if cfg!(target_arch = "x86_64") { "AMD64" } else { "ARM64" };
    set(&mut donor, "version_compile_machine", alias);
    assert_eq!(failed(&donor, &own()), []);
}

#[test]
fn collations_plugins_and_engines_that_are_missing_are_named() {
    let mut own = own();
    own.collations = Some(vec!["utf8mb4_general_ci".to_owned()]);
    let (check, number, text) = failed(&donor(), &own).remove(0);
    assert_eq!((check.as_str(), number), ("collations", 3867));
    assert!(text.contains("latin1_swedish_ci is unavailable"), "{text}");

    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("loadable.so"), "").unwrap();
    let mut own = self::own();
    own.plugins = Some(vec![plugin("Aria", "STORAGE ENGINE", "")]);
    own.add([("plugin_dir".to_owned(), directory.path().display().to_string())], "by a test");
    let mut donor = donor();
    donor.server.plugins = Some(vec![
        plugin("InnoDB", "STORAGE ENGINE", ""),
        plugin("loadable", "AUDIT", "loadable.so"),
        plugin("absent", "AUDIT", "absent.so"),
        plugin("escaping", "AUDIT", "../loadable.so"),
    ]);
    let failed = failed(&donor, &own);
    let texts: Vec<_> = failed
        .iter()
        .map(|(check, number, text)| {
            assert_eq!(*number, 3870, "{text}");
            (check.as_str(), text.as_str())
        })
        .collect();
    assert_eq!(texts.len(), 4, "{texts:?}");
    assert!(texts[0].1.contains("plugin InnoDB is not active") && texts[0].1.contains("tables"));
    assert!(texts[1].1.contains("put absent.so into"), "{texts:?}");
    assert!(texts[2].1.contains("escaping"), "{texts:?}");
    assert_eq!(texts[3].0, "storage_engines");
}

#[test]
fn encrypted_data_need_keys_and_whose_is_never_said_to_be_known() {
    let mut donor = donor();
    donor.server.encryption =
        Some(Encryption { tablespaces: 3, key_ids: vec![1, 7], redo_log: false });
    let (check, _, text) = failed(&donor, &own()).remove(0);
    assert_eq!(check, "encryption_keys");
    assert!(text.contains("3 tablespaces (keys 1, 7)"), "{text}");
    let mut own = own();
    own.plugins.as_mut().unwrap().push(plugin("file_key_management", "ENCRYPTION", "f.so"));
    let finding = found(&donor, &own).pop().unwrap();
    assert_eq!(finding.status(), FindingStatus::NotChecked, "{finding:?}");
    // The redo log alone does.
    donor.server.encryption = Some(Encryption { redo_log: true, ..Encryption::default() });
    assert_eq!(failed(&donor, &self::own()).len(), 1);
}

/// Guards a clone that no server of the other side can read: MySQL's keyrings are components, which no
/// list of plugins has. Without the look at them nothing is refused.
#[test]
fn encrypted_data_of_a_mysql_need_a_keyring_and_one_that_nobody_may_see_is_not_checked() {
    let (mut donor, mut own) = (donor(), own());
    set(&mut donor, "version", "9.7.0");
    own.values.get_mut("version").unwrap().value = "9.7.0".to_owned();
    donor.server.encryption = Some(Encryption { tablespaces: 2, ..Encryption::default() });
    let mut told = |component| {
        own.keyring_component = component;
        let mut found = found(&donor, &own);
        found.retain(|finding| finding.check == "encryption_keys");
        let finding = found.remove(0);
        (finding.status(), finding.reason, finding.message)
    };
    let (status, reason, message) = told(Some(false));
    assert_eq!((status, &*reason), (FindingStatus::Failed, "ENCRYPTION_KEYS"));
    assert!(message.contains("no keyring component that is active"), "{message}");
    let (status, _, message) = told(None);
    assert_eq!(status, FindingStatus::NotChecked);
    assert!(message.contains("performance_schema.keyring_component_status"), "{message}");
    // Whether its keys are the right ones no server tells.
    let (status, _, message) = told(Some(true));
    assert_eq!(status, FindingStatus::NotChecked);
    assert!(message.contains("cannot be asked"), "{message}");
}

/// Guards a clone that no server of the other side can read: MariaDB encrypts tables of Aria by a setting
/// of their own. Without the look at it the check passes for what it has not seen. Its binary log is not
/// cloned, and needs no keys.
#[test]
fn encrypted_tables_of_aria_need_keys_and_are_not_passed_over_when_nobody_asked() {
    let mut donor = donor();
    set(&mut donor, "aria_encrypt_tables", "ON");
    let (check, _, text) = failed(&donor, &own()).remove(0);
    assert_eq!(check, "encryption_keys");
    assert!(text.contains("donor: Aria tables (aria_encrypt_tables);"), "{text}");
    set(&mut donor, "aria_encrypt_tables", "OFF");
    set(&mut donor, "encrypt_binlog", "ON");
    let of = |donor: &DonorFacts| {
        let mut found = found(donor, &own());
        found.retain(|finding| finding.check == "encryption_keys");
        found.remove(0)
    };
    let finding = of(&donor);
    assert_eq!(finding.status(), FindingStatus::Passed, "{finding:?}");
    assert!(finding.message.contains("its binary log is, and is not cloned"), "{finding:?}");
    donor.server.variables.remove("aria_encrypt_tables");
    assert_eq!(of(&donor).status(), FindingStatus::NotChecked);
    // MySQL has no such setting.
    set(&mut donor, "version", "9.7.0");
    assert_eq!(of(&donor).status(), FindingStatus::Passed);
}

#[test]
fn undo_files_of_one_name_are_refused_and_another_number_is_a_warning() {
    let mut donor = donor();
    donor.server.undo_files = Some(vec!["./undo_001".to_owned(), "/far/undo_001".to_owned()]);
    let (check, number, text) = failed(&donor, &own()).remove(0);
    assert_eq!((check.as_str(), number), ("undo_names", 3869));
    assert!(text.contains("/far/undo_001"), "{text}");
    let mut donor = self::donor();
    set(&mut donor, "innodb_undo_tablespaces", "3");
    set(&mut donor, "max_allowed_packet", "67108864");
    let warnings: Vec<_> = found(&donor, &own())
        .into_iter()
        .filter(|f| f.status() == FindingStatus::Warning)
        .map(|f| f.check)
        .collect();
    assert_eq!(warnings, ["innodb_undo_tablespaces", "max_allowed_packet"]);
}
