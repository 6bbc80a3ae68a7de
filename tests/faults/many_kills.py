"""Kill a run at many random moments, by hand: `python tests/faults/many_kills.py --count 40`."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "faults")]
os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def main() -> int:
    """Kill, resume and compare `--count` times; one line for each, and the sum at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40, help="how many runs are killed")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    given = parser.parse_args()
    import ray
    from harness import NOTE_BEGIN, FaultyJob
    from model_folder import write_folder
    from season import make_season
    from test_kills import Killed, kill_somewhere

    with tempfile.TemporaryDirectory(prefix="kills") as name, tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as r:
        folder = Path(name)
        ray.init(
            num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False,
            _node_ip_address="127.0.0.2", _temp_dir=r,
        )  # fmt: skip
        season = make_season(folder, str(write_folder(folder / "tiny")))
        since = time.monotonic()
        db = season.copy(folder / "undisturbed")
        with FaultyJob(season.arguments(db), folder / "undisturbed" / "job", [NOTE_BEGIN]) as job:
            assert job.end() == 0, job.process.log
        duration_s = time.monotonic() - since
        print(f"an undisturbed run takes {duration_s:.1f} s")
        rng = random.Random(given.seed)
        killed: list[Killed] = []
        wrong = 0
        for number in range(given.count):
            moment = rng.uniform(0, duration_s)
            try:
                killed.append(kill_somewhere(moment, season, folder / str(number)))
            except AssertionError as error:
                wrong += 1
                print(f"{number:3d}  after {moment:5.1f} s: WRONG: {error}", flush=True)
                continue
            print(f"{number:3d}  after {moment:5.1f} s: {killed[-1]}", flush=True)
        ray.shutdown()
    redone = Counter(max(0, k.begun - k.staged) for k in killed if k.release == 1)
    print(
        f"{given.count} runs killed, {wrong} wrong ends; readers had release 1 {sum(k.release == 1 for k in killed)} "
        f"times, release 2 {sum(k.release == 2 for k in killed)} times; partitions done again: "
        + ", ".join(f"{n} in {count} runs" for n, count in sorted(redone.items()))
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
