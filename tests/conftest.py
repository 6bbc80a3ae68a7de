"""Fixtures for all tests: one Ray, small model folders, small catalogs."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from s3_server import S3Server

# Before anything imports ray: a Ray of our own, on loopback, with short socket paths.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 -- Ray spells it so; as a local run of ours sets it
os.environ["HF_HUB_OFFLINE"] = "1"

# And before Ray starts, as its workers keep the environment: where tests/s3_server.py will listen, once a test asks.
with socket.socket() as _free:
    _free.bind(("127.0.0.1", 0))
    S3_PORT = int(_free.getsockname()[1])
for _name in [name for name in os.environ if name.startswith("AWS_")]:
    del os.environ[_name]
os.environ |= {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "eu-central-1",
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{S3_PORT}",
}

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def _quiet_log() -> Iterator[None]:
    """A job that ran in this process sends the log to standard error; the next test does not expect it there."""
    yield
    for name in ("pipeline", "jobs"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray with two logical GPUs, for all tests that need one."""
    import ray

    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        ray.init(
            num_cpus=2,
            num_gpus=2,
            include_dashboard=False,
            object_store_memory=200_000_000,
            log_to_driver=False,
            _node_ip_address="127.0.0.2",
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3 server that fails when it is told to; the environment names it already."""
    from s3_server import s3_server

    with s3_server(S3_PORT) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder of jina-clip-v1's architecture, 48 dimensions, seeded weights."""
    from model_folder import write_folder

    return str(write_folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real catalogs and the reference, which are never part of the project."""
    if not SHARED.exists():
        pytest.skip("the real data lies beside the checkout, and is not there")
    return SHARED
