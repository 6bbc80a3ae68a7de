"""What `kubectl kustomize` would make of a folder, for the few features that infra/ uses, and what it would refuse.

Stricter than kustomize itself: a patch or an image that meets nothing is an error here, and silence there.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

Doc = dict[str, Any]
_KEYS = {"apiVersion", "kind", "namespace", "resources", "images", "patches", "configMapGenerator", "generatorOptions"}


class Refused(Exception):
    """What is wrong with a kustomization."""


def render(folder: Path) -> list[Doc]:
    """All resources of a kustomization, patched.

    Raises:
        Refused: a file, a resource or a target that does not exist, an unknown key, two resources of one name.
    """
    file = folder / "kustomization.yaml"
    if not file.is_file():
        raise Refused(f"there is no {file}")
    told = yaml.safe_load(file.read_text())
    if unknown := set(told) - _KEYS:
        raise Refused(f"{file} has unknown keys: {', '.join(sorted(unknown))}")
    docs = [copy.deepcopy(doc) for name in told.get("resources", []) for doc in _resource(folder, name)]
    docs += [_config_map(folder, spec, told.get("generatorOptions", {})) for spec in told.get("configMapGenerator", [])]
    ids = [(doc["apiVersion"], doc["kind"], doc["metadata"]["name"]) for doc in docs]
    if twice := {id_ for id_ in ids if ids.count(id_) > 1}:
        raise Refused(f"{file}: resources of the same name: {twice}")
    for patch in told.get("patches", []):
        _patch(docs, patch, file)
    for image in told.get("images", []):
        _set_image(docs, image, file)
    if "namespace" in told:
        for doc in docs:
            doc["metadata"]["namespace"] = told["namespace"]
            for subject in doc.get("subjects", []):
                subject["namespace"] = told["namespace"]
    return docs


def containers(node: Any) -> Iterator[Doc]:
    """Every container, however deep, as kustomize finds images."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers") and isinstance(value, list):
                yield from value
            else:
                yield from containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from containers(value)


def _resource(folder: Path, name: str) -> list[Doc]:
    path = (folder / name).resolve()
    if path.is_dir():
        return render(path)
    if not path.is_file():
        raise Refused(f"{folder / 'kustomization.yaml'} names {name}, which does not exist")
    docs = [doc for doc in yaml.safe_load_all(path.read_text()) if doc]
    return json.loads(json.dumps(docs))  # an anchor's copies apart, for patches


def _config_map(folder: Path, spec: Doc, options: Doc) -> Doc:
    if not options.get("disableNameSuffixHash"):
        raise Refused("a generated name with a hash cannot be told beforehand; set disableNameSuffixHash")
    data = {}
    for entry in spec["files"]:
        key, _, name = entry.rpartition("=")
        if not (folder / name).is_file():
            raise Refused(f"{folder}: the generator names {name}, which does not exist")
        data[key or Path(name).name] = (folder / name).read_text()
    metadata = {"name": spec["name"], "labels": dict(options.get("labels", {}))}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _patch(docs: list[Doc], patch: Doc, file: Path) -> None:
    content = yaml.safe_load(patch["patch"])
    if isinstance(content, list):
        target = patch.get("target") or {}
        met = [d for d in docs if d["kind"] == target.get("kind") and _is(target.get("name", ".*"), d)]
        if not met:
            raise Refused(f"{file}: no resource is the target {target}")
        for doc in met:
            for operation in copy.deepcopy(content):
                _operate(doc, operation, file)
        return
    met = [d for d in docs if (d["kind"], d["metadata"]["name"]) == (content["kind"], content["metadata"]["name"])]
    if not met:
        raise Refused(f"{file}: no resource matches the patch of {content['kind']} {content['metadata']['name']}")
    if content["kind"] != "ConfigMap":
        raise Refused(f"{file}: merging into {content['kind']} replaces its lists; use operations with paths")
    met[0]["data"] |= content["data"]


def _is(name: str, doc: Doc) -> bool:
    return re.fullmatch(name, doc["metadata"]["name"]) is not None


def _operate(doc: Doc, operation: Doc, file: Path) -> None:
    """One operation of RFC 6902."""
    *way, last = operation["path"].lstrip("/").split("/")
    node: Any = doc
    try:
        for step in way:
            node = node[int(step)] if isinstance(node, list) else node[_unescaped(step)]
        kind, value = operation["op"], operation.get("value")
        if isinstance(node, list):
            act: dict[str, Callable[[], object]] = {
                "add": lambda: node.append(value) if last == "-" else node.insert(int(last), value),
                "replace": lambda: node.__setitem__(int(last), value),
                "remove": lambda: node.pop(int(last)),
            }
        else:
            key = _unescaped(last)
            if kind != "add":
                node[key]
            act = {
                "add": lambda: node.__setitem__(key, value),
                "replace": lambda: node.__setitem__(key, value),
                "remove": lambda: node.pop(key),
            }
        act[kind]()
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise Refused(f"{file}: {operation['op']} {operation['path']} meets nothing in {doc['kind']}") from error


def _unescaped(step: str) -> str:
    return step.replace("~1", "/").replace("~0", "~")


def _set_image(docs: list[Doc], image: Doc, file: Path) -> None:
    met = [c for c in containers(docs) if c["image"].partition(":")[0] == image["name"]]
    if not met:
        raise Refused(f"{file}: no container has the image {image['name']}")
    for container in met:
        tag = f"@{image['digest']}" if "digest" in image else f":{image['newTag']}"
        container["image"] = image.get("newName", image["name"]) + tag
