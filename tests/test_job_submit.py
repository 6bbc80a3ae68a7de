"""The main job on a running cluster with token authentication, through `ray job submit`; and how actors share GPUs."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from job_process import CHECKOUT, command_line, environment, run_backfill
from small_catalog import assert_equal_tables, items, write_products

from pipeline.errors import ClusterError
from pipeline.run.checks import probed
from pipeline.run.cluster import PoolSize, check_nodes
from pipeline.run.signals import Stop

PARTITIONS, PRODUCTS, IMAGES = 8, 20, 4
RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As many partitions as any of these runs has actors, and enough to be stopped in the middle of it."""
    groups = [items(PRODUCTS, images=IMAGES, seed=seed) for seed in range(PARTITIONS)]
    return str(write_products(tmp_path_factory.mktemp("catalog"), groups))


@dataclass(frozen=True)
class Job:
    """What a submitted job left.

    Attributes:
        told: what the command line of Ray printed.
        log: of the driver, as `ray job logs` shows it.
    """

    code: int
    told: str
    log: str

    @property
    def last_line(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.log.splitlines()[-1])
        return result


@dataclass(frozen=True)
class Cluster:
    """A head node that asks for a token, all on loopback."""

    folder: Path
    address: str
    url: str

    @property
    def env(self) -> dict[str, str]:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        return environment({**token, "RAY_API_SERVER_ADDRESS": self.url})

    def ray(self, *arguments: str, cwd: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
        return subprocess.run([RAY, "job", *arguments], cwd=cwd, env=self.env, text=True, capture_output=True)

    def submit(
        self, name: str, entrypoint: Sequence[str], *options: str, cwd: Path = CHECKOUT, is_code_sent: bool = True
    ) -> Job:
        code = ["--working-dir", "."] if is_code_sent else []
        done = self.ray("submit", "--submission-id", name, *code, *options, "--", *entrypoint, cwd=cwd)
        return Job(done.returncode, done.stdout + done.stderr, self.log(name))

    def log(self, name: str) -> str:
        return (self.folder / "r" / "session_latest" / "logs" / f"job-driver-{name}.log").read_text()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="c", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)  # short: Ray's sockets lie below it
        (folder / "token").write_text(secrets.token_hex(32))
        port, dashboard, agent, client = free_ports(4)
        made = Cluster(folder, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
        with (folder / "log").open("w") as log:
            head = subprocess.Popen(
                [
                    RAY, "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address", "127.0.0.1",
                    "--port", str(port), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard),
                    "--dashboard-agent-listen-port", str(agent), "--ray-client-server-port", str(client),
                    "--min-worker-port", "0", "--max-worker-port", "0", "--temp-dir", str(folder / "r"),
                    "--num-cpus", "2", "--num-gpus", "2", "--object-store-memory", "200000000",
                ],
                cwd=folder, env=made.env, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while made.ray("list").returncode:
                assert head.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(1)
            yield made
        finally:
            head.terminate()
            try:
                head.wait(30)
            finally:
                kill_session(head.pid)


@contextmanager
def held(name: str) -> Iterator[None]:
    """Stop the processes of that name for the block."""
    found = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and name in command_line(int(entry.name))
    ]
    assert found, name
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def kill_session(session: int) -> None:
    """End what is left of the head node's own processes, and no one else's."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session:
                    os.kill(int(entry.name), signal.SIGKILL)
            except ProcessLookupError:
                continue


def backfill(catalog: str, db: str | Path, model: str, *more: str) -> list[str]:
    return ["python", "-m", "jobs.backfill", *arguments(catalog, db, model, *more), "--json"]


def arguments(catalog: str, db: str | Path, model: str, *more: str) -> list[str]:
    return ["--catalog", catalog, "--db", str(db), "--model", model, *more]


def gpus_of(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What each actor sees, checked against what Ray gave it."""
    for actor in result["actors"]:
        assert actor["cuda_visible_devices"] == ",".join(actor["gpu_ids"])
    return sorted(tuple(actor["gpu_ids"]) for actor in result["actors"])


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_from_the_checkout(cluster: Cluster, catalog: str, tiny_model: str, tmp_path: Path) -> None:
    job = cluster.submit("checkout", backfill(catalog, tmp_path / "db", tiny_model))
    assert job.code == 0, job.told
    assert job.last_line["released"]
    assert job.last_line["products"] == PARTITIONS * PRODUCTS
    assert gpus_of(job.last_line) == [("0",), ("1",)]
    sent = {path.name for path in (cluster.folder / "r").glob("session_latest/runtime_resources/*/_ray_pkg_*/*")}
    assert {"pipeline", "jobs"} <= sent
    assert not sent & {".venv", ".git", ".demo", ".mypy_cache", ".ruff_cache"}


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_from_an_installed_package(cluster: Cluster, catalog: str, tiny_model: str, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    install = ["pip", "install", "--quiet", "--no-deps", "--target", str(packages), str(CHECKOUT)]
    subprocess.run([sys.executable, "-m", *install], check=True, env=environment())
    where = json.dumps({"env_vars": {"PYTHONPATH": str(packages)}})
    command = " ".join(backfill(catalog, tmp_path / "db", tiny_model))
    entrypoint = ["sh", "-c", f"python -c 'import pipeline; print(pipeline.__file__)' && {command}"]
    job = cluster.submit("installed", entrypoint, "--runtime-env-json", where, cwd=tmp_path, is_code_sent=False)
    assert job.code == 0, job.told
    assert str(packages / "pipeline" / "__init__.py") in job.log
    assert job.last_line["released"]


@pytest.mark.ray
@pytest.mark.slow
def test_relative_paths_are_refused(cluster: Cluster, catalog: str, tiny_model: str, tmp_path: Path) -> None:
    job = cluster.submit("relative", backfill(catalog, "some/db", tiny_model))
    assert job.code == 1
    assert "failed with exit code 2" in job.told
    assert "--db 'some/db' is a relative path; in a Ray job" in job.last_line["error"]
    assert f"error: {job.last_line['error']}" in job.log
    assert "Traceback" not in job.log
    assert not (tmp_path / "db").exists()
    assert not list((cluster.folder / "r").glob("session_latest/runtime_resources/*/*/some"))


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_with_too_few_gpus(cluster: Cluster, catalog: str, tiny_model: str, tmp_path: Path) -> None:
    more = ["--set", "pool.actors=3", "--set", "pool.start_timeout_s=6"]
    job = cluster.submit("three", backfill(catalog, tmp_path / "db", tiny_model, *more))
    assert "failed with exit code 2" in job.told
    assert "asked for 3 x 1 GPUs, the cluster has 2" in job.last_line["error"]
    assert "pool.start_timeout_s = 6 seconds" in job.last_line["error"]
    assert not (tmp_path / "db").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_stopped_job_is_resumed(cluster: Cluster, catalog: str, tiny_model: str, tmp_path: Path) -> None:
    entrypoint = backfill(catalog, tmp_path / "db", tiny_model, "--set", "pool.actors=1")
    code, env = ["--working-dir", "."], json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30"}})
    cluster.ray(
        "submit", "--no-wait", "--submission-id", "stopped", "--runtime-env-json", env, *code, "--", *entrypoint
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "db" / "_staging").glob("*.json")):
        assert time.monotonic() < deadline, cluster.log("stopped")
        time.sleep(0.05)
    with held("ray::EmbedWorker"):  # it would be done with all before `ray job stop` has started
        assert cluster.ray("stop", "stopped").returncode == 0
    told = json.loads(cluster.log("stopped").splitlines()[-1])
    assert told["kind"] == "RunInterrupted"
    assert "run the same command to go on" in told["error"]
    staged = len(list((tmp_path / "db" / "_staging").glob("*.json")))
    job = cluster.submit("resumed", entrypoint)
    assert f"{staged} of {PARTITIONS} partitions are staged already" in job.log
    assert job.last_line["released"]
    other = cluster.submit("undisturbed", backfill(catalog, tmp_path / "other", tiny_model))
    assert other.code == 0
    assert_equal_tables(tmp_path / "db", tmp_path / "other")


@pytest.mark.ray
@pytest.mark.slow
def test_a_wrong_token(cluster: Cluster, catalog: str, tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(secrets.token_hex(32))
    env = cluster.env | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    more = ["--set", f"ray.address={cluster.address}"]
    code, told, _ = run_backfill(arguments(catalog, tmp_path / "db", tiny_model, *more), tmp_path / "job", env)
    assert code == 2
    assert f"cannot reach Ray at '{cluster.address}'" in told["error"]
    assert "RAY_AUTH_TOKEN_PATH" in told["error"]
    assert not (tmp_path / "db").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:{closed}", "cannot reach Ray at '127.0.0.1:{closed}'"),
        ("http://127.0.0.1:8265", "ray.address is local, auto or the host:port of a cluster's head"),
    ],
)
def test_an_address_without_a_cluster(
    address: str, sentence: str, catalog: str, tiny_model: str, tmp_path: Path
) -> None:
    closed = free_ports(1)[0]
    more = ["--set", f"ray.address={address.format(closed=closed)}"]
    code, told, log = run_backfill(arguments(catalog, tmp_path / "db", tiny_model, *more), tmp_path / "job")
    assert code == 2
    assert sentence.format(closed=closed) in told["error"]
    assert "Traceback" not in log


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "gpus"),
    [
        (("--set", "pool.gpus_per_actor=0.5"), [("0",), ("0",), ("1",), ("1",)]),
        (("--set", "pool.gpus_per_actor=2"), [("0", "1")]),
    ],
)
def test_each_actor_sees_its_own_gpu(
    more: tuple[str, ...], gpus: list[tuple[str, ...]], catalog: str, tiny_model: str, tmp_path: Path
) -> None:
    given = arguments(catalog, tmp_path / "db", tiny_model, "--set", "pool.gpus=2", *more)
    code, told, _ = run_backfill(given, tmp_path / "job")
    assert code == 0, told
    assert gpus_of(told) == gpus


@pytest.mark.ray
def test_more_actors_than_gpus(catalog: str, tiny_model: str, tmp_path: Path) -> None:
    more = ["--set", "pool.gpus=2", "--set", "pool.actors=3"]
    code, told, log = run_backfill(arguments(catalog, tmp_path / "db", tiny_model, *more), tmp_path / "job")
    assert code == 2
    assert told["kind"] == "ClusterError"
    assert told["error"].startswith("asked for 3 x 1 GPUs, the cluster has 2: lower pool.actors")
    assert "Traceback" not in log
    assert not (tmp_path / "db").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}, "but CUDA_VISIBLE_DEVICES is None on "),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "cannot start a local Ray: Attempting to start raylet with 2 GPU"),
    ],
)
def test_a_hidden_gpu(env: dict[str, str], sentence: str, catalog: str, tiny_model: str, tmp_path: Path) -> None:
    given = arguments(catalog, tmp_path / "db", tiny_model, "--set", "pool.gpus=2")
    code, told, log = run_backfill(given, tmp_path / "job", env)
    assert code == 2
    assert sentence in told["error"]
    assert "Traceback" not in log
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize(
    ("per_actor", "actors", "node", "cores"),
    [
        (1.0, 12, {"CPU": 96.0, "GPU": 8.0}, 12),
        (1.0, 12, {"CPU": 32.0, "GPU": 4.0}, 8),
        (0.5, 12, {"CPU": 32.0, "GPU": 4.0}, 4),
        (2.0, 12, {"CPU": 32.0, "GPU": 4.0}, 16),
        (1.0, 2, {"CPU": 32.0, "GPU": 4.0}, 16),  # no more actors than that
        (0.0, 6, {"CPU": 8.0}, 4),  # two on each of three nodes
        (0.0, 6, {"CPU": 1.0}, 1),
    ],
)
def test_an_actor_has_its_own_nodes_cores(per_actor: float, actors: int, node: dict[str, float], cores: int) -> None:
    assert PoolSize(actors, per_actor, 0.0, 12.0, 2, None, None).cores_of_an_actor(node) == cores


@pytest.mark.ray
def test_a_node_that_cannot_read_a_path(tmp_path: Path, ray_session: None) -> None:
    check_nodes([str(tmp_path)], Stop())
    with pytest.raises(ClusterError, match=r"node 127\.0\.0\.2 cannot read /no/such/folder; use an object store"):
        check_nodes([str(tmp_path), "/no/such/folder"], Stop())


def test_probes_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with probed([str(tmp_path / "there"), str(tmp_path / "new" / "db")], "run1") as probes:
        assert [Path(probe).exists() for probe in probes] == [True, True]
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match="the driver cannot write to"), probed([f"{tmp_path}/file/db"], "run1"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
