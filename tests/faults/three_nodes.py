"""A backfill on a Ray cluster of three nodes on this machine: `python three_nodes.py ARGUMENTS`."""

from __future__ import annotations

import os
import sys
import tempfile

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
# A node that is gone is noticed within two seconds instead of fifteen.
os.environ |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
NODE = {"node_ip_address": "127.0.0.3", "object_store_memory": 80_000_000, "include_dashboard": False}


def main() -> int:
    """Start a head without CPUs and two workers, run the job on them, end them."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        os.environ["RAY_TMPDIR"] = folder
        from ray.cluster_utils import Cluster

        from jobs.backfill import main as backfill

        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "num_gpus": 0})
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=2, num_gpus=0, **NODE)
            return backfill([*sys.argv[1:], "--set", f"ray.address={cluster.address}"])
        finally:
            cluster.shutdown()


if __name__ == "__main__":
    raise SystemExit(main())
