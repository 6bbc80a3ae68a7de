"""Every Python process of a job under test imports this first: faults come from outside, the jobs have no hooks."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def load_the_one_that_is_hidden() -> None:
    """Another sitecustomize of this installation, which this one stands before, still has its say."""
    path = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


load_the_one_that_is_hidden()
if "FAULTS" in os.environ:
    from injected_faults import install

    install()
