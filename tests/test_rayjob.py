"""`python -m jobs.rayjob` against a small API server on loopback that knows RayJobs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from jobs import rayjob

PREFIX = "/apis/ray.io/v1/namespaces/shop/rayjobs"
JOB = "twotower-reindex-29385600"
NAME = f"{JOB}-run"
MODEL = {
    "metadata": {"name": "twotower", "uid": "1", "labels": {"a": "b"}},
    "spec": {"entrypoint": "python -m jobs.backfill", "suspend": True, "shutdownAfterJobFinishes": True, "jobId": "x"},
    "status": {"jobDeploymentStatus": "Suspended"},
}


class Api(ThreadingHTTPServer):
    """RayJobs by name; each GET of one takes its next status, as `script` has it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rayjobs: dict[str, dict[str, Any]] = {"twotower": MODEL}
        self.script: dict[str, list[Any]] = {}
        self.fail: Callable[[str, str], int | None] = lambda method, path: None
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str] = set()


class _Handler(BaseHTTPRequestHandler):
    server: Api

    def log_message(self, *_: object) -> None: ...

    def _answer(self, code: int, body: object) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def _refused(self) -> bool:
        self.server.tokens.add(self.headers["Authorization"])
        code = self.server.fail(self.command, self.path)
        if code:
            self._answer(code, {"message": f"no, {code}"})
        return bool(code)

    def do_GET(self) -> None:
        if self._refused():
            return
        url = urlsplit(self.path)
        name = url.path.removeprefix(PREFIX).strip("/")
        if not name:
            label, _, value = parse_qs(url.query)["labelSelector"][0].partition("=")
            found = [r for r in self.server.rayjobs.values() if r["metadata"].get("labels", {}).get(label) == value]
            self._answer(200, {"items": found})
        elif name in self.server.rayjobs:
            found = self.server.rayjobs[name]
            if steps := self.server.script.get(name):
                state = steps.pop(0)
                if state is None:
                    self._answer(404, {"message": "gone"})
                    return
                found["status"] = state
            self._answer(200, found)
        else:
            self._answer(404, {"message": "not found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        name = body["metadata"]["name"]
        if name in self.server.rayjobs:
            self._answer(409, {"message": "exists"})
            return
        self.server.rayjobs[name] = body
        self.server.created.append(body)
        self._answer(201, body)


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    """Run the job: exit code, its JSON object, what it said."""
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "namespace").write_text("shop")

    def run(*more: str) -> tuple[int, Any, str]:
        url = f"http://127.0.0.1:{api.server_port}"
        given = ["--like", "twotower", "--name", NAME, "--api", url, "--account", str(tmp_path), "--json",
                 "--poll-s", "0.01", "--unreachable-s", "0.1", *more]  # fmt: skip
        code = rayjob.main(given)
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]), err

    return run


def steps(*states: str, job: str = "SUCCEEDED", message: str = "") -> list[dict[str, str]]:
    """Statuses, as KubeRay writes them one after the other."""
    result = [{"jobDeploymentStatus": state} for state in states]
    return [*result[:-1], {**result[-1], "jobStatus": job, "message": message}]


def test_a_rayjob_is_created_and_waited_for(api: Api, run: Callable[..., Any]) -> None:
    api.script[NAME] = steps("", "Initializing", "Running", "Running", "Complete")
    code, told, said = run("--entrypoint", "python -m jobs.reindex", "--owner", f"{JOB}/u-1")
    assert (code, told["job_status"]) == (0, "SUCCEEDED")
    (body,) = api.created
    assert body["spec"] == {
        "entrypoint": "python -m jobs.reindex", "suspend": False, "shutdownAfterJobFinishes": True
    }  # fmt: skip
    assert body["metadata"]["ownerReferences"] == [{"apiVersion": "batch/v1", "kind": "Job", "name": JOB, "uid": "u-1"}]
    assert body["metadata"]["labels"]["twotower/like"] == "twotower"
    assert "uid" not in body["metadata"]
    assert said.count("is Running") == 1
    assert api.tokens == {"Bearer secret"}


@pytest.mark.parametrize(
    ("last", "job", "message", "said"),
    [
        ("Failed", "FAILED", "exit code 1", "ended as Failed, FAILED: exit code 1"),
        ("Complete", "STOPPED", "", "ended as Complete, STOPPED: see its log"),
        ("ValidationFailed", "", "ttl is negative", "ended as ValidationFailed, never started: ttl is negative"),
    ],
)
def test_a_rayjob_that_fails(api: Api, run: Callable[..., Any], last: str, job: str, message: str, said: str) -> None:
    api.script[NAME] = steps("Running", last, job=job, message=message)
    code, told, _ = run()
    assert code == 1
    assert said in told["error"]


def test_a_rayjob_that_is_removed(api: Api, run: Callable[..., Any]) -> None:
    api.script[NAME] = [*steps("Running"), None]
    code, told, _ = run()
    assert code == 1
    assert "was removed before it ended" in told["error"]


def test_the_pod_that_starts_again_waits_for_its_own_rayjob(api: Api, run: Callable[..., Any]) -> None:
    api.rayjobs[NAME] = {"metadata": {"name": NAME, "labels": {"twotower/like": "twotower"}}}
    api.script[NAME] = steps("Running", "Complete")
    code, _, said = run()
    assert code == 0
    assert api.created == []
    assert "found, and waiting for" in said


def test_one_of_an_earlier_schedule_is_waited_for_instead(api: Api, run: Callable[..., Any]) -> None:
    for name, state in (("ended", "Complete"), ("left", "Running")):
        api.rayjobs[name] = {"metadata": {"name": name, "labels": {"twotower/like": "twotower"}},
                             "status": {"jobDeploymentStatus": state}}  # fmt: skip
    api.script["left"] = steps("Running", "Complete")
    code, told, said = run()
    assert (code, told["rayjob"]) == (0, "left")
    assert api.created == []
    assert "left of an earlier start still runs" in said


def test_a_server_that_stumbles_is_asked_again(api: Api, run: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(rayjob.time, "sleep", lambda _: None)
    answers = iter([500, None, 429, None, None, 503])
    api.fail = lambda method, path: next(answers, None)
    api.script[NAME] = steps("Running", "Complete")
    code, _, said = run("--unreachable-s", "60")
    assert code == 0
    assert said.count("does not answer, trying again") == 3


@pytest.mark.parametrize(
    ("status", "said"),
    [(403, "Kubernetes refused to GET RayJobs: 403 no, 403"), (500, "did not answer for 0.1 seconds")],
)
def test_a_server_that_refuses(api: Api, run: Callable[..., Any], status: int, said: str) -> None:
    api.fail = lambda method, path: status
    code, told, _ = run()
    assert code == 2
    assert said in told["error"]


def test_a_name_that_the_submitter_will_take(api: Api, run: Callable[..., Any]) -> None:
    code, told, _ = run("--owner", f"{NAME}/u-1")
    assert code == 2
    assert "its submitter's Job takes that name" in told["error"]
    assert api.created == []


def test_no_rayjob_to_be_like(api: Api, run: Callable[..., Any]) -> None:
    api.rayjobs.clear()
    code, told, _ = run()
    assert code == 2
    assert "there is no RayJob twotower in this namespace" in told["error"]


def test_outside_of_a_cluster(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert rayjob.main(["--like", "a", "--name", "b"]) == 2
    assert "this is no pod of Kubernetes" in capsys.readouterr().err
