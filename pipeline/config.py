"""One frozen tree of settings, from a TOML file and `--set key=value`. Unknown keys are refused, units are in names."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pipeline.errors import ConfigError
from pipeline.hosts import HostRule
from pipeline.records import ImageLimits

T = TypeVar("T")
_LIMITS = ImageLimits()

_SWITCH = "on"
"""A section that has this setting may be given as true or false."""


@dataclass(frozen=True)
class ColumnsConfig:
    """The catalog's own names for what we read. A missing optional column is read as null, and so is one named ""."""

    product_id: str = "product_id"
    title: str = "title"
    description: str = "description"
    images: str = "images"
    image_ordinal: str = "image_ordinal"
    broad_category: str = "broad_category"
    fine_category: str = "fine_category"
    carried: tuple[str, ...] = ()
    """Further columns, copied into `products` as they are."""


@dataclass(frozen=True)
class CatalogConfig:
    """How the catalog is laid out and cut into partitions."""

    shape: str = field(default="auto", metadata={"choices": ("auto", "product", "image")})
    partition_bytes: int = field(default=256_000_000, metadata={"min": 1})
    """A larger file is cut into ranges of row groups of about this size, compressed."""


@dataclass(frozen=True)
class ImagesConfig:
    """What becomes of image bytes before the tower."""

    root: str = ""
    """Folder or prefix that references in the images column are relative to; empty: the catalog's own."""
    preprocessing: str = field(default="shop", metadata={"choices": ("shop", "published")})
    jpeg_draft: bool = False
    """Let the JPEG decoder shrink large photographs while decoding: faster, at a small cost in cosine."""
    max_bytes: int = field(default=_LIMITS.max_bytes, metadata={"min": 1})
    max_pixels: int = field(default=_LIMITS.max_pixels, metadata={"min": 1})
    min_side_px: int = field(default=_LIMITS.min_side_px, metadata={"min": 1})
    max_aspect: float = field(default=_LIMITS.max_aspect, metadata={"min": 1.0})

    @property
    def limits(self) -> ImageLimits:
        """The limits as the decoder takes them."""
        return ImageLimits(self.max_bytes, self.max_pixels, self.min_side_px, self.max_aspect)


@dataclass(frozen=True)
class FetchConfig:
    """How references in the images column are read: under `images.root`, and over http(s) where that is switched on.

    Raises:
        ConfigError: http without a host, or an entry that names none.
    """

    http: bool = False
    allow_hosts: tuple[str, ...] = ()
    """Hosts that URLs may name: `img.shop.example`, `*.cdn.shop.example` for what is under it, `img.shop.example:8080`
    for another port than 80 and 443."""
    allow_private_hosts: tuple[str, ...] = ()
    """Those of them that may be at private or loopback addresses: a shop's inner image server. Names only."""
    timeout_s: float = field(default=20.0, metadata={"min": 0.1})
    """For one attempt, redirects and the whole answer included."""
    connect_timeout_s: float = field(default=5.0, metadata={"min": 0.1})
    max_attempts: int = field(default=3, metadata={"min": 1})
    backoff_s: float = field(default=0.5, metadata={"min": 0.0})
    """Before the second attempt, doubled for each further one; a longer Retry-After is waited for, up to timeout_s."""
    max_redirects: int = field(default=3, metadata={"min": 0})
    per_host: int = field(default=8, metadata={"min": 1})
    """Requests of an actor to one host at a time."""
    threads: int = field(default=16, metadata={"min": 1})
    """Of an actor, where http is on or `images.root` is an object store; else the decode threads read."""

    def __post_init__(self) -> None:
        if self.http and not self.allow_hosts:
            raise ConfigError(
                "fetch.http=true needs the hosts that may be asked: fetch.allow_hosts=['img.shop.example']"
            )
        for name in ("allow_hosts", "allow_private_hosts"):
            for text in getattr(self, name):
                try:
                    rule = HostRule.parse(text)
                except ValueError as error:
                    raise ConfigError(f"fetch.{name}: {error}") from error
                if name == "allow_private_hosts" and (rule.is_wildcard or rule.port is not None):
                    raise ConfigError(f"fetch.{name} takes single hosts without wildcard or port; got {text!r}")


@dataclass(frozen=True)
class ModelConfig:
    """How the model is run; its name is `--model`."""

    dtype: str = field(default="float32", metadata={"choices": ("float32", "bfloat16", "float16")})
    device: str = field(default="auto", metadata={"choices": ("auto", "cpu", "cuda")})
    """auto: cuda where an actor was given a GPU that torch can use, else cpu."""
    revision: str | None = None
    """Commit of a model on the hub; None: the pinned one for jinaai/jina-clip-v1."""
    max_tokens: int = field(default=512, metadata={"min": 3, "max": 8192})
    compile: bool = False


@dataclass(frozen=True)
class RayConfig:
    """Where Ray is."""

    address: str | None = None
    """local: a Ray of this run's own; auto or host:port: a running cluster. None: auto inside a Ray job, else local;
    a Ray that merely happens to run on the machine is never joined."""


@dataclass(frozen=True)
class PoolConfig:
    """The embedding actors."""

    actors: int | None = field(default=None, metadata={"min": 1})
    """None: as many as the GPUs allow; on a machine without, one."""
    gpus: int | None = field(default=None, metadata={"min": 0})
    """Logical GPUs of a local Ray; None: what Ray detects."""
    gpus_per_actor: float | None = field(default=None, metadata={"min": 0.0})
    """None: 1 where the cluster has GPUs, else 0. A fraction shares one GPU."""
    cpus_per_actor: float = field(default=0.0, metadata={"min": 0.0})
    start_timeout_s: float = field(default=300.0, metadata={"min": 0.0})
    partitions_per_actor: int = field(default=2, metadata={"min": 1})
    """How many partitions are handed to an actor at a time: one being embedded, the others waiting in its queue."""
    max_attempts: int = field(default=3, metadata={"min": 1})
    """How often a partition whose worker died is tried, before it is halved until the row that kills it is alone."""
    max_crashes: int = field(default=100, metadata={"min": 0})
    """A run in which more workers died is ended: then it is not single rows."""
    stall_timeout_s: float = field(default=600.0, metadata={"min": 1.0})
    """An actor whose counts do not move for so long is taken for hanging: it is ended, and that counts as a crash."""
    memory_per_actor_bytes: int | None = field(default=None, metadata={"min": 1})
    """Most that an actor's process may take, its model included; beyond it, batches are made smaller. None: no limit.
    Ray is asked to keep as much free for it."""
    decode_threads: int | None = field(default=None, metadata={"min": 1})
    """None: beside a GPU the cores of each actor's node, shared between the actors there, at most 16; on a CPU the
    towers' own threads decode where they have nothing else to do."""
    torch_threads: int | None = field(default=None, metadata={"min": 1})
    """Batches of a tower beside each other on a CPU, each on one core. None: those cores on a CPU, 1 beside a GPU."""


@dataclass(frozen=True)
class LeaseConfig:
    """One run writes a database at a time."""

    when_held: str = field(default="stop", metadata={"choices": ("stop", "wait", "replan")})
    """What a run does where another one holds the database: end with a sentence; wait for it and begin then; or embed
    beside it, wait before the first commit, and plan again on what the other has released."""
    wait_s: float = field(default=3600.0, metadata={"min": 0.0})
    """How long to wait, with `wait` and `replan`."""
    ttl_s: float = field(default=60.0, metadata={"min": 1.0})
    """A holder that does not renew its lease for so long loses it; one that died on this machine loses it at once."""


@dataclass(frozen=True)
class StagingConfig:
    """Where embedded partitions wait for their release."""

    path: str = ""
    """Empty: `<db>/_staging`."""


@dataclass(frozen=True)
class AverageConfig:
    """avg_vector = unit(text_weight * text_vector + (1 - text_weight) * image_vector)."""

    text_weight: float = field(default=0.5, metadata={"min": 0.0, "max": 1.0})


@dataclass(frozen=True)
class PlanConfig:
    """How a run decides what to embed."""

    dedupe: bool = False
    """One more pass over the catalog, so that equal inputs of different partitions are embedded once."""


@dataclass(frozen=True)
class GateConfig:
    """Whether search may get worse: `release.gate=true` alone switches it on."""

    on: bool = False
    margin: float = field(default=0.01, metadata={"min": 0.0, "max": 1.0})
    """Of precision@10: a release that is not shown to have lost less than this in every mode is refused."""
    queries: int = field(default=1000, metadata={"min": 2})
    """How many are drawn from a release, and frozen beside it."""
    recipe: str = field(
        default="article", metadata={"choices": ("article", "attribute", "broad", "fine", "description")}
    )
    seed: int = field(default=0, metadata={"min": 0})


@dataclass(frozen=True)
class ReleaseConfig:
    """What stands before a release."""

    gate: GateConfig = GateConfig()
    index_min_rows: int = field(default=5000, metadata={"min": 1})
    """Under this many vectors a column is searched exactly, without an index."""
    min_recall: float = field(default=0.99, metadata={"min": 0.0, "max": 1.0})
    """Of each index's recall@10 against exact search; as many probes are used as reach it."""


@dataclass(frozen=True)
class Config:
    """Everything a run is told. The first three come from the command line, the rest from a file or `--set`."""

    catalog_uri: str = field(default="", metadata={"given": True})
    db: str = field(default="", metadata={"given": True})
    model_name: str = field(default="", metadata={"given": True})
    max_reject_share: float = field(default=0.05, metadata={"min": 0.0, "max": 1.0})
    max_delete_share: float = field(default=0.1, metadata={"min": 0.0, "max": 1.0})
    columns: ColumnsConfig = ColumnsConfig()
    catalog: CatalogConfig = CatalogConfig()
    images: ImagesConfig = ImagesConfig()
    fetch: FetchConfig = FetchConfig()
    model: ModelConfig = ModelConfig()
    ray: RayConfig = RayConfig()
    pool: PoolConfig = PoolConfig()
    lease: LeaseConfig = LeaseConfig()
    staging: StagingConfig = StagingConfig()
    average: AverageConfig = AverageConfig()
    plan: PlanConfig = PlanConfig()
    release: ReleaseConfig = ReleaseConfig()

    @property
    def staging_path(self) -> str:
        """Folder or prefix of the staged partitions."""
        return self.staging.path or f"{self.db.rstrip('/')}/_staging"

    @property
    def model_settings(self) -> dict[str, Any]:
        """What decides which vectors a model gives, its dtype apart: arguments of `load_model`."""
        return {
            "preprocessing": self.images.preprocessing,
            "max_tokens": self.model.max_tokens,
            "jpeg_draft": self.images.jpeg_draft,
            "revision": self.model.revision,
        }


def load_config(file: str | None = None, sets: Iterable[str] = (), **given: Any) -> Config:
    """Read a TOML file, then apply `key=value` settings, dotted as in `pool.gpus=2`.

    Args:
        file: a TOML file whose tables are the sections of `Config`, or None.
        sets: settings that win over the file; a value is TOML, or else taken as a string.
        **given: `catalog_uri`, `db`, `model_name`.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, a file that is not TOML.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        try:
            tree = tomllib.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"cannot read the config file {file}: {error}") from error
    for setting in sets:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set takes key=value, as in pool.gpus=2; got {setting!r}")
        _place(tree, name.strip(), _value(text.strip()))
    config = _build(Config, tree, "")
    return dataclasses.replace(config, **given)


def _value(text: str) -> object:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _place(tree: dict[str, Any], name: str, value: object) -> None:
    *sections, last = name.split(".")
    for section in sections:
        if isinstance(tree.get(section), bool):
            tree[section] = {_SWITCH: tree[section]}
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{name}: {section} is a value, not a section")
    if isinstance(value, bool) and isinstance(tree.get(last), dict):
        tree[last][_SWITCH] = value
    else:
        tree[last] = value


def _build(cls: type[T], tree: Mapping[str, Any], prefix: str) -> T:
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("given")}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in fields:
            known = ", ".join(prefix + n for n in fields)
            raise ConfigError(f"unknown setting {prefix}{name}; known are {known}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if isinstance(value, bool) and _SWITCH in {f.name for f in dataclasses.fields(hint)}:
                value = {_SWITCH: value}
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{name} is a section, as in {prefix}{name}.key=value; got {value!r}")
            values[name] = _build(typing.cast("type[Any]", hint), value, f"{prefix}{name}.")
        else:
            values[name] = _checked(value, hint, fields[name].metadata, prefix + name)
    return cls(**values)


def _checked(value: object, hint: Any, metadata: Mapping[str, Any], name: str) -> object:
    """The value in its declared type, or a ConfigError that says what is expected."""
    options = get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None or (value == "none" and type(None) in options):
        value = None
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if get_origin(hint) is tuple:
        value = (value,) if isinstance(value, str) else value
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{name} takes a list of strings; got {value!r}")
        return tuple(value)
    if type(value) not in options:
        wanted = " or ".join("none" if o is type(None) else o.__name__ for o in options)
        raise ConfigError(f"{name} takes {wanted}; got {value!r}")
    choices = metadata.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{name} is one of {', '.join(choices)}; got {value!r}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = metadata.get("min"), metadata.get("max")
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            span = f"from {low}" if high is None else f"from {low} to {high}"
            raise ConfigError(f"{name} takes a number {span}; got {value!r}")
    return value
