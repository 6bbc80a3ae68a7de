"""Where reports lie: `<db>/_reports/<run_id>.html`, and the same as JSON beside it; the newest 50 are kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import pyarrow.fs as pafs

from pipeline.errors import described
from pipeline.paths import resolve
from pipeline.run.report_page import page
from pipeline.run.staging import write_atomically
from pipeline.run.usage import Sample
from pipeline.shown import redacted_tree
from pipeline.store.tables import Database

log = logging.getLogger(__name__)

_KEPT = 50
_SUFFIXES = ("json", "html")


def page_path(db: Database, run_id: str) -> str:
    """Where a run's page lies."""
    return f"{_folder(db)}/{run_id}.html"


def write_report(db: Database, told: Mapping[str, Any], series: Sequence[Sample]) -> bool:
    """Write a run's page and JSON, without credentials; what goes wrong is a warning.

    Args:
        db: the database.
        told: the run's report, with its `settings`.
        series: how far it was over time.

    Returns:
        Whether they were written.
    """
    run_id = told["run_id"]
    try:
        shown = redacted_tree(told)
        as_json = json.dumps({**shown, "samples": [asdict(sample) for sample in series]}, default=str)
        as_page = page(shown, series)
        write_atomically(f"{_folder(db)}/{run_id}.json", as_json.encode())
        write_atomically(page_path(db, run_id), as_page.encode("utf-8", errors="replace"))
        _keep_newest(db)
    except Exception as error:  # of whatever kind: a run that is released has not failed for want of a page
        log.warning("the run's page could not be written to %s: %s", _folder(db), described(error))
        return False
    return True


def _keep_newest(db: Database) -> None:
    """Remove the files of all but the newest runs; another run may do so at the same moment."""
    filesystem, inside = resolve(_folder(db))
    newest: dict[str, int] = {}
    for info in filesystem.get_file_info(pafs.FileSelector(inside)):
        stem, dot, suffix = info.path.rpartition(".")
        if dot and suffix in _SUFFIXES:
            newest[stem] = max(newest.get(stem, 0), info.mtime_ns)
    for stem in sorted(newest, key=lambda stem: -newest[stem])[_KEPT:]:
        for suffix in _SUFFIXES:
            with suppress(FileNotFoundError):
                filesystem.delete_file(f"{stem}.{suffix}")


def _folder(db: Database) -> str:
    return f"{db.uri.rstrip('/')}/_reports"
