#!/usr/bin/env python3
"""Measures Marcot beside its peers and against its targets. `make bench` runs it.

    bench_targets.py [NAME...] --bin DIR --work DIR --tls DIR [--json FILE]

NAME (default: all)
  memory-to-memory   BENCH_BYTES (4G) in four files, from tmpfs to tmpfs: Marcot plain and over TLS,
                     raw TCP (sendfile, recv, pwrite; one stream, and as many as Marcot has)
  durable            the same on the disk's file system: Marcot plain and over TLS, rsync -W --fsync,
                     cp and sync, a sequential write past the page cache (dd oflag=direct, fsync)
  small-files        SMALL_FILES (20000) files of 4 to 64 KiB: Marcot plain, rsync -a --fsync, cp -a
  local              CLONE LOCAL beside cp; reflinks on XFS and btrfs (images, mounted: needs root)
  live               a live MariaDB, until the first answered query: see bench_mariadb.py
  memory             peak memory: see bench.py

Each command is timed whole, process start included. ROUNDS (3) rounds, each begins with another
contender. The source is in memory. What is durable is durable at the end of the time: Marcot's own
sync, rsync --fsync, cp and sync -f. tmpfs has nothing to sync, for anybody. Each copy of each round
is compared with its source. CPU is user and system time of both sides, children too.

Marcot runs with its defaults: what holds only with flags does not hold. A target is a ratio of
medians of one run. The last line is `targets K/N`; the exit code is 1 when one is missed.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile

import bench
import bench_raw
from bench import GIB, KIB, MIB, Pair, RsyncDaemon, column, measure, run, same, size_of

STREAMS = min(os.cpu_count(), 8)


class Report:
    """What was measured, and which targets that meets."""

    def __init__(self):
        self.results, self.targets = [], []

    def target(self, name, value, goal, meets, digits=2):
        """A value beside its goal: `meets` is `>=` or `<=`."""
        met = value >= goal if meets == ">=" else value <= goal
        word = "met" if met else "missed"
        print(f"target {name} {value:.{digits}f} goal {meets}{goal:g} {word}", flush=True)
        self.targets.append({"name": name, "value": value, "goal": goal, "met": met})

    def table(self, title, contenders, results, peer):
        self.results += [result | {"bench": title} for result in results]
        print(f"\n{title}; median (least to most)")
        print(f"{'':16}{'MiB/s':>26}{'CPU-s/GiB':>22}{'peak MiB':>26}  of {peer}")
        beside = middle(results, peer, "mib_per_second")
        for name in contenders:
            rate = column(results, name, "mib_per_second")
            cpu = column(results, name, "cpu_seconds_per_gib")
            peaks = [result["peak_bytes"] for result in results if result["name"] == name]
            peak = " ".join(
                f"{part} {max(one[part] for one in peaks) / MIB:.0f}" for part in sorted(peaks[0])
            )
            print(f"{name:16}{spread(rate, 0):>26}{spread(cpu, 2):>22}{peak:>26}", end="")
            print(f"{statistics.median(rate) / beside:>10.2f}", flush=True)


def middle(results, name, key):
    return statistics.median(column(results, name, key))


def spread(values, digits):
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def take_turns(contenders, rounds, copy, size, is_same):
    """Runs all contenders in each round, and compares what they made."""
    results = []
    for number in range(rounds):
        turn = number % len(contenders)
        for name, command, then, daemons in contenders[turn:] + contenders[:turn]:
            bench.prepare(copy)
            result = measure(name, command, then, daemons, size) | {"round": number + 1}
            if not is_same(name):
                sys.exit(f"bench: {name} made a copy that differs")
            print(json.dumps(result), file=sys.stderr, flush=True)
            results.append(result)
    shutil.rmtree(copy, ignore_errors=True)
    return results


@contextlib.contextmanager
def place(options, name, parent):
    """Options with a work directory of their own below `parent`."""
    work = pathlib.Path(tempfile.mkdtemp(prefix=f"marcot-bench-{name}-", dir=parent))
    try:
        (work / "state").mkdir()
        (work / "copies").mkdir()
        yield argparse.Namespace(**vars(options) | {"work": work})
    finally:
        shutil.rmtree(work, ignore_errors=True)


def memory_to_memory(options, report):
    size = size_of(os.environ.get("BENCH_BYTES", "4G"))
    with place(options, "memory", "/dev/shm") as here:
        source, copy = here.work / "source", here.work / "copies/copy"
        bench.make_files(source, size)
        pair = Pair(here, source)
        try:
            both = [pair.donor, pair.recipient]
            contenders = [
                ("plain", pair.command(copy, "NO SSL"), None, both),
                ("TLS", pair.command(copy, "SSL"), None, both),
            ]
            for count in sorted({1, STREAMS}):
                command = bench_raw.command(source, copy, count)
                contenders.append((f"raw {count}", command, None, []))
            results = take_turns(
                contenders, options.rounds, copy, size, lambda _: same(source, copy)
            )
        finally:
            pair.stop()
    raw = max(
        (name for name, *_ in contenders if name.startswith("raw")),
        key=lambda name: middle(results, name, "mib_per_second"),
    )
    names = [name for name, *_ in contenders]
    report.table(f"memory to memory, {size / GIB:g} GiB", names, results, raw)
    rate = {name: middle(results, name, "mib_per_second") for name in names}
    cpu = {name: middle(results, name, "cpu_seconds_per_gib") for name in names}
    report.target("plain-of-raw", rate["plain"] / rate[raw], 0.85, ">=")
    report.target("plain-cpu-of-raw", cpu["plain"] / cpu[raw], 1.2, "<=")
    report.target("tls-of-raw", rate["TLS"] / rate[raw], 0.60, ">=")
    report.target("tls-of-plain", rate["TLS"] / rate["plain"], 0.72, ">=")
    report.target("tls-cpu-per-gib", cpu["TLS"], 1.5, "<=")


def durable(options, report):
    size = size_of(os.environ.get("BENCH_BYTES", "4G"))
    with place(options, "durable", options.work) as here:
        source, copies = here.work / "source", here.work / "copies"
        copy = copies / "copy"
        bench.make_files(source, size)
        pair = Pair(here, source)
        try:
            rsync = RsyncDaemon(here, source)
            pair.daemons.append(rsync.daemon)
            both = [pair.donor, pair.recipient]
            direct = (
                f"mkdir '{copy}' && for f in '{source}'/*; do "
                f"dd if=$f of='{copy}'/${{f##*/}} bs=1M oflag=direct conv=fsync status=none; done"
            )
            contenders = [
                ("plain", pair.command(copy, "NO SSL"), None, both),
                ("TLS", pair.command(copy, "SSL"), None, both),
                ("rsync", rsync.command(copy), None, [rsync.daemon]),
                ("cp", ["cp", "-a", "--reflink=never", source, copy], ["sync", "-f", copies], []),
                ("direct write", ["sh", "-ec", direct], None, []),
            ]
            same(source, source)  # brings the source into memory
            results = take_turns(
                contenders, options.rounds, copy, size, lambda _: same(source, copy)
            )
        finally:
            pair.stop()
    names = [name for name, *_ in contenders]
    report.table(f"durable on the disk, {size / GIB:g} GiB", names, results, "rsync")
    rate = {name: middle(results, name, "mib_per_second") for name in names}
    goal = min(1.5 * rate["rsync"], 0.9 * rate["direct write"])
    report.target("durable-of-goal", rate["plain"] / goal, 1.0, ">=")


def make_small_files(directory, count):
    generator = random.Random(3)
    noise = generator.randbytes(MIB)
    total = 0
    for number in range(count):
        parent = directory / f"schema{number // 500:03}"
        if number % 500 == 0:
            parent.mkdir(parents=True)
        size = generator.randrange(4 * KIB, 64 * KIB + 1)
        start = generator.randrange(len(noise) - size)
        (parent / f"t{number:06}.ibd").write_bytes(noise[start : start + size])
        total += size
    return total


def small_files(options, report):
    count = int(os.environ.get("SMALL_FILES", "20000"))
    with place(options, "small", options.work) as here:
        source, copies = here.work / "source", here.work / "copies"
        copy = copies / "copy"
        size = make_small_files(source, count)
        pair = Pair(here, source)
        try:
            rsync = RsyncDaemon(here, source)
            pair.daemons.append(rsync.daemon)
            both = [pair.donor, pair.recipient]
            contenders = [
                ("plain", pair.command(copy, "NO SSL"), None, both),
                ("rsync", rsync.command(copy), None, [rsync.daemon]),
                ("cp", ["cp", "-a", "--reflink=never", source, copy], ["sync", "-f", copies], []),
            ]
            compare = [sys.executable, bench.TOOLS / "compare.py", "--left-out", source, copy]
            silent = {"stdout": subprocess.DEVNULL, "stderr": sys.stderr}
            is_same = lambda _: subprocess.run(compare, **silent).returncode == 0
            results = take_turns(contenders, options.rounds, copy, size, is_same)
        finally:
            pair.stop()
    names = [name for name, *_ in contenders]
    report.table(f"{count} small files, {size / GIB:.2f} GiB, durable", names, results, "rsync")
    rate = {name: middle(results, name, "mib_per_second") for name in names}
    report.target("small-files-of-rsync", rate["plain"] / rate["rsync"], 3.0, ">=")


def local_command(pair, copy):
    statement = f"CLONE LOCAL DATA DIRECTORY = '{copy}'"
    return [pair.marcot, "--recipient", pair.recipient_address, "sql", statement]


def local(options, report):
    size = size_of(os.environ.get("BENCH_BYTES", "4G"))
    with place(options, "local", options.work) as here:
        source, copies = here.work / "source", here.work / "copies"
        copy = copies / "copy"
        bench.make_files(source, size)
        pair = Pair(here, source, recipient=["--data-directory", source])
        try:
            contenders = [
                ("local", local_command(pair, copy), None, [pair.recipient]),
                ("cp", ["cp", "-a", "--reflink=never", source, copy], ["sync", "-f", copies], []),
            ]
            same(source, source)
            results = take_turns(
                contenders, options.rounds, copy, size, lambda _: same(source, copy)
            )
        finally:
            pair.stop()
    report.table(f"CLONE LOCAL, {size / GIB:g} GiB", ["local", "cp"], results, "cp")
    rates = [middle(results, name, "mib_per_second") for name in ("local", "cp")]
    report.target("local-of-cp", rates[0] / rates[1], 0.95, ">=")
    for kind in ("xfs", "btrfs"):
        reflink(options, report, kind, size)


def reflink(options, report, kind, size):
    if os.geteuid() != 0:
        sys.exit("bench: local mounts images of file systems; run it as root, or name other benches")
    if shutil.which(f"mkfs.{kind}", path=os.environ["PATH"]) is None:
        package = {"xfs": "xfsprogs", "btrfs": "btrfs-progs"}[kind]
        sys.exit(f"bench: mkfs.{kind} is missing; as root: apt-get install {package}")
    image, mount = options.work / f"{kind}.image", options.work / kind
    mount.mkdir()
    with open(image, "wb") as file:
        file.truncate(2 * size + 2 * GIB)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    try:
        with place(options, kind, mount) as here:
            source, copy = here.work / "source", here.work / "copies/copy"
            bench.make_files(source, size)
            os.sync()
            pair = Pair(here, source, recipient=["--data-directory", source])
            seconds = []
            try:
                for _ in range(options.rounds):
                    bench.prepare(copy)
                    seconds.append(run(local_command(pair, copy))[0])
                    if not same(source, copy):
                        sys.exit(f"bench: the reflinked copy on {kind} differs")
            finally:
                pair.stop()
    finally:
        subprocess.run(["umount", mount], check=True)
        image.unlink()
    print(f"\nCLONE LOCAL by reflink on {kind}, {size / GIB:g} GiB: {spread(seconds, 2)} s")
    report.target(f"reflink-{kind}-seconds", statistics.median(seconds), 1.0, "<=")


def live(options, report):
    import bench_mariadb

    with place(options, "live", options.work) as here:
        contenders, results = bench_mariadb.compare(here, options.rounds)
    bench_mariadb.print_table(contenders, results, options.rounds)
    report.results += [result | {"bench": "live"} for result in results]
    backup = middle(results, "mariadb-backup", "seconds")
    for name in ("plain", "TLS"):
        value = backup / middle(results, f"marcot {name}", "seconds")
        report.target(f"live-{name.lower()}-of-mariadb-backup", value, 2.0, ">=")


def memory(options, report):
    with place(options, "peak", options.work) as here:
        peaks, seconds, files = bench.measure_memory(here)
    print(f"\n1 TiB sparse file and {files} small files in {seconds:.1f} s, over TLS")
    for name, peak, bound in peaks:
        report.target(f"{name}-peak-mib", peak / MIB, bound / MIB, "<=", digits=1)


BENCHES = {
    "memory-to-memory": memory_to_memory,
    "durable": durable,
    "small-files": small_files,
    "local": local,
    "live": live,
    "memory": memory,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", nargs="*", default=list(BENCHES))
    for name in ("--bin", "--work", "--tls"):
        parser.add_argument(name, type=lambda text: pathlib.Path(text).resolve(), required=True)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    unknown = set(options.bench) - set(BENCHES)
    if unknown:
        sys.exit(f"bench: no such bench: {' '.join(unknown)}; there are {' '.join(BENCHES)}")
    options.rounds = int(os.environ.get("ROUNDS", "3"))
    # SIGTERM ends the daemons as well: by way of `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ["PATH"] += ":/usr/sbin"
    print(f"{options.rounds} rounds, {os.cpu_count()} cores, {STREAMS} streams")
    report = Report()
    for name in options.bench:
        BENCHES[name](options, report)
    if options.json:
        options.json.write_text(json.dumps(vars(report), indent=1))
    met = sum(target["met"] for target in report.targets)
    print(f"targets {met}/{len(report.targets)}")
    sys.exit(met < len(report.targets))


if __name__ == "__main__":
    main()
