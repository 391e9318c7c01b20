"""The overlays, played: real servers, real clones over mTLS by pod name."""

import os
import re
import signal
import subprocess
import threading

import yaml

from convert import Cluster
from kubelet import Kubelet, wait_for
from rendered import ROOT, Wrong, render

ROWS = 300_000
# Slow enough that a clone of some 150 MB can be hit in its middle, fast enough for CI; in units of
# 12 MiB, so that some are durable by then.
SLOW = {"MARCOT_MAX_NETWORK_BANDWIDTH": "8MiB", "MARCOT_MAX_CONCURRENCY": "4"}
MIDDLE = 64 << 20


def secrets(namespace, *names):
    script = ROOT / "deploy/certificates.sh"
    done = subprocess.run([script, namespace, *names], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise Wrong(f"certificates.sh: {done.stderr}")
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def expect(condition, what):
    if not condition:
        raise Wrong(what)


class Played:
    """An overlay whose pods are played, with a database that is written to."""

    def __init__(self, podman, kubectl, directory, overlay, pods, environment):
        self.podman = podman
        self.objects = render(kubectl, overlay)
        self.source, self.source_name = pods[0], f"{pods[0]}-mariadb"
        # The names of their certificates: with the pod's own, which podman's DNS knows.
        self.names = [name for pod in pods for name in (pod, f"{pod}.{pod[:-2]}")]
        self.objects += secrets(overlay, *self.names)
        self.cluster = Cluster(directory, self.objects, environment)
        self.kubelet = Kubelet(podman, self.cluster)
        self.writer = None

    def sql(self, pod, text):
        done = self.podman.execute(
            f"{pod}-mariadb", "mariadb", "--user=root", "--batch", "--skip-column-names",
            "--execute", text,
        )
        return done.stdout.strip()

    def fill(self):
        self.sql(
            self.source,
            f"""CREATE DATABASE garden;
            CREATE TABLE garden.bed (id INT PRIMARY KEY, plant VARCHAR(200)) ENGINE=InnoDB;
            CREATE TABLE garden.book (id BIGINT AUTO_INCREMENT PRIMARY KEY, what VARCHAR(60));
            INSERT INTO garden.bed SELECT seq, REPEAT(MD5(seq), 6) FROM mysql.seq_1_to_{ROWS}""",
        )

    def load(self):
        """A writer inside the source's container, until the source is stopped."""
        text = """DELIMITER //
            BEGIN NOT ATOMIC WHILE TRUE DO
              INSERT INTO garden.book (what) VALUES (MD5(RAND())); DO SLEEP(0.002);
            END WHILE; END//"""
        self.writer = subprocess.Popen(
            [*self.podman.command, "exec", self.source_name, "mariadb", "--user=root"]
            + ["--execute", text],
            env=self.podman.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def end_load(self):
        if self.writer:
            self.writer.kill()
            self.writer.wait()
            self.writer = None

    def book(self, pod):
        return int(self.sql(pod, "SELECT COUNT(*) FROM garden.book"))

    def same_bed(self, pod):
        ask = "CHECKSUM TABLE garden.bed"
        return self.sql(pod, ask) == self.sql(self.source, ask)


class Quickstart(Played):
    SOURCE, COPY = "source-mariadb-0", "copy-mariadb-0"
    SEED = f"{COPY}-marcot-seed"

    def __init__(self, podman, kubectl, directory):
        slow = {"marcot-seed": dict(SLOW)}
        super().__init__(podman, kubectl, directory, "quickstart", [self.SOURCE], slow)

    def the_source_is_ready_with_its_donor_beside_it(self):
        self.kubelet.start(self.SOURCE)
        self.fill()
        self.load()
        wait_for("rows of the load", lambda: self.book(self.SOURCE) > 20)

    def probes_pass_and_see_a_drain(self):
        """Every probe of the pod, by grpcurl or in its container; then one of no service."""
        asked = 0
        for container, probes in self.kubelet.pods[self.SOURCE].probes.items():
            for kind, probe in probes.items():
                expect(self.kubelet.probe(self.SOURCE, container, probe), f"{container} {kind}")
                asked += 1
        expect(asked == 4, f"{asked} probes, of 4")
        donor = f"{self.SOURCE}-marcot-donor"
        unknown = {"grpc": {"port": 9407, "service": "no.such.Service"}}
        is_serving = self.kubelet.probe(self.SOURCE, "marcot-donor", unknown)
        expect(not is_serving, "any service is SERVING")
        for path in ("healthz", "readyz", "metrics"):
            got = self.kubelet.in_network(donor, "curl", "-sf", f"http://127.0.0.1:9407/{path}")
            expect(got, f"/{path} answers nothing")

    def staged(self):
        """Bytes on the disk of what is staged on the copy's volume."""
        volume = self.cluster.directory / f"claim/data-{self.COPY}"
        done = subprocess.run(
            ["du", "--summarize", "--block-size=1", *volume.glob(".marcot-*/tree")],
            capture_output=True,
            text=True,
            cwd=self.cluster.directory,
        )
        # It may be put in place meanwhile.
        return sum(int(line.split()[0]) for line in done.stdout.splitlines() if "/tree" in line)

    def seed_log(self):
        return self.podman.logs(self.SEED)[-1500:]

    def begin_seed(self):
        stage = self.kubelet.stage_of(self.COPY, "marcot-seed")
        self.kubelet.begin_stage(self.COPY, stage)

    def middle_of_a_seed(self):
        def in_the_middle():
            code = self.podman.exit_code(self.SEED)
            expect(code is None, f"the seed has ended ({code}): {self.seed_log()}")
            return self.staged() > MIDDLE

        wait_for("a seed that has copied something", in_the_middle)

    def a_seed_that_is_killed_goes_on(self):
        (first,) = self.kubelet.begin_stage(self.COPY, 0)
        expect(self.kubelet.end_of(first) == 0, self.podman.logs(first))
        # Before the clone begins: its point is fixed at any moment after that.
        self.before = self.book(self.SOURCE)
        self.begin_seed()
        self.middle_of_a_seed()
        os.kill(self.podman.pid(self.SEED), signal.SIGKILL)
        expect(self.kubelet.end_of(self.SEED) == 137, "it was not killed")
        self.begin_seed()
        self.went_on()

    def went_on(self):
        def told():
            return re.search(r"the clone goes on.*", self.podman.logs(self.SEED))

        line = wait_for("the seed to go on", told)[0]
        units = re.search(r'"units":"?(\d+)|units=(\d+)', line)
        expect(units and int(units[1] or units[2]) > 0, f"nothing was kept: {line}")

    def a_pod_that_is_deleted_goes_on(self):
        expect(self.podman.exit_code(self.SEED) is None, "the seed has ended already")
        self.kubelet.delete(self.COPY)
        expect(self.staged() > MIDDLE, "what was staged has gone with the pod")
        self.begin_seed()
        self.went_on()

    def the_copy_is_seeded_by_name_over_mtls_and_its_server_starts(self):
        before = self.before
        del self.cluster.environment["marcot-seed"]
        self.kubelet.pods = self.cluster.pods()
        self.kubelet.start(self.COPY)
        rows = self.book(self.COPY)
        expect(before <= rows <= self.book(self.SOURCE), f"{rows} rows, {before} were there before")
        expect(self.same_bed(self.COPY), "the tables differ")
        log = self.podman.logs(f"{self.COPY}-mariadb").splitlines()
        errors = [line for line in log if "[ERROR]" in line]
        expect(not errors, f"its server complains: {errors}")

    def a_pod_that_is_started_again_seeds_nothing(self):
        self.sql(self.COPY, "INSERT INTO garden.bed VALUES (0, 'of the copy')")
        self.kubelet.stop(self.COPY)
        self.kubelet.delete(self.COPY)
        self.kubelet.start(self.COPY)
        got = self.sql(self.COPY, "SELECT plant FROM garden.bed WHERE id = 0")
        expect(got == "of the copy", "what its server has written is gone")

    def fingerprint(self):
        donor = f"{self.SOURCE}-marcot-donor"
        text = self.kubelet.in_network(
            donor, "sh", "-c", "openssl s_client -connect 127.0.0.1:4407 </dev/null 2>/dev/null"
        )
        return re.search(r"-----BEGIN CERTIFICATE-----.*?-----END", text, re.S)[0]

    def certificates_are_exchanged_while_all_runs(self):
        """Another CA altogether: the donor takes it without a restart, and whoever still has the
        old certificates is refused."""
        donor = f"{self.SOURCE}-marcot-donor"
        before, started = self.fingerprint(), self.podman.inspect(donor)["State"]["StartedAt"]
        fresh = {one["metadata"]["name"]: one for one in secrets("quickstart", *self.names)}
        self.cluster.publish(fresh["marcot-donor-tls"])
        wait_for("the donor's new certificate", lambda: self.fingerprint() != before)
        self.reseed(tries=1, works=False)
        expect("CERTIFICATE_NOT_TRUSTED" in self.seed_log(), self.seed_log())
        self.cluster.publish(fresh["marcot-recipient-tls"])
        self.reseed(tries=2, works=True)
        now = self.podman.inspect(donor)["State"]["StartedAt"]
        expect(now == started, "the donor was restarted")

    def reseed(self, tries, works):
        """Seeds the copy once more, from nothing."""
        self.kubelet.delete(self.COPY)
        claim = self.cluster.directory / f"claim/data-{self.COPY}"
        subprocess.run(["rm", "-rf", claim], check=True)
        self.kubelet.pods = self.cluster.pods()
        try:
            self.kubelet.run_init(self.COPY, tries)
            ended = True
        except Wrong:
            ended = False
        expect(ended == works, f"a seed: {self.seed_log()}")

    def sigterm_ends_all_within_the_grace(self):
        self.end_load()
        took, codes = self.kubelet.stop(self.SOURCE)
        expect(codes == {"marcot-donor": 0, "mariadb": 0}, f"exit codes {codes}")
        expect(took < self.kubelet.pods[self.SOURCE].grace, f"{took:.0f} s")


class Production(Played):
    PRIMARY, STANDBY, JOB = "primary-mariadb-0", "standby-mariadb-0", "marcot-clone"

    def __init__(self, podman, kubectl, directory):
        both = [self.PRIMARY, self.STANDBY]
        super().__init__(podman, kubectl, directory, "production", both, {})

    def a_job_replaces_the_standby_by_the_primary_and_waits(self):
        self.kubelet.start(self.PRIMARY)
        self.fill()
        self.load()
        self.kubelet.start(self.STANDBY)
        self.sql(self.STANDBY, "CREATE DATABASE old_garden")
        seen, dead, ended = [], [], threading.Event()
        server = self.kubelet.pods[self.STANDBY].probes["mariadb"]

        def watch():
            while not ended.is_set():
                seen.append(self.kubelet.probe(self.STANDBY, "mariadb", server["readiness"]))
                if not self.kubelet.probe(self.STANDBY, "mariadb", server["liveness"]):
                    dead.append(len(seen))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        (job,) = self.kubelet.begin_stage(self.JOB, -1)
        code = self.kubelet.end_of(job, patience=240)
        ended.set()
        watcher.join()
        expect(code == 0, f"the Job has ended with {code}: {self.podman.logs(job)[-2000:]}")
        expect(not dead, f"liveness failed at probes {dead}")
        expect(False in seen, f"the standby was ready all along: {len(seen)} probes")
        self.kubelet.wait_ready(self.STANDBY)
        expect(self.same_bed(self.STANDBY), "the tables differ")
        schemas = self.sql(self.STANDBY, "SHOW DATABASES")
        expect("old_garden" not in schemas, "the old data are there")

    def a_job_that_is_started_again_finds_the_same_clone(self):
        before = self.sql(self.STANDBY, "SELECT COUNT(*) FROM garden.book")
        (job,) = self.kubelet.begin_stage(self.JOB, -1)
        expect(self.kubelet.end_of(job) == 0, self.podman.logs(job)[-2000:])
        expect(self.sql(self.STANDBY, "SELECT COUNT(*) FROM garden.book") == before, "cloned again")

    def a_supervised_server_ends_with_its_recipient(self):
        self.end_load()
        took, codes = self.kubelet.stop(self.STANDBY)
        expect(codes == {"marcot-donor": 0, "mariadb": 0}, f"exit codes {codes}")
        expect(took < self.kubelet.pods[self.STANDBY].grace, f"{took:.0f} s")


QUICKSTART = [
    Quickstart.the_source_is_ready_with_its_donor_beside_it,
    Quickstart.probes_pass_and_see_a_drain,
    Quickstart.a_seed_that_is_killed_goes_on,
    Quickstart.a_pod_that_is_deleted_goes_on,
    Quickstart.the_copy_is_seeded_by_name_over_mtls_and_its_server_starts,
    Quickstart.a_pod_that_is_started_again_seeds_nothing,
    Quickstart.certificates_are_exchanged_while_all_runs,
    Quickstart.sigterm_ends_all_within_the_grace,
]
PRODUCTION = [
    Production.a_job_replaces_the_standby_by_the_primary_and_waits,
    Production.a_job_that_is_started_again_finds_the_same_clone,
    Production.a_supervised_server_ends_with_its_recipient,
]
