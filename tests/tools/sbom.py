#!/usr/bin/env python3
"""Bill of materials of what ships: CycloneDX 1.5, from cargo's own resolution.

    sbom.py OUTPUT           writes it, and checks it
    sbom.py --check OUTPUT   checks one that is there

A component is "required" when its code is in a program that ships, "excluded" when it only takes
part in the build. The check asks another source than the one that it was made from: every package
that `cargo tree` finds in the programs must be in it, with the checksum of Cargo.lock.
"""

import json
import pathlib
import subprocess
import sys
import tomllib
import uuid

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Packages whose programs ship: marcot-donor; marcot-recipient and marcot.
SHIPPED = ["marcot-donor", "marcot-recipient"]
TARGETS = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"]


def cargo(*arguments):
    command = ["cargo", *arguments, "--locked"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def checksums():
    """SHA-256 of each package of a registry, by name and version."""
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text())
    return {(p["name"], p["version"]): p.get("checksum") for p in lock["package"]}


def reached(nodes, roots, kinds):
    """Ids of what is reached from roots over dependencies of these kinds."""
    seen, left = set(), list(roots)
    while left:
        package = left.pop()
        if package in seen:
            continue
        seen.add(package)
        for dep in nodes[package]["deps"]:
            if any(kind["kind"] in kinds for kind in dep["dep_kinds"]):
                left.append(dep["pkg"])
    return seen


def purl(package):
    return f"pkg:cargo/{package['name']}@{package['version']}"


def component(package, sums, ships):
    made = {
        "type": "library",
        "bom-ref": purl(package),
        "name": package["name"],
        "version": package["version"],
        "purl": purl(package),
        "scope": "required" if ships else "excluded",
    }
    if package.get("license"):
        made["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    digest = sums.get((package["name"], package["version"]))
    if digest:
        made["hashes"] = [{"alg": "SHA-256", "content": digest}]
    if package.get("repository"):
        made["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
    return made


def make():
    sums = checksums()
    packages, shipped, built, edges = {}, set(), set(), {}
    for target in TARGETS:
        metadata = json.loads(cargo("metadata", "--format-version=1", "--filter-platform", target))
        nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
        by_id = {package["id"]: package for package in metadata["packages"]}
        packages |= by_id
        roots = [p["id"] for p in metadata["packages"] if p["name"] in SHIPPED and not p["source"]]
        assert len(roots) == len(SHIPPED), f"{SHIPPED}: found {roots}"
        # The code of a procedural macro runs in the build, and so does what it needs.
        is_macro = {i for i, p in by_id.items() if any("proc-macro" in t["kind"] for t in p["targets"])}
        own = {i: {"deps": [d for d in n["deps"] if d["pkg"] not in is_macro]} for i, n in nodes.items()}
        shipped |= reached(own, roots, {None})
        built |= reached(nodes, roots, {None, "build"})
        for package in built:
            deps = [
                dep["pkg"]
                for dep in nodes.get(package, {"deps": []})["deps"]
                if any(kind["kind"] in (None, "build") for kind in dep["dep_kinds"])
            ]
            edges.setdefault(package, set()).update(deps)
    order = sorted(built, key=lambda i: (packages[i]["name"], packages[i]["version"]))
    lock = (ROOT / "Cargo.lock").read_text()
    version = next(p["version"] for p in packages.values() if p["name"] == SHIPPED[0])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        # The same for the same Cargo.lock, so that two builds can be compared.
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, lock)}",
        "version": 1,
        "metadata": {
            "component": {"type": "application", "bom-ref": "marcot", "name": "marcot", "version": version}
        },
        "components": [component(packages[i], sums, i in shipped) for i in order],
        "dependencies": [
            {"ref": purl(packages[i]), "dependsOn": sorted({purl(packages[d]) for d in edges[i] if d in built})}
            for i in order
        ],
    }


def shipped_by_tree():
    """Names and versions of all that is linked into what ships, as `cargo tree` says."""
    found = set()
    for target in TARGETS:
        wanted = [word for name in SHIPPED for word in ("--package", name)]
        text = cargo(
            "tree", *wanted, "--edges=normal,no-proc-macro", "--target", target, "--prefix=none", "--format={p}"
        )
        for line in text.splitlines():
            words = line.split()
            if len(words) >= 2:
                found.add((words[0], words[1].removeprefix("v")))
    return found


def check(bom):
    """What is wrong with it."""
    problems = []
    if (bom.get("bomFormat"), bom.get("specVersion")) != ("CycloneDX", "1.5"):
        problems.append("it is no CycloneDX 1.5")
    components = {(c["name"], c["version"]): c for c in bom["components"]}
    if len(components) != len(bom["components"]):
        problems.append("a component is there twice")
    sums = checksums()
    needed = shipped_by_tree()
    if len(needed) < 50:
        problems.append(f"cargo tree found {len(needed)} packages")
    for name, version in sorted(needed):
        found = components.get((name, version))
        if found is None or found["scope"] != "required":
            problems.append(f"{name} {version} ships, and is not in it")
            continue
        digest = sums.get((name, version))
        if digest and {"alg": "SHA-256", "content": digest} not in found.get("hashes", []):
            problems.append(f"{name} {version} has another checksum in Cargo.lock")
        if digest and not found.get("licenses"):
            problems.append(f"{name} {version} has no licence")
    refs = {c["bom-ref"] for c in bom["components"]}
    for dependency in bom["dependencies"]:
        for ref in [dependency["ref"], *dependency["dependsOn"]]:
            if ref not in refs:
                problems.append(f"{ref} is no component")
    return problems, len(needed)


def main(arguments):
    if arguments[:1] == ["--check"]:
        output = pathlib.Path(arguments[1])
    else:
        output = pathlib.Path(arguments[0])
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(make(), indent=1, sort_keys=True) + "\n")
    bom = json.loads(output.read_text())
    problems, needed = check(bom)
    for problem in problems:
        print(f"sbom: {problem}", file=sys.stderr)
    if problems:
        return 1
    total = len(bom["components"])
    print(f"sbom: {total} components, {needed} of them ship: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
