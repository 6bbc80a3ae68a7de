"""What a broken connection hinders is done again: commits, which never count twice, and listings."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import lance

from pipeline.errors import first_line

_ATTEMPTS = 6
_PAUSE_S = 0.1
_MAX_REBASES = 20  # Lance's own

_P = ParamSpec("_P")
_T = TypeVar("_T")


def commit_once(uri: str, transaction: lance.Transaction, *, max_rebases: int = _MAX_REBASES) -> int:
    """Commit a transaction; one whose answer was lost is looked up, because made again it would double its rows.

    Args:
        uri: of the table.
        transaction: with a uuid of its own; its `read_version` is the version that it was made on.
        max_rebases: how often Lance may put it on top of what others committed meanwhile.

    Returns:
        The version that it made.

    Raises:
        OSError, RuntimeError: it was not committed; another writer's commit contradicts it, or the store is away.
    """

    def commit() -> int:
        return int(lance.LanceDataset.commit(uri, transaction, max_retries=max_rebases).version)

    return persistently(commit, lambda: _version_of(uri, transaction))


def persistently(do: Callable[[], _T], find: Callable[[], _T | None] = lambda: None) -> _T:
    """Do something that a broken connection may have hindered, or only kept the answer of.

    Lance and its object store repeat requests, but not conditional puts, by which they commit, as those may have been
    done; and not a listing whose answer broke off.

    Args:
        do: safe to do again where `find` finds nothing.
        find: what `do` would have returned, if it was done after all.

    Raises:
        OSError, RuntimeError, ValueError: what `do` raised last; at once, unless it was the connection.
    """
    attempt = 1
    while True:
        try:
            return do()
        except (OSError, RuntimeError, ValueError) as error:  # Lance has all of them for a store that fails
            found = persistently(find)  # which may meet with the same
            if found is not None:
                return found
            if attempt == _ATTEMPTS or not connection_broke(error):
                raise
        time.sleep(_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5))
        attempt += 1


def persistent(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, done `persistently`; it is safe to do again."""

    @wraps(function)
    def again(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return persistently(lambda: function(*args, **kwargs))

    return again


def connection_broke(error: BaseException) -> bool:
    """Whether a store did not answer a request that was made once only."""
    said = str(error)
    return "HTTP error" in said and "max_retries" not in said


def _version_of(uri: str, transaction: lance.Transaction) -> int | None:
    """The version that a transaction made, if it did."""
    try:
        dataset = lance.dataset(uri)
    except ValueError as error:
        if "was not found" in str(error):  # there is no table yet
            return None
        raise OSError(first_line(error)) from error
    for version in range(transaction.read_version + 1, int(dataset.version) + 1):
        made_by = dataset.read_transaction(version)
        if made_by is not None and made_by.uuid == transaction.uuid:
            return version
    return None
