"""What no schema says: that names in rendered objects lead to what is there.

Each check returns lines, one for each thing that is wrong.
"""

import re

import yaml
from rendered import ROOT, containers, matches, name_of, of_kind, pods

# What the pages of the overlays have a person or cert-manager make.
SECRETS_FROM_OUTSIDE = {"marcot-donor-tls", "marcot-recipient-tls", "marcot-client-tls"}
METRICS_PORTS = {"donor-metrics", "recip-metrics"}
DATA_PORTS = {3306, 4406, 4407}
MONITORING = ROOT / "deploy/monitoring"


def check(objects, version):
    found = []
    rules = (selectors, volumes, config, services, policies, monitors, rules_and_dashboards)
    for rule in (*rules, security, long_lived, spools):
        found += rule(objects)
    return found + images(objects, version) + settings(objects)


def selectors(objects):
    wrong = []
    for one in of_kind(objects, "StatefulSet", "Deployment"):
        labels = one["spec"]["template"]["metadata"]["labels"]
        if not matches(one["spec"]["selector"], labels):
            wrong.append(f"{name_of(one)}: its selector does not take its own pods")
    for one in of_kind(objects, "PodDisruptionBudget"):
        labels = [template["metadata"]["labels"] for _, template in pods(objects)]
        if not any(matches(one["spec"]["selector"], some) for some in labels):
            wrong.append(f"{name_of(one)} takes no pod")
    return wrong


def volumes(objects):
    wrong = []
    for one, template in pods(objects):
        claims = [c["metadata"]["name"] for c in one["spec"].get("volumeClaimTemplates", [])]
        there = {v["name"] for v in template["spec"].get("volumes", [])} | set(claims)
        mounted = set()
        for container in containers(template):
            for mount in container.get("volumeMounts", []):
                mounted.add(mount["name"])
                if mount["name"] not in there:
                    wrong.append(f"{name_of(one)}: {container['name']} mounts {mount['name']}")
                if "subPath" in mount:
                    wrong.append(f"{name_of(one)}: {mount['name']} by subPath is never renewed")
        wrong += [f"{name_of(one)}: nobody mounts {name}" for name in sorted(there - mounted)]
    return wrong


def config(objects):
    """ConfigMaps, Secrets, service accounts that pods name."""
    there = {name_of(one) for one in objects}
    made = {one["spec"]["secretName"] for one in of_kind(objects, "Certificate")}
    has_certificates = bool(made)
    wrong = []
    for one, template in pods(objects):
        spec = template["spec"]
        maps = [v["configMap"]["name"] for v in spec.get("volumes", []) if "configMap" in v]
        named = [f"ConfigMap/{name}" for name in maps]
        for container in containers(template):
            for source in container.get("envFrom", []):
                named.append(f"ConfigMap/{source['configMapRef']['name']}")
        if "serviceAccountName" in spec:
            named.append(f"ServiceAccount/{spec['serviceAccountName']}")
        wrong += [f"{name_of(one)} names {name}" for name in named if name not in there]
        for volume in spec.get("volumes", []):
            secret = volume.get("secret", {}).get("secretName")
            outside = made if has_certificates else SECRETS_FROM_OUTSIDE
            if secret and secret not in outside:
                wrong.append(f"{name_of(one)} mounts Secret/{secret}, which nobody makes")
    return wrong


def ports_of(template):
    found = {}
    for container in containers(template):
        for port in container.get("ports", []):
            found[port["name"]] = port["containerPort"]
    return found


def services(objects):
    wrong = []
    for one in of_kind(objects, "Service"):
        selector = {"matchLabels": one["spec"]["selector"]}
        taken = [t for _, t in pods(objects) if matches(selector, t["metadata"]["labels"])]
        if not taken:
            wrong.append(f"{name_of(one)} takes no pod")
        for port in one["spec"]["ports"]:
            if any(port["targetPort"] not in ports_of(template) for template in taken):
                wrong.append(f"{name_of(one)}: no container port {port['targetPort']}")
            if port.get("appProtocol") != "tcp":
                wrong.append(f"{name_of(one)}: a mesh would guess what {port['name']} speaks")
        is_headless = one["spec"].get("clusterIP") == "None"
        if is_headless and not one["spec"].get("publishNotReadyAddresses"):
            wrong.append(f"{name_of(one)}: hides pods that are not ready")
    governing = {one["metadata"]["name"]: one for one in of_kind(objects, "Service")}
    for one in of_kind(objects, "StatefulSet"):
        service = governing.get(one["spec"]["serviceName"])
        if not service or service["spec"].get("clusterIP") != "None":
            wrong.append(f"{name_of(one)}: its pods have no names of their own")
    return wrong


def policies(objects):
    """Every pod is behind a policy; its ports exist; a recipient gets to a donor."""
    wrong = []
    found = of_kind(objects, "NetworkPolicy")
    for one in found:
        if not any(is_of(one, template) for _, template in pods(objects)):
            wrong.append(f"{name_of(one)} takes no pod")
    for one, template in pods(objects):
        own = [policy for policy in found if is_of(policy, template)]
        covered = {kind for p in own for kind in p["spec"]["policyTypes"]}
        if covered != {"Ingress", "Egress"}:
            wrong.append(f"{name_of(one)}: policies cover {sorted(covered)} only")
        known = set(ports_of(template).values())
        for policy in own:
            for rule in policy["spec"].get("ingress", []):
                for port in rule["ports"]:
                    if port["port"] not in known:
                        opened = f"{name_of(policy)} opens {port['port']}"
                        wrong.append(f"{opened}, which {name_of(one)} lacks")
    for source, target, port in (
        ("marcot.dev/recipient", "marcot.dev/donor", 4407),
        ("marcot.dev/clone-client", "marcot.dev/supervise", 4406),
    ):
        for caller, template in labelled(objects, source):
            for called, other in labelled(objects, target):
                if caller is called:
                    continue
                if not may_reach(found, template, other, port):
                    wrong.append(f"{name_of(caller)} may not reach {name_of(called)}:{port}")
    return wrong


def is_of(policy, template):
    return matches(policy["spec"]["podSelector"], template["metadata"]["labels"])


def labelled(objects, label):
    return [(o, t) for o, t in pods(objects) if t["metadata"]["labels"].get(label) == "true"]


def may_reach(found, source, target, port):
    def allowed(policy, direction, peers, own, other):
        if direction.capitalize() not in policy["spec"]["policyTypes"]:
            return False
        if not is_of(policy, own):
            return False
        for rule in policy["spec"].get(direction, []):
            if port not in [p["port"] for p in rule["ports"]]:
                continue
            for peer in rule[peers]:
                # Of another namespace: not these pods.
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    if matches(peer["podSelector"], other["metadata"]["labels"]):
                        return True
        return False

    return any(allowed(p, "egress", "to", source, target) for p in found) and any(
        allowed(p, "ingress", "from", target, source) for p in found
    )


def monitors(objects):
    wrong = []
    for one in of_kind(objects, "PodMonitor"):
        taken = [
            t for _, t in pods(objects) if matches(one["spec"]["selector"], t["metadata"]["labels"])
        ]
        if not taken:
            wrong.append(f"{name_of(one)} takes no pod")
        for endpoint in one["spec"]["podMetricsEndpoints"]:
            if endpoint["port"] not in METRICS_PORTS:
                wrong.append(f"{name_of(one)} scrapes {endpoint['port']}")
            if any(endpoint["port"] not in ports_of(template) for template in taken):
                wrong.append(f"{name_of(one)}: a pod that it takes has no port {endpoint['port']}")
    return wrong


def rules_and_dashboards(objects):
    """With PodMonitors come the rules and dashboards that were tested, unchanged."""
    if not of_kind(objects, "PodMonitor"):
        return []
    wrong = []
    tested = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))
    if [one["spec"] for one in of_kind(objects, "PrometheusRule")] != [tested]:
        wrong.append("PrometheusRule: not the rules of alerts.yaml, once")
    shown = {}
    for one in of_kind(objects, "ConfigMap"):
        if one["metadata"].get("labels", {}).get("grafana_dashboard") == "1":
            shown |= one["data"]
    made = {p.name: p.read_text(encoding="utf-8") for p in (MONITORING / "dashboards").iterdir()}
    if shown != made:
        wrong.append(f"dashboards: {sorted(shown)} are not {sorted(made)}")
    return wrong


def security(objects):
    """The Pod Security Standard `restricted`, and a root file system that nobody writes."""
    wrong = []
    for one, template in pods(objects):
        spec, context = template["spec"], template["spec"].get("securityContext", {})
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(key):
                wrong.append(f"{name_of(one)}: {key}")
        if spec.get("automountServiceAccountToken") is not False:
            wrong.append(f"{name_of(one)}: has a token of the API server")
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            wrong.append(f"{name_of(one)}: may run as root")
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            wrong.append(f"{name_of(one)}: no seccomp profile")
        if any("hostPath" in volume for volume in spec.get("volumes", [])):
            wrong.append(f"{name_of(one)}: a path of the host")
        for container in containers(template):
            own, what = container.get("securityContext", {}), f"{name_of(one)} {container['name']}"
            if own.get("allowPrivilegeEscalation") is not False:
                wrong.append(f"{what}: allowPrivilegeEscalation")
            if own.get("capabilities", {}).get("drop") != ["ALL"] or "add" in own["capabilities"]:
                wrong.append(f"{what}: capabilities")
            if own.get("readOnlyRootFilesystem") is not True:
                wrong.append(f"{what}: its root file system can be written")
            if "runAsUser" in own or "runAsGroup" in own:
                wrong.append(f"{what}: another user than its pod's")
            for kind in ("requests", "limits"):
                if not {"cpu", "memory"} <= set(container.get("resources", {}).get(kind, {})):
                    wrong.append(f"{what}: resources {kind}")
    return wrong


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(s|min|)", text).groups()
    return int(number) * (60 if unit == "min" else 1)


# After its drain: calls (2 s), an install that is left (10 s), spans (3 s).
AFTER_DRAIN_SECONDS = 15


def end_seconds(container):
    """How long a daemon may take to end; 0 for what is none."""
    env = {e["name"]: e.get("value", "") for e in container.get("env", [])}
    bounds = [seconds(env.get(f"MARCOT_{name}", "0")) for name in ("DRAIN_SECONDS", "STOP_GRACE")]
    return sum(bounds) + AFTER_DRAIN_SECONDS if any(bounds) else 0


def long_lived(objects):
    """The grace holds the ends of all containers: native sidecars are told to end once the others have,
    one after the other."""
    wrong = []
    for one, template in pods(objects):
        spec = template["spec"]
        grace = spec.get("terminationGracePeriodSeconds", 30)
        before = spec.get("initContainers", [])
        sidecars = [end_seconds(c) for c in before if c.get("restartPolicy") == "Always"]
        alone = [end_seconds(c) for c in before if c.get("restartPolicy") != "Always"]
        others = [end_seconds(c) for c in spec["containers"]]
        needed = max(max(others) + sum(sidecars), *alone, 0)
        if needed > grace:
            wrong.append(f"{name_of(one)} may take {needed} s, of a grace of {grace} s")
    return wrong


def quantity(text):
    """Bytes, as Kubernetes (5Gi) and the daemons (4GiB) write them."""
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)B?", text).groups()
    return int(number) << {"Mi": 20, "Gi": 30}[unit]


def spools(objects):
    """Redo in an emptyDir is held by the quota alone: it is below the volume's size, and the scheduler
    knows of both."""
    wrong = []
    for one, template in pods(objects):
        sizes = {
            v["name"]: v["emptyDir"].get("sizeLimit", "0Mi")
            for v in template["spec"].get("volumes", [])
            if "emptyDir" in v
        }
        for container in containers(template):
            env = {e["name"]: e.get("value", "") for e in container.get("env", [])}
            mounts = {m["mountPath"]: m["name"] for m in container.get("volumeMounts", [])}
            size = sizes.get(mounts.get(env.get("MARCOT_SPOOL_DIRECTORY")))
            if size is None:
                continue
            quota = env.get("MARCOT_SPOOL_QUOTA", "16GiB")
            asked = container["resources"]["requests"].get("ephemeral-storage", "0Mi")
            if not quantity(quota) < quantity(size) <= quantity(asked):
                what = f"{name_of(one)} {container['name']}"
                wrong.append(f"{what}: quota {quota}, volume {size}, asks for {asked}")
    return wrong


def images(objects, version):
    wrong = []
    for one, template in pods(objects):
        for container in containers(template):
            image = container["image"].split("/")[-1]
            if image.startswith("marcot-") and not image.endswith(f":{version}"):
                wrong.append(f"{name_of(one)}: {image}, and this is {version}")
            if ":" not in image or image.endswith(":latest"):
                wrong.append(f"{name_of(one)}: {image} names no version")
    return wrong


def settings(objects):
    """Addresses and paths in the environment lead to ports and mounts of the same container."""
    wrong = []
    for one, template in pods(objects):
        for container in containers(template):
            what = f"{name_of(one)} {container['name']}"
            known = {p["containerPort"] for p in container.get("ports", [])}
            mounts = [m["mountPath"] for m in container.get("volumeMounts", [])]
            for pair in container.get("env", []):
                value = pair.get("value", "")
                for port in re.findall(r"0\.0\.0\.0:(\d+)", value):
                    if int(port) not in known:
                        wrong.append(f"{what}: {pair['name']} listens on {port}, no port of it")
                for path in re.findall(r"(?:^|:)(/[^,:]+)", value):
                    if not any(path == m or path.startswith(m + "/") for m in mounts):
                        wrong.append(f"{what}: {pair['name']}={path} is in no mount")
    return wrong
