"""The writer's lease: one run at a time changes a database, and a run that died does not hinder the next for long.

The lease is the newest version of a small Lance table in the database itself, so it works wherever the database lies.
It is changed only by a commit that fails where the table has moved. Clocks decide when a lease may be taken over, never
whether two runs hold it: whoever lost it learns so from `check`, and publishing compares and swaps the release number.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime

import lance
import pyarrow as pa
from lance.fragment import write_fragments

from pipeline.errors import LeaseHeld, LeaseLost, RunError, first_line
from pipeline.store.holder import Holder, this_process
from pipeline.store.schemas import lease_schema
from pipeline.store.tables import Database
from pipeline.store.transactions import commit_once, persistent

log = logging.getLogger(__name__)

_TABLE = "lease"
_KEPT_VERSIONS, _CLEAN_EVERY = 20, 50  # a reader holds a version for milliseconds
_POLL_S = 1.0
_HELD_HERE: set[str] = set()  # tokens of the leases that this process holds
_FRESH_S = 1.0  # as long a confirmed lease is not asked for again


class Lease:
    """The right to write to a database.

    Args:
        db: the database.
        run_id: told to others who want the lease.
        job: told to others too.
        ttl_s: how long the lease outlives its last renewal; a thread renews it every third of that.
        clock: wall clock, in seconds since 1970.
        monotonic: a clock that nobody sets, in seconds.
    """

    def __init__(
        self,
        db: Database,
        *,
        run_id: str,
        job: str,
        ttl_s: float = 60.0,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._db, self._run_id, self._job, self._ttl_s = db, run_id, job, ttl_s
        self._clock, self._monotonic = clock, monotonic
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._mine: Holder | None = None
        self._version = 0
        self._renewed = self._confirmed = (-math.inf, -math.inf)
        self._lost = ""

    @property
    def is_held(self) -> bool:
        """Whether the lease was acquired and, as far as is known, neither released nor lost."""
        return self._mine is not None and not self._lost

    def is_free(self) -> bool:
        """Whether nobody holds the lease, as far as its row says; only looks."""
        _, holder = _read(self._db)
        return holder is None or self._is_free(holder, unchanged_s=0.0)

    def acquire(self, *, wait_s: float = 0.0, check: Callable[[], None] = lambda: None) -> None:
        """Take the lease, at once where nobody holds it or its holder has died.

        Args:
            wait_s: how long to wait for another holder; where its clock disagrees with ours, one `ttl_s` is waited at
                least, as only watching tells whether it lives.
            check: called while waiting; what it raises ends the wait.

        Raises:
            LeaseHeld: another run holds it.
            RunError: the database cannot be read or written.
        """
        try:
            self._wait_and_take(wait_s, check)
        except (OSError, RuntimeError, ValueError) as error:
            raise RunError(f"the lease of {self._db.uri} could not be read or written: {first_line(error)}") from error

    def check(self) -> None:
        """Go on only while the lease is ours; asked for again at most once a second.

        Raises:
            LeaseLost: another run took it, or it could not be renewed in time.
        """
        with self._lock:
            if self._mine is None:
                raise LeaseLost(self._lost or f"the lease of {self._db.uri} was not acquired")
            if not self._lost and self._since(self._confirmed) >= min(_FRESH_S, self._ttl_s / 10):
                self._confirm()
            if self._lost:
                raise LeaseLost(self._lost)

    def release(self) -> None:
        """Give the lease back, and end its renewal; nothing happens where it is not held."""
        self._ended.set()
        with self._lock:
            mine, self._mine = self._mine, None
            if mine is not None and not self._lost:
                with contextlib.suppress(OSError, RuntimeError, ValueError):  # then it expires, or our end is seen
                    _swap(self._db, self._version, replace(mine, is_released=True))
            if mine is not None:
                _HELD_HERE.discard(mine.token)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _wait_and_take(self, wait_s: float, check: Callable[[], None]) -> None:
        began = since = self._monotonic()
        seen: int | None = None
        has_moved = False
        while True:
            check()
            version, holder = _read(self._db)
            if version != seen:
                has_moved, seen, since = seen is not None, version, self._monotonic()
            unchanged_s = self._monotonic() - since
            if holder is None or self._is_free(holder, unchanged_s):
                if self._take(version, holder):
                    return
                continue
            is_ahead = holder.renewed_at.timestamp() - self._clock() > holder.ttl_s / 3
            if self._monotonic() - began >= wait_s and (has_moved or not is_ahead):
                raise LeaseHeld(
                    f"another run holds the database {self._db.uri}: {holder.describe(self._now())}; wait until it "
                    "ends, let this run wait for it, or stop that one"
                )
            time.sleep(min(_POLL_S, holder.ttl_s / 10))

    def _is_free(self, holder: Holder, unchanged_s: float) -> bool:
        """Whether the lease may be taken over from its last holder."""
        expired_s = self._clock() - holder.renewed_at.timestamp() - holder.ttl_s
        # One of this very process that could not be given back, as its row could not be written, is held by nobody.
        is_left = holder.is_this_process and holder.token not in _HELD_HERE
        return holder.is_released or holder.has_died or is_left or expired_s > 0 or unchanged_s > holder.ttl_s

    def _take(self, version: int, before: Holder | None) -> bool:
        now = self._now()
        mine = Holder(uuid.uuid4().hex, self._run_id, self._job, *this_process(), now, now, self._ttl_s)
        moment = self._moment()
        _HELD_HERE.add(mine.token)
        if not _swap(self._db, version, mine):
            _HELD_HERE.discard(mine.token)
            return False
        if before is not None and not before.is_released:
            log.warning("the lease was taken over from %s", before.describe(now))
        with self._lock:
            self._mine, self._version, self._lost = mine, version + 1, ""
            self._renewed = self._confirmed = moment
        self._ended = threading.Event()
        threading.Thread(target=self._keep, args=(self._ended,), name="lease", daemon=True).start()
        return True

    def _keep(self, ended: threading.Event) -> None:
        """The thread that renews."""
        renewals = 0
        while not ended.wait(self._ttl_s / 3):
            with self._lock:
                if self._mine is None or self._lost:
                    return
                self._renew()
            renewals += 1
            if renewals % _CLEAN_EVERY == 0:
                self._clean()

    def _confirm(self) -> None:
        """See whether the lease is still ours, and renew it where the thread did not come to it. Under the lock."""
        assert self._mine is not None
        if self._since(self._renewed) > self._ttl_s / 2:
            self._renew()
            return
        moment = self._moment()
        try:
            _, holder = _read(self._db)
        except (OSError, RuntimeError, ValueError) as error:
            self._fail(error)
            return
        if holder is not None and holder.token == self._mine.token:
            self._confirmed = moment
        else:
            self._lose(holder)

    def _renew(self) -> None:
        """Write the row again, or note that the lease is lost. Under the lock."""
        assert self._mine is not None
        moment, renewed = self._moment(), replace(self._mine, renewed_at=self._now())
        try:
            if _swap(self._db, self._version, renewed):
                self._mine, self._version = renewed, self._version + 1
                self._renewed = self._confirmed = moment
            else:
                self._lose(_read(self._db)[1])
        except (OSError, RuntimeError, ValueError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """The database did not answer: others may take the lease once it has expired, and not before."""
        if self._since(self._renewed) > self._ttl_s:
            self._lost = f"the lease of {self._db.uri} could not be renewed for {self._ttl_s:g} s: {first_line(error)}"
        else:
            log.warning("the lease could not be renewed: %s", first_line(error))

    def _lose(self, holder: Holder | None) -> None:
        by = holder.describe(self._now()) if holder else "someone who removed its table"
        self._lost = (
            f"the lease of {self._db.uri} was taken over by {by}, because this run did not renew it for "
            f"{self._ttl_s:g} s or a clock jumped; this run changes nothing any more: run it again"
        )

    def _moment(self) -> tuple[float, float]:
        return self._monotonic(), self._clock()

    def _since(self, moment: tuple[float, float]) -> float:
        """Seconds by the clock that says more: one stands still while the machine sleeps, the other may be set."""
        return max(now - then for now, then in zip(self._moment(), moment, strict=True))

    def _clean(self) -> None:
        """Remove old versions: a long run makes thousands. Files of others' failed attempts stay for Lance's week."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._db.dataset(_TABLE).cleanup_old_versions(retain_versions=_KEPT_VERSIONS)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)


def read_lease(db: Database) -> Holder | None:
    """Who holds the lease by its row; None where it was never taken or was given back. The holder may have died."""
    _, holder = _read(db)
    return holder if holder is not None and not holder.is_released else None


@persistent
def _read(db: Database) -> tuple[int, Holder | None]:
    """The table's version, 0 where there is none, and its row."""
    if not db.exists(_TABLE):
        return 0, None
    dataset = db.dataset(_TABLE)
    rows = dataset.to_table().to_pylist()
    return int(dataset.version), Holder(**rows[0]) if rows else None


def _swap(db: Database, version: int, holder: Holder) -> bool:
    """Write the row as the version after `version`; False where the table has another version by now."""
    schema = lease_schema()
    rows = pa.Table.from_pylist([asdict(holder)], schema=schema)
    try:
        fragments = write_fragments(rows, db.uri_of(_TABLE), schema=schema, mode="overwrite" if version else "create")
        # Without retries an overwrite is not rebased: it fails where the table moved.
        transaction = lance.Transaction(version, lance.LanceOperation.Overwrite(schema, fragments))
        commit_once(db.uri_of(_TABLE), transaction, max_rebases=0)
    except (OSError, RuntimeError):
        found, row = _read(db)
        if row == holder:  # it was written, only the answer was lost
            return True
        if found == version:
            raise
        return False
    return True
