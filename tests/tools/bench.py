"""What benches share: a pair of daemons, rsync's daemon, timed commands, files to copy."""


import json
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import time

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
DONOR_RSS_MAX = 64 * MIB
RECIPIENT_RSS_MAX = 96 * MIB
READY_SECONDS = 30
STOP_SECONDS = 30
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
TOOLS = pathlib.Path(__file__).resolve().parent
PASSWORD = "measured-twice"
CERTIFICATE = ".marcot-certificate"


def size_of(text):
    suffixes = {"K": KIB, "M": MIB, "G": GIB}
    return int(text[:-1]) * suffixes[text[-1]] if text[-1] in suffixes else int(text)


class Daemon:
    """A process of our own that serves until it is told to end."""

    def __init__(self, name, command, work):
        self.name = name
        self.log = open(work / f"{name}.log", "wb")
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT
        )

    def wait_for(self, ready):
        """Waits until `ready` returns something, and returns that."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                sys.exit(f"bench: {self.name} ended with {self.process.returncode}")
            result = ready()
            if result:
                return result
            time.sleep(0.02)
        sys.exit(f"bench: {self.name} does not serve after {READY_SECONDS} s")

    def cpu_seconds(self):
        """User and system time, that of children that have ended included."""
        with open(f"/proc/{self.process.pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return sum(int(field) for field in fields[11:15]) / TICKS_PER_SECOND

    def has_children(self):
        path = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        with open(path, encoding="ascii") as file:
            return bool(file.read().split())

    def reset_peak(self):
        with open(f"/proc/{self.process.pid}/clear_refs", "w", encoding="ascii") as file:
            file.write("5")

    def peak_bytes(self):
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("VmHWM:"))
        return int(line.split()[1]) * KIB

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


class Pair:
    """A donor of one directory and a recipient, on free ports."""

    def __init__(self, options, source, engine=(), recipient=()):
        work, tls = options.work, options.tls
        self.marcot = options.bin / "marcot"
        accounts = work / "accounts"
        if not accounts.exists():
            subprocess.run(
                [self.marcot, "account", "add", "bench", "--accounts", accounts]
                + ["--privilege", "BACKUP_ADMIN"],
                input=PASSWORD.encode() + b"\n",
                stdout=sys.stderr,
                check=True,
            )
        self.daemons = []
        try:
            self.donor, self.donor_address = self.start(
                work,
                "donor",
                [options.bin / "marcot-donor", "--data-directory", source]
                + ["--listen", "127.0.0.1:0", "--accounts", accounts]
                + ["--tls-cert", tls / "server.pem", "--tls-key", tls / "server.key", *engine],
            )
            self.recipient, self.recipient_address = self.start(
                work,
                "recipient",
                [options.bin / "marcot-recipient", "--state-directory", work / "state"]
                + ["--listen", "127.0.0.1:0", "--allow-directory", work / "copies"]
                + ["--ssl-ca", tls / "ca.pem", "--donor-list", "127.0.0.1:*", *recipient],
            )
        except BaseException:
            self.stop()
            raise

    def start(self, work, name, command):
        ready = work / f"{name}.ready"
        ready.unlink(missing_ok=True)
        daemon = Daemon(name, [*command, "--ready-file", ready], work)
        self.daemons.append(daemon)
        told = daemon.wait_for(lambda: ready.exists() and json.loads(ready.read_text()))
        return daemon, told["listen"]

    def command(self, copy, ssl):
        port = self.donor_address.rpartition(":")[2]
        statement = (
            f"CLONE INSTANCE FROM 'bench'@'127.0.0.1':{port} IDENTIFIED BY '{PASSWORD}' "
            f"DATA DIRECTORY '{copy}' REQUIRE {ssl}"
        )
        return [self.marcot, "--recipient", self.recipient_address, "sql", statement]

    def stop(self):
        for daemon in self.daemons:
            daemon.stop()


class RsyncDaemon:
    """rsync's own daemon, read only, on a free port of loopback."""

    def __init__(self, options, source):
        work = options.work
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        owner = f"uid = {os.geteuid()}\ngid = {os.getegid()}\n" if os.geteuid() == 0 else ""
        configuration = work / "rsyncd.conf"
        configuration.write_text(
            f"use chroot = no\n{owner}[data]\npath = {source}\nread only = yes\n"
        )
        self.daemon = Daemon(
            "rsyncd",
            ["rsync", "--daemon", "--no-detach", f"--config={configuration}"]
            + ["--address=127.0.0.1", f"--port={self.port}"],
            work,
        )
        self.daemon.wait_for(self.answers)

    def answers(self):
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe:
                return probe.recv(8).startswith(b"@RSYNCD:")
        except OSError:
            return False

    def command(self, copy):
        url = f"rsync://127.0.0.1:{self.port}/data/"
        return ["rsync", "--archive", "--whole-file", "--fsync", url, f"{copy}/"]


def make_files(directory, total_bytes):
    """Four files; each MiB is half noise that nothing compresses, half text."""
    directory.mkdir()
    generator = random.Random(1)
    noise = generator.randbytes(16 * MIB)
    text = b"INSERT INTO orders VALUES (1, 'sapling', 4.25);\n" * 12_000
    for number in range(4):
        with open(directory / f"ibdata{number}", "wb") as file:
            for piece in range(total_bytes // 4 // MIB):
                start = generator.randrange(len(noise) - MIB // 2)
                file.write(b"%016x" % (number << 32 | piece))
                file.write(noise[start : start + MIB // 2 - 16])
                file.write(text[: MIB // 2])


def run(command, then=None):
    """Runs a command, and a second one; seconds and CPU-seconds."""
    begin = time.perf_counter()
    cpu_seconds = 0.0
    for words in filter(None, (command, then)):
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            sys.exit(f"bench: {words[0]} ended with {process.returncode}")
        cpu_seconds += usage.ru_utime + usage.ru_stime
    return time.perf_counter() - begin, cpu_seconds


def measure(name, command, then, daemons, size):
    """One timed run with the CPU time of all processes that had a part in it."""
    for daemon in daemons:
        daemon.reset_peak()
    before = [daemon.cpu_seconds() for daemon in daemons]
    seconds, command_cpu = run(command, then)
    settle = time.monotonic() + 5
    while any(daemon.has_children() for daemon in daemons) and time.monotonic() < settle:
        time.sleep(0.02)
    spent = [daemon.cpu_seconds() - start for daemon, start in zip(daemons, before)]
    cpu = {daemon.name: cpu for daemon, cpu in zip(daemons, spent)} | {"command": command_cpu}
    # Only a donor's and a recipient's: rsync's daemon works in children, a command is gone by now.
    peaks = {daemon.name: daemon.peak_bytes() for daemon in daemons if daemon.name != "rsyncd"}
    return {
        "name": name,
        "seconds": seconds,
        "mib_per_second": size / MIB / seconds,
        "cpu_seconds_per_gib": sum(cpu.values()) / (size / GIB),
        "cpu_seconds": cpu,
        "peak_bytes": peaks,
    }


def same(source, copy):
    """Whether a copy has the names and bytes of its source, and no more than a certificate."""
    names = sorted(entry.name for entry in source.iterdir())
    if names != sorted(entry.name for entry in copy.iterdir() if entry.name != CERTIFICATE):
        return False
    pairs = ((source / name, copy / name) for name in names)
    return all(subprocess.run(["cmp", a, b], stdout=sys.stderr).returncode == 0 for a, b in pairs)


def prepare(copy):
    shutil.rmtree(copy, ignore_errors=True)
    os.sync()
    if os.environ.get("BENCH_COLD") == "1":
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")


def column(results, name, key):
    return [result[key] for result in results if result["name"] == name]


def make_many(directory, files):
    directory.mkdir()
    with open(directory / "sparse.ibd", "wb") as file:
        for offset in (0, GIB, TIB // 2, TIB - MIB):
            file.seek(offset)
            file.write(random.Random(offset).randbytes(64 * KIB))
        file.truncate(TIB)
    for number in range(files):
        parent = directory / f"schema{number // 1000:04}"
        if number % 1000 == 0:
            parent.mkdir()
        (parent / f"table_{number:06}.ibd").write_bytes(b"%06d" % number * (1 + number % 200))


def measure_memory(options):
    """Peaks of donor and recipient, each with its bound; seconds; files."""
    files = int(os.environ.get("MEMORY_FILES", "200000"))
    source, copies = options.work / "source", options.work / "copies"
    copies.mkdir(exist_ok=True)
    make_many(source, files)
    os.sync()
    pair = Pair(options, source)
    copy = copies / "copy"
    try:
        seconds, _ = run(pair.command(copy, "SSL"))
        peaks = [(pair.donor, DONOR_RSS_MAX), (pair.recipient, RECIPIENT_RSS_MAX)]
        peaks = [(daemon.name, daemon.peak_bytes(), bound) for daemon, bound in peaks]
    finally:
        pair.stop()
    command = [sys.executable, TOOLS / "compare.py", "--left-out", source, copy]
    if subprocess.run(command).returncode != 0:
        sys.exit("bench: the copy differs")
    return peaks, seconds, files
