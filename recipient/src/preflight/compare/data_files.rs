//! innodb_data_file_path: the files that the system tablespace is made of. A server starts only on
//! files of the names and sizes that its own says.

/// Whether a server whose value is `ours` starts on the files of `theirs`; else why not.
pub(super) fn check(theirs: &str, ours: &str) -> Result<(), String> {
    let (donor, own) = (parse(theirs)?, parse(ours)?);
    if donor.len() != own.len() {
        return Err(format!("the donor has {} files, the recipient {}", donor.len(), own.len()));
    }
    for (theirs, ours) in donor.iter().zip(&own) {
        if theirs.name != ours.name {
            return Err(format!("file {} is named {} there", theirs.name, ours.name));
        }
        // One that grows has its size in its first page; it may only not be smaller than is said.
        let fits = match (theirs.grows, ours.grows) {
            (true, true) => ours.bytes <= theirs.bytes,
            (false, false) => ours.bytes == theirs.bytes,
            _ => false,
        };
        if !fits {
            return Err(format!("{} has another size there, or grows otherwise", theirs.name));
        }
    }
    Ok(())
}

struct DataFile<'a> {
    name: &'a str,
    bytes: u64,
    grows: bool,
}

fn parse(value: &str) -> Result<Vec<DataFile<'_>>, String> {
    let bad = || format!("`{value}` cannot be read");
    value
        .split(';')
        .filter(|part| !part.is_empty())
        .map(|part| file(part).ok_or_else(bad))
        .collect()
}

fn file(part: &str) -> Option<DataFile<'_>> {
    let mut fields = part.split(':');
    let (name, size) = (fields.next()?.trim_start_matches("./"), fields.next()?);
    Some(DataFile { name, bytes: bytes(size)?, grows: fields.any(|f| f == "autoextend") })
}

fn bytes(size: &str) -> Option<u64> {
    let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match &size[digits.len()..] {
        "" => 1,
        "K" | "k" => 1 << 10,
        "M" | "m" => 1 << 20,
        "G" | "g" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn files_must_have_the_names_and_sizes_that_the_donor_says() {
        let default = "ibdata1:12M:autoextend";
        for (donor, own, expected) in [
            (default, default, true),
            (default, "./ibdata1:12288K:autoextend", true),
            ("ibdata1:1G:autoextend", default, true),
            (default, "ibdata1:1G:autoextend", false),
            (default, "ibdata1:12M", false),
            (default, "ibdata2:12M:autoextend", false),
            (default, "ibdata1:12M;ibdata2:12M:autoextend", false),
            (
                "ibdata1:12M;ibdata2:12M:autoextend:max:5G",
                "ibdata1:12M;ibdata2:12M:autoextend",
                true,
            ),
            ("ibdata1:12M;ibdata2:12M:autoextend", "ibdata1:13M;ibdata2:12M:autoextend", false),
            (default, "nonsense", false),
            (default, "ibdata1:99999999999999999999G", false),
        ] {
            assert_eq!(check(donor, own).is_ok(), expected, "{donor} {own}");
        }
    }
}
