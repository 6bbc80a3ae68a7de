"""What every job's command line shares: the common arguments, the log, and errors as one sentence and an exit code."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from pipeline.errors import ConfigError, MissingExtra, RunError, RunInterrupted, TwotowerError, first_line
from pipeline.shown import visible

LOG_LEVELS = ("debug", "info", "warning", "error")


class JobParser(argparse.ArgumentParser):
    """A command line whose errors are told like all others: a sentence, and with `--json` an object."""

    def parse_known_args(self, args: Any = None, namespace: Any = None, **more: Any) -> Any:
        """Parse as argparse does, which comes here for actions too, and remember what was given."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace, **more)

    def error(self, message: str) -> NoReturn:
        """Tell what is wrong with the arguments, and end with exit code 2."""
        code = fail(ConfigError(f"{message}; see {self.prog} --help"), as_json="--json" in self._given)
        raise SystemExit(code)


def add_log_level(parser: argparse.ArgumentParser) -> None:
    """The `--log-level` of every job."""
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="how much is told on standard error")


def positive(text: str) -> int:
    """The type of an argument that is a whole number from 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number from 1, not {text!r}")
    return int(text)


def count(text: str) -> int:
    """The type of an argument that is a whole number from 0."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"takes a whole number from 0, not {text!r}")
    return int(text)


def number(text: str) -> float:
    """The type of an argument that is a number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"takes a number from 0, not {text!r}")
    return value


def port(text: str) -> int:
    """The type of an argument that is a TCP port; 0 lets the system choose."""
    if not text.isascii() or not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"takes a port from 0 to 65535, not {text!r}")
    return int(text)


class _StandardError(logging.StreamHandler[Any]):
    """Standard error as it is when a line is written, which need not be what it was at the start."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


class _Visible(logging.Formatter):
    """Lines in which titles, paths and what others said cannot steer the terminal, nor begin a line of their own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 -- logging's own name
        return visible(super().formatMessage(record))


def start_log(level: str) -> None:
    """Send the project's own log to standard error; other libraries speak from warnings up, Lance from errors.

    Lance reads its level as it is imported, and warns of every empty partition of a small index segment.
    """
    os.environ.setdefault("LANCE_LOG", "error")
    handler = _StandardError()
    handler.setFormatter(_Visible("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    for name in ("pipeline", "jobs"):
        log = logging.getLogger(name)
        log.handlers[:] = [handler]
        log.propagate = False
        log.setLevel(level.upper())


def run_job(job: Callable[[], Mapping[str, Any] | None], *, as_json: bool = False) -> int:
    """Run a job's body and turn what comes of it into an exit code.

    Args:
        job: the body; with `as_json` the mapping it returns becomes the last line of standard output. None where it
            has printed what there is.
        as_json: print the result, or the error, as one JSON object.

    Returns:
        The result's `exit_code` if it has one, else 0; for an error its own code, with its sentence on standard error.
    """
    try:
        with _interruptible():
            told = job()
    except KeyboardInterrupt:
        return fail(RunInterrupted("stopped by a signal; run the same command again"), as_json=as_json)
    except TwotowerError as error:
        return fail(error, as_json=as_json)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("pipeline", "jobs"):
            raise
        return fail(
            MissingExtra(f"the package {package} is not installed: pip install 'twotower[embed]'"), as_json=as_json
        )
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away, as `| head` does; there is no one left to tell
        return 1
    except OSError as error:
        return fail(RunError(f"a file, folder or store cannot be reached: {first_line(error)}"), as_json=as_json)
    result = dict(told or {})
    code = int(result.pop("exit_code", 0))
    if as_json and told is not None:
        print(json.dumps(result, default=str), flush=True)
    return code


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM as a KeyboardInterrupt, like Ctrl-C, from the first import on; a run takes both over as it starts Ray."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Ctrl-C too: a process that a script started in the background begins with it ignored.
    before = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tell(text: str) -> None:
    """Print lines for people; what a catalog, a path or another program put into them cannot steer the terminal."""
    print("\n".join(visible(line) for line in text.split("\n")), flush=True)


def run_and_tell(
    arguments: argparse.Namespace,
    job: Callable[[], Mapping[str, Any]],
    describe: Callable[[Mapping[str, Any]], str],
) -> int:
    """Run a job whose result is its output: as lines for people, or with `--json` as one object.

    Args:
        arguments: with `log_level` and `json`.
        job: the body, as `run_job` takes it.
        describe: makes the lines.

    Returns:
        The exit code.
    """
    start_log(arguments.log_level)

    def told() -> Mapping[str, Any]:
        result = job()
        if not arguments.json:
            tell(describe(result))
        return result

    return run_job(told, as_json=arguments.json)


def fail(error: TwotowerError, *, as_json: bool) -> int:
    """Tell an error, and give its exit code."""
    print(f"error: {visible(error)}", file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}), flush=True)
    return error.exit_code
