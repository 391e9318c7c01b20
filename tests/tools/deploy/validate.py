"""Schemas of Kubernetes at two versions, and checkov."""

import json
import subprocess
import sys

import kubernetes_validate
import yaml

from rendered import Wrong, name_of

# Kinds of other projects, whose schemas are in no package: references.py looks at them.
FOREIGN = {"Certificate", "Issuer", "PodMonitor", "PrometheusRule"}

# What checkov asks for and is not done, each with its reason.
SKIPPED = {
    "CKV_K8S_43": "digests belong to whoever mirrors the images",
    "CKV_K8S_15": "tags are versions, which do not move: IfNotPresent starts without a registry",
    "CKV_K8S_40": "999 is the database image's user, which a donor must be as well",
    "CKV_K8S_8": "the database gets no liveness probe: its recovery must not be killed",
}


def schemas(objects, versions):
    checked = 0
    for version in versions:
        for one in objects:
            if one["kind"] in FOREIGN:
                continue
            try:
                kubernetes_validate.validate(one, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                raise Wrong(f"{name_of(one)} at Kubernetes {version}: {error.message}") from error
            checked += 1
    return checked


def checkov(overlays, directory):
    """All overlays in one run, for its start takes longest; returns how many checks passed."""
    directory.mkdir()
    for name, objects in overlays.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump_all(objects))
    done = subprocess.run(
        [sys.executable, "-m", "checkov.main", "--directory", directory]
        + ["--framework", "kubernetes", "--output", "json", "--quiet", "--compact"]
        + ["--skip-download"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    try:
        report = json.loads(done.stdout)
    except ValueError as error:
        raise Wrong(f"checkov: {done.stdout[-500:]}{done.stderr[-500:]}") from error
    failed = report["results"]["failed_checks"]
    open_ones = [one for one in failed if one["check_id"] not in SKIPPED]
    if open_ones:
        lines = {
            f"{one['file_path']}: {one['check_id']} {one['check_name']}: {one['resource']}"
            for one in open_ones
        }
        raise Wrong("checkov:\n  " + "\n  ".join(sorted(lines)))
    if not report["summary"]["passed"]:
        raise Wrong("checkov has checked nothing")
    idle = set(SKIPPED) - {one["check_id"] for one in failed}
    if idle:
        raise Wrong(f"checkov complains of none of {sorted(idle)}: take them off the list")
    return report["summary"]["passed"]
