//! The donor's server beside the one that is to run on the clone: each rule of the plugin's, and what
//! the plugin leaves to be found out later.
//!
//! A rule that lacks a value on either side is reported as not checked, never as passed.

mod data_files;
mod plugins;
mod version;

use marcot_common::{failure::Failure, host};

use super::{donor_facts::DonorFacts, findings::Findings, own_server::OwnServer};

/// Variables that must be equal: the plugin's four, and one that decides what tables are called.
const EQUAL: [(&str, &str); 5] = [
    (
        "innodb_page_size",
        "a server opens only pages of its own size: set innodb_page_size as the donor has it in the \
         configuration of the server that is to run on the clone",
    ),
    ("character_set_server", SET_AS_DONOR),
    ("character_set_filesystem", SET_AS_DONOR),
    ("collation_server", SET_AS_DONOR),
    (
        "lower_case_table_names",
        "tables that the donor has would not be found: set lower_case_table_names as the donor has it",
    ),
];

const SET_AS_DONOR: &str = "set it in the recipient server's configuration as the donor has it";

/// Least max_allowed_packet of both servers, as the plugin has it.
const PACKET_MIN: u64 = 2 << 20;

/// Compares all; `in_use` are the storage engines that the donor's tables are in.
pub(super) fn compare(
    donor: &DonorFacts,
    own: &OwnServer,
    in_use: &[String],
    findings: &mut Findings,
) {
    hosts(donor, own, findings);
    if !donor.has_server() {
        let text = format!(
            "the donor's engine `{}` knows of no server: version, page size, character sets, table \
             names, plugins, encryption and sizes are not compared",
            donor.engine
        );
        return findings.not_checked("server", text);
    }
    let rules = Rules { donor, own };
    rules.check("version", "version", findings, |theirs, ours| {
        version::check(theirs, ours).map_err(|why| {
            Failure::precondition(
                "CLONE_VERSION",
                format!(
                    "Clone Donor version: {theirs} is different from Recipient version: {ours}: {why}"
                ),
            )
            .mysql(3864)
            .with("action", version::action(theirs))
        })
    });
    for (name, action) in EQUAL {
        rules.check(name, name, findings, |theirs, ours| {
            if theirs.eq_ignore_ascii_case(ours) {
                return Ok(());
            }
            Err(configuration(name, theirs, ours).with("action", action))
        });
    }
    rules.check("innodb_data_file_path", "innodb_data_file_path", findings, |theirs, ours| {
        data_files::check(theirs, ours).map_err(|why| {
            Failure::precondition(
                "CLONE_SYS_CONFIG",
                format!(
                    "Clone system configuration: innodb_data_file_path: Donor value: {theirs} is \
                         different from Recipient value: {ours}: {why}"
                ),
            )
            .mysql(3869)
            .with("action", SET_AS_DONOR)
        })
    });
    undo(&rules, findings);
    packets(&rules, findings);
    collations(donor, own, findings);
    plugins::check(donor, own, in_use, findings);
    encryption(donor, own, findings);
}

/// Both servers, for rules on one variable.
struct Rules<'a> {
    donor: &'a DonorFacts,
    own: &'a OwnServer,
}

impl Rules<'_> {
    fn check(
        &self,
        check: &str,
        name: &str,
        findings: &mut Findings,
        rule: impl FnOnce(&str, &str) -> Result<(), Failure>,
    ) {
        let theirs = self.donor.server.variable(name);
        if theirs.is_empty() {
            return findings.not_checked(check, format!("the donor does not tell its {name}"));
        }
        let Some(ours) = self.own.get(name).filter(|known| !known.value.is_empty()) else {
            let text = format!("the donor's is {theirs}; {}", self.own.why_not);
            return findings.not_checked(check, text);
        };
        let passed = format!("the donor's is {theirs}, {} {}", ours.origin, ours.value);
        findings.add(check, rule(theirs, &ours.value).map(|()| passed));
    }
}

fn configuration(name: &str, theirs: &str, ours: &str) -> Failure {
    Failure::precondition(
        "CLONE_CONFIG",
        format!(
            "Clone Configuration {name}: Donor value: {theirs} is different from Recipient value: \
             {ours}"
        ),
    )
    .mysql(3868)
}

/// Host beside host: this one's own words where no server tells other ones.
fn hosts(donor: &DonorFacts, own: &OwnServer, findings: &mut Findings) {
    let both = |variable: &str, theirs: &str, ours: &str| {
        let theirs = match donor.server.variable(variable) {
            "" => theirs.to_owned(),
            value => value.to_owned(),
        };
        let ours = own.get(variable).map_or_else(|| ours.to_owned(), |known| known.value.clone());
        (theirs, ours)
    };
    let mut add = |check: &str, (theirs, ours): (String, String), equal: bool, failure: Failure| {
        if theirs.is_empty() {
            findings.not_checked(check, "the donor does not tell it");
        } else if equal {
            findings.passed(check, format!("the donor's is {theirs}, this one's {ours}"));
        } else {
            findings.failed(check, failure);
        }
    };
    let (theirs, ours) = both("version_compile_os", &donor.os, host::OS);
    let failure = Failure::precondition(
        "CLONE_OS",
        format!(
            "Clone Donor OS: {theirs} is different from Recipient OS: {ours}; clone between hosts of \
             one operating system, or dump and load"
        ),
    );
    let equal = operating_system(&theirs) == operating_system(&ours);
    add("os", (theirs, ours), equal, failure.mysql(3865));
    let (theirs, ours) = both("version_compile_machine", &donor.machine, std::env::consts::ARCH);
    let failure = Failure::precondition(
        "CLONE_PLATFORM",
        format!(
            "Clone Donor platform: {theirs} is different from Recipient platform: {ours}; clone \
             between machines of one kind, or dump and load"
        ),
    );
    let equal = machine(&theirs) == machine(&ours);
    add("machine", (theirs, ours), equal, failure.mysql(3866));
}

/// Distributions name their Linux differently: debian-linux-gnu, Linux.
fn operating_system(text: &str) -> String {
    let lower = text.to_ascii_lowercase();
    if lower.contains("linux") { "linux".to_owned() } else { lower }
}

fn machine(text: &str) -> String {
    match text.to_ascii_lowercase().as_str() {
        "amd64" | "x86-64" => "x86_64".to_owned(),
        "arm64" => "aarch64".to_owned(),
        other => other.to_owned(),
    }
}

/// Two undo files of one name would be one in the clone; another number of them is no error, and not
/// what the operator has set.
fn undo(rules: &Rules<'_>, findings: &mut Findings) {
    const CHECK: &str = "undo_names";
    match &rules.donor.server.undo_files {
        // MariaDB's are numbered, in one directory.
        None if rules.donor.server.variable("version").contains("MariaDB") => {
            findings.passed(CHECK, "the donor's undo tablespaces are numbered");
        }
        None => findings.not_checked(CHECK, "the donor does not tell its undo tablespaces' files"),
        Some(files) => {
            let base = |file: &str| file.rsplit('/').next().unwrap_or_default().to_owned();
            let mut names: Vec<String> = files.iter().map(|file| base(file)).collect();
            names.sort();
            let twice = names.windows(2).find(|pair| pair[0] == pair[1]);
            findings.add(
                CHECK,
                match twice {
                    None => Ok(format!("{} undo files of different names", files.len())),
                    Some(pair) => Err(Failure::precondition(
                        "CLONE_SYS_CONFIG",
                        format!(
                            "Clone system configuration: two undo files of the donor are named {} \
                             ({}); drop one of their tablespaces and make it under another name",
                            pair[0],
                            files.join(", ")
                        ),
                    )
                    .mysql(3869)),
                },
            );
        }
    }
    let name = "innodb_undo_tablespaces";
    let theirs = rules.donor.server.variable(name);
    if theirs.is_empty() {
        return findings.not_checked(name, format!("the donor does not tell its {name}"));
    }
    let Some(ours) = rules.own.get(name).filter(|known| !known.value.is_empty()) else {
        let text = format!("the donor's is {theirs}; {}", rules.own.why_not);
        return findings.not_checked(name, text);
    };
    if theirs == ours.value {
        findings.passed(name, format!("the donor's is {theirs}, {} {}", ours.origin, ours.value));
    } else {
        findings.warning(
            name,
            format!("the donor's {name} is {theirs}, {} it is {}", ours.origin, ours.value),
            "the clone keeps the donor's undo tablespaces; set it as the donor has it".to_owned(),
        );
    }
}

/// The plugin's packets must fit. Marcot's do not go through the server; but a client or a replica of
/// the clone must get each row that the donor has taken.
fn packets(rules: &Rules<'_>, findings: &mut Findings) {
    const NAME: &str = "max_allowed_packet";
    rules.check(NAME, NAME, findings, |theirs, ours| {
        for (value, of) in [(theirs, "donor"), (ours, "recipient")] {
            if value.parse::<u64>().is_ok_and(|bytes| bytes < PACKET_MIN) {
                return Err(Failure::precondition(
                    "CLONE_NETWORK_PACKET",
                    format!(
                        "Clone needs max_allowed_packet value to be {PACKET_MIN} or more. Current \
                         value is {value} on the {of} (the donor has {theirs}, the recipient {ours})"
                    ),
                )
                .mysql(3957)
                .with("action", "raise max_allowed_packet there"));
            }
        }
        Ok(())
    });
    let theirs = rules.donor.server.variable(NAME).parse::<u64>();
    let Some(ours) = rules.own.get(NAME) else { return };
    if let (Ok(theirs), Ok(bytes)) = (theirs, ours.value.parse::<u64>())
        && bytes < theirs
    {
        findings.warning(
            NAME,
            format!("the donor's {NAME} is {theirs}, {} it is {bytes}", ours.origin),
            "rows that the donor has taken may be too large for clients of the clone; raise it"
                .to_owned(),
        );
    }
}

fn collations(donor: &DonorFacts, own: &OwnServer, findings: &mut Findings) {
    const CHECK: &str = "collations";
    let Some(theirs) = &donor.server.collations else {
        return findings.not_checked(CHECK, "the donor does not tell its collations");
    };
    let Some(ours) = &own.collations else {
        return findings.not_checked(CHECK, not_running(own, "collations"));
    };
    let missing: Vec<&str> =
        theirs.iter().filter(|name| !ours.contains(name)).map(String::as_str).collect();
    if missing.is_empty() {
        return findings.passed(CHECK, format!("all {} of the donor's are there", theirs.len()));
    }
    let shown = missing.iter().take(NAMES_MAX).copied().collect::<Vec<_>>().join(", ");
    findings.failed(
        CHECK,
        Failure::precondition(
            "CLONE_CHARSET",
            format!(
                "Clone Donor collation: {shown} is unavailable in Recipient ({} of {} are missing); \
                 run a server there that has them",
                missing.len(),
                theirs.len()
            ),
        )
        .mysql(3867),
    );
}

/// Most names in one finding.
const NAMES_MAX: usize = 20;

fn not_running(own: &OwnServer, what: &str) -> String {
    match own.why_not.as_str() {
        "" => format!("only a running server tells its {what}"),
        why => format!("only a running server tells its {what}; {why}"),
    }
}

/// Pages travel as they are on the disk: who has not the donor's keys cannot read them.
fn encryption(donor: &DonorFacts, own: &OwnServer, findings: &mut Findings) {
    const CHECK: &str = "encryption_keys";
    let Some(encrypted) = donor.server.encrypted() else {
        return findings.not_checked(
            CHECK,
            "the donor does not tell whether its data are encrypted at rest (its account needs \
             PROCESS; a donor of an older version does not ask for Aria's tables)",
        );
    };
    if encrypted.is_empty() {
        let binlog = match donor.server.encrypts_binlog() {
            true => "; its binary log is, and is not cloned",
            false => "",
        };
        let text = format!("nothing of the donor's that is cloned is encrypted at rest{binlog}");
        return findings.passed(CHECK, text);
    }
    let what = encrypted.join(", ");
    let Some(ours) = &own.plugins else {
        let text = format!("encrypted: {what}; {}", not_running(own, "key plugins"));
        return findings.not_checked(CHECK, text);
    };
    let is_mysql = !donor.server.variable("version").contains("MariaDB");
    let by_plugin =
        ours.iter().any(|plugin| plugin.kind == "ENCRYPTION" || plugin.name.starts_with("keyring"));
    let keeper = if is_mysql { "keyring component" } else { "key management plugin (ENCRYPTION)" };
    match own.keyring_component.filter(|_| is_mysql) {
        _ if by_plugin => {}
        Some(true) => {}
        None if is_mysql => {
            let text = format!(
                "encrypted at rest on the donor: {what}; the account on the recipient's server may \
                 not ask for its keyring: grant it SELECT on \
                 performance_schema.keyring_component_status"
            );
            return findings.not_checked(CHECK, text);
        }
        _ => {
            let text = format!(
                "encrypted at rest on the donor: {what}; the recipient's server has no {keeper} that \
                 is active; configure the donor's there, with the same keys"
            );
            return findings.failed(CHECK, Failure::precondition("ENCRYPTION_KEYS", text));
        }
    }
    // No server tells its keys.
    findings.not_checked(
        CHECK,
        format!(
            "encrypted at rest on the donor: {what}; whether the recipient's server has the donor's keys cannot be \
             asked: see that its key file or keyring is the donor's"
        ),
    );
}

#[cfg(test)]
mod tests;
