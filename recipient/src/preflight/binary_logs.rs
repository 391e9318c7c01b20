//! Where the server whose data are replaced keeps its binary and relay logs. Those outside its data
//! directory would stay, and it would go on with logs of other data (R9); and the end of a MySQL's
//! log, which decides prepared transactions, is found under the server's own name alone (R4).

use std::{
    ffi::OsStr,
    io,
    path::{Component, Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use marcot_common::{
    binlog::{BINLOG_BASE, is_base},
    failure::Failure,
};

use super::{donor_facts::DonorFacts, findings::Findings, own_server::OwnServer};

const BINARY: &str = "binary_log";
const RELAY: &str = "relay_log";

/// What a donor calls the log in a clone, where its own is outside its data directory.
const DEFAULT_BASE: &str = "binlog";

/// What the logs of both servers are judged by.
#[derive(Debug)]
pub(super) struct Logs<'a> {
    /// The server whose data are replaced.
    pub(super) own: &'a OwnServer,
    /// Its data directory.
    pub(super) data_directory: &'a Path,
    /// `None` where the donor has told nothing of a server.
    pub(super) donor: Option<&'a DonorFacts>,
    /// What the donor can do.
    pub(super) capabilities: &'a [String],
    /// Whether the recipient itself starts the server on the clone.
    pub(super) manages: bool,
}

/// The base name that a clone's binary log is to have, over all of its snapshots: the server that it is
/// worked out from may not be there any more when another snapshot is opened, and could not start on a log
/// of another name with transactions that are prepared.
#[derive(Debug, Default)]
pub struct KnownBase(Mutex<Option<String>>);

impl KnownBase {
    /// Takes note of what is known now; `None`: nothing is, and what was known before holds.
    pub fn note(&self, now: Option<String>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *known = now.or_else(|| known.take());
    }

    /// What holds for the next snapshot.
    pub fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Where a server has a log.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Unknown,
    Off,
    /// Its base name, from the data directory on.
    Inside(PathBuf),
    /// Its base name.
    Outside(PathBuf),
}

impl Logs<'_> {
    /// Adds what is wrong. Returns the base name that the clone's binary log is to have, where that is
    /// to be said.
    pub(super) fn check(&self, findings: &mut Findings) -> Option<String> {
        self.relay(findings);
        let theirs = self.donor_base();
        match self.binary_place() {
            Place::Unknown if theirs.is_none() && self.has_no_log_bin() => {
                let text = "no log_bin is set: a binary log that the server writes all the same is \
                            inside its data directory";
                findings.passed(BINARY, text);
                None
            }
            Place::Unknown => {
                let must = theirs.map_or_else(
                    || {
                        "see that it is inside the data directory, or that no logs of the old data \
                         are left there"
                            .to_owned()
                    },
                    |theirs| {
                        format!("it must start on the clone with log_bin={}", theirs.display())
                    },
                );
                let text = format!("what log_bin the recipient's server has is not known: {must}");
                findings.not_checked(BINARY, text);
                None
            }
            Place::Off => {
                findings.add(BINARY, without_log(theirs.as_deref()));
                None
            }
            Place::Outside(path) => {
                self.outside(&path, theirs.as_deref(), findings);
                None
            }
            Place::Inside(path) => {
                if let Some(index) = self.index_outside(theirs.is_some()) {
                    self.old_index(&index, theirs.is_some(), findings);
                    return None;
                }
                let named = self.name_for(&path, theirs.as_deref());
                let base = named.as_ref().ok().cloned().flatten();
                let passed = format!("the clone's binary log is named {}", path.display());
                findings.add(BINARY, named.map(|_| passed));
                base
            }
        }
    }

    fn own(&self, name: &str) -> &str {
        self.own.get(name).map_or("", |known| &known.value)
    }

    fn binary_place(&self) -> Place {
        match self.own("log_bin") {
            "" => Place::Unknown,
            "OFF" => Place::Off,
            "ON" => self.place(self.own("log_bin_basename")),
            // As a program says it that would be started: another instance's says nothing of this one.
            _ if Path::new(self.own("datadir")) != self.data_directory => Place::Unknown,
            // What was set; an extension is no part of the name.
            path => self.place(&Path::new(path).with_extension("").to_string_lossy()),
        }
    }

    /// As a program says it that would be started on this very directory. A MySQL writes a log then too,
    /// by a name that it does not say.
    fn has_no_log_bin(&self) -> bool {
        self.own.get("log_bin").is_some_and(|known| known.value.is_empty())
            && Path::new(self.own("datadir")) == self.data_directory
            && self.index_outside(false).is_none()
    }

    /// `Off` where nothing is set: what there is lies in the data directory.
    fn relay_place(&self) -> Place {
        if let Some(known) = self.own.get("relay_log_basename") {
            return if known.value.is_empty() { Place::Off } else { self.place(&known.value) };
        }
        match self.own.get("relay_log") {
            _ if Path::new(self.own("datadir")) != self.data_directory => Place::Unknown,
            None => Place::Unknown,
            Some(known) if known.value.is_empty() => Place::Off,
            Some(known) => {
                self.place(&Path::new(&known.value).with_extension("").to_string_lossy())
            }
        }
    }

    fn place(&self, base: &str) -> Place {
        let datadir = Path::new(self.own("datadir"));
        if base.is_empty() {
            return Place::Unknown;
        }
        match below(datadir, Path::new(base)) {
            Some(inside) => Place::Inside(inside),
            None => Place::Outside(PathBuf::from(base)),
        }
    }

    /// Base name in the clone of a MySQL donor's log; `None` where none is cloned.
    fn donor_base(&self) -> Option<PathBuf> {
        let facts = self.donor.filter(|facts| facts.is_mysql())?;
        let variable = |name: &str| facts.server.variable(name);
        (variable("log_bin") == "ON").then(|| {
            let base = Path::new(variable("log_bin_basename"));
            below(Path::new(variable("datadir")), base)
                .unwrap_or_else(|| PathBuf::from(DEFAULT_BASE))
        })
    }

    /// Whether both servers' indexes have one name in a data directory.
    fn has_donors_index(&self) -> bool {
        let own = below(Path::new(self.own("datadir")), Path::new(self.own("log_bin_index")));
        let theirs = self.donor.and_then(|facts| {
            let variable = |name: &str| Path::new(facts.server.variable(name));
            below(variable("datadir"), variable("log_bin_index"))
        });
        own.is_some() && own == theirs
    }

    /// The index of the binary log, where it lies elsewhere than the log, and is there or will be looked for.
    fn index_outside(&self, is_needed: bool) -> Option<PathBuf> {
        let index = PathBuf::from(self.own("log_bin_index"));
        let is_outside = below(Path::new(self.own("datadir")), &index).is_none();
        let counts = is_needed || !matches!(index.try_exists(), Ok(false));
        (!index.as_os_str().is_empty() && is_outside && counts).then_some(index)
    }

    fn old_index(&self, index: &Path, is_needed: bool, findings: &mut Findings) {
        let text = format!(
            "the index of the server's binary log is {} (log_bin_index), outside its data directory {}: \
             the server would look on the clone for the logs that it names, which go with the data that \
             are replaced",
            index.display(),
            self.own("datadir")
        );
        if self.manages || is_needed {
            let failure = Failure::precondition("PATH_OUTSIDE_DATA_DIRECTORY", text);
            let action = "start the server without log_bin_index, and clone again";
            return findings.failed(BINARY, failure.with("action", action));
        }
        // A person starts it, and can see to that.
        let action = "move it away before the server is started on the clone".to_owned();
        findings.warning("binlog_outside", text, action);
    }

    /// The name that the clone's log must be given, if the donor is to be told.
    fn name_for(&self, path: &Path, theirs: Option<&Path>) -> Result<Option<String>, Failure> {
        let index = Path::new(self.own("log_bin_index"));
        let is_plain_index = index.as_os_str().is_empty()
            || index.file_name() == Some(&with_index(path.file_name().unwrap_or_default()));
        let can = self.capabilities.iter().any(|name| name == BINLOG_BASE);
        let name = path.to_str().filter(|name| can && is_plain_index && is_base(name));
        let Some(theirs) = theirs.filter(|_| name.is_none()) else {
            return Ok(name.map(str::to_owned));
        };
        if path == theirs && (is_plain_index || self.has_donors_index()) {
            return Ok(None);
        }
        let old = if can { "" } else { ", or a donor of this version" };
        Err(Failure::precondition(
            "BINLOG_NAME",
            format!(
                "the clone's binary log is {} (the donor's log_bin), the recipient's server looks for \
                 {} (log_bin; its index is {}): it would not find the end of the log, which decides \
                 prepared transactions",
                theirs.display(),
                path.display(),
                index.display()
            ),
        )
        .with(
            "action",
            format!(
                "start the recipient's server with log_bin={}, or another name without a directory, \
                 and without log_bin_index{old}",
                theirs.display()
            ),
        ))
    }

    fn outside(&self, path: &Path, theirs: Option<&Path>, findings: &mut Findings) {
        let left = left_of(path);
        if let (Ok(0), None) = (&left, theirs) {
            let text = format!("the server's binary log is {}, and none is there", path.display());
            return findings.passed(BINARY, text);
        }
        let datadir = self.own("datadir");
        let mut why = Vec::new();
        if !matches!(left, Ok(0)) {
            why.push(format!(
                "{} of the data that are replaced would stay, and the server would go on with them on \
                 the clone, with GTIDs and positions that are not the clone's",
                counted(&left)
            ));
        }
        if let Some(theirs) = theirs {
            why.push(format!(
                "it would not find the end of the donor's log, {} in the clone, which decides prepared \
                 transactions",
                theirs.display()
            ));
        }
        let text = format!(
            "the server's binary log is {} (log_bin), outside its data directory {datadir}: {}",
            path.display(),
            why.join("; and ")
        );
        let name = path.file_name().unwrap_or(OsStr::new(DEFAULT_BASE)).to_string_lossy();
        let action = format!(
            "start the server with log_bin={name}, which is inside its data directory, and clone \
             again"
        );
        if self.manages || theirs.is_some() {
            let failure = Failure::precondition("PATH_OUTSIDE_DATA_DIRECTORY", text);
            return findings.failed(BINARY, failure.with("action", action));
        }
        // A person starts it, and can see to that.
        findings.warning(
            "binlog_outside",
            text,
            "move them away before the server is started on the clone".to_owned(),
        );
    }

    /// A replica's channels are in its tables, with names of relay logs in them: of those, files of
    /// other data must not be there.
    fn relay(&self, findings: &mut Findings) {
        let path = match self.relay_place() {
            Place::Outside(path) => path,
            Place::Off | Place::Inside(_) => return,
            Place::Unknown => {
                let text = "where the recipient's server has relay logs is not known: see that \
                            relay_log is inside the data directory, or that none of the old data are \
                            left there";
                return findings.not_checked(RELAY, text);
            }
        };
        let left = left_of(&path);
        if let Ok(0) = left {
            let text = format!("the server's relay log is {}, and none is there", path.display());
            return findings.passed(RELAY, text);
        }
        let text = format!(
            "the server's relay log is {} (relay_log), outside its data directory {}: {} of the data \
             that are replaced would stay, and a replica on the clone could go on with them",
            path.display(),
            self.own("datadir"),
            counted(&left)
        );
        let action =
            "end the server's replication (RESET REPLICA ALL; MariaDB: RESET SLAVE ALL) and \
                      move what is left of them away, or have relay_log inside the data directory"
                .to_owned();
        match left {
            Ok(_) if self.manages => {
                let failure = Failure::precondition("PATH_OUTSIDE_DATA_DIRECTORY", text);
                findings.failed(RELAY, failure.with("action", action));
            }
            _ => findings.warning(RELAY, text, action),
        }
    }
}

fn without_log(theirs: Option<&Path>) -> Result<String, Failure> {
    let Some(theirs) = theirs else {
        return Ok("the server writes no binary log, and needs none on the clone".to_owned());
    };
    Err(Failure::precondition(
        "BINLOG_OFF",
        format!(
            "the donor's server writes a binary log ({} in the clone), the recipient's does not \
             (log_bin=OFF): transactions that are prepared at the clone's point are decided by the end \
             of that log, and a server without one does not start where there are any",
            theirs.display()
        ),
    )
    .with(
        "action",
        format!(
            "start the recipient's server with log_bin={}, and clone again; it may be switched off \
             once the clone was started",
            theirs.display()
        ),
    ))
}

/// A path from the data directory on; `None` when it lies elsewhere.
fn below(datadir: &Path, path: &Path) -> Option<PathBuf> {
    let is_name = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    let inside = if path.is_relative() {
        Some(path.to_owned())
    } else if let Ok(inside) = path.strip_prefix(datadir) {
        Some(inside.to_owned())
    } else {
        // The same directory by another name.
        let parent = path.parent()?.canonicalize().ok()?;
        let inside = parent.strip_prefix(datadir.canonicalize().ok()?).ok()?.to_owned();
        Some(inside.join(path.file_name()?))
    };
    inside
        .filter(|path| !path.as_os_str().is_empty() && path.components().all(is_name))
        .map(|path| path.components().filter(|part| *part != Component::CurDir).collect())
}

/// How many logs of a base name there are.
fn left_of(base: &Path) -> io::Result<usize> {
    let name = base.file_name().unwrap_or_default().as_encoded_bytes();
    let directory = base.parent().unwrap_or(Path::new("/"));
    let mut count = 0;
    for entry in std::fs::read_dir(directory)? {
        let file = entry?.file_name();
        let rest = file.as_encoded_bytes().strip_prefix(name).unwrap_or_default();
        // A connection of MariaDB's has its name between.
        let digits = rest.rsplit(|&b| b == b'.').next().unwrap_or_default();
        let is_log = matches!(rest.first(), Some(b'.' | b'-'))
            && !digits.is_empty()
            && digits.iter().all(u8::is_ascii_digit);
        count += usize::from(is_log);
    }
    Ok(count)
}

fn counted(left: &io::Result<usize>) -> String {
    match left {
        Ok(count) => format!("logs there ({count})"),
        Err(error) => format!("logs there, which cannot be looked at ({error}),"),
    }
}

fn with_index(name: &OsStr) -> std::ffi::OsString {
    let mut index = name.to_owned();
    index.push(".index");
    index
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use marcot_engine::server_facts::ServerFacts;
    use marcot_proto::recipient::v1::{Finding, FindingStatus};

    use super::*;

    /// Guards the clone's prepared transactions where another snapshot is opened while its server is not
    /// there: forgotten, the log has the donor's name, under which the server does not find it.
    #[test]
    fn a_name_that_was_known_holds_where_nobody_tells_it_any_more() {
        let base = KnownBase::default();
        base.note(None);
        assert_eq!(base.get(), None);
        for known in ["first", "other"] {
            base.note(Some(known.to_owned()));
            base.note(None);
            assert_eq!(base.get().as_deref(), Some(known));
        }
    }

    fn own(values: &[(&str, &str)]) -> OwnServer {
        let mut own = OwnServer::default();
        let values = values.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
        own.add(values, "of the running server");
        // A server that is no replica, unless a test says another thing.
        let none = [("relay_log_basename".to_owned(), String::new())];
        own.add(none, "of the running server");
        own
    }

    fn with_log(base: &str) -> OwnServer {
        let base = format!("/own/{base}");
        let index = format!("{base}.index");
        own(&[
            ("datadir", "/own/"),
            ("log_bin", "ON"),
            ("log_bin_basename", &base),
            ("log_bin_index", &index),
        ])
    }

    fn donor(version: &str, base: &str) -> DonorFacts {
        let variables: BTreeMap<String, String> = [
            ("version", version),
            ("datadir", "/theirs/"),
            ("log_bin", if base.is_empty() { "OFF" } else { "ON" }),
            ("log_bin_basename", base),
            ("log_bin_index", &format!("{base}.index")),
        ]
        .map(|(n, v)| (n.to_owned(), v.to_owned()))
        .into();
        let server = ServerFacts { variables, ..ServerFacts::default() };
        DonorFacts { engine: "innodb".to_owned(), server, ..DonorFacts::default() }
    }

    const MYSQL: &str = "9.7.4";
    const MARIADB: &str = "10.11.14-MariaDB";

    struct Case<'a> {
        own: &'a OwnServer,
        donor: Option<&'a DonorFacts>,
        manages: bool,
        can: bool,
    }

    impl Case<'_> {
        /// The name that the donor is told, and what was found.
        fn check(&self) -> (Option<String>, Vec<Finding>) {
            let capabilities: &[String] = if self.can { &[BINLOG_BASE.to_owned()] } else { &[] };
            let Self { own, donor, manages, .. } = *self;
            let data_directory = Path::new("/own");
            let logs = Logs { own, data_directory, donor, capabilities, manages };
            let mut findings = Findings::default();
            let base = logs.check(&mut findings);
            (base, findings.all().to_vec())
        }

        fn refusal(&self) -> Finding {
            let (base, findings) = self.check();
            assert_eq!(base, None);
            let [finding] = &findings[..] else { panic!("{findings:?}") };
            assert_eq!(finding.status(), FindingStatus::Failed, "{finding:?}");
            finding.clone()
        }
    }

    fn case<'a>(own: &'a OwnServer, donor: &'a DonorFacts) -> Case<'a> {
        Case { own, donor: Some(donor), manages: true, can: true }
    }

    /// Guards R4: the end of the donor's log comes under the name that the recipient's server looks
    /// for, or the clone is refused. Without the name a server whose clone has prepared transactions
    /// does not start.
    #[test]
    fn the_clones_log_has_the_name_that_its_server_looks_for() {
        let theirs = donor(MYSQL, "/theirs/bin");
        for base in ["bin", "mysql-bin"] {
            let (named, findings) = case(&with_log(base), &theirs).check();
            assert_eq!(named.as_deref(), Some(base), "{findings:?}");
        }
        // A donor that cannot name it, or a name in a directory, that is not the donor's own.
        for (base, can) in [("mysql-bin", false), ("logs/bin", true)] {
            let own = with_log(base);
            let refusal = Case { can, ..case(&own, &theirs) }.refusal();
            assert_eq!(refusal.reason, "BINLOG_NAME");
            assert!(refusal.message.contains(&format!("looks for {base} ")), "{refusal:?}");
            assert!(refusal.message.contains("log is bin "), "{refusal:?}");
            assert!(refusal.action.contains("log_bin=bin"), "{refusal:?}");
        }
        for (base, their_base, can) in
            [("bin", "/theirs/bin", false), ("logs/bin", "/theirs/logs/bin", true)]
        {
            let (own, theirs) = (with_log(base), donor(MYSQL, their_base));
            let (named, findings) = Case { can, ..case(&own, &theirs) }.check();
            let passed = findings.iter().all(|f| f.status() == FindingStatus::Passed);
            assert!(named.is_none() && passed && !findings.is_empty(), "{findings:?}");
        }
        // An index of another name is not found either.
        let mut own = with_log("bin");
        let index = crate::preflight::own_server::Known {
            value: "/own/other.index".to_owned(),
            origin: "of the running server",
        };
        own.values.insert("log_bin_index".to_owned(), index);
        assert_eq!(case(&own, &theirs).refusal().reason, "BINLOG_NAME");
    }

    /// Guards R9: the index of the old data's log is not gone on with. Without the look the server is
    /// started on a clone with an index of logs that went with the old data.
    #[test]
    fn an_index_that_would_stay_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let index = home.path().join("bin.index");
        let shown = index.display().to_string();
        let mut own = with_log("bin");
        own.values.get_mut("log_bin_index").unwrap().value.clone_from(&shown);
        for (theirs, manages, is_there, status) in [
            (donor(MARIADB, "/theirs/bin"), true, false, FindingStatus::Passed),
            (donor(MARIADB, "/theirs/bin"), true, true, FindingStatus::Failed),
            (donor(MARIADB, "/theirs/bin"), false, true, FindingStatus::Warning),
            (donor(MYSQL, "/theirs/bin"), false, true, FindingStatus::Failed),
        ] {
            drop(std::fs::remove_file(&index));
            if is_there {
                std::fs::write(&index, "./bin.000001\n").unwrap();
            }
            let (_, findings) = Case { manages, ..case(&own, &theirs) }.check();
            assert_eq!(findings[0].status(), status, "{findings:?}");
            if is_there {
                assert!(findings[0].message.contains(&shown), "{findings:?}");
            }
        }
    }

    #[test]
    fn a_server_without_a_log_cannot_decide_what_is_prepared() {
        let off = own(&[("datadir", "/own/"), ("log_bin", "OFF")]);
        let theirs = donor(MYSQL, "/theirs/bin");
        let refusal = case(&off, &theirs).refusal();
        assert_eq!(refusal.reason, "BINLOG_OFF");
        assert!(refusal.action.contains("log_bin=bin"), "{refusal:?}");
        for theirs in [donor(MARIADB, "/theirs/bin"), donor(MYSQL, "")] {
            let (_, findings) = case(&off, &theirs).check();
            assert_eq!(findings[0].status(), FindingStatus::Passed, "{findings:?}");
        }
        let set = own(&[("datadir", "/own/"), ("log_bin", "mine.log")]);
        assert_eq!(case(&set, &theirs).check().0.as_deref(), Some("mine"));
    }

    /// Guards R9 where nobody knows, or by a program whose configuration is of another instance: that is said
    /// of either log and for every donor, and never passed. A server that is stopped may have both elsewhere.
    #[test]
    fn logs_that_nobody_knows_of_are_not_checked() {
        let other = [("datadir", "/other/"), ("log_bin", "/far/bin"), ("relay_log", "/far/relay")];
        let mut of_other = own(&other);
        of_other.values.remove("relay_log_basename");
        let (mysql, mariadb) = (donor(MYSQL, "/theirs/bin"), donor(MARIADB, "/theirs/bin"));
        for unknown in [OwnServer::default(), of_other] {
            for donor in [Some(&mysql), Some(&mariadb), None] {
                let case = Case { own: &unknown, donor, manages: true, can: true };
                let (base, findings) = case.check();
                let told: Vec<_> = findings.iter().map(|f| (&*f.check, f.status())).collect();
                let not_checked = [RELAY, BINARY].map(|check| (check, FindingStatus::NotChecked));
                assert_eq!((base, &told[..]), (None, &not_checked[..]), "{findings:?}");
                let must = donor.is_some_and(DonorFacts::is_mysql);
                assert_eq!(findings[1].message.contains("log_bin=bin"), must, "{findings:?}");
            }
        }
        // A program that would be started on this very directory.
        let mut set = own(&[("datadir", "/own"), ("log_bin", "OFF"), ("relay_log", "")]);
        set.values.remove("relay_log_basename");
        let relay = |own: &OwnServer| {
            let findings = case(own, &mariadb).check().1;
            findings.into_iter().find(|finding| finding.check == RELAY)
        };
        assert_eq!(relay(&set), None);
        // Nothing is set: that is enough where the donor's log is not needed, and for this directory alone.
        set.values.get_mut("log_bin").unwrap().value.clear();
        let binary = |own: &OwnServer, donor: &DonorFacts| {
            let findings = case(own, donor).check().1;
            findings.iter().find(|finding| finding.check == BINARY).unwrap().status()
        };
        assert_eq!(binary(&set, &mariadb), FindingStatus::Passed);
        assert_eq!(binary(&set, &mysql), FindingStatus::NotChecked);
        let of_other = own(&[("datadir", "/other/"), ("log_bin", "")]);
        assert_eq!(binary(&of_other, &mariadb), FindingStatus::NotChecked);
        set.values.get_mut("relay_log").unwrap().value = "/nowhere/relay.log".to_owned();
        let told = relay(&set).expect("it lies elsewhere");
        assert!(told.message.contains("/nowhere/relay "), "{told:?}");
    }

    /// Guards R9: logs of the old data that lie outside the data directory outlive it, and the server
    /// would go on with them.
    #[test]
    fn logs_outside_the_data_directory_are_named() {
        let home = tempfile::tempdir().unwrap();
        let base = home.path().join("mysql-bin");
        let shown = base.display().to_string();
        let outside = own(&[
            ("datadir", "/own/"),
            ("log_bin", "ON"),
            ("log_bin_basename", &shown),
            ("relay_log_basename", &home.path().join("relay").display().to_string()),
        ]);
        let of = |donor: Option<&DonorFacts>, manages| {
            let case = Case { own: &outside, donor, manages, can: true };
            let findings = case.check().1;
            findings.iter().map(|f| (f.check.clone(), f.status())).collect::<Vec<_>>()
        };
        let found = |check: &str, status| (check.to_owned(), status);
        let (mysql, mariadb) = (donor(MYSQL, "/theirs/bin"), donor(MARIADB, "/theirs/bin"));
        // Nothing is left there.
        let no_relay = found(RELAY, FindingStatus::Passed);
        let passed = [no_relay.clone(), found(BINARY, FindingStatus::Passed)];
        assert_eq!(of(Some(&mariadb), true), passed);
        assert_eq!(of(None, true), passed);
        // The end of the donor's log would not be found all the same.
        let failed = [no_relay, found(BINARY, FindingStatus::Failed)];
        assert_eq!(of(Some(&mysql), false), failed);
        std::fs::write(base.with_extension("000007"), "old").unwrap();
        for donor in [Some(&mysql), Some(&mariadb), None] {
            assert_eq!(of(donor, true), failed);
        }
        let case = Case { own: &outside, donor: Some(&mariadb), manages: true, can: true };
        let refusal = case.check().1.remove(1);
        assert_eq!(refusal.reason, "PATH_OUTSIDE_DATA_DIRECTORY");
        for text in [&shown[..], "/own/", "logs there (1)"] {
            assert!(refusal.message.contains(text), "{refusal:?}");
        }
        assert!(refusal.action.contains("log_bin=mysql-bin"), "{refusal:?}");
        // A person who starts the server can move them away first.
        let warned = found("binlog_outside", FindingStatus::Warning);
        assert_eq!(of(Some(&mariadb), false)[1], warned);
        std::fs::write(home.path().join("relay-east.000002"), "old").unwrap();
        assert_eq!(of(Some(&mariadb), true)[0], found(RELAY, FindingStatus::Failed));
        assert_eq!(of(Some(&mariadb), false)[0], found(RELAY, FindingStatus::Warning));
    }

    #[test]
    fn a_path_of_the_data_directory_by_another_name_is_inside() {
        let home = tempfile::tempdir().unwrap();
        let (data, link) = (home.path().join("data"), home.path().join("link"));
        std::fs::create_dir(&data).unwrap();
        std::os::unix::fs::symlink(&data, &link).unwrap();
        assert_eq!(below(&link, &data.join("bin")), Some("bin".into()));
        assert_eq!(below(&link, Path::new("./logs/bin")), Some("logs/bin".into()));
        for outside in ["/elsewhere/bin", "../bin"] {
            assert_eq!(below(&data, Path::new(outside)), None, "{outside}");
        }
    }
}
