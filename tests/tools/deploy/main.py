"""`make deploy-test`, once tools and images are there: see deploy_test.sh, which starts it.

main.py WORK VERSION DATABASE_TREE SHELL_TREE
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import traceback

import references
import stories
import validate
from podman import Podman
from rendered import ROOT, Wrong, render

# By profile: without optimisation a program is twice as large.
IMAGE_BYTES_MAX = {"release": 25_000_000, "dev": 60_000_000}
# The oldest with what an overlay needs (native sidecars: 1.29; grpc probes: 1.25), and the newest that
# the schemas are there for.
OVERLAYS = {
    "quickstart": ("1.29", "1.37"),
    "production": ("1.29", "1.37"),
    "before-1.29": ("1.25", "1.37"),
}
KUBECTL = pathlib.Path(sys.prefix) / "bin/kubectl"


class Tally:
    def __init__(self):
        self.done = self.all = 0

    def story(self, name, work, *arguments):
        self.all += 1
        begin = time.monotonic()
        try:
            note = work(*arguments)
        except Exception as error:  # Whatever it is, the others are told of as well.
            print(f"FAILED {name}: {error}", flush=True)
            if not isinstance(error, Wrong):
                traceback.print_exc()
            return False
        took = time.monotonic() - begin
        print(f"ok     {name} ({took:.1f} s{', ' + note if note else ''})", flush=True)
        self.done += 1
        return True

    def chain(self, what, tests, owner):
        """Stories that go on from one another: one that fails is the last."""
        for number, test in enumerate(tests):
            name = f"{what}: {test.__name__.replace('_', ' ')}"
            if owner is None or not self.story(name, test, owner):
                rest = tests[number + (owner is not None):]
                self.all += len(rest)
                for other in rest:
                    name = f"{what}: {other.__name__.replace('_', ' ')}"
                    print(f"FAILED {name}: not reached", flush=True)
                return


def image(podman, name, version, programs):
    tag = f"localhost/{name}:{version}"
    found = podman.inspect(tag)
    largest = IMAGE_BYTES_MAX[os.environ.get("PROFILE", "release")]
    if not 1_000_000 < found["Size"] < largest:
        raise Wrong(f"{tag} has {found['Size']} bytes, at most {largest} are allowed")
    if found["Config"]["User"] != "65532:65532":
        raise Wrong(f"{tag} runs as {found['Config']['User']}")
    if len(found["RootFS"]["Layers"]) != 1:
        raise Wrong(f"{tag} holds more than its programs")
    bare = ["--rm", "--read-only", "--network", "none", "--cap-drop", "all"]
    bare += ["--security-opt", "no-new-privileges", "--entrypoint"]
    for program in programs:
        said = podman.run("run", *bare, f"/{program}", tag, "--version").stdout
        if f"{program} {version}" not in said:
            raise Wrong(f"{program} says {said!r}")
    serves(podman, tag, programs[0])
    return f"{found['Size'] / 1e6:.1f} MB"


def serves(podman, tag, program):
    """The daemon itself, read-only and as nobody: it takes calls, and ends when it is told to."""
    name = f"try-{program}"
    arguments = ["--data-directory", "/data", "--log", "info"]
    if program == "marcot-recipient":
        arguments += ["--state-directory", "/data/state"]
    podman.run(
        "run", "--detach", "--name", name, "--read-only", "--cap-drop", "all", "--network", "none",
        "--tmpfs", "/data:mode=0777", "--tmpfs", "/var/tmp:mode=0777", tag, *arguments,
    )
    stories.wait_for(f"{tag} to serve", lambda: "takes calls" in podman.logs(name), 20)
    podman.run("stop", "--time", "20", name)
    code = podman.exit_code(name)
    podman.run("rm", "--force", name)
    if code:
        raise Wrong(f"{tag} has ended with {code}")


def overlay(name, versions, version):
    objects = render(KUBECTL, name)
    wrong = references.check(objects, version)
    if wrong:
        raise Wrong("\n  ".join(["", *wrong]))
    return f"{validate.schemas(objects, versions)} objects against schemas"


def hardening(work):
    overlays = {name: render(KUBECTL, name) for name in OVERLAYS}
    return f"{validate.checkov(overlays, work / 'checkov')} checks passed"


def broken(name, overlay, instance, change, version):
    """One change of a pod's template, which must be complained of."""
    objects = render(KUBECTL, overlay)
    one = next(
        o for o in objects if o["kind"] == "StatefulSet" and instance in o["metadata"]["name"]
    )
    change(one["spec"]["template"])
    if not references.check(objects, version):
        raise Wrong(f"a manifest that is broken ({name}) passes")


def broken_manifests_are_found(version):
    """The checks themselves: each of these changes must be complained of."""
    changes = {
        "selector": lambda t: t["metadata"]["labels"].pop("app.kubernetes.io/name"),
        "mount": lambda t: t["spec"]["volumes"].pop(),
        "root": lambda t: t["spec"]["securityContext"].pop("runAsNonRoot"),
        "grace": lambda t: t["spec"].update(terminationGracePeriodSeconds=30),
        "port": lambda t: references.containers(t)[-2].update(ports=[]),
        "policy": lambda t: t["metadata"]["labels"].pop("marcot.dev/donor"),
        "spool": lambda t: t["spec"]["volumes"].append(
            {"name": "donor-spool", "emptyDir": {"sizeLimit": "4Gi"}}
        ),
    }
    for name, change in changes.items():
        broken(name, "quickstart", "source", change, version)
    # Enough for each of its containers, but not for one after the other.
    def short(template):
        template["spec"].update(terminationGracePeriodSeconds=180)

    broken("sum of ends", "production", "standby", short, version)
    objects = render(KUBECTL, "quickstart")
    objects[-1]["spec"]["noSuchField"] = 1
    try:
        validate.schemas(objects, ["1.37"])
    except Wrong:
        return f"{len(changes) + 2} ways"
    raise Wrong("an unknown field passes")


def database_image(podman, trees, work):
    """The stock server of Debian, under the name that the manifests ask for."""
    root = work / "database"
    root.mkdir()
    for tree in trees:
        subprocess.run(["cp", "-a", f"{tree}/.", root], check=True)
    for path in ("etc/mysql", "usr/local/bin", "usr/share/perl", "usr/lib/x86_64-linux-gnu/perl"):
        shutil.rmtree(root / path, ignore_errors=True)
        (root / path).mkdir(parents=True)
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nmysql:x:999:999::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nmysql:x:999:\n")
    (root / "etc/mysql/my.cnf").write_text("!includedir /etc/mysql/conf.d/\n")
    for path in ("tmp", "etc/mysql/conf.d", "docker-entrypoint-initdb.d"):
        (root / path).mkdir(parents=True, exist_ok=True)
    entrypoint = pathlib.Path(__file__).with_name("entrypoint.sh")
    shutil.copy(entrypoint, root / "usr/local/bin/docker-entrypoint.sh")
    archive = subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE)
    podman.run(
        "import", "--change", "ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "--change", 'ENTRYPOINT ["docker-entrypoint.sh"]', "-", "docker.io/library/mariadb:10.11",
        stdin=archive.stdout,
    )
    if archive.wait():
        raise Wrong("tar failed")
    shutil.rmtree(root)


def played(podman, make, directory):
    try:
        return make(podman, KUBECTL, directory)
    except Exception:
        traceback.print_exc()
        return None


def main():
    # What follows `finally` is run then as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work, version, trees = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    podman = Podman(work / "podman")
    tally = Tally()
    try:
        build = [ROOT / "deploy/build-images.sh"]
        begin = time.monotonic()
        subprocess.run(
            build, check=True,
            env=dict(podman.environment(), CONTAINER_TOOL=" ".join(podman.command)),
        )
        print(f"images built ({time.monotonic() - begin:.0f} s)", flush=True)
        tally.story("image marcot-donor", image, podman, "marcot-donor", version, ["marcot-donor"])
        programs = ["marcot-recipient", "marcot"]
        tally.story("image marcot-recipient", image, podman, "marcot-recipient", version, programs)
        for name, versions in OVERLAYS.items():
            tally.story(f"overlay {name}", overlay, name, versions, version)
        tally.story("checkov", hardening, work)
        tally.story("broken manifests are found", broken_manifests_are_found, version)
        database_image(podman, trees, work)
        podman.make_network()
        for what, make, tests in (
            ("quickstart", stories.Quickstart, stories.QUICKSTART),
            ("production", stories.Production, stories.PRODUCTION),
        ):
            owner = played(podman, make, work / what)
            tally.chain(what, tests, owner)
            if owner:
                owner.end_load()
            podman.run("pod", "rm", "--all", "--force", "--time", "0", check=False)
    finally:
        podman.clean_up()
    print(f"deployed {tally.done}/{tally.all}", flush=True)
    return 0 if tally.done == tally.all else 1


if __name__ == "__main__":
    sys.exit(main())
