#!/usr/bin/env python3
"""Makes a directory tree that holds every kind of entry that the engine `files` copies.

    make_tree.py DIR [--entries N] [--bytes SIZE] [--seed S]

DIR must not exist. The same arguments make the same tree. SIZE takes K, M, G (default 2G) and
counts bytes stored, holes left out; below 512M the files around 64 MiB are sparse. Sockets and a
pid file are made too: they are to be left out by a clone. As root, owners differ and one file
has mode 0000. A tree that lacks a kind because the file system or a tool lacks it is an error.
"""

import argparse
import os
import random
import shutil
import socket
import subprocess
import sys

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SUFFIXES = {"K": KIB, "M": MIB, "G": GIB}
POOL_BYTES = 8 * MIB
STAMP_EVERY = 64 * KIB
SECOND_NS = 1_000_000_000

# Times whose seconds, nanoseconds or signs have been got wrong by copiers before.
MODIFY_TIMES_NS = [
    0,
    1,
    -1,
    -SECOND_NS,
    -1_500_000_000,
    -2_000_000_000 * SECOND_NS + 123_456_789,  # 1906
    (2**31 - 1) * SECOND_NS + 999_999_999,
    2**31 * SECOND_NS + 1,
    13_000_000_000 * SECOND_NS + 987_654_321,  # 2381
    1_700_000_000 * SECOND_NS + 1,
    1_700_000_000 * SECOND_NS + 999_999_999,
]
MODES = [0o400, 0o440, 0o444, 0o600, 0o640, 0o644, 0o666, 0o700, 0o755, 0o777]
OWNERS = [(0, 0), (1, 1), (1000, 1000), (65534, 65534), (4_000_000_000, 7)]


def size_of(text):
    return int(text[:-1]) * SUFFIXES[text[-1]] if text[-1] in SUFFIXES else int(text)


class Tree:
    def __init__(self, root, entries, total_bytes, seed):
        self.root = os.fsencode(root)
        self.entries_wanted = entries
        self.bytes_wanted = total_bytes
        self.random = random.Random(seed)
        half = self.random.randbytes(POOL_BYTES // 2)
        # Half noise, half text: compression has something to do and something to give up on.
        text = b"INSERT INTO orders VALUES (1, 'sapling', 4.25);\n"
        self.pool = half + text * (POOL_BYTES // 2 // len(text))
        self.entries = 0
        self.bytes = 0
        self.files = 0
        self.is_root = os.geteuid() == 0

    def path(self, name):
        return os.path.join(self.root, name)

    def directory(self, name, mode=0o750):
        os.mkdir(self.path(name))
        os.chmod(self.path(name), mode)
        self.entries += 1
        return name

    def data(self, offset, length):
        """Bytes that differ from file to file and from place to place."""
        start = (self.files * 7919 + offset * 31) % (len(self.pool) - MIB)
        piece = bytearray(self.pool[start : start + length])
        for at in range(0, len(piece), STAMP_EVERY):
            stamp = b"%08x%012x" % (self.files, offset + at)
            width = min(len(stamp), len(piece) - at)
            piece[at : at + width] = stamp[:width]
        return piece

    def write(self, fd, offset, length):
        end = offset + length
        while offset < end:
            piece = self.data(offset, min(MIB, end - offset))
            offset += os.pwrite(fd, piece, offset)
        self.bytes += length

    def file(self, name, size, mode=None, islands=None):
        """A file; `islands` are the (offset, length) of its data, the rest of it is holes."""
        fd = os.open(self.path(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        for offset, length in [(0, size)] if islands is None else islands:
            self.write(fd, offset, length)
        os.ftruncate(fd, size)
        if self.is_root and self.files % 3 == 0:
            os.fchown(fd, *OWNERS[self.files // 3 % len(OWNERS)])
        # After fchown, which clears the setuid and setgid bits.
        os.fchmod(fd, MODES[self.files % len(MODES)] if mode is None else mode)
        os.close(fd)
        self.entries += 1
        self.files += 1
        return name

    def symlink(self, name, target):
        os.symlink(target, self.path(name))
        if self.is_root:
            os.chown(self.path(name), 1000, 1000, follow_symlinks=False)
        self.entries += 1

    def link(self, name, existing):
        os.link(self.path(existing), self.path(name))
        self.entries += 1

    def make(self):
        os.mkdir(self.root)
        os.chmod(self.root, 0o750)
        self.sizes()
        self.sparse()
        self.names()
        self.modes()
        self.links()
        self.attributes()
        self.left_out()
        self.small_files()
        self.large_files()
        self.times()

    def sizes(self):
        d = self.directory(b"sizes") + b"/"
        small = [0, 1, 2, 511, 512, 513, 4095, 4096, 4097]
        around = [64 * KIB, 128 * KIB, MIB, 2 * MIB, 4 * MIB]
        for size in small + [at + delta for at in around for delta in (-1, 0, 1)]:
            self.file(d + b"%d" % size, size)
        stored = self.bytes_wanted >= 512 * MIB
        for size in (64 * MIB - 1, 64 * MIB, 64 * MIB + 1):
            islands = None if stored else [(0, 1), (32 * MIB, MIB), (size - 1, 1)]
            self.file(d + b"%d" % size, size, islands=islands)

    def sparse(self):
        d = self.directory(b"sparse") + b"/"
        self.file(d + b"only-hole", 3 * MIB, islands=[])
        self.file(d + b"hole-first", 3 * MIB, islands=[(2 * MIB, MIB)])
        self.file(d + b"hole-last", 3 * MIB, islands=[(0, MIB)])
        self.file(d + b"hole-last-unaligned", 3 * MIB + 17, islands=[(0, MIB)])
        self.file(d + b"hole-across-chunks", 5 * MIB, islands=[(0, 4096), (3 * MIB + 4096, 8192)])
        comb = [(at, 4096) for at in range(0, 4 * MIB, 16 * KIB)]
        self.file(d + b"comb", 4 * MIB, islands=comb)
        far = [(0, 4096), (2 * GIB - 4096, 8192), (4 * GIB - 4096, 8192), (5 * GIB, MIB)]
        self.file(d + b"over-4-gib", 5 * GIB + 2 * MIB, islands=far)

    def names(self):
        d = self.directory(b"names") + b"/"
        odd = [
            b" ", b" leading", b"trailing ", b"two  spaces", b"new\nline", b"\n", b"tab\t", b"\r",
            b"-rf", b"--", b"-", b"...", b"..a", b".hidden", b"~", b"*", b"?", b"[a]", b"$HOME",
            b"`id`", b"'", b'"', b"\\", b"\\n", b"a:b", b"a;b", b"a|b", b"%s%n", b"#", b"\x01",
            b"\x7f", b"\xff\xfe", b"latin-\xe9", b"\xc3\xa9", b"e\xcc\x81", b"\xf0\x9f\x8c\xb1",
            b"\xed\xa0\x80", b"Case", b"case", b"CON", b"x" * 255, b"\xff" * 255, b"a", b"a-", b"a0",
        ]  # fmt: skip
        for name in odd:
            self.file(d + name, self.random.randrange(0, 300))
        # `b-` comes before `b/` byte by byte, and after it component by component.
        for name in (b"b", b"b-", b"b.d", b"b0", b"\xff\xff", b"new\nline.d"):
            self.file(self.directory(d + name) + b"/inside", 10)
        self.directory(d + b"empty-directory")
        deep = d + b"deep"
        self.directory(deep)
        while len(deep) < 3000:
            deep = self.directory(deep + b"/" + b"d" * self.random.randrange(1, 60))
        self.file(deep + b"/bottom", 100)

    def modes(self):
        d = self.directory(b"modes") + b"/"
        for mode in MODES + [0o1644, 0o4755, 0o2755, 0o6755] + ([0o000] if self.is_root else []):
            self.file(d + b"file-%04o" % mode, 20, mode)
        for mode in (0o500, 0o700, 0o755, 0o777, 0o1777, 0o2775):
            inside = self.directory(d + b"directory-%04o" % mode, 0o700) + b"/inside"
            self.file(inside, 20)
            os.chmod(self.path(d + b"directory-%04o" % mode), mode)

    def links(self):
        d = self.directory(b"links") + b"/"
        self.directory(d + b"other")
        self.file(d + b"three", 70_000)
        self.link(d + b"other/three", d + b"three")
        self.link(b"a-name-that-sorts-first", d + b"three")
        self.file(d + b"empty", 0)
        self.link(d + b"empty-again", d + b"empty")
        self.link(d + b"sparse", b"sparse/hole-first")
        self.link(d + b"large", b"sizes/%d" % (4 * MIB + 1))
        self.symlink(d + b"to-file", b"three")
        self.symlink(d + b"to-directory", b"other")
        self.symlink(d + b"up-and-down", b"../sizes/4096")
        self.symlink(d + b"to-itself", b".")
        self.symlink(d + b"dangling", b"not/here")
        self.symlink(d + b"odd-target", b"new\nline \xff")
        self.symlink(d + b"long-target", b"other/" * 600 + b"three")

    def attributes(self):
        d = self.directory(b"attributes") + b"/"
        file, directory = self.file(d + b"file", 100, 0o640), self.directory(d + b"directory")
        for name in (file, directory):
            path = self.path(name)
            os.setxattr(path, b"user.comment", b"rooted while attached")
            os.setxattr(path, b"user.empty", b"")
            os.setxattr(path, b"user.binary", bytes(range(256)))
            os.setxattr(path, b"user.odd name \xff=", b"\x00")
        os.setxattr(self.path(self.file(d + b"large-value", 1)), b"user.large", b"v" * 3000)
        setfacl = shutil.which("setfacl")
        if not setfacl:
            sys.exit("make_tree.py: setfacl is missing; install Debian's package acl")
        acl = "u:65534:rw-,g:1:r--,m::rwx"
        subprocess.run([setfacl, "-m", acl, self.path(file)], check=True)
        subprocess.run([setfacl, "-m", acl, "-m", "d:u:1:rwx", self.path(directory)], check=True)
        self.file(directory + b"/inherits", 10, 0o660)

    def left_out(self):
        for name in (b"server.sock", b"links/other.sock"):
            with socket.socket(socket.AF_UNIX) as listener:
                directory = os.open(os.path.dirname(self.path(name)), os.O_RDONLY)
                listener.bind(b"/proc/self/fd/%d/" % directory + os.path.basename(name))
                os.close(directory)
        with open(self.path(b"server.pid"), "wb") as pid_file:
            pid_file.write(b"12345\n")

    def small_files(self):
        many = self.directory(b"many")
        self.directory(many + b"/flat")
        number = 0
        while self.entries < self.entries_wanted:
            if number % 2:
                directory = many + b"/flat"
            else:
                directory = many + b"/%02d" % (number // 2 % 37)
                if not os.path.isdir(self.path(directory)):
                    self.directory(directory)
            size = min(self.random.randrange(1, 64 * KIB), self.random.randrange(1, 64 * KIB))
            self.file(directory + b"/%05d.ibd" % number, size)
            number += 1

    def large_files(self):
        d = self.directory(b"large") + b"/"
        number = 0
        while self.bytes < self.bytes_wanted:
            size = min(256 * MIB + 12_345, self.bytes_wanted - self.bytes)
            self.file(d + b"ibdata%d" % number, size)
            number += 1

    def times(self):
        """Sets all times, last of all: making an entry changes its directory's time."""
        number = 0
        for _, names, files, fd in os.fwalk(self.root):
            names.sort()
            for name in sorted(files + names):
                self.set_time(name, fd, number)
                number += 1
        os.utime(self.root, ns=(0, MODIFY_TIMES_NS[4]))

    def set_time(self, name, directory, number):
        if number % 4 == 0:
            time_ns = MODIFY_TIMES_NS[number // 4 % len(MODIFY_TIMES_NS)]
        else:
            time_ns = 1_600_000_000 * SECOND_NS + self.random.randrange(10**17)
        os.utime(name, ns=(0, time_ns), dir_fd=directory, follow_symlinks=False)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory")
    parser.add_argument("--entries", type=int, default=2500)
    parser.add_argument("--bytes", type=size_of, default=2 * GIB)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    os.umask(0o022)
    tree = Tree(options.directory, options.entries, options.bytes, options.seed)
    tree.make()
    print(f"{tree.entries} entries, {tree.bytes} bytes stored, in {options.directory}")


if __name__ == "__main__":
    main()
