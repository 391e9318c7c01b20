//! The only place where a peer's messages become checked types.

use bytes::Bytes;
use marcot_proto::donor::v1 as pb;

use crate::{
    entry::{Attributes, Change, Entry, FileId, Kind, Totals},
    failure::Failure,
    path::{NAME_BYTES_MAX, PATH_BYTES_MAX, RelativePath},
    position::{Position, Stage},
};

/// Most bytes of extended attributes that one entry may carry: the kernel's own bound for one
/// value (XATTR_SIZE_MAX).
pub const EXTENDED_ATTRIBUTE_BYTES_MAX: usize = 64 << 10;

/// Most extended attributes of one entry: each holds some 100 bytes of memory beside its own.
const EXTENDED_ATTRIBUTES_MAX: usize = 4096;

/// Permission bits that may travel: setuid and setgid never do.
pub const MODE_MASK: u32 = 0o1777;

/// Reads a stage and round that a donor's list can have.
pub fn position(stage: i32, round: u32) -> Result<Position, Failure> {
    let Some(stage) = Stage::from_wire(stage) else {
        return Err(Failure::invalid(
            "BAD_STAGE",
            format!("stage {stage} is not one of a donor's"),
        ));
    };
    if round == 0 {
        return Err(Failure::invalid("BAD_STAGE", "round 0: rounds count from 1"));
    }
    Ok(Position { stage, round })
}

/// Reads an entry.
pub fn entry(message: pb::FileEntry) -> Result<Entry, Failure> {
    let bad = |why: String| {
        Failure::peer_misbehaved(format!("entry {} of the list: {why}", message.number))
    };
    let path = RelativePath::new(&message.path)
        .map_err(|e| bad(format!("{e}: `{}`", clip(&message.path))))?;
    if message.file_id == 0 {
        return Err(bad(format!("{path} has file id 0")));
    }
    let change = match pb::EntryChange::try_from(message.change) {
        Ok(pb::EntryChange::Add) => Change::Add,
        Ok(pb::EntryChange::Replace) => Change::Replace,
        Ok(pb::EntryChange::Rename) => Change::Rename,
        Ok(pb::EntryChange::Truncate) => Change::Truncate,
        Ok(pb::EntryChange::Remove) => Change::Remove,
        Ok(pb::EntryChange::Patch) => Change::Patch,
        _ => return Err(bad(format!("{path} has unknown change {}", message.change))),
    };
    let kind = match pb::FileType::try_from(message.r#type) {
        Ok(pb::FileType::Unspecified) if change == Change::Remove => None,
        _ if change == Change::Remove => {
            return Err(bad(format!("{path} is removed and has type {}", message.r#type)));
        }
        Ok(pb::FileType::Regular) => {
            if i64::try_from(message.size_bytes).is_err() {
                return Err(bad(format!("{path} has size {}", message.size_bytes)));
            }
            Some(Kind::Regular { size: message.size_bytes, allocated: message.allocated_bytes })
        }
        Ok(pb::FileType::Directory) => Some(Kind::Directory),
        Ok(pb::FileType::Symlink) => {
            check_link_target(&path, &message.link_target).map_err(|e| bad(e.to_string()))?;
            Some(Kind::Symlink { target: message.link_target[..].into() })
        }
        Ok(pb::FileType::HardLink) => {
            if message.link_file_id == 0 {
                return Err(bad(format!("hard link {path} names no file")));
            }
            Some(Kind::HardLink { file_id: FileId(message.link_file_id) })
        }
        _ => return Err(bad(format!("{path} has unknown type {}", message.r#type))),
    };
    let attributes = attributes(pb::Attributes {
        mode: message.mode,
        modify_time: message.modify_time,
        uid: message.uid,
        gid: message.gid,
        extended_attributes: message.extended_attributes,
    })
    .map_err(|why| {
        Failure::peer_misbehaved(format!("entry {} of the list: {path} {why}", message.number))
    })?;
    Ok(Entry {
        number: message.number,
        file_id: FileId(message.file_id),
        change,
        path,
        kind,
        attributes,
        growing: message.growing,
    })
}

/// Reads attributes; an error ends a sentence that begins with whose they are.
pub fn attributes(message: pb::Attributes) -> Result<Attributes, String> {
    let modify_time = message.modify_time.unwrap_or_default();
    let nanos = u32::try_from(modify_time.nanos)
        .ok()
        .filter(|&n| n < 1_000_000_000)
        .ok_or_else(|| format!("has {} nanoseconds", modify_time.nanos))?;
    let count = message.extended_attributes.len();
    if count > EXTENDED_ATTRIBUTES_MAX {
        return Err(format!(
            "has {count} extended attributes, at most {EXTENDED_ATTRIBUTES_MAX} are allowed"
        ));
    }
    let mut extended = Vec::with_capacity(count.min(64));
    let mut extended_bytes = 0;
    for attribute in &message.extended_attributes {
        extended_bytes += attribute.name.len() + attribute.value.len();
        if attribute.name.is_empty()
            || attribute.name.len() > NAME_BYTES_MAX
            || attribute.name.contains(&0)
            || extended_bytes > EXTENDED_ATTRIBUTE_BYTES_MAX
        {
            return Err("has a bad or too large extended attribute".to_owned());
        }
        if !extended_attribute_travels(&attribute.name) {
            return Err(format!("carries `{}`, which never travels", clip(&attribute.name)));
        }
        extended.push((attribute.name[..].into(), attribute.value[..].into()));
    }
    Ok(Attributes {
        mode: message.mode & MODE_MASK,
        modify_time: (modify_time.seconds, nanos),
        uid: message.uid,
        gid: message.gid,
        extended,
    })
}

/// Writes attributes.
#[must_use]
pub fn attributes_to_wire(attributes: &Attributes) -> pb::Attributes {
    let (seconds, nanos) = attributes.modify_time;
    pb::Attributes {
        mode: attributes.mode,
        modify_time: Some(prost_types::Timestamp {
            seconds,
            nanos: i32::try_from(nanos).unwrap_or(0),
        }),
        uid: attributes.uid,
        gid: attributes.gid,
        extended_attributes: attributes
            .extended
            .iter()
            .map(|(name, value)| pb::ExtendedAttribute {
                name: Bytes::copy_from_slice(name),
                value: Bytes::copy_from_slice(value),
            })
            .collect(),
    }
}

/// Writes an entry.
#[must_use]
pub fn entry_to_wire(entry: &Entry) -> pb::FileEntry {
    let attributes = attributes_to_wire(&entry.attributes);
    let mut message = pb::FileEntry {
        number: entry.number,
        file_id: entry.file_id.0,
        change: match entry.change {
            Change::Add => pb::EntryChange::Add,
            Change::Replace => pb::EntryChange::Replace,
            Change::Rename => pb::EntryChange::Rename,
            Change::Truncate => pb::EntryChange::Truncate,
            Change::Remove => pb::EntryChange::Remove,
            Change::Patch => pb::EntryChange::Patch,
        }
        .into(),
        path: Bytes::copy_from_slice(entry.path.as_bytes()),
        mode: attributes.mode,
        uid: attributes.uid,
        gid: attributes.gid,
        extended_attributes: attributes.extended_attributes,
        growing: entry.growing,
        ..pb::FileEntry::default()
    };
    let Some(kind) = &entry.kind else {
        return message;
    };
    message.modify_time = attributes.modify_time;
    match kind {
        Kind::Regular { size, allocated } => {
            message.r#type = pb::FileType::Regular.into();
            message.size_bytes = *size;
            message.allocated_bytes = *allocated;
        }
        Kind::Directory => message.r#type = pb::FileType::Directory.into(),
        Kind::Symlink { target } => {
            message.r#type = pb::FileType::Symlink.into();
            message.link_target = Bytes::copy_from_slice(target);
        }
        Kind::HardLink { file_id } => {
            message.r#type = pb::FileType::HardLink.into();
            message.link_file_id = file_id.0;
        }
    }
    message
}

/// Reads counts.
#[must_use]
pub fn totals(message: Option<pb::Totals>) -> Totals {
    let t = message.unwrap_or_default();
    Totals {
        entries: t.entries,
        files: t.files,
        size_bytes: t.size_bytes,
        allocated_bytes: t.allocated_bytes,
        data_bytes: t.size_bytes.min(t.allocated_bytes),
        largest_bytes: t.largest_bytes,
    }
}

/// Writes counts.
#[must_use]
pub fn totals_to_wire(totals: Totals) -> pb::Totals {
    pb::Totals {
        entries: totals.entries,
        files: totals.files,
        size_bytes: totals.size_bytes,
        allocated_bytes: totals.allocated_bytes,
        largest_bytes: totals.largest_bytes,
    }
}

/// Why a symbolic link's target is refused.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Empty, too long, or with a NUL.
    #[error("symbolic link {0} has an empty, too long or NUL-holding target")]
    Malformed(RelativePath),
    /// The target is absolute or climbs out.
    #[error("symbolic link {0} leaves the data directory: `{1}`")]
    LeavesTree(RelativePath, String),
}

/// Checks that a link at `path` with this `target` stays inside the tree by its text alone.
///
/// The text cannot climb above the tree; whether a directory on its way is itself a link makes no
/// difference to a copy, which never follows links.
pub fn check_link_target(path: &RelativePath, target: &[u8]) -> Result<(), LinkError> {
    if target.is_empty() || target.len() > PATH_BYTES_MAX || target.contains(&0) {
        return Err(LinkError::Malformed(path.clone()));
    }
    let leaves = || LinkError::LeavesTree(path.clone(), clip(target));
    if target[0] == b'/' {
        return Err(leaves());
    }
    let mut depth = path.as_bytes().iter().filter(|&&b| b == b'/').count();
    for component in target.split(|&b| b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => depth = depth.checked_sub(1).ok_or_else(leaves)?,
            _ => depth += 1,
        }
    }
    Ok(())
}

/// Whether an extended attribute travels: user attributes and POSIX ACLs do, security and trusted
/// ones never.
#[must_use]
pub fn extended_attribute_travels(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || matches!(name, b"system.posix_acl_access" | b"system.posix_acl_default")
}

fn clip(bytes: &[u8]) -> String {
    bytes[..bytes.len().min(256)].escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regular() -> pb::FileEntry {
        pb::FileEntry {
            number: 3,
            file_id: 4,
            change: pb::EntryChange::Add.into(),
            path: Bytes::from_static(b"db/t.ibd"),
            r#type: pb::FileType::Regular.into(),
            size_bytes: 10,
            allocated_bytes: 4096,
            mode: 0o640,
            modify_time: Some(prost_types::Timestamp { seconds: 5, nanos: 6 }),
            ..Default::default()
        }
    }

    #[test]
    fn an_entry_survives_the_wire() {
        let message = regular();
        assert_eq!(entry_to_wire(&entry(message.clone()).unwrap()), message);
    }

    #[test]
    fn hostile_entries_are_refused() {
        let cases: [(&str, fn(&mut pb::FileEntry)); 11] = [
            ("type of what is gone", |m| m.change = pb::EntryChange::Remove.into()),
            ("countless attributes", |m| {
                let name = Bytes::from_static(b"user.x");
                let one = pb::ExtendedAttribute { name, value: Bytes::new() };
                m.extended_attributes = vec![one; EXTENDED_ATTRIBUTES_MAX + 1];
            }),
            ("climbing path", |m| m.path = Bytes::from_static(b"../etc/passwd")),
            ("absolute path", |m| m.path = Bytes::from_static(b"/etc/passwd")),
            ("no id", |m| m.file_id = 0),
            ("no change", |m| m.change = 0),
            ("unknown type", |m| m.r#type = 99),
            ("huge size", |m| m.size_bytes = 1 << 63),
            ("link out", |m| {
                m.r#type = pb::FileType::Symlink.into();
                m.link_target = Bytes::from_static(b"../../etc");
            }),
            ("bad time", |m| m.modify_time.as_mut().unwrap().nanos = -1),
            ("security attribute", |m| {
                m.extended_attributes.push(pb::ExtendedAttribute {
                    name: Bytes::from_static(b"security.capability"),
                    value: Bytes::new(),
                });
            }),
        ];
        for (name, spoil) in cases {
            let mut message = regular();
            spoil(&mut message);
            let failure = entry(message).expect_err(name);
            assert_eq!(failure.reason, "PEER_MISBEHAVED", "{name}");
        }
    }

    #[test]
    fn setuid_and_setgid_never_travel() {
        let mut message = regular();
        message.mode = 0o7755;
        assert_eq!(entry(message).unwrap().attributes.mode, 0o1755);
    }

    #[test]
    fn links_may_climb_only_within_the_tree() {
        let path = RelativePath::new(b"a/b/link").unwrap();
        for good in [&b"x"[..], b"../x", b"../../x", b"../b/../c", b"./x/"] {
            check_link_target(&path, good).unwrap();
        }
        for bad in [&b""[..], b"/x", b"../../../x", b"x/../../../../y", b"a\0"] {
            check_link_target(&path, bad).unwrap_err();
        }
    }
}
