"""A page to search in, and its JSON API: `python -m jobs.serve --db DB`, then http://127.0.0.1:8000/."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.cli import JobParser, add_log_level, number, port, positive, run_job, start_log
from pipeline.errors import ConfigError, MissingExtra

log = logging.getLogger("jobs.serve")  # not __name__: as a job this module is __main__

TOKEN_VARIABLE = "TWOTOWER_TOKEN"
_SHORTEST_TOKEN = 16


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(
        prog="python -m jobs.serve",
        description="Serve a page to search in, and its JSON API (/openapi.json), until SIGTERM or SIGINT.",
    )
    result.add_argument("--db", required=True, help="folder or object-store prefix of the LanceDB tables")
    result.add_argument("--model", help="a model folder, when the release's own is not at hand")
    result.add_argument("--release", type=positive, metavar="N", help="serve this release; by default the newest")
    result.add_argument("--refresh", type=number, default=5, metavar="S", help="look for a new release; 0: never")
    result.add_argument("--host", default="127.0.0.1", help="where to listen; wider than loopback needs a token")
    result.add_argument("--port", type=port, default=8000, help="0: a free one, which standard output names")
    result.add_argument(
        "--token-file", type=Path, metavar="FILE",
        help=f"holds the token that requests have to bring; or it is in the environment as {TOKEN_VARIABLE}",
    )  # fmt: skip
    result.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="a name by which this server may be asked for, beside localhost; may be repeated",
    )  # fmt: skip
    result.add_argument("--max-body-bytes", type=positive, default=16 * 2**20, metavar="N", help="of one request")
    result.add_argument("--timeout", type=number, default=10, metavar="S", help="of one request")
    result.add_argument("--threads", type=positive, metavar="N", help="searches at once; by default as many as cores")
    result.add_argument("--device", default="cpu", help="where queries are embedded: cpu or cuda")
    result.add_argument(
        "--no-warm", action="store_true", help="load the model with the first query that needs it: vectors need none"
    )
    add_log_level(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)
    start_log(arguments.log_level)
    return run_job(lambda: _serve(arguments))


def _serve(arguments: argparse.Namespace) -> Mapping[str, Any]:
    token = read_token(arguments.token_file)
    try:
        from pipeline.serve.guard import LOOPBACK_NAMES, Limits, is_loopback
        from pipeline.serve.listen import Server, address_of, listening
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pipeline"):
            raise
        raise MissingExtra(f"jobs.serve needs {error.name}: pip install 'twotower[serve]'") from error

    if arguments.timeout == 0:
        raise ConfigError("--timeout is more than 0 seconds")
    is_local = is_loopback(arguments.host)
    if not is_local and not token:
        raise ConfigError(
            f"--host {arguments.host} can be reached from other machines, so requests have to bring a token: give "
            f"--token-file FILE or set {TOKEN_VARIABLE}, or listen on 127.0.0.1"
        )
    hosts = [*LOOPBACK_NAMES, arguments.host, *arguments.allow_host] if is_local or arguments.allow_host else []
    try:
        with listening(arguments.host, arguments.port) as listener:
            service = _open(arguments)
            from pipeline.serve.app import application

            size = arguments.max_body_bytes
            limits = Limits(body_bytes=size, held_bytes=max(Limits().held_bytes, 2 * size), seconds=arguments.timeout)
            app = application(
                service,
                limits=limits,
                token=token,
                hosts=hosts,
                refresh_s=0 if arguments.release else arguments.refresh,
            )
            address = address_of(listener, arguments.host)
            log.info("release %d of %s on %s", service.searcher.release.release, arguments.db, address)
            print(address, flush=True)
            Server(app, ends_within_s=arguments.timeout + 1).run(listener)
    except KeyboardInterrupt:
        log.info("stopped by a signal")
        return {}
    if not service.close(within_s=2):
        # A search that hangs in a store cannot be ended, and would keep the process for as long as it hangs.
        log.warning("a search still runs and is left behind")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return {}


def _open(arguments: argparse.Namespace) -> Any:
    """The service, warm."""
    from pipeline.query import Searcher
    from pipeline.serve.metrics import Metrics
    from pipeline.serve.service import Service

    searcher = Searcher.open(arguments.db, release=arguments.release, model=arguments.model, device=arguments.device)
    service = Service(searcher, Metrics(), threads=arguments.threads or max(2, os.cpu_count() or 1))
    if not arguments.no_warm:
        service.warm()
    return service


def read_token(file: Path | None) -> str:
    """The token from a file, or else from the environment; empty where there is none.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    if file is None:
        token, where = os.environ.get(TOKEN_VARIABLE, ""), TOKEN_VARIABLE
    else:
        try:
            token, where = file.read_text(encoding="utf-8").strip(), f"--token-file {file}"
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token-file {file} cannot be read: {error}") from error
    is_usable = len(token) >= _SHORTEST_TOKEN and token.isascii() and token.isprintable() and " " not in token
    if (token or file is not None) and not is_usable:
        raise ConfigError(
            f"{where} is no token: it takes {_SHORTEST_TOKEN} or more letters, digits and signs, without blanks"
        )
    return token


if __name__ == "__main__":
    raise SystemExit(main())
