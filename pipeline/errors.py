"""Every error this project raises on purpose.

    TwotowerError                  exit code 1
    ├── UsageError                 exit code 2: nothing was started, nothing was written
    │   ├── ConfigError            an unknown key, a value out of range
    │   ├── CatalogError           no partitions, a missing column, a wrong type
    │   ├── ModelError             a missing, damaged, misshapen or unsupported model
    │   ├── ClusterError           no Ray, too few GPUs, a path that a node cannot read
    │   ├── QueryError             a query that has no answer: empty text, zero vector, unknown column
    │   └── MissingExtra           a part of the installation is not there
    ├── RunError                   a run began and could not end well
    │   ├── RunInterrupted         SIGTERM or SIGINT; what was staged is kept
    │   ├── LeaseHeld              another run writes to the database
    │   ├── LeaseLost              another run took over, as this one seemed dead
    │   └── ReleaseRefused         the run ended, its result may not be released
    └── InputRejected              one input of one product is bad; it becomes a row in `rejects`
        └── ImageRejected

All of them carry one readable sentence: what happened, where, and what to do. They are picklable, because Ray moves
them between processes.
"""

from __future__ import annotations

import re


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing, for a sentence of ours.

    Where in Lance's own source it was raised helps nobody, and is left out.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r",? /\S+\.rs:[\d:]+", "", lines[0])


def described(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    said = first_line(error)
    return said if said == type(error).__name__ else f"{type(error).__name__}: {said}"


class TwotowerError(Exception):
    """Base of all errors raised on purpose; `str(error)` is a sentence for people."""

    exit_code = 1


class UsageError(TwotowerError):
    """What the caller asked for cannot be done; nothing was started and nothing was written."""

    exit_code = 2


class ConfigError(UsageError):
    """The configuration holds an unknown key or a value that cannot be used."""


class CatalogError(UsageError):
    """The catalog cannot be read as products."""


class ModelError(UsageError):
    """The model is missing, damaged, unsupported, or not the one it claims to be."""


class ClusterError(UsageError):
    """Ray or its nodes cannot give what the run needs."""


class QueryError(UsageError):
    """A query has no defined answer."""


class MissingExtra(UsageError):
    """A package of an optional part of the installation is missing."""


class RunError(TwotowerError):
    """A run began and could not end well."""


class RunInterrupted(RunError):
    """A signal ended the run; staged partitions are kept and the same command resumes."""


class LeaseHeld(RunError):
    """Another run holds the writer's lease of the database."""


class LeaseLost(RunError):
    """The writer's lease was taken over by another run, or could not be renewed in time."""


class ReleaseRefused(RunError):
    """The run ended, but its result did not pass the checks that stand before a release."""


class InputRejected(TwotowerError):
    """One input is bad.

    Args:
        reason: a value of `pipeline.records.Reason`.
        detail: a sentence for the person who repairs the catalog.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class ImageRejected(InputRejected):
    """An image that cannot or should not be embedded."""
