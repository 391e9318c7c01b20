#!/usr/bin/env python3
"""Plants known differences in a copy of a tree, to prove that compare.py reports them.

    plant.py ORIGINAL COPY (K | all)      plants difference K, or all eight
    plant.py check PLANTED REPORT         0 when the report holds what was planted, and no more

The eight: 1 content (one bit), 2 size, 3 mode, 4 mtime (one nanosecond, of a symlink), 5 name
(a file renamed: one name missing, one extra), 6 a filled hole, 7 a broken hard link, 8 an
extended attribute.

Prints `PLANTED K kind path` for each. Everything else about an entry, its times above all, is put
back, so that only the check that is meant can find the difference.
"""

import argparse
import os
import re
import stat
import sys

from compare import attributes_of, show


class Planter:
    """Changes entries of a copy; each difference gets an entry of its own."""

    def __init__(self, copy):
        self.copy = copy
        self.taken = set()

    def find(self, wanted):
        """The first entry of the copy, in order of names, that serves and is not yet taken."""
        for directory, names, files in os.walk(self.copy):
            names.sort()
            for name in sorted(files):
                path = os.path.join(directory, name)
                entry = os.lstat(path)
                if path not in self.taken and wanted(path, entry):
                    self.taken.add(path)
                    return path, entry
        sys.exit("plant.py: the tree has no entry for this difference")

    def plant(self, number, kind, path):
        print(f"PLANTED {number} {kind} {show(os.path.relpath(path, self.copy))}")

    def content(self, number):
        def filled(path, entry):
            return plain(entry) and entry.st_size > 2 << 20 and full(entry)

        path, entry = self.find(filled)
        with open(path, "r+b") as file:
            file.seek(entry.st_size - 2)
            byte = file.read(1)[0]
            file.seek(entry.st_size - 2)
            file.write(bytes([byte ^ 1]))
        restore_times(path, entry)
        self.plant(number, "content", path)

    def size(self, number):
        path, entry = self.find(lambda path, entry: plain(entry) and 4096 < entry.st_size < 1 << 20)
        os.truncate(path, entry.st_size - 1)
        restore_times(path, entry)
        self.plant(number, "size", path)

    def mode(self, number):
        path, entry = self.find(lambda path, entry: plain(entry) and not has_acl(path))
        os.chmod(path, stat.S_IMODE(entry.st_mode) ^ stat.S_IXOTH)
        self.plant(number, "mode", path)

    def mtime(self, number):
        path, entry = self.find(lambda path, entry: stat.S_ISLNK(entry.st_mode))
        times = (entry.st_atime_ns, entry.st_mtime_ns + 1)
        os.utime(path, ns=times, follow_symlinks=False)
        self.plant(number, "mtime", path)

    def name(self, number):
        path, _ = self.find(lambda path, entry: plain(entry) and b"\xff" in os.path.basename(path))
        directory = os.path.dirname(path)
        entry = os.lstat(directory)
        new = os.path.join(directory, b"~planted")
        os.rename(path, new)
        restore_times(directory, entry)
        self.taken.add(new)
        self.plant(number, "missing", path)
        self.plant(number, "extra", new)

    def holes(self, number):
        def is_sparse(path, entry):
            name = os.path.basename(path)
            return plain(entry) and entry.st_size < 16 << 20 and name in (b"comb", b"hole-first")

        path, entry = self.find(is_sparse)
        fd = os.open(path, os.O_RDWR)
        # A hole with data after it, so that SEEK_DATA finds its end.
        start = os.lseek(fd, 0, os.SEEK_HOLE)
        os.pwrite(fd, bytes(os.lseek(fd, start, os.SEEK_DATA) - start), start)
        os.close(fd)
        restore_times(path, entry)
        self.plant(number, "holes", path)

    def hard_link(self, number):
        def is_second_name(path, entry):
            return (
                stat.S_ISREG(entry.st_mode)
                and entry.st_nlink == 2
                and 0 < entry.st_size < 16 << 20
                and full(entry)
            )

        # The later of two names, so that the group's first name stays as it is.
        first, entry = self.find(is_second_name)
        path, _ = self.find(lambda path, other: other.st_ino == entry.st_ino)
        directory = os.path.dirname(path)
        directory_entry = os.lstat(directory)
        attributes = attributes_of(path)
        with open(path, "rb") as file:
            data = file.read()
        os.unlink(path)
        with open(path, "xb") as file:
            file.write(data)
        os.chown(path, entry.st_uid, entry.st_gid)
        os.chmod(path, stat.S_IMODE(entry.st_mode))
        for name, value in attributes.items():
            os.setxattr(path, name, value)
        restore_times(path, entry)
        restore_times(directory, directory_entry)
        self.plant(number, "hardlink", path)

    def attribute(self, number):
        def has_comment(path, entry):
            return plain(entry) and "user.comment" in attributes_of(path)

        path, _ = self.find(has_comment)
        os.setxattr(path, "user.comment", b"planted")
        self.plant(number, "xattr", path)


def plain(entry):
    return stat.S_ISREG(entry.st_mode) and entry.st_nlink == 1


def full(entry):
    return entry.st_blocks * 512 >= entry.st_size


def has_acl(path):
    return any(name.startswith("system.posix_acl") for name in attributes_of(path))


def restore_times(path, entry):
    os.utime(path, ns=(entry.st_atime_ns, entry.st_mtime_ns))


DIFFERENCES = [
    Planter.content,
    Planter.size,
    Planter.mode,
    Planter.mtime,
    Planter.name,
    Planter.holes,
    Planter.hard_link,
    Planter.attribute,
]


def check(planted_path, report_path):
    """Compares what was planted with what compare.py reported; both ways."""
    with open(planted_path, encoding="utf-8") as planted_lines:
        planted = {tuple(line.rstrip("\n").split(" ", 3)[2:]) for line in planted_lines}
    with open(report_path, encoding="utf-8") as report_lines:
        matches = [re.match(r"DIFF (\w+) (.*?): ", line) for line in report_lines]
    reported = {matched.groups() for matched in matches if matched}
    for kind, path in sorted(planted - reported):
        print(f"not reported: {kind} {path}")
    for kind, path in sorted(reported - planted):
        print(f"reported, not planted: {kind} {path}")
    return planted == reported and len(planted) > 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("original", help="the original tree, or `check`")
    parser.add_argument("copy", help="the copy to change, or what was printed for it")
    parser.add_argument("what", help="1 to 8, or all; with `check` compare.py's output")
    options = parser.parse_args()
    if options.original == "check":
        sys.exit(0 if check(options.copy, options.what) else 1)
    if os.path.samefile(options.original, options.copy):
        sys.exit("plant.py: the copy is the original")
    planter = Planter(os.fsencode(options.copy))
    numbers = range(1, 9) if options.what == "all" else [int(options.what)]
    for number in numbers:
        DIFFERENCES[number - 1](planter, number)


if __name__ == "__main__":
    main()
