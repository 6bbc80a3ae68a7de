"""A backfill on a Ray cluster whose nodes come and go: `python moving_nodes.py ARGUMENTS`.

A head without GPUs, a node with two, one more node with one GPU once work is under way, and then the first node leaves.
Which process ran what is in the fault log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
# A node that is gone is noticed within two seconds instead of fifteen.
os.environ |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
NODE = {"object_store_memory": 80_000_000, "include_dashboard": False}
FEW = 3  # partitions begun until the late node comes


def main() -> int:
    """Start the head and the first node, run the job on them, and move the nodes meanwhile."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        os.environ["RAY_TMPDIR"] = folder
        from ray.cluster_utils import Cluster

        head = {**NODE, "node_ip_address": "127.0.0.3", "num_cpus": 0, "num_gpus": 0}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            first = cluster.add_node(num_cpus=2, num_gpus=2, node_ip_address="127.0.0.4", **NODE)
            address = ["--set", f"ray.address={cluster.address}"]
            job = subprocess.Popen([sys.executable, "-m", "jobs.backfill", *sys.argv[1:], *address])
            move(cluster, first, job)
            return job.wait()
        finally:
            cluster.shutdown()


def move(cluster: Any, first: Any, job: subprocess.Popen[bytes]) -> None:
    """Add a node when work is under way, and take the first one away when the new one works."""
    while len(begun_by()) < FEW and job.poll() is None:
        time.sleep(0.1)
    before = {pid for pid, _ in begun_by()}
    cluster.add_node(num_cpus=2, num_gpus=1, node_ip_address="127.0.0.5", **NODE)
    while not {pid for pid, _ in begun_by()} - before and job.poll() is None:
        time.sleep(0.1)
    cluster.remove_node(first, allow_graceful=False)


def begun_by() -> list[tuple[int, str]]:
    """Processes and partitions that they began."""
    log = Path(os.environ["FAULT_LOG"])
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [(e["pid"], name) for e in events if e["action"] == "note" for name in e["names"]]


if __name__ == "__main__":
    raise SystemExit(main())
