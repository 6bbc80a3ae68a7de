"""The right to write a database, as a run uses it: looked at early, taken before the first write, given back."""

from __future__ import annotations

import logging
from types import TracebackType

from pipeline.config import LeaseConfig
from pipeline.run.signals import Stop
from pipeline.store.lease import Lease
from pipeline.store.recovery import recover
from pipeline.store.releases import Release, newest_release
from pipeline.store.tables import Database

log = logging.getLogger(__name__)


class Writer:
    """One run's way to the lease of a database.

    A run that cannot start writes nothing, not even a lease, so the lease is only looked at until the actors are there.

    Args:
        db: the database.
        config: what to do where another run holds it.
        run_id: this run.
        job: what the run is, for those who wait for it.
        stop: ends the waiting when it is set.
    """

    def __init__(self, db: Database, config: LeaseConfig, *, run_id: str, job: str, stop: Stop) -> None:
        self._db = db
        self._config = config
        self._run_id = run_id
        self._stop = stop
        self.lease = Lease(db, run_id=run_id, job=job, ttl_s=config.ttl_s)

    def look(self) -> None:
        """Go on where the database is free; else wait, end, or embed beside the holder, as the settings say.

        Raises:
            LeaseHeld: another run holds it, and this one is not to wait, or has waited for `lease.wait_s`.
            RunInterrupted: `stop` was set.
        """
        if self._config.when_held != "replan" and not self.lease.is_free():
            self.take()

    def begin(self) -> None:
        """Take the lease before the first partition is staged, unless this run embeds beside another one."""
        if self._config.when_held != "replan":
            self.take()

    def take(self) -> Release | None:
        """Take the lease, where it is not held yet, and clean up after runs that died with it.

        Returns:
            The newest release: nobody makes another one until the lease is given back.

        Raises:
            LeaseHeld: another run holds the database, and has not given it back in time.
            RunInterrupted: `stop` was set.
        """
        if not self.lease.is_held:
            wait_s = 0.0 if self._config.when_held == "stop" else self._config.wait_s
            self.lease.acquire(wait_s=wait_s, check=self._stop.check)
            recover(self._db, self._run_id)
        return newest_release(self._db)

    def check(self) -> None:
        """See that the lease, if it was taken, is still ours.

        Raises:
            LeaseLost: it is not.
        """
        if self.lease.is_held:
            self.lease.check()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lease.release()
