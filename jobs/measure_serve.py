"""How a server bears load: `python -m jobs.measure_serve --db DB`.

Starts `jobs.serve` as a process of its own and lets clients ask it, each its next question once it has the answer: new
texts, texts that were asked before, texts with filters, diversified ones, vectors, similar products and thumbnails.
Told are requests a second, errors, the median and the 99th percentile by kind, and the server's memory at the start,
after ten seconds and at the end. The clients share the machine with the server: what they cost is in the figures.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from jobs.cli import JobParser, add_log_level, number, positive, run_and_tell
from pipeline.errors import RunError

KINDS = {
    "new text": 30,
    "repeated text": 25,
    "filter": 15,
    "diversified": 10,
    "vector": 5,
    "similar": 5,
    "thumbnail": 10,
}
"""Of 100 requests so many are of each kind."""

_WORDS = (
    ["red", "blue", "black", "green", "navy", "striped", "floral", "plain", "checked", "dotted", "pink", "white"],
    ["midi", "long", "short", "wide", "slim", "cropped", "pleated", "casual", "formal", "light", "warm", "soft"],
    ["dress", "jacket", "skirt", "jeans", "coat", "shirt", "blouse", "sweater", "trousers", "top", "blazer", "cape"],
)
_REPEATED = 50
_MEMORY_AT_S = 10.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(prog="python -m jobs.measure_serve", description=__doc__)
    result.add_argument("--db", required=True, help="folder or object-store prefix of the LanceDB tables")
    result.add_argument("--clients", type=positive, default=16, metavar="N", help="so many ask at once")
    result.add_argument("--seconds", type=number, default=60, metavar="S", help="for so long")
    result.add_argument("--k", type=positive, default=24, metavar="N", help="hits of each answer")
    result.add_argument("--model", help="a model folder, when the release's own is not at hand")
    result.add_argument("--threads", type=positive, metavar="N", help="of the server")
    result.add_argument("--seed", type=int, default=0, help="of the questions")
    result.add_argument("--json", action="store_true", help="print one JSON object")
    add_log_level(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)
    return run_and_tell(arguments, lambda: measure(arguments), describe)


@dataclass
class Tally:
    """What one client saw."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: Counter[str] = field(default_factory=Counter)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Serve, ask, and count."""
    command = [sys.executable, "-m", "jobs.serve", "--db", arguments.db, "--port", "0", "--log-level", "warning"]
    command += ["--model", arguments.model] if arguments.model else []
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    with _served(command) as (pid, port):
        questions = _Questions(port, arguments.k)
        memory = [_rss_mb(pid)]
        tallies = [Tally() for _ in range(arguments.clients)]
        until = time.monotonic() + arguments.seconds
        clients = [
            threading.Thread(
                target=_ask, args=(port, questions, random.Random(arguments.seed * 1000 + n), tally, until)
            )
            for n, tally in enumerate(tallies)
        ]
        begun = time.monotonic()
        for client in clients:
            client.start()
        time.sleep(min(_MEMORY_AT_S, arguments.seconds))
        memory.append(_rss_mb(pid))
        for client in clients:
            client.join()
        took = time.monotonic() - begun
        memory.append(_rss_mb(pid))
    return _told(tallies, took, memory)


def describe(told: Mapping[str, Any]) -> str:
    """What was measured, as a table."""
    lines = [
        f"{told['requests']:,} requests in {told['seconds']:.1f} s: {told['requests_per_second']:.1f} a second, "
        f"{sum(told['errors'].values())} errors" + (f" {told['errors']}" if told["errors"] else ""),
        "server memory " + ", ".join(f"{name} {mb:.0f} MB" for name, mb in told["memory_mb"].items()),
        f"{'kind':<14} {'requests':>8} {'p50 ms':>8} {'p99 ms':>8}",
    ]
    lines += [
        f"{kind:<14} {row['requests']:>8,} {row['p50_ms']:>8.1f} {row['p99_ms']:>8.1f}"
        for kind, row in told["kinds"].items()
    ]
    return "\n".join(lines)


def _told(tallies: Sequence[Tally], took: float, memory: Sequence[float]) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {
        kind: sorted(value for tally in tallies for value in tally.seconds[kind]) for kind in KINDS
    }
    errors: Counter[str] = sum((tally.errors for tally in tallies), Counter())
    everything = sorted(value for values in seconds.values() for value in values)
    return {
        "exit_code": 1 if errors else 0,
        "requests": len(everything),
        "seconds": round(took, 2),
        "requests_per_second": round(len(everything) / took, 2),
        "errors": dict(errors),
        "memory_mb": dict(zip(("at the start", "after 10 s", "at the end"), memory, strict=True)),
        "kinds": {kind: _row(values) for kind, values in (seconds | {"all": everything}).items() if values},
    }


def _row(values: Sequence[float]) -> dict[str, float]:
    at = min(len(values) - 1, int(0.99 * len(values)))
    p50, p99 = statistics.median(values), values[at]
    return {"requests": len(values), "p50_ms": round(1000 * p50, 1), "p99_ms": round(1000 * p99, 1)}


class _Questions:
    """Requests of each kind, about what the database holds."""

    def __init__(self, port: int, k: int) -> None:
        self._k = k
        self._made = 0
        self._lock = threading.Lock()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        first = {"q": "dress", "k": 50, "columns": ["avg_vector", "n_images"]}
        schema = _answer(connection, "/schema")
        found = _answer(connection, "/search?" + urlencode(first, doseq=True))["hits"]
        connection.close()
        self._ids = [hit["product_id"] for hit in found]
        self._pictured = [hit["product_id"] for hit in found if hit["fields"]["n_images"]] or self._ids
        self._vectors = [hit["fields"]["avg_vector"] for hit in found]
        self._filters = [
            {column["name"]: value} for column in schema["columns"] for value, _ in column["values"][:10]
        ] or [{"product_id": {"ne": ""}}]

    def draw(self, kind: str, chance: random.Random) -> tuple[str, str, bytes | None]:
        """Method, path and body."""
        asked: dict[str, Any] = {"k": self._k}
        if kind == "thumbnail":
            return "GET", f"/thumbnail/{quote(chance.choice(self._pictured), safe='')}", None
        if kind == "similar":
            return "GET", f"/similar/{quote(chance.choice(self._ids), safe='')}?{urlencode(asked)}", None
        if kind == "vector":
            vector = [value + chance.gauss(0, 0.02) for value in chance.choice(self._vectors)]
            return "POST", "/search", json.dumps(asked | {"vector": vector}).encode()
        asked["q"] = self._text(chance if kind == "repeated text" else None)
        if kind == "filter":
            asked["where"] = json.dumps(chance.choice(self._filters))
        if kind == "diversified":
            asked |= {"clusters": 5, "candidates": 50}
        return "GET", "/search?" + urlencode(asked), None

    def _text(self, chance: random.Random | None) -> str:
        """One of a few texts by chance; without it one that nobody asked yet."""
        if chance is not None:
            place = chance.randrange(_REPEATED)
        else:
            with self._lock:
                self._made += 1
                place = _REPEATED + self._made
        words = []
        for choices in _WORDS:
            place, at = divmod(place, len(choices))
            words.append(choices[at])
        return " ".join([*words, str(place)] if place else words)


def _ask(port: int, questions: _Questions, chance: random.Random, tally: Tally, until: float) -> None:
    """A client: one question after the other on one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    kinds, weights = list(KINDS), list(KINDS.values())
    while time.monotonic() < until:
        kind = chance.choices(kinds, weights)[0]
        method, path, body = questions.draw(kind, chance)
        headers = {"content-type": "application/json"} if body else {}
        begun = time.perf_counter()
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            tally.errors[type(error).__name__] += 1
            connection.close()
            continue
        tally.seconds[kind].append(time.perf_counter() - begun)
        if answer.status != 200:
            tally.errors[f"{kind}: {answer.status}"] += 1
    connection.close()


def _answer(connection: http.client.HTTPConnection, path: str) -> dict[str, Any]:
    connection.request("GET", path)
    answer = connection.getresponse()
    document: dict[str, Any] = json.loads(answer.read())
    if answer.status != 200:
        raise RunError(f"the server answered {answer.status}: {document.get('error')}")
    return document


@contextmanager
def _served(command: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The server's process and port."""
    environment = {name: value for name, value in os.environ.items() if name != "TWOTOWER_TOKEN"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise RunError(f"the server did not start, and ended with {process.wait()}; its own sentence is above")
        yield process.pid, int(address.rstrip("/").rpartition(":")[2])
    finally:
        process.terminate()
        code = process.wait(30)
    if code:
        raise RunError(f"the server ended with {code}")


def _rss_mb(pid: int) -> float:
    """Memory of a process, where the system tells it; else 0."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


if __name__ == "__main__":
    raise SystemExit(main())
