//! Which server runs on a clone of which: the plugin's rule for MySQL, and one like it for MariaDB.
//!
//! A clone starts by crash recovery, which a server does for the redo log of its own series only.

/// The first patch of MySQL 8.0 that is cloned to others (WL#15989).
const MYSQL_8_0_FREE: u32 = 37;

/// Whether a server of version `ours` may run on a clone of one of version `theirs`; else why not.
pub(super) fn check(theirs: &str, ours: &str) -> Result<(), String> {
    let (Some(donor), Some(own)) = (Version::parse(theirs), Version::parse(ours)) else {
        return Err("a version cannot be read".to_owned());
    };
    if donor.series() != own.series() {
        return Err(format!(
            "a clone starts by crash recovery, which only a server of the same series {}.{} does",
            donor.major, donor.minor
        ));
    }
    if theirs.contains("MariaDB") {
        return match own.patch >= donor.patch {
            true => Ok(()),
            false => Err("the recipient's patch must be the donor's or a later one".to_owned()),
        };
    }
    match donor.series() {
        (8, 0) if donor.patch == own.patch => Ok(()),
        (8, 0) if donor.patch >= MYSQL_8_0_FREE && own.patch >= MYSQL_8_0_FREE => Ok(()),
        (8, 0) => Err(format!("patches of 8.0 must be equal, or both {MYSQL_8_0_FREE} or later")),
        (major, _) if major < 8 && donor.patch != own.patch => {
            Err("patches before 8.0 must be equal".to_owned())
        }
        _ => Ok(()),
    }
}

/// What to do where the rule is broken.
pub(super) fn action(theirs: &str) -> String {
    match Version::parse(theirs) {
        Some(donor) if theirs.contains("MariaDB") => format!(
            "run MariaDB {}.{} on the recipient, patch {} or later",
            donor.major, donor.minor, donor.patch
        ),
        Some(donor) if donor.series() == (8, 0) => {
            format!("run MySQL 8.0.{} on the recipient", donor.patch)
        }
        Some(donor) => format!("run MySQL {}.{} on the recipient", donor.major, donor.minor),
        None => "see what the servers' version() says".to_owned(),
    }
}

struct Version {
    major: u32,
    minor: u32,
    patch: u32,
}

impl Version {
    /// What comes after the numbers is a build's name, and does not count.
    fn parse(text: &str) -> Option<Self> {
        let numbers = text.split('-').next()?;
        let mut parts = numbers.split('.').map(str::parse);
        let mut next = || parts.next()?.ok();
        Some(Self { major: next()?, minor: next()?, patch: next()? })
    }

    fn series(&self) -> (u32, u32) {
        (self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn mariadb_runs_on_clones_of_its_series_and_of_no_later_patch() {
        for (donor, own, expected) in [
            ("10.11.14-MariaDB-0+deb12u2-log", "10.11.14-MariaDB", true),
            ("10.11.14-MariaDB", "10.11.18-MariaDB-ubu", true),
            ("10.11.14-MariaDB", "10.11.18", true),
            ("10.11.14-MariaDB", "10.11.13-MariaDB", false),
            ("10.11.14-MariaDB", "11.8.3-MariaDB", false),
            ("11.8.3-MariaDB", "10.11.14-MariaDB", false),
            ("10.11.14-MariaDB", "10.6.22-MariaDB", false),
            ("10.11.14-MariaDB", "9.7.1", false),
            ("10.11.14-MariaDB", "", false),
        ] {
            assert_eq!(check(donor, own).is_ok(), expected, "{donor} {own}");
        }
    }

    #[test]
    fn mysql_runs_on_clones_as_the_plugin_says() {
        for (donor, own, expected) in [
            ("8.0.36", "8.0.36", true),
            ("8.0.25", "8.0.25-debug", true),
            ("8.0.36", "8.0.37", false),
            ("8.0.37", "8.0.41", true),
            ("8.0.41", "8.0.37", true),
            ("8.0.41", "8.4.1", false),
            ("8.4.0", "8.4.5", true),
            ("8.4.5", "8.4.0", true),
            ("9.6.0", "9.7.0", false),
            ("9.7.1", "9.7.0", true),
            ("5.7.44", "5.7.43", false),
            ("9.7", "9.7.0", false),
        ] {
            assert_eq!(check(donor, own).is_ok(), expected, "{donor} {own}");
        }
    }
}
