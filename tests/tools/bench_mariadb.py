#!/usr/bin/env python3
"""Measures clones of a live MariaDB beside mariadb-backup. `make bench BENCH=mariadb` runs it.

    bench_mariadb.py --bin DIR --work DIR --tls DIR

One server with BYTES (default 1G) of rows, under sysbench's oltp_write_only at RATE (default 200)
transactions per second throughout, is copied in turn, ROUNDS (default 3) rounds, each beginning
with another one:
  marcot TLS, marcot plain   CLONE INSTANCE over loopback, REQUIRE SSL and REQUIRE NO SSL
  mariadb-backup             --backup --stream=xbstream over a TCP connection of loopback into
                             mbstream -x, then --prepare, then sync -f: Marcot syncs what it writes
Each is timed from the start of its first command until the stock server, started on the copy, has
answered its first query, which reads a table. As many streams as cores, at most 8, for all.
  CPU: user and system time of all commands, of donor and recipient, and of the started server until
  that query. The copied server's own share is left out: it is mostly its load's.
  Each started server must hold all rows of the table that does not change, and log no [ERROR].
  MiB/s are of the data directory's allocated bytes without redo and binary logs. Commits/s tell
  that the load was the same.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from bench import GIB, MIB, Daemon, Pair, column, size_of

ROW_BYTES = 1200
DATABASE_PASSWORD = "beside-the-server"
STREAMS = min(os.cpu_count(), 8)
# Recovery and --prepare have the same memory.
BUFFER_POOL = "256M"
SHARE = pathlib.Path("/usr/share/mysql")
START_SECONDS = 300
AS_ROOT = ["--user=root"] if os.geteuid() == 0 else []


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A mariadbd of our own; root needs no password."""

    started = 0

    def __init__(self, work, sockets, data, server_id):
        Server.started += 1
        name = f"mariadbd-{Server.started}"
        self.socket = sockets / f"{name}.sock"
        self.temporary = work / f"{name}.tmp"
        self.temporary.mkdir()
        self.log = work / f"{name}.log"
        command = ["mariadbd", "--no-defaults", *AS_ROOT, f"--datadir={data}"]
        command += [f"--socket={self.socket}", f"--pid-file={work / name}.pid"]
        command += [f"--tmpdir={self.temporary}", f"--server-id={server_id}", "--log-bin=bin"]
        command += [f"--innodb-buffer-pool-size={BUFFER_POOL}", "--innodb-log-file-size=256M"]
        command += ["--innodb-flush-log-at-trx-commit=2", "--sync-binlog=0", "--skip-networking"]
        self.daemon = Daemon(name, command, work)

    def query(self, sql):
        words = ["mariadb", "--no-defaults", "--user=root", f"--socket={self.socket}"]
        words += ["--batch", "--skip-column-names", f"--execute={sql}"]
        return subprocess.run(words, capture_output=True, text=True)

    def wait_for(self, sql):
        """Until the server answers, and the answer."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            answer = self.query(sql)
            if answer.returncode == 0:
                return answer.stdout.strip()
            if self.daemon.process.poll() is not None:
                sys.exit(f"bench: mariadbd ended:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.02)
        sys.exit(f"bench: mariadbd does not answer:\n{self.log.read_text()[-2000:]}")

    def ask(self, sql):
        answer = self.query(sql)
        if answer.returncode != 0:
            sys.exit(f"bench: {sql[:80]}: {answer.stderr}")
        return answer.stdout.strip()

    def commits(self):
        return int(self.ask("SHOW GLOBAL STATUS LIKE 'Com_commit'").split()[1])

    def stop(self):
        self.daemon.stop()
        shutil.rmtree(self.temporary, ignore_errors=True)


def install(work, data):
    (data / "mysql").mkdir(parents=True)
    (work / "install.tmp").mkdir()
    scripts = ["mariadb_system_tables", "mysql_system_tables", "mariadb_system_tables_data"]
    scripts += ["mysql_system_tables_data", "mariadb_performance_tables"]
    paths = [SHARE / f"{name}.sql" for name in scripts]
    sql = b"use mysql;\n" + b"".join(path.read_bytes() for path in paths if path.exists())
    command = ["mariadbd", "--no-defaults", *AS_ROOT, f"--datadir={data}", "--bootstrap"]
    command += ["--silent-startup", f"--tmpdir={work / 'install.tmp'}"]
    command += ["--innodb-log-file-size=256M"]
    with open(work / "install.log", "wb") as log:
        subprocess.run(command, input=sql, stdout=log, stderr=log, check=True)


def fill(server, rows):
    server.ask(
        "CREATE DATABASE bench; CREATE DATABASE sbtest; "
        "CREATE TABLE bench.bulk (id INT PRIMARY KEY, v TEXT) ENGINE=InnoDB; "
        f"CREATE USER marcot@localhost IDENTIFIED BY '{DATABASE_PASSWORD}'; "
        "GRANT RELOAD, BINLOG MONITOR, PROCESS, SLAVE MONITOR ON *.* TO marcot@localhost"
    )
    step = 100_000
    for first in range(1, rows + 1, step):
        last = min(first + step - 1, rows)
        values = f"SELECT seq, REPEAT(MD5(seq), 34) FROM mysql.seq_{first}_to_{last}"
        server.ask(f"SET sql_log_bin = 0; INSERT INTO bench.bulk {values}")


def sysbench(server, *words):
    command = ["sysbench", "oltp_write_only", "--tables=4", "--table-size=25000", "--threads=4"]
    command += ["--db-driver=mysql", "--mysql-user=root", "--mysql-db=sbtest"]
    return [*command, f"--mysql-socket={server.socket}", *words]


def spent_by_children():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def check(*processes):
    for process in processes:
        if process.wait() != 0:
            sys.exit(f"bench: {process.args[0]} ended with {process.returncode}")


def backup(server, work, copy):
    """Streams, extracts, prepares and syncs; the two ends are connected by TCP."""
    copy.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as there, listener.accept()[0] as here:
            extract = subprocess.Popen(
                ["mbstream", "--extract", f"--directory={copy}", f"--parallel={STREAMS}"],
                stdin=here,
            )
            with open(work / "backup.log", "ab") as log:
                stream = subprocess.Popen(
                    ["mariadb-backup", "--no-defaults", "--backup", "--stream=xbstream"]
                    + ["--user=root", f"--socket={server.socket}", f"--parallel={STREAMS}"]
                    + [f"--target-dir={work / 'backup.tmp'}"],
                    stdout=there,
                    stderr=log,
                )
            # Each end is its process's alone: the stream's end is the connection's.
            there.close()
            here.close()
            check(stream, extract)
    with open(work / "backup.log", "ab") as log:
        prepare = ["mariadb-backup", "--no-defaults", "--prepare", f"--use-memory={BUFFER_POOL}"]
        check(subprocess.Popen([*prepare, f"--target-dir={copy}"], stdout=log, stderr=log))
    check(subprocess.Popen(["sync", "-f", copy]))


class Bench:
    def __init__(self, options, sockets):
        self.work, self.sockets = options.work, sockets
        self.rows = size_of(os.environ.get("BYTES", "1G")) // ROW_BYTES
        self.data, self.copies = self.work / "data", self.work / "copies"
        self.copies.mkdir(exist_ok=True)
        install(self.work, self.data)
        self.server = Server(self.work, sockets, self.data, 1)
        self.running = [self.server]
        try:
            self.server.wait_for("SELECT 1")
            fill(self.server, self.rows)
            self.load = self.start_load(os.environ.get("RATE", "200"))
            self.running.insert(0, self.load)
            self.pair = self.start_pair(options)
            self.running.insert(0, self.pair)
        except BaseException:
            self.stop()
            raise

    def start_load(self, rate):
        prepared = subprocess.run(sysbench(self.server, "prepare"), stdout=sys.stderr)
        if prepared.returncode != 0:
            sys.exit("bench: sysbench prepare failed")
        words = ["--time=0", f"--rate={rate}", "run"]
        return Daemon("sysbench", sysbench(self.server, *words), self.work)

    def start_pair(self, options):
        password = self.work / "database-password"
        password.write_text(DATABASE_PASSWORD + "\n")
        password.chmod(0o600)
        (self.work / "spool").mkdir()
        engine = ["--engine", "innodb", "--database-socket", self.server.socket]
        engine += ["--database-user", "marcot", "--database-password-file", password]
        return Pair(options, self.data, [*engine, "--spool-directory", self.work / "spool"])

    def copied_bytes(self):
        files = [path for path in self.data.rglob("*") if path.is_file()]
        logs = ("bin.", "ib_logfile")
        return sum(path.stat().st_blocks * 512 for path in files if not path.name.startswith(logs))

    def measure(self, name, make_copy):
        copy = self.copies / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        os.sync()
        size = self.copied_bytes()
        daemons = [self.pair.donor, self.pair.recipient]
        before = [daemon.cpu_seconds() for daemon in daemons]
        children, commits = spent_by_children(), self.server.commits()
        begin = time.perf_counter()
        make_copy(copy)
        copied = time.perf_counter()
        cpu = spent_by_children() - children
        cpu += sum(daemon.cpu_seconds() - start for daemon, start in zip(daemons, before))
        server = Server(self.work, self.sockets, copy, 2)
        try:
            server.wait_for("SELECT id FROM bench.bulk WHERE id = 7")
            end = time.perf_counter()
            cpu += server.daemon.cpu_seconds()
            rate = (self.server.commits() - commits) / (end - begin)
            rows = int(server.ask("SELECT COUNT(*) FROM bench.bulk"))
            errors = [line for line in server.log.read_text().splitlines() if "[ERROR]" in line]
        finally:
            server.stop()
        if rows != self.rows or errors:
            sys.exit(f"bench: {name}: {rows} rows of {self.rows}, {errors}")
        if self.load.process.poll() is not None:
            sys.exit(f"bench: sysbench ended: {(self.work / 'sysbench.log').read_text()[-500:]}")
        return {
            "name": name,
            "seconds": end - begin,
            "copy_seconds": copied - begin,
            "mib_per_second": size / MIB / (end - begin),
            "cpu_seconds_per_gib": cpu / (size / GIB),
            "commits_per_second": rate,
            "gib": size / GIB,
        }

    def contenders(self):
        def marcot(ssl):
            return lambda copy: check(
                subprocess.Popen(self.pair.command(copy, ssl), stdout=subprocess.DEVNULL)
            )

        return [
            ("marcot TLS", marcot("SSL")),
            ("marcot plain", marcot("NO SSL")),
            ("mariadb-backup", lambda copy: backup(self.server, self.work, copy)),
        ]

    def stop(self):
        for one in self.running:
            one.stop()


def print_table(contenders, results, rounds):
    gib = statistics.median(result["gib"] for result in results)
    print(f"{gib:.2f} GiB, {rounds} rounds, until the first query; median (least to most)")
    print(
        f"{'':16}{'seconds':>22}{'of it copy':>12}{'MiB/s':>8}{'CPU-s/GiB':>22}{'commits/s':>11}"
        f"{'of mariadb-backup':>19}"
    )
    beside = statistics.median(column(results, "mariadb-backup", "seconds"))
    for name, _ in contenders:
        seconds = column(results, name, "seconds")
        cpu = column(results, name, "cpu_seconds_per_gib")
        middle = {
            key: statistics.median(column(results, name, key))
            for key in ("copy_seconds", "mib_per_second", "commits_per_second")
        }
        median = statistics.median(seconds)
        print(
            f"{name:16}"
            f"{f'{median:.1f} ({min(seconds):.1f} to {max(seconds):.1f})':>22}"
            f"{middle['copy_seconds']:>12.1f}{middle['mib_per_second']:>8.0f}"
            f"{f'{statistics.median(cpu):.2f} ({min(cpu):.2f} to {max(cpu):.2f})':>22}"
            f"{middle['commits_per_second']:>11.0f}{median / beside:>19.2f}"
        )


def compare(options, rounds):
    """All contenders in turn; their names and results."""
    # A socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory() as sockets:
        bench = Bench(options, pathlib.Path(sockets))
        results = []
        try:
            contenders = bench.contenders()
            for number in range(rounds):
                turn = number % len(contenders)
                for name, make_copy in contenders[turn:] + contenders[:turn]:
                    result = bench.measure(name, make_copy) | {"round": number + 1}
                    print(json.dumps(result), file=sys.stderr, flush=True)
                    results.append(result)
        finally:
            bench.stop()
    return contenders, results


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("--bin", "--work", "--tls"):
        parser.add_argument(name, type=lambda text: pathlib.Path(text).resolve(), required=True)
    options = parser.parse_args()
    # SIGTERM ends the daemons as well: by way of `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ["PATH"] += ":/usr/sbin"
    (options.work / "state").mkdir()
    rounds = int(os.environ.get("ROUNDS", "3"))
    contenders, results = compare(options, rounds)
    print_table(contenders, results, rounds)


if __name__ == "__main__":
    main()
