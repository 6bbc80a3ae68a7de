"""Whether a command line would be taken by the job that it names, and its settings by the config."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.config import load_config
from pipeline.errors import ConfigError


def problems(
    words: Sequence[str], environment: Mapping[str, str], files: Mapping[str, str], *, in_shell: bool
) -> Iterator[str]:
    """What is wrong with `python -m jobs.NAME ...`.

    Args:
        words: the command line.
        environment: the variables that will be there.
        files: mounted files by path, for `--config`.
        in_shell: whether a shell fills in `$NAME`; else Kubernetes fills in `$(NAME)`.
    """
    variable = re.compile(r"\$(\w+)" if in_shell else r"\$\((\w+)\)")
    for name in sorted({name for word in words for name in variable.findall(word)} - set(environment)):
        yield f"${name} names a variable that is not set"
    words = [variable.sub(lambda m: environment.get(m[1], m[0]), word) for word in words]
    if list(words[:2]) != ["python", "-m"] or not words[2].startswith("jobs."):
        yield f"{' '.join(words[:3])!r} is no job of ours"
        return
    name = words[2].removeprefix("jobs.")
    try:
        job = importlib.import_module(f"jobs.{name}")
    except ModuleNotFoundError:
        yield f"there is no job {name}"
        return
    try:
        given = _parser(job).parse_args(list(words[3:]))
    except (SystemExit, argparse.ArgumentError):
        yield f"jobs.{name} does not take {' '.join(words[3:])}"
        return
    yield from _settings(given, files)


def _parser(job: object) -> argparse.ArgumentParser:
    make = getattr(job, "parser", None) or job._parser
    result: argparse.ArgumentParser = make()
    return result


def _settings(given: argparse.Namespace, files: Mapping[str, str]) -> Iterator[str]:
    """Whether `--config` and `--set` load."""
    config, sets = getattr(given, "config", None), getattr(given, "set", [])
    if config is not None and config not in files:
        yield f"no pod mounts {config}"
        return
    with TemporaryDirectory() as folder:
        file = Path(folder, "settings.toml")
        file.write_text(files.get(config or "", ""))
        try:
            load_config(str(file), sets)
        except ConfigError as error:
            yield str(error)
