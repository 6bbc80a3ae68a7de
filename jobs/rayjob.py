"""Create a KubeRay RayJob like one that lies suspended in the cluster, and wait for its end: what the CronJob runs.

    python -m jobs.rayjob --like twotower --name reindex-29385600-run --entrypoint 'python -m jobs.reindex ...'

A Kubernetes Job ends with its pod, a RayJob only begins with the request that creates it. So this job waits, and
`concurrencyPolicy: Forbid` means what it says. Its pod may die and be started again: the name is made of the Job's own,
so the RayJob that exists already is waited for; and one that an earlier schedule left running is waited for instead of
starting another beside it. The name is not the Job's own itself: KubeRay gives the RayJob's to the Job that submits.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.cli import JobParser, add_log_level, run_job, start_log
from pipeline.errors import ClusterError, RunError, first_line

log = logging.getLogger("jobs.rayjob")  # not __name__: as a job this module is __main__

_LIKE = "twotower/like"
_PLURAL = "apis/ray.io/v1/namespaces/{}/rayjobs"
_ENDED = ("Complete", "Failed", "ValidationFailed")
_ANSWER_TIMEOUT_S = 30.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(
        prog="python -m jobs.rayjob",
        description="Create a RayJob like a suspended one of this namespace and wait for its end, inside a pod whose "
        "service account may get, list and create RayJobs.",
        epilog="exit codes: 0 the RayJob succeeded; 1 it failed or was removed; 2 Kubernetes refused",
    )
    result.add_argument("--like", required=True, metavar="RAYJOB", help="the suspended RayJob whose spec is taken")
    result.add_argument("--name", required=True, help="of the new RayJob; one that exists already is waited for")
    result.add_argument("--entrypoint", help="command of the new RayJob; without it, that of --like")
    result.add_argument("--owner", type=owner, metavar="JOB/UID", help="the Kubernetes Job whose removal shall remove "
                        "the RayJob")  # fmt: skip
    result.add_argument("--poll-s", type=float, default=10.0, metavar="S", help="how often to look at the RayJob")
    result.add_argument("--unreachable-s", type=float, default=600.0, metavar="S", help="how long to try an API that "
                        "does not answer")  # fmt: skip
    result.add_argument("--api", metavar="URL", help="the API server, where it is not the pod's own")
    result.add_argument("--account", default="/var/run/secrets/kubernetes.io/serviceaccount", metavar="FOLDER",
                        help="token, ca.crt and namespace of the service account")  # fmt: skip
    result.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    add_log_level(result)
    return result


def owner(text: str) -> dict[str, str]:
    """The type of `--owner`: a reference to a Job."""
    name, slash, uid = text.partition("/")
    if not (name and slash and uid):
        raise argparse.ArgumentTypeError(f"takes name/uid of a Job, not {text!r}")
    return {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)
    start_log(arguments.log_level)

    def job() -> Mapping[str, Any]:
        api = RayJobs(Path(arguments.account), arguments.api, patience_s=arguments.unreachable_s)
        name = start(api, arguments.name, arguments.like, arguments.entrypoint, arguments.owner)
        return wait(api, name, poll_s=arguments.poll_s)

    return run_job(job, as_json=arguments.json)


class RayJobs:
    """The RayJobs of the pod's own namespace, through the Kubernetes API.

    Args:
        account: folder with `token`, `namespace` and, for https, `ca.crt`; read for each request, as tokens rotate.
        url: of the API server; None: the pod's own.
        patience_s: how long a server that does not answer, or answers 429 or 5xx, is asked again.

    Raises:
        ClusterError: this is no pod, or it has no service account token.
    """

    def __init__(self, account: Path, url: str | None, *, patience_s: float) -> None:
        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{name}") for name in ("HOST", "PORT"))
        if url is None and not host:
            raise ClusterError(
                "this is no pod of Kubernetes; give --api and --account, or create the RayJob by kubectl"
            )
        base = url or (f"https://[{host}]:{port}" if ":" in str(host) else f"https://{host}:{port}")
        self._account, self._patience_s = account, patience_s
        try:
            namespace = (account / "namespace").read_text().strip()
            certificate = account / "ca.crt"
            self._ssl = ssl.create_default_context(cafile=certificate) if base.startswith("https") else None
        except OSError as error:
            raise ClusterError(f"cannot read the service account in {account}: {first_line(error)}") from error
        self._base = f"{base}/{_PLURAL.format(namespace)}"

    def get(self, name: str) -> dict[str, Any] | None:
        """One RayJob, None where there is none of that name."""
        return self._ask("GET", f"/{name}")

    def labelled(self, label: str, value: str) -> list[dict[str, Any]]:
        """All RayJobs with a label."""
        found = self._ask("GET", "?" + urllib.parse.urlencode({"labelSelector": f"{label}={value}"}))
        return list((found or {}).get("items", []))

    def create(self, body: Mapping[str, Any]) -> bool:
        """Create one; False where its name is taken."""
        return self._ask("POST", "", body) is not None

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """One request, asked again while the server is away; None for 404 and for 409.

        Raises:
            ClusterError: the server refuses, or does not answer for too long.
        """
        give_up, pause_s = time.monotonic() + self._patience_s, 1.0
        while True:
            try:
                return self._once(method, path, body)
            except urllib.error.HTTPError as error:
                said = _message(error)
                if error.code in (404, 409):
                    return None
                if error.code != 429 and error.code < 500:
                    raise ClusterError(f"Kubernetes refused to {method} RayJobs: {error.code} {said}") from error
            except OSError as error:  # no connection, a time-out, a broken answer
                said = first_line(error)
            if time.monotonic() > give_up:
                raise ClusterError(f"Kubernetes did not answer for {self._patience_s:g} seconds: {said}")
            log.warning("Kubernetes does not answer, trying again: %s", said)
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 30.0)

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        token = (self._account / "token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json", "Content-Type": "application/json"}
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self._base + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=_ANSWER_TIMEOUT_S, context=self._ssl) as answer:
            result: dict[str, Any] = json.load(answer)
            return result


def start(api: RayJobs, name: str, like: str, entrypoint: str | None, owner: Mapping[str, str] | None) -> str:
    """See that a RayJob runs; returns the name of the one to wait for.

    Raises:
        ClusterError: there is no RayJob `like`, the name is the owner's, or Kubernetes refuses the new one.
    """
    for other in api.labelled(_LIKE, like):
        other_name = str(other["metadata"]["name"])
        if other_name != name and _state(other) not in _ENDED:
            log.warning("%s of an earlier start still runs: waiting for it, and starting no other", other_name)
            return other_name
    model = api.get(like)
    if model is None:
        raise ClusterError(f"there is no RayJob {like} in this namespace; apply the overlay first")
    if owner is not None and owner["name"] == name:
        raise ClusterError(f"a RayJob may not be called {name} like its owner: its submitter's Job takes that name")
    spec = {key: value for key, value in model["spec"].items() if key != "jobId"}
    body = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/name": "twotower", _LIKE: like},
            "ownerReferences": [dict(owner)] if owner else [],
        },
        "spec": {**spec, "suspend": False, "entrypoint": entrypoint or spec["entrypoint"]},
    }
    log.info("%s %s", "created" if api.create(body) else "found, and waiting for", name)
    return name


def wait(api: RayJobs, name: str, *, poll_s: float) -> dict[str, Any]:
    """Wait for a RayJob's end.

    Raises:
        RunError: it failed, was stopped, or was removed.
    """
    before = None
    while True:
        rayjob = api.get(name)
        if rayjob is None:
            raise RunError(f"the RayJob {name} was removed before it ended; what it staged is kept")
        state, status = _state(rayjob), rayjob.get("status", {})
        if state != before:
            log.info("%s is %s", name, state or "new")
        if state in _ENDED:
            result = {"rayjob": name, "state": state, "job_status": status.get("jobStatus")}
            if state == "Complete" and status.get("jobStatus") == "SUCCEEDED":
                return result
            why = status.get("message") or status.get("reason") or "see its log"
            raise RunError(f"the RayJob {name} ended as {state}, {status.get('jobStatus') or 'never started'}: {why}")
        before = state
        time.sleep(poll_s)


def _state(rayjob: Mapping[str, Any]) -> str:
    return str(rayjob.get("status", {}).get("jobDeploymentStatus", ""))


def _message(error: urllib.error.HTTPError) -> str:
    """What Kubernetes says in the body of an error."""
    try:
        return str(json.load(error)["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return str(error.reason)


if __name__ == "__main__":
    raise SystemExit(main())
