"""What KubeRay's operator refuses in a RayJob after the API server has taken it, and what we ask for beyond that."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml
from kustomize import Doc

RAY_VERSION = re.search(r"^ray==(\S+)$", (Path(__file__).parents[1] / "constraints.txt").read_text(), re.MULTILINE)[1]
_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    f"{letter}i": 1024.0**power for power, letter in enumerate("KMGT", start=1)
}


def problems(spec: Doc) -> Iterator[str]:
    """What is wrong with the spec of a RayJob, as sentences."""
    mode, shuts_down = spec.get("submissionMode", "K8sJobMode"), spec.get("shutdownAfterJobFinishes", False)
    if mode not in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"):
        yield f"submissionMode {mode} does not exist"
    if spec.get("ttlSecondsAfterFinished") and not shuts_down:
        yield "a TTL without shutdownAfterJobFinishes"
    if spec.get("suspend") and not shuts_down:
        yield "suspend without shutdownAfterJobFinishes"
    if spec.get("clusterSelector") and spec.get("backoffLimit"):
        yield "clusterSelector with a backoffLimit: a retry needs a cluster of its own"
    if spec.get("clusterSelector") and (spec.get("suspend") or mode == "SidecarMode"):
        yield "clusterSelector with suspend or SidecarMode"
    if not spec.get("clusterSelector") and not spec.get("rayClusterSpec"):
        yield "neither clusterSelector nor rayClusterSpec"
    if mode == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec):
        yield "SidecarMode with settings of a submitter, which it has not"
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield "InteractiveMode with a backoffLimit"
    for key in ("entrypointNumGpus", "entrypointNumCpus"):
        if spec.get(key):
            yield f"{key} takes from the pool what the driver does not need"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), Mapping):
        yield "runtimeEnvYAML is no YAML mapping"
    if "rayClusterSpec" in spec:
        yield from _raycluster(spec["rayClusterSpec"], mode)


def _raycluster(cluster: Doc, mode: str) -> Iterator[str]:
    groups = [("head", cluster["headGroupSpec"])]
    groups += [(group.get("groupName", "?"), group) for group in cluster.get("workerGroupSpecs", [])]
    options, scales = cluster.get("autoscalerOptions", {}), cluster.get("enableInTreeAutoscaling", False)
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "the cluster asks for no token"
    elif not cluster.get("rayVersion"):
        yield "authentication without rayVersion"
    elif cluster["rayVersion"] != RAY_VERSION:
        yield f"rayVersion {cluster['rayVersion']} is not that of constraints.txt, {RAY_VERSION}"
    if options and not scales:
        yield "autoscalerOptions without enableInTreeAutoscaling"
    if cluster["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
        yield 'the head takes tasks: num-cpus is not "0"'
    names = [name for name, _ in groups]
    if len(set(names)) < len(names):
        yield f"two groups of one name: {names}"
    for name, group in groups:
        pod, params = group["template"]["spec"], group.get("rayStartParams", {})
        if (mode == "SidecarMode" or (scales and options.get("version") == "v2")) and (
            pod.get("restartPolicy", "Never") != "Never"
        ):
            yield f"group {name}: restartPolicy {pod['restartPolicy']} with autoscaler v2 or SidecarMode"
        if "num-gpus" in params:
            yield f"group {name}: Ray takes the number of GPUs from the limits, not from num-gpus"
        if name != "head" and not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            yield f"group {name}: not minReplicas <= replicas <= maxReplicas"
        yield from (f"group {name}: {problem}" for problem in _raypod(pod, params))


def _raypod(pod: Doc, params: Doc) -> Iterator[str]:
    container = pod["containers"][0]
    missing = [probe for probe in ("startupProbe", "readinessProbe", "livenessProbe") if probe not in container]
    if missing:
        yield f"no {', '.join(missing)}; KubeRay's own take the image for one with wget"
    gpus = [
        {key: v for key, v in container["resources"].get(side, {}).items() if "gpu" in key}
        for side in ("requests", "limits")
    ]
    if gpus[0] != gpus[1]:
        yield "GPUs requested are not the limit"
    mounted = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    shm = volumes.get(mounted.get("/dev/shm", ""), {}).get("emptyDir", {})
    if shm.get("medium") != "Memory" or "sizeLimit" not in shm:
        yield "/dev/shm is no emptyDir in memory with a sizeLimit"
    elif quantity(params.get("object-store-memory", 0)) > quantity(shm["sizeLimit"]):
        yield "object-store-memory does not fit into /dev/shm"
    elif quantity(shm["sizeLimit"]) > quantity(container["resources"].get("limits", {}).get("memory", 0)) / 2:
        yield "/dev/shm takes more than half of the container's memory"


def quantity(text: object) -> float:
    """`100m`, `2Gi` or 4 as a number."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()
    return float(number) * _UNITS[unit]
