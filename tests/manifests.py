"""Checks of rendered manifests that need no cluster: our schema, who names whom, sizes that fit, commands."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kuberay
import yaml
from kuberay import quantity
from kustomize import Doc, containers

_MAX_NAME, _MAX_RAYJOB_NAME, _CRON_SUFFIX = 63, 47, 15  # KubeRay makes longer names of a RayJob's; a CronJob adds 15


def problems(docs: list[Doc]) -> list[str]:
    """Everything that is wrong with the manifests of one overlay, as sentences."""
    found = [*_schema(docs), *_names(docs), *_references(docs), *_network(docs), *_access(docs)]
    for doc in docs:
        if doc["kind"] == "RayJob":
            found += [f"RayJob {doc['metadata']['name']}: {problem}" for problem in kuberay.problems(doc["spec"])]
            found += _sizes(doc, docs)
        if doc["kind"] == "CronJob":
            found += _cronjob(doc)
    return found


def pods(docs: list[Doc]) -> Iterator[tuple[str, Doc]]:
    """Every pod template with a name for it."""

    def find(node: Any, where: str) -> Iterator[tuple[str, Doc]]:
        if isinstance(node, dict):
            if "containers" in node.get("spec", {}) and "apiVersion" not in node:
                yield where, node
            for key, value in node.items():
                yield from find(value, f"{where}/{key}")
        elif isinstance(node, list):
            for number, value in enumerate(node):
                yield from find(value, f"{where}/{number}")

    for doc in docs:
        yield from find(doc, f"{doc['kind']}/{doc['metadata']['name']}")


def config_maps(docs: list[Doc]) -> dict[str, dict[str, str]]:
    """Data of the ConfigMaps by name."""
    return {doc["metadata"]["name"]: doc["data"] for doc in docs if doc["kind"] == "ConfigMap"}


def _schema(docs: list[Doc]) -> Iterator[str]:
    """Unknown and missing fields, wrong types and values."""
    for doc in docs:
        validator = _validators().get(f"{doc.get('apiVersion')} {doc.get('kind')}")
        if validator is None:
            yield f"{doc.get('apiVersion')} {doc.get('kind')} is in no schema: add it to tests/manifest_schema.yaml"
            continue
        for error in validator.iter_errors(doc):
            yield f"{doc['kind']}/{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"


@functools.cache
def _validators() -> dict[str, jsonschema.Draft202012Validator]:
    """One for each `apiVersion kind`."""
    told = yaml.safe_load((Path(__file__).parent / "manifest_schema.yaml").read_text())
    common = {"apiVersion": {}, "kind": {}, "metadata": {"$ref": "#/$defs/metadata"}}
    found = {}
    for kind, own in told["kinds"].items():
        whole = {**own, "properties": common | own.get("properties", {}), "$defs": told["$defs"]}
        found[kind] = jsonschema.Draft202012Validator(_strict(whole))
    return found


def _strict(node: Any) -> Any:
    """Objects that name their properties take no others; the properties of `$defs` and `properties` are no objects."""
    if isinstance(node, list):
        return [_strict(value) for value in node]
    if not isinstance(node, dict):
        return node
    result = {
        key: {name: _strict(value) for name, value in children.items()}
        if key in ("properties", "$defs") and isinstance(children, dict)
        else _strict(children)
        for key, children in node.items()
    }
    if result.get("type") == "object" and "properties" in result:
        result.setdefault("additionalProperties", False)
    return result


def openapi(node: Any) -> Any:
    """A schema of the Kubernetes API as a strict JSON schema: unknown fields are errors, defaults and formats go."""
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = (
        "type",
        "enum",
        "required",
        "pattern",
        "minimum",
        "maximum",
        "minItems",
        "maxItems",
        "minLength",
        "maxLength",
    )
    result = {key: node[key] for key in kept if key in node}
    if "properties" in node:
        result["properties"] = {name: openapi(value) for name, value in node["properties"].items()}
        if "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    for key in ("items", "additionalProperties", "not"):
        if key in node:
            result[key] = openapi(node[key])
    for key in ("anyOf", "allOf", "oneOf"):
        if key in node:
            result[key] = [openapi(value) for value in node[key]]
    if node.get("nullable") and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    return result


def _names(docs: list[Doc]) -> Iterator[str]:
    for doc in docs:
        name, kind = doc["metadata"]["name"], doc["kind"]
        longest = {"RayJob": _MAX_RAYJOB_NAME, "CronJob": _MAX_RAYJOB_NAME - _CRON_SUFFIX}.get(kind, _MAX_NAME)
        if len(name) > longest:
            yield f"{kind} {name} is longer than {longest} characters, of which other names are made"
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
            yield f"{kind} {name} is no DNS label"


def _references(docs: list[Doc]) -> Iterator[str]:
    """Volumes, ConfigMaps, accounts, claims and ports that are named but not there; images without a version."""
    there = {(doc["kind"], doc["metadata"]["name"]) for doc in docs}
    for where, pod in pods(docs):
        spec = pod["spec"]
        if ("ServiceAccount", spec.get("serviceAccountName")) not in there:
            yield f"{where}: there is no ServiceAccount {spec.get('serviceAccountName')}"
        for volume in spec.get("volumes", []):
            for key, kind, field in (("configMap", "ConfigMap", "name"),
                                     ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName")):  # fmt: skip
                if key in volume and (kind, volume[key][field]) not in there:
                    yield f"{where}: there is no {kind} {volume[key][field]}"
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        for container in containers(spec):
            if missing := {mount["name"] for mount in container.get("volumeMounts", [])} - volumes:
                yield f"{where}: there is no volume {', '.join(sorted(missing))}"
            for source in container.get("envFrom", []):
                name = source.get("configMapRef", {}).get("name")
                if name and ("ConfigMap", name) not in there:
                    yield f"{where}: there is no ConfigMap {name}"
                secret = source.get("secretRef", {})
                if secret and not secret.get("optional"):
                    yield f"{where}: the Secret {secret['name']} is in no manifest, and not optional"
            if not re.fullmatch(r"[^:@]+(:[^:@]+)?(@sha256:[0-9a-f]{64}|:(?!latest$)[\w.-]+)", container["image"]):
                yield f"{where}: the image {container['image']} has no version"
            ports = {port.get("name") for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                port = next((h.get("port") for h in container.get(probe, {}).values() if isinstance(h, dict)), None)
                if isinstance(port, str) and port not in ports:
                    yield f"{where}: {probe} names the port {port}, which does not exist"


def _network(docs: list[Doc]) -> Iterator[str]:
    """Every pod stands behind the policy, and nothing but its own kind reaches all of its ports."""
    policies = [doc["spec"] for doc in docs if doc["kind"] == "NetworkPolicy"]
    for where, pod in pods(docs):
        labels = pod.get("metadata", {}).get("labels", {})
        if not any(p["podSelector"].get("matchLabels", {}).items() <= labels.items() for p in policies):
            yield f"{where}: no NetworkPolicy selects this pod"
    for policy in policies:
        if "Ingress" not in policy["policyTypes"]:
            yield "a NetworkPolicy that lets everyone in"
        for rule in policy.get("ingress", []):
            own = [peer for peer in rule.get("from", []) if peer.get("podSelector") == policy["podSelector"]]
            if "ports" not in rule and len(own) != len(rule.get("from", [None])):
                yield "a NetworkPolicy lets others reach all ports"


def _access(docs: list[Doc]) -> Iterator[str]:
    there = {(doc["kind"], doc["metadata"]["name"]) for doc in docs}
    for doc in docs:
        if doc["kind"] == "RoleBinding":
            for ref in [doc["roleRef"], *doc["subjects"]]:
                if (ref["kind"], ref["name"]) not in there:
                    yield f"RoleBinding {doc['metadata']['name']}: there is no {ref['kind']} {ref['name']}"
        if doc["kind"] == "Role":
            for rule in doc["rules"]:
                if "*" in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]:
                    yield f"Role {doc['metadata']['name']} allows everything"


def _cronjob(doc: Doc) -> Iterator[str]:
    """The pod has to stay as long as the RayJob runs, and its exit codes have to be told from an eviction."""
    job = doc["spec"]["jobTemplate"]["spec"]
    pod, where = job["template"]["spec"], f"CronJob {doc['metadata']['name']}"
    if doc["spec"].get("concurrencyPolicy") != "Forbid":
        yield f"{where}: two runs at once are not forbidden"
    if pod.get("restartPolicy") != "Never":
        yield f"{where}: podFailurePolicy needs restartPolicy Never"
    if "--name=$(JOB_NAME)" in pod["containers"][0].get("args", []):
        yield f"{where}: KubeRay's submitter would be a Job of the name that this Job has"
    names = {container["name"] for container in pod["containers"]}
    for rule in job.get("podFailurePolicy", {}).get("rules", []):
        if rule.get("onExitCodes", {}).get("containerName", pod["containers"][0]["name"]) not in names:
            yield f"{where}: podFailurePolicy names a container that does not exist"


def _sizes(rayjob: Doc, docs: list[Doc]) -> Iterator[str]:
    """Actors that the groups can never hold would wait until pool.start_timeout_s, and end the run."""
    from tempfile import TemporaryDirectory

    from pipeline.config import load_config
    from pipeline.errors import ConfigError

    text = config_maps(docs).get("twotower-settings", {}).get("twotower.toml", "")
    with TemporaryDirectory() as folder:
        file = Path(folder, "twotower.toml")
        file.write_text(text)
        try:
            pool = load_config(str(file)).pool
        except ConfigError as error:
            yield f"twotower.toml: {error}"
            return
    groups = rayjob["spec"].get("rayClusterSpec", {}).get("workerGroupSpecs", [])
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
    if pool.actors is None or pool.gpus_per_actor is None:
        yield "twotower.toml: a cluster that starts without GPUs tells nothing: set pool.actors and pool.gpus_per_actor"
        return
    if not pool.gpus_per_actor and not pool.cpus_per_actor:
        yield "twotower.toml: actors that reserve nothing bring no pod, and start on the head: set pool.cpus_per_actor"
    gpus = [quantity(limit.get("nvidia.com/gpu", 0)) for limit in limits]
    cpus = [int(quantity(limit["cpu"])) for limit in limits]
    held = 0
    for group, gpu, cpu in zip(groups, gpus, cpus, strict=True):
        by_gpu = gpu // pool.gpus_per_actor if pool.gpus_per_actor else float("inf")
        by_cpu = cpu // pool.cpus_per_actor if pool.cpus_per_actor else float("inf")
        a_pod = min(by_gpu, by_cpu)
        held += 0 if a_pod == float("inf") else int(a_pod) * group["maxReplicas"]
        if a_pod and (pool.decode_threads or 0) * min(a_pod, 99) > cpu + 1:
            yield f"group {group['groupName']}: {pool.decode_threads} decode_threads an actor, on {cpu} CPUs"
    if pool.actors > held:
        yield f"twotower.toml: pool.actors = {pool.actors}, and the worker groups hold {held} at most"


def commands(docs: list[Doc]) -> Iterator[tuple[str, list[str], Mapping[str, str], bool]]:
    """Every command line of a job: where it stands, its words, its environment, and whether a shell reads it."""
    maps, shell = config_maps(docs), dict[str, str]()

    def environment(container: Doc) -> dict[str, str]:
        told = {entry["name"]: entry.get("value", "from-the-pod") for entry in container.get("env", [])}
        for source in container.get("envFrom", []):
            told |= maps.get(source.get("configMapRef", {}).get("name"), {})
        return told

    for doc in docs:
        if doc["kind"] == "RayJob":
            container = doc["spec"].get("submitterPodTemplate", {"spec": {"containers": [{}]}})["spec"]["containers"][0]
            shell = environment(container)  # the submitter's shell fills the variables in
            yield f"RayJob {doc['metadata']['name']}", shlex.split(doc["spec"]["entrypoint"]), shell, True
    for where, pod in pods(docs):
        for container in pod["spec"]["containers"]:
            words = [*container.get("command", []), *container.get("args", [])]
            if words:
                yield where, words, environment(container), False
            for word in words:  # a command in a command: the entrypoint that is handed to jobs.rayjob
                if word.startswith("python -m jobs."):
                    yield f"{where}, entrypoint", shlex.split(word), shell, True
