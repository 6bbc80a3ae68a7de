"""What is looked at before a run begins: its paths, its folders, and whether every node sees them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from pipeline.catalog.partitions import Catalog
from pipeline.config import Config
from pipeline.errors import ClusterError, ConfigError, first_line
from pipeline.paths import absolute, is_uri, reach, resolve
from pipeline.run.cluster import check_nodes, connected, is_inside_job, ray_address
from pipeline.run.signals import Stop
from pipeline.run.staging import write_atomically
from pipeline.store.tables import Database, reach_database


def settle_paths(config: Config) -> Config:
    """Local paths made absolute; where other processes resolve them from another folder, relative ones are refused.

    Raises:
        ConfigError: catalog, db or model is not given, or the store of db or staging is not there.
        ClusterError: a relative local path inside a Ray job or with a remote cluster.
    """
    given = {
        "--catalog": config.catalog_uri, "--db": config.db, "--model": config.model_name,
        "staging.path": config.staging.path, "images.root": config.images.root,
    }  # fmt: skip
    for name, value in given.items():
        if name.startswith("--") and not value:
            raise ConfigError(f"{name} is missing")
        is_path = name != "--model" or Path(value).exists() or value.startswith(".")
        if is_path and value and not is_uri(value):
            is_relative = not Path(value).expanduser().is_absolute()
            if is_relative and (is_inside_job() or ray_address(config) != "local"):
                raise ClusterError(
                    f"{name} {value!r} is a relative path; in a Ray job it would name a folder of Ray's temporary copy "
                    "of the code: give an absolute path that all nodes share, or an object store's URI"
                )
            given[name] = absolute(value)
    for name in ("--db", "staging.path"):
        if given[name] and not is_uri(given[name]):
            check_folder(name, Path(given[name]))
    try:
        name = "--db"
        reach_database(Database(given[name]))
        name = "staging.path"
        reach(given[name])
    except OSError as error:
        raise ConfigError(f"{name} {given[name]}: {first_line(error)}") from error
    return replace(
        config,
        catalog_uri=given["--catalog"],
        db=given["--db"].rstrip("/"),
        model_name=given["--model"],
        staging=replace(config.staging, path=given["staging.path"]),
        images=replace(config.images, root=given["images.root"]),
    )


def check_folder(name: str, path: Path) -> None:
    """Whether a local folder can be written to, or made.

    Raises:
        ConfigError: it cannot.
    """
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"{name} {path}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{name} {path}: {existing} is not writable")


class Cluster:
    """Ray, as a run uses it: joined, and its nodes checked, once there is work that this process does not do alone.

    Args:
        config: where Ray is.
        catalog: what every node has to see.
        run_id: names the probes.
        stop: ends the waiting when it is set.
    """

    def __init__(self, config: Config, catalog: Catalog, run_id: str, stop: Stop) -> None:
        self._config, self._catalog, self._run_id, self._stop = config, catalog, run_id, stop
        self._held = ExitStack()
        self.is_joined = False

    def join(self) -> None:
        """Start or join Ray, where that was not done yet.

        Raises:
            ClusterError: there is none, or a node cannot see what it has to.
        """
        if not self.is_joined:
            self._held.enter_context(connected(self._config, self._stop))
            check_cluster(self._config, self._catalog, self._run_id, self._stop)
            self.is_joined = True

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()


def check_cluster(config: Config, catalog: Catalog, run_id: str, stop: Stop) -> None:
    """On a cluster, have every node look at the catalog, the model, and what the driver writes beside db and staging.

    Raises:
        ClusterError: names the node and the path that it cannot read, or the folder that cannot be written to.
    """
    if ray_address(config) == "local":
        return
    paths = [catalog.partitions[0].name.partition("#")[0]]
    paths += [path for path in (config.images.root, config.model_name) if is_uri(path) or Path(path).is_absolute()]
    with probed(dict.fromkeys((config.db, config.staging_path)), run_id) as probes:
        check_nodes([*paths, *probes], stop)


@contextmanager
def probed(folders: Iterable[str], run_id: str) -> Iterator[list[str]]:
    """A small file in each folder, for others to look at; afterwards the files are gone, and so are new empty folders.

    Raises:
        ClusterError: a folder cannot be written to.
    """
    probes: list[str] = []
    made: list[Path] = []
    try:
        for folder in folders:
            probe = f"{folder.rstrip('/')}/_probe-{run_id}"
            if not is_uri(folder):
                made += [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
            try:
                write_atomically(probe, b"")
            except OSError as error:
                raise ClusterError(f"the driver cannot write to {folder}: {error}") from error
            probes.append(probe)
        yield probes
    finally:
        for probe in probes:
            filesystem, inside = resolve(probe)
            filesystem.delete_file(inside)
        for path in sorted(made, key=lambda path: -len(path.parts)):
            with suppress(OSError):
                path.rmdir()
