"""Ray tasks, for what needs no tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.errors import RunError, described
from pipeline.run.cluster import cause
from pipeline.run.signals import Stop

_POLL_S = 0.5


def run_tasks(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, stop: Stop, is_brief: bool = False
) -> list[Any]:
    """Run a function over argument tuples, as Ray tasks.

    Args:
        function: takes what a tuple holds.
        arguments: one tuple a task.
        stop: cancels the tasks when it is set.
        is_brief: all of it takes a second or two; the calls are made here, where they cost no process.

    Raises:
        RunInterrupted: `stop` was set.
    """
    stop.check()
    if not arguments:
        return []
    if is_brief:
        return [function(*a) for a in arguments]
    task = ray.remote(num_cpus=1, max_retries=2)(function)
    waiting = [task.remote(*a) for a in arguments]
    pending = waiting
    while pending:
        if stop.is_set:
            for reference in pending:
                ray.cancel(reference, force=True)
            stop.check()
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=_POLL_S)
    try:
        return list(ray.get(waiting))
    except RayTaskError as error:
        raise cause(error) from error
    except RayError as error:
        raise RunError(f"a worker failed: {described(error)}") from error
