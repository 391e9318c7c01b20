#!/usr/bin/env python3
"""Compares a copy of a directory tree with its original. Shares no code with Marcot.

    compare.py [options] ORIGINAL COPY

Prints `DIFF kind path: original / copy` for each difference, then `identical` (exit 0) or
`differ N` (exit 1); exit 2 when the comparison itself could not be made.

The rules, by kind:

  missing, extra   a name on one side only; a directory stands for all that is in it; the clone's
                   certificate in the copy's root is none
  type             regular file, directory, symlink, socket, fifo, device
  mode             the copy's bits are the original's without setuid and setgid
  owner            see --owner
  mtime            to the nanosecond, of files, directories and symlinks, the root included
  size             of regular files
  holes            every hole of the original that covers at least one whole block (the larger of
                   the two file systems' block sizes) is a hole in the copy, and the other way
                   round. Parts of blocks at a hole's edges are left out, because a file system
                   cannot keep them. SEEK_HOLE also reports space that is allocated but unwritten,
                   so the copy may moreover not occupy more than 1 MiB + 1 % above the original.
  hardlink         names of one inode in the original are names of one inode in the copy
  shared           an entry of the copy is the original's own inode
  target           of a symlink, byte for byte
  xattr            all names and values, POSIX ACLs among them; security.* is never copied, and
                   the copy holds none but what its own host sets (selinux, ima, evm, apparmor)
  content          every byte that is allocated on either side

Both trees are walked in the same order of names. Memory holds the names of the directories on the
way from the root, and one entry for each inode that has several names.
"""

import argparse
import errno
import os
import resource
import stat
import sys

PIECE_BYTES = 1 << 20
CERTIFICATE = b".marcot-certificate"
OCCUPIED_SLACK_BYTES = 1 << 20
HOST_LABELS = ("security.selinux", "security.ima", "security.evm", "security.apparmor")
TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFSOCK: "socket",
    stat.S_IFIFO: "fifo",
    stat.S_IFBLK: "block device",
    stat.S_IFCHR: "character device",
}


def show(path):
    """A path on one line: control characters and bytes that are not UTF-8 are escaped."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def type_name(entry):
    return TYPES[stat.S_IFMT(entry.st_mode)]


def seek(fd, offset, whence, size):
    """lseek for data or holes; the file's size where there is no more data."""
    try:
        return min(os.lseek(fd, offset, whence), size)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        raise


class Comparison:
    def __init__(self, options):
        self.options = options
        self.differences = 0
        self.entries = 0
        self.block_bytes = 4096
        self.left_leaders = {}
        self.right_leaders = {}

    def report(self, kind, path, left, right):
        self.differences += 1
        print(f"DIFF {kind} {show(path)}: {left} / {right}")

    def trees(self, left_root, right_root):
        """Walks both trees at once. An explicit stack: a path may have 2,000 components."""
        left, right = open_root(left_root), open_root(right_root)
        self.block_bytes = max(block_bytes(left), block_bytes(right))
        self.owner = self.expected_owner(right_root)
        self.entry(b".", os.fstat(left), os.fstat(right))
        self.attributes(b".", f"/proc/self/fd/{left}/.", f"/proc/self/fd/{right}/.")
        stack = [(left, right, b"", self.children(left, right, b""))]
        while stack:
            left, right, prefix, children = stack[-1]
            name = next(children, None)
            if name is None:
                os.close(left)
                os.close(right)
                stack.pop()
                continue
            below = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            left, right = (os.open(name, below, dir_fd=fd) for fd in (left, right))
            prefix += name + b"/"
            stack.append((left, right, prefix, self.children(left, right, prefix)))

    def expected_owner(self, right_root):
        owner = self.options.owner
        if owner == "parent":
            parent = os.stat(os.path.join(right_root, b".."))
            return parent.st_uid, parent.st_gid
        if owner in ("numeric", "any"):
            return None
        uid, gid = owner.split(":")
        return int(uid), int(gid)

    def children(self, left, right, prefix):
        """Compares the names of two directories; yields those that are directories in both."""
        left_names = iter(sorted(list_names(left)))
        right_names = iter(sorted(list_names(right)))
        left_name, right_name = next(left_names, None), next(right_names, None)
        while left_name is not None or right_name is not None:
            if right_name is None or (left_name is not None and left_name < right_name):
                self.only_left(prefix + left_name, os.lstat(left_name, dir_fd=left))
                left_name = next(left_names, None)
            elif left_name is None or right_name < left_name:
                entry = os.lstat(right_name, dir_fd=right)
                if prefix + right_name != CERTIFICATE:
                    self.report("extra", prefix + right_name, "-", type_name(entry))
                right_name = next(right_names, None)
            else:
                if self.pair(left, right, left_name, prefix + left_name):
                    yield left_name
                left_name, right_name = next(left_names, None), next(right_names, None)

    def left_out(self, path, entry):
        if not self.options.left_out:
            return False
        is_pid_file = stat.S_ISREG(entry.st_mode) and path.endswith(b".pid")
        return stat.S_ISSOCK(entry.st_mode) or is_pid_file

    def only_left(self, path, entry):
        if not self.left_out(path, entry):
            self.report("missing", path, type_name(entry), "-")

    def pair(self, left_dir, right_dir, name, path):
        """Compares one name; true when it is a directory on both sides."""
        left = os.lstat(name, dir_fd=left_dir)
        right = os.lstat(name, dir_fd=right_dir)
        if self.left_out(path, left):
            self.report("extra", path, f"{type_name(left)}, to be left out", type_name(right))
            return False
        if not self.entry(path, left, right):
            return False
        self.attributes(path, proc_path(left_dir, name), proc_path(right_dir, name))
        if stat.S_ISLNK(left.st_mode):
            targets = [os.readlink(name, dir_fd=fd) for fd in (left_dir, right_dir)]
            if targets[0] != targets[1]:
                self.report("target", path, show(targets[0]), show(targets[1]))
        if stat.S_ISREG(left.st_mode):
            self.links(path, left, right)
            self.file(path, left_dir, right_dir, name, left, right)
        return stat.S_ISDIR(left.st_mode)

    def entry(self, path, left, right):
        """Compares what lstat tells; true when the types agree."""
        self.entries += 1
        if stat.S_IFMT(left.st_mode) != stat.S_IFMT(right.st_mode):
            self.report("type", path, type_name(left), type_name(right))
            return False
        if (left.st_dev, left.st_ino) == (right.st_dev, right.st_ino):
            self.report("shared", path, f"inode {left.st_ino}", f"inode {right.st_ino}")
        expected = stat.S_IMODE(left.st_mode) & 0o1777
        if stat.S_IMODE(right.st_mode) != expected:
            self.report("mode", path, f"{expected:04o}", f"{stat.S_IMODE(right.st_mode):04o}")
        owner = self.owner or (left.st_uid, left.st_gid)
        if self.options.owner != "any" and (right.st_uid, right.st_gid) != owner:
            self.report("owner", path, f"{owner[0]}:{owner[1]}", f"{right.st_uid}:{right.st_gid}")
        if left.st_mtime_ns != right.st_mtime_ns:
            self.report("mtime", path, left.st_mtime_ns, right.st_mtime_ns)
        return True

    def attributes(self, path, left_path, right_path):
        left, right = attributes_of(left_path), attributes_of(right_path)
        for name in sorted(left.keys() | right.keys()):
            if name in HOST_LABELS:
                continue
            value = None if name.startswith("security.") else left.get(name)
            if value != right.get(name):
                self.report("xattr", path, f"{name}={value!r}", f"{name}={right.get(name)!r}")

    def links(self, path, left, right):
        leaders = []
        for entry, known in ((left, self.left_leaders), (right, self.right_leaders)):
            several = entry.st_nlink > 1
            leaders.append(known.setdefault((entry.st_dev, entry.st_ino), path) if several else path)
        if leaders[0] != leaders[1]:
            self.report("hardlink", path, f"of {show(leaders[0])}", f"of {show(leaders[1])}")

    def file(self, path, left_dir, right_dir, name, left, right):
        if left.st_size != right.st_size:
            self.report("size", path, left.st_size, right.st_size)
        size = min(left.st_size, right.st_size)
        if size == 0:
            return
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        left_fd = os.open(name, flags, dir_fd=left_dir)
        right_fd = os.open(name, flags, dir_fd=right_dir)
        try:
            self.holes(path, left_fd, right_fd, left, right, size)
            self.content(path, left_fd, right_fd, size)
        finally:
            os.close(left_fd)
            os.close(right_fd)

    def holes(self, path, left_fd, right_fd, left, right, size):
        lost = self.first_lost_hole(left_fd, right_fd, size)
        if lost:
            self.report("holes", path, f"hole {lost[0]}..{lost[1]}", f"data from {lost[2]}")
        gained = self.first_lost_hole(right_fd, left_fd, size)
        if gained and not self.options.allow_new_holes:
            self.report("holes", path, f"data from {gained[2]}", f"hole {gained[0]}..{gained[1]}")
        left_bytes, right_bytes = left.st_blocks * 512, right.st_blocks * 512
        if not lost and right_bytes > left_bytes * 1.01 + OCCUPIED_SLACK_BYTES:
            self.report("holes", path, f"occupies {left_bytes}", f"occupies {right_bytes}")

    def first_lost_hole(self, fd, other_fd, size):
        """The first whole-block hole of one file in which the other has data."""
        block = self.block_bytes
        position = 0
        while position < size:
            start = seek(fd, position, os.SEEK_HOLE, size)
            end = seek(fd, start, os.SEEK_DATA, size)
            inner_start = -(-start // block) * block
            inner_end = end if end == size else end // block * block
            # A last block that is cut by the end of the file counts as whole.
            if inner_start < inner_end:
                data = seek(other_fd, inner_start, os.SEEK_DATA, size)
                if data < inner_end:
                    return start, end, data
            position = max(end, position + 1)
        return None

    def content(self, path, left_fd, right_fd, size):
        position = 0
        while True:
            starts = [seek(fd, position, os.SEEK_DATA, size) for fd in (left_fd, right_fd)]
            position = min(starts)
            if position >= size:
                return
            ends = [
                seek(fd, position, os.SEEK_HOLE, size)
                for fd, start in zip((left_fd, right_fd), starts)
                if start == position
            ]
            end = max(ends)
            while position < end:
                length = min(PIECE_BYTES, end - position)
                left = read_exactly(left_fd, length, position)
                right = read_exactly(right_fd, length, position)
                if left != right:
                    at = next(i for i, (a, b) in enumerate(zip(left, right)) if a != b)
                    where = f"at byte {position + at}"
                    self.report("content", path, f"{left[at]:#04x} {where}", f"{right[at]:#04x}")
                    return
                position += length


def open_root(path):
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def block_bytes(fd):
    information = os.fstatvfs(fd)
    return max(information.f_bsize, information.f_frsize, 512)


def proc_path(directory, name):
    """A short path to a name in an open directory: the full path may be too long for the kernel."""
    return os.fsencode(f"/proc/self/fd/{directory}/") + name


def list_names(directory):
    return os.listdir(os.fsencode(f"/proc/self/fd/{directory}"))


def attributes_of(path):
    try:
        names = os.listxattr(path, follow_symlinks=False)
        return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise


def read_exactly(fd, length, offset):
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise OSError(errno.EIO, f"file became shorter while it was compared, at {offset}")
        data += more
    return data


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("original", type=os.fsencode)
    parser.add_argument("copy", type=os.fsencode)
    parser.add_argument(
        "--owner",
        default="parent",
        help="parent (default): all of the copy belongs to the owner and group of the directory "
        "that it stands in; numeric: as the original; UID:GID; any",
    )
    parser.add_argument(
        "--left-out",
        action="store_true",
        help="sockets and *.pid files of the original must be absent from the copy",
    )
    parser.add_argument(
        "--allow-new-holes",
        action="store_true",
        help="zeros that are stored in the original may be holes in the copy",
    )
    options = parser.parse_args()
    # Two descriptors for each directory on the way down.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    comparison = Comparison(options)
    try:
        comparison.trees(options.original, options.copy)
    except OSError as error:
        print(f"compare.py: cannot compare: {error}", file=sys.stderr)
        return 2
    if comparison.differences:
        print(f"differ {comparison.differences}")
        return 1
    print(f"{comparison.entries} entries", file=sys.stderr)
    print("identical")
    return 0


if __name__ == "__main__":
    sys.exit(main())
