"""The kubelet's part, as far as stories need it: order, restarts, probes, the end of a pod."""

import pathlib
import subprocess
import time

from rendered import Wrong

GRPCURL = pathlib.Path(__file__).resolve().parents[3] / ".tools/venv/bin/grpcurl"
# What takes longer on a loaded machine with two cores is broken.
PATIENCE = 120


def wait_for(what, condition, patience=PATIENCE):
    deadline = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Wrong(f"waited {patience} s for {what}")
        time.sleep(0.1)


class Kubelet:
    def __init__(self, podman, cluster):
        self.podman = podman
        self.cluster = cluster
        self.pods = cluster.pods()

    def container(self, pod, container):
        return f"{pod}-{container}"

    def begin_stage(self, pod, number):
        """Plays one stage of a pod, in the place of what was there under its name."""
        self.podman.remove_pod(pod)
        text, names = self.pods[pod].stages[number]
        self.podman.play(text)
        return [self.container(pod, name) for name in names]

    def stage_of(self, pod, container):
        names = [names for _, names in self.pods[pod].stages]
        return next(number for number, some in enumerate(names) if container in some)

    def end_of(self, container, patience=PATIENCE):
        done = lambda: self.podman.exit_code(container) is not None
        wait_for(f"the end of {container}", done, patience)
        return self.podman.exit_code(container)

    def run_init(self, pod, tries=5):
        """Runs a pod's init containers one after another; one that fails is started again."""
        for number in range(len(self.pods[pod].stages) - 1):
            for attempt in range(tries):
                (container,) = self.begin_stage(pod, number)
                if self.end_of(container) == 0:
                    break
                if attempt == tries - 1:
                    raise Wrong(f"{container} fails: {self.podman.logs(container)[-1500:]}")

    def start(self, pod):
        """A whole start of a pod, up to its readiness."""
        self.run_init(pod)
        self.run_main(pod)

    def run_main(self, pod):
        self.begin_stage(pod, -1)
        self.wait_ready(pod)

    def wait_ready(self, pod):
        def ready():
            self.must_run(pod)
            return self.is_ready(pod)

        wait_for(f"{pod} to be ready", ready)

    def must_run(self, pod):
        for name in self.pods[pod].stages[-1][1]:
            code = self.podman.exit_code(self.container(pod, name))
            if code is not None:
                logs = self.podman.logs(self.container(pod, name))[-1500:]
                raise Wrong(f"{pod} {name} has ended with {code}: {logs}")

    def is_ready(self, pod):
        return all(
            self.probe(pod, name, probes["readiness"])
            for name, probes in self.pods[pod].probes.items()
            if "readiness" in probes
        )

    def probe(self, pod, container, probe):
        """Whether a probe passes, asked as the kubelet would: in plaintext, from outside."""
        name = self.container(pod, container)
        if "exec" in probe:
            return not self.podman.execute(name, *probe["exec"]["command"], check=False).returncode
        here = pathlib.Path(__file__).parent
        asked = ["-plaintext", "-max-time", "5", "-import-path", here, "-proto", "health.proto"]
        if "service" in probe["grpc"]:
            asked += ["-d", '{"service": "%s"}' % probe["grpc"]["service"]]
        asked += [f"127.0.0.1:{probe['grpc']['port']}", "grpc.health.v1.Health/Check"]
        return '"SERVING"' in self.in_network(name, GRPCURL, *asked)

    def in_network(self, container, *command):
        """Runs a program of this host among the ports of a pod."""
        pid = self.podman.pid(container)
        if not pid:
            return ""
        done = subprocess.run(
            ["nsenter", "--target", str(pid), "--net", *command],
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout

    def delete(self, pod):
        """As `kubectl delete pod --force` does: what it had in empty directories goes as well."""
        self.podman.remove_pod(pod)
        self.cluster.forget_empty_directories(pod)
        # As its controller would.
        self.pods = self.cluster.pods()

    def stop(self, pod):
        """SIGTERM to all, SIGKILL after the grace; how long it took, and how each has ended."""
        begin = time.monotonic()
        grace = self.pods[pod].grace
        self.podman.run("pod", "stop", "--time", str(grace), pod, timeout=grace + 60)
        took = time.monotonic() - begin
        names = self.pods[pod].stages[-1][1]
        return took, {n: self.podman.exit_code(self.container(pod, n)) for n in names}
