"""Renders an overlay, and finds its objects."""

import pathlib
import subprocess

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[3]
OVERLAYS = ROOT / "deploy/kustomize/overlays"


class Wrong(Exception):
    """What is wrong, for a person."""


def render(kubectl, overlay):
    """Every object of an overlay, as `kubectl apply -k` would send it."""
    path = OVERLAYS / overlay
    done = subprocess.run(
        [kubectl, "kustomize", path], capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise Wrong(f"kubectl kustomize {path}: {done.stderr.strip()}")
    objects = [one for one in yaml.safe_load_all(done.stdout) if one]
    if not objects:
        raise Wrong(f"{path} renders nothing")
    return objects


def name_of(one):
    return f"{one['kind']}/{one['metadata']['name']}"


def of_kind(objects, *kinds):
    return [one for one in objects if one["kind"] in kinds]


def pods(objects):
    """Each pod template, with the object that it is of."""
    workloads = of_kind(objects, "StatefulSet", "Deployment", "DaemonSet", "Job")
    return [(one, one["spec"]["template"]) for one in workloads]


def containers(template):
    spec = template["spec"]
    return spec.get("initContainers", []) + spec["containers"]


def matches(selector, labels):
    """Whether a label selector takes an object with these labels."""
    wanted = selector.get("matchLabels", {})
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    for rule in selector.get("matchExpressions", []):
        held = labels.get(rule["key"])
        taken = {
            "In": held in rule.get("values", []),
            "NotIn": held not in rule.get("values", []),
            "Exists": held is not None,
            "DoesNotExist": held is None,
        }
        if not taken[rule["operator"]]:
            return False
    return True
