"""podman with storage, network and settings of its own: nothing of it outlives this run."""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

CONTAINERS_CONF = """[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_config_dir = "{home}/networks"
"""

NETWORK = "marcot-deploy"
# Of the range for tests of networks; no pod of this leaves the host.
SUBNET = "198.18.77.0/24"


class PodmanFailed(Exception):
    """What podman said."""


class Podman:
    def __init__(self, home):
        self.home = pathlib.Path(home)
        (self.home / "networks").mkdir(parents=True)
        self.conf = self.home / "containers.conf"
        self.conf.write_text(CONTAINERS_CONF.format(home=self.home))
        # podman wants 50 characters at most: sockets are in it.
        self.run_home = pathlib.Path(tempfile.mkdtemp(prefix="marcot-", dir="/tmp"))
        self.command = ["podman", "--root", f"{self.home}/root"]
        self.command += ["--runroot", f"{self.run_home}/run", "--tmpdir", f"{self.run_home}/tmp"]

    def environment(self):
        return dict(os.environ, CONTAINERS_CONF=str(self.conf))

    def run(self, *arguments, check=True, timeout=120, **more):
        done = subprocess.run(
            [*self.command, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment(),
            **more,
        )
        if check and done.returncode:
            raise PodmanFailed(
                f"podman {' '.join(map(str, arguments))}: {done.stderr.strip()[-2000:]}"
            )
        return done

    def inspect(self, container):
        return json.loads(self.run("inspect", container).stdout)[0]

    def make_network(self):
        self.run("network", "create", "--subnet", SUBNET, NETWORK)

    def play(self, text):
        return self.run("kube", "play", "--network", NETWORK, "-", input=text)

    def pid(self, container):
        """0 when it does not run."""
        return self.inspect(container)["State"]["Pid"]

    def exit_code(self, container):
        """None while it runs."""
        state = self.inspect(container)["State"]
        return None if state["Running"] else state["ExitCode"]

    def logs(self, container):
        done = self.run("logs", container, check=False)
        return done.stdout + done.stderr

    def remove_pod(self, pod):
        self.run("pod", "rm", "--force", "--time", "0", pod, check=False)

    def execute(self, container, *command, check=True, timeout=60):
        return self.run("exec", container, *command, check=check, timeout=timeout)

    def mounted(self):
        """What a container that was killed leaves behind, the deepest first."""
        lines = pathlib.Path("/proc/mounts").read_text().splitlines()
        points = [line.split()[1] for line in lines]
        own = (f"{self.home}/", f"{self.run_home}/")
        return sorted((point for point in points if point.startswith(own)), reverse=True)

    def clean_up(self):
        """Ends and removes all; says what would not go."""
        self.run("pod", "rm", "--all", "--force", "--time", "0", check=False)
        self.run("rm", "--all", "--force", "--time", "0", check=False)
        self.run("network", "rm", "--force", NETWORK, check=False)
        for _ in range(20):
            for mounted in self.mounted():
                subprocess.run(["umount", mounted], capture_output=True)
            shutil.rmtree(self.run_home, ignore_errors=True)
            shutil.rmtree(self.home, ignore_errors=True)
            if not self.home.exists() and not self.run_home.exists():
                return
            time.sleep(0.5)
        print(f"left: {self.home} {self.run_home}")
