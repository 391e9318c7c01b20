"""From rendered objects to what podman 4.3 can play.

podman knows no StatefulSet and no Job, waits for ever for a native sidecar, passes probes and grace over,
and shows Secrets as they are encoded. So of each StatefulSet and Job one pod is made, as its controller
would; init containers become pods that are played one after another before it, by the same name, as the
kubelet starts them; native sidecars become containers. Volumes are directories of this host with the
owner that `fsGroup` gives: root's, writable by the group. Secrets and ConfigMaps are laid out as the
kubelet does, behind a link that is exchanged when they change.

What is lost on the way is said in deploy/README.md.
"""

import base64
import os
import pathlib
import re
import shutil

import yaml

from rendered import of_kind, pods


class Pod:
    """One pod: what is played before it, itself, and what the kubelet would ask it."""

    def __init__(self, name, stages, probes, grace):
        self.name = name
        # Texts for `podman kube play`, each with the containers in it.
        self.stages = stages
        # {container: {"readiness"|"liveness"|"startup": probe}}
        self.probes = probes
        self.grace = grace


class Cluster:
    """Directories that stand for a cluster's volumes, and the pods of some rendered objects."""

    def __init__(self, directory, objects, environment=None):
        self.directory = pathlib.Path(directory)
        self.objects = objects
        # {container: {variable: value}}: what a test sets otherwise.
        self.environment = environment or {}
        self.services = [one["metadata"]["name"] for one in of_kind(objects, "Service")]
        for one in of_kind(objects, "Secret", "ConfigMap"):
            self.publish(one)

    def pods(self):
        return {pod.name: pod for pod in (self.pod(one, t) for one, t in pods(self.objects))}

    def publish(self, one):
        """A Secret or a ConfigMap, as the kubelet writes it: all files change at one moment."""
        home = self.directory / one["kind"].lower() / one["metadata"]["name"]
        home.mkdir(parents=True, exist_ok=True)
        number = len(list(home.glob("..data-*")))
        files = home / f"..data-{number}"
        files.mkdir()
        for name, text in one.get("data", {}).items():
            data = base64.b64decode(text) if one["kind"] == "Secret" else text.encode()
            (files / name).write_bytes(data)
            os.chmod(files / name, 0o440 if one["kind"] == "Secret" else 0o444)
            os.chown(files / name, 0, self.group_of(one))
        swapped = home / "..data-new"
        swapped.symlink_to(files.name)
        swapped.rename(home / "..data")
        for name in one.get("data", {}):
            if not (home / name).is_symlink():
                (home / name).symlink_to(f"..data/{name}")

    def group_of(self, one):
        """The fsGroup of the pods that mount a Secret or a ConfigMap."""
        name = one["metadata"]["name"]
        for _, template in pods(self.objects):
            for volume in template["spec"].get("volumes", []):
                mounted = volume.get("secret", {}).get("secretName")
                if name in (mounted, volume.get("configMap", {}).get("name")):
                    return template["spec"]["securityContext"]["fsGroup"]
        return 0

    def pod(self, one, template):
        is_job = one["kind"] == "Job"
        name = one["metadata"]["name"] + ("" if is_job else "-0")
        spec = template["spec"]
        labels = dict(template["metadata"].get("labels", {}))
        if is_job:
            labels["batch.kubernetes.io/job-name"] = one["metadata"]["name"]
        volumes = self.volumes(name, spec, one["spec"].get("volumeClaimTemplates", []))
        probes, first, beside = {}, [], []
        for container in spec.get("initContainers", []):
            is_sidecar = container.get("restartPolicy") == "Always"
            (beside if is_sidecar else first).append(container)
        make = lambda c: self.container(c, spec["securityContext"], labels, probes)
        stages = [[make(container)] for container in first]
        stages.append([make(container) for container in beside + spec["containers"]])
        texts = [self.text(name, stage, volumes, spec) for stage in stages]
        names = [[container["name"] for container in stage] for stage in stages]
        return Pod(
            name, list(zip(texts, names)), probes, spec.get("terminationGracePeriodSeconds", 30)
        )

    def text(self, name, stage, volumes, spec):
        mounted = {m["name"] for container in stage for m in container.get("volumeMounts", [])}
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name},
                "spec": {
                    "restartPolicy": "Never",
                    "containers": stage,
                    "volumes": [volume for volume in volumes if volume["name"] in mounted],
                },
            }
        )

    def container(self, container, context, labels, probes):
        made = {
            key: container[key]
            for key in ("name", "command", "args", "resources", "volumeMounts")
            if key in container
        }
        found = {key: container[f"{key}Probe"] for key in ("readiness", "liveness", "startup")
                 if f"{key}Probe" in container}
        if found:
            probes[container["name"]] = found
        image = container["image"]
        made["image"] = image if "/" in image else f"localhost/{image}"
        made["imagePullPolicy"] = "Never"
        environment = self.variables(container, labels)
        made["env"] = [{"name": k, "value": v} for k, v in environment.items()]
        expand = lambda text: re.sub(
            r"\$\((\w+)\)", lambda m: environment.get(m[1], m[0]), text
        )
        for key in ("command", "args"):
            if key in made:
                made[key] = [expand(text) for text in made[key]]
        made["securityContext"] = dict(
            container["securityContext"],
            runAsUser=context["runAsUser"],
            runAsGroup=context["runAsGroup"],
            runAsNonRoot=True,
        )
        return made

    def variables(self, container, labels):
        maps = of_kind(self.objects, "ConfigMap")
        maps = {one["metadata"]["name"]: one.get("data", {}) for one in maps}
        found = {}
        for source in container.get("envFrom", []):
            found.update(maps[source["configMapRef"]["name"]])
        for pair in container.get("env", []):
            if "valueFrom" in pair:
                key = re.fullmatch(
                    r"metadata\.labels\['(.*)'\]", pair["valueFrom"]["fieldRef"]["fieldPath"]
                )[1]
                found[pair["name"]] = labels[key]
            else:
                found[pair["name"]] = pair["value"]
        found.update(self.environment.get(container["name"], {}))
        return {name: self.by_pod_name(value) for name, value in found.items()}

    def by_pod_name(self, value):
        """podman's DNS knows pods, and no Services that their names could be below."""
        for service in self.services:
            value = re.sub(rf"([\w*-]+)\.{service}(?=[:,]|$)", r"\1", value)
        return value

    def volumes(self, name, spec, claims):
        made, group = [], spec["securityContext"]["fsGroup"]
        for claim in claims:
            claimed = claim["metadata"]["name"]
            made.append((claimed, self.writable(f"claim/{claimed}-{name}", group)))
        for volume in spec.get("volumes", []):
            if "emptyDir" in volume:
                path = self.writable(f"empty/{name}/{volume['name']}", group)
            elif "secret" in volume:
                path = self.directory / "secret" / volume["secret"]["secretName"]
            else:
                path = self.directory / "configmap" / volume["configMap"]["name"]
            made.append((volume["name"], path))
        return [{"name": n, "hostPath": {"path": str(p), "type": "Directory"}} for n, p in made]

    def writable(self, name, group):
        path = self.directory / name
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, 0, group)
        os.chmod(path, 0o2775)
        return path

    def forget_empty_directories(self, pod):
        """They go with their pod."""
        shutil.rmtree(self.directory / "empty" / pod, ignore_errors=True)
