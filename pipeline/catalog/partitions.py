"""A catalog of Parquet files as partitions: found, checked against the column mapping, and read in batches."""

from __future__ import annotations

import fnmatch
import hashlib
import posixpath
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.config import CatalogConfig, ColumnsConfig
from pipeline.errors import CatalogError, RunError
from pipeline.paths import is_uri, open_file, reach, resolve

_GLOB = frozenset("*?[")
_BATCH_BYTES = 64_000_000
_BATCH_ROWS = 64  # a batch is what progress moves by, and what a stop waits for
_READ_BUFFER_BYTES = 1 << 20
_READ_AGAIN_AFTER_S = 1.0
_FOOTER_THREADS = 16  # a footer is two or three small reads, which an object store answers side by side
_TAIL_BYTES = 8  # of a Parquet file: the footer's length, and "PAR1"
_ROW_GROUPS = re.compile(r"#\d+-\d+$")

READ_ERRORS = (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError)
"""What reading a damaged Parquet page can raise."""


@dataclass(frozen=True)
class Partition:
    """A Parquet file, or a range of its row groups: the unit of work and of retry.

    Attributes:
        name: the file's absolute path or URI, with `#first-last` row groups where the file is cut.
        path: the file as its filesystem names it.
        first_row: the range's first row in the file.
        size_bytes: compressed size of the row groups.
        identity: size and modification time of the file: what a resumed run compares.
        digest: of identity, footer and row groups: what a later run compares, to leave the partition unread.
    """

    name: str
    path: str
    row_groups: tuple[int, ...]
    first_row: int
    rows: int
    size_bytes: int
    identity: str
    digest: str = ""

    @property
    def file(self) -> str:
        """The file's name, without the row groups."""
        return file_of(self.name)

    @property
    def span(self) -> tuple[int, int]:
        """First row and row after the last, as in the file."""
        return self.first_row, self.first_row + self.rows


@dataclass(frozen=True)
class Catalog:
    """A checked catalog. It travels to the actors, so it holds names and no open files.

    Attributes:
        root: the folder or prefix that image references are relative to.
        shape: `product` or `image`.
        columns: the mapping, with absent optional columns as empty names.
        carried: the further columns with their Arrow types.
    """

    uri: str
    root: str
    shape: str
    columns: ColumnsConfig
    carried: tuple[pa.Field, ...]
    partitions: tuple[Partition, ...]

    @property
    def has_ordinals(self) -> bool:
        """Whether images have a place given by the catalog: a list's order, or an `image_ordinal` column."""
        return self.shape == "product" or bool(self.columns.image_ordinal)

    def read(
        self,
        partition: Partition,
        columns: Sequence[str],
        *,
        rows: tuple[int, int] | None = None,
        batch_rows: int | None = None,
    ) -> Iterator[pa.Table]:
        """The partition's rows in file order, streamed: no row group is held whole.

        A batch that cannot be read is read once more, since stores and networks fail for a moment.

        Args:
            partition: one of `partitions`.
            columns: file columns to read.
            rows: first row and row after the last, as in the file; None: all of the partition.
            batch_rows: rows per batch at most; None: as many as fit 64 MB of compressed row, up to 64.

        Raises:
            OSError: the file cannot be read.
            pa.ArrowInvalid: its pages are damaged.
            RunError: the file is gone, or is another one than when the catalog was opened.
        """
        if batch_rows is None:
            row_bytes = max(1, partition.size_bytes // max(1, partition.rows))
            batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes))
        row, stop = rows or partition.span
        failed_at = -1
        while row < stop:
            try:
                for table in self._read(partition, columns, row, stop, batch_rows):
                    yield table
                    row += table.num_rows
            except READ_ERRORS:
                self.check_unchanged(partition)
                if failed_at == row:
                    raise
                failed_at = row
                time.sleep(_READ_AGAIN_AFTER_S)
            else:
                return

    def check_unchanged(self, partition: Partition) -> None:
        """See that the partition's file is the one that the catalog was opened with.

        Raises:
            RunError: it is not; what was planned for its rows does not hold any more.
        """
        filesystem, _ = resolve(self.uri)
        try:
            info = filesystem.get_file_info(partition.path)
        except OSError as error:
            raise RunError(
                f"{partition.path} cannot be reached any more ({error}); run the same command again"
            ) from error
        if info.type != pafs.FileType.File or _identity(info) != partition.identity:
            what = "is gone" if info.type == pafs.FileType.NotFound else "was changed"
            raise RunError(
                f"{partition.path} {what} while the run was reading the catalog; what was staged is kept: run the same "
                "command again, on a catalog that stays as it is"
            )

    def _read(
        self, partition: Partition, columns: Sequence[str], first: int, stop: int, batch_rows: int
    ) -> Iterator[pa.Table]:
        """Rows from `first` up to `stop`, from the row groups that hold them."""
        filesystem, _ = resolve(self.uri)
        with open_file(filesystem, partition.path) as source:
            file = pq.ParquetFile(source, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False)
            groups: list[int] = []
            row = end = partition.first_row
            for group in partition.row_groups:
                start, end = end, end + file.metadata.row_group(group).num_rows
                if start < stop and end > first:
                    row = row if groups else start
                    groups.append(group)
            batches = file.iter_batches(
                batch_size=batch_rows, row_groups=groups, columns=list(columns), use_threads=False
            )
            for batch in batches:
                skipped = max(0, first - row)
                wanted = min(batch.num_rows, stop - row) - skipped
                row += batch.num_rows
                if wanted > 0:
                    yield pa.Table.from_batches([batch.slice(skipped, wanted)])


def file_of(name: str) -> str:
    """The file that a partition's name speaks of."""
    return _ROW_GROUPS.sub("", name)


def open_catalog(uri: str, catalog: CatalogConfig, columns: ColumnsConfig, *, images_root: str = "") -> Catalog:
    """Find the catalog's files, check each file's schema, and cut them into partitions.

    Args:
        uri: a folder, a file, a glob, or an object-store prefix.
        catalog: shape and partition size.
        columns: the column mapping.
        images_root: where references point; empty: beside the catalog.

    Raises:
        CatalogError: nothing there, not Parquet, a column missing or of a wrong type: names the file, the column, what
            was found and what was expected.
    """
    try:
        reach(uri)
        filesystem, files, root = _find(uri)
    except (OSError, pa.ArrowInvalid) as error:
        raise CatalogError(f"the catalog {uri} cannot be listed: {error}") from error
    if not files:
        raise CatalogError(f"the catalog {uri} holds no Parquet file (*.parquet); give a folder, a file or a glob")
    with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
        read = list(threads.map(lambda info: _footer(filesystem, info), files))
    footers = [footer for footer, _ in read]
    schemas = [footer.schema.to_arrow_schema() for footer in footers]
    checked = [_check(info.path, schema, columns, catalog.shape) for info, schema in zip(files, schemas, strict=True)]
    first = checked[0]
    for info, other in zip(files, checked, strict=True):
        if other != first:
            raise CatalogError(_difference(files[0].path, first, info.path, other))
    partitions = [
        partition
        for info, (footer, digest) in zip(files, read, strict=True)
        for partition in _cut(uri, info, footer, digest, catalog.partition_bytes)
    ]
    if not sum(p.rows for p in partitions):
        raise CatalogError(f"the catalog {uri} has no rows: its Parquet files, {len(files)} in number, are empty")
    return Catalog(uri, images_root or root, first.shape, first.columns, first.carried, tuple(partitions))


@dataclass(frozen=True)
class _Checked:
    """What a file's schema says about the catalog; equal for all of its files."""

    shape: str
    id_kind: str
    columns: ColumnsConfig
    carried: tuple[pa.Field, ...]


def _find(uri: str) -> tuple[pafs.FileSystem, list[pafs.FileInfo], str]:
    """Filesystem, the Parquet files in path order, and the root that references are relative to."""
    is_glob = bool(_GLOB & set(uri.rsplit("://", 1)[-1]))
    base, parts, fixed = uri, uri.split("/"), 0
    if is_glob:
        fixed = next(i for i, part in enumerate(parts) if _GLOB & set(part))
        base = "/".join(parts[:fixed]) or ("/" if uri.startswith("/") else ".")
    filesystem, path = resolve(base)
    top = filesystem.get_file_info(path)
    if top.type == pafs.FileType.NotFound:
        raise CatalogError(f"there is no catalog at {uri}: {base} does not exist")
    if top.type == pafs.FileType.File:
        return filesystem, [top], _with_scheme(uri, posixpath.dirname(path))
    infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    files = [info for info in infos if info.type == pafs.FileType.File and _is_data(info.path, path)]
    if is_glob:
        wanted = [*path.strip("/").split("/"), *parts[fixed:]] if path.strip("/") else parts[fixed:]
        files = [info for info in files if _matches(info.path.strip("/").split("/"), wanted)]
    return filesystem, sorted(files, key=lambda info: info.path), _with_scheme(uri, path)


def _with_scheme(uri: str, path: str) -> str:
    """The path as a URI of the catalog's own scheme."""
    return f"{uri.partition('://')[0]}://{path}" if is_uri(uri) else path


def _is_data(path: str, base: str) -> bool:
    """Parquet by name, and not in a hidden or underscore folder, where engines keep what is not data."""
    inside = posixpath.relpath(path, base).split("/")
    return path.endswith((".parquet", ".pq")) and not any(part[0] in "._" for part in inside)


def _matches(names: list[str], wanted: list[str]) -> bool:
    """Whether a path, or a folder above it, matches a glob, part by part; `**` stands for any number of parts."""
    if not wanted:
        return True
    if wanted[0] == "**":
        return any(_matches(names[i:], wanted[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], wanted[0]) and _matches(names[1:], wanted[1:])


def _footer(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> tuple[pq.FileMetaData, str]:
    """A file's footer, and the digest of its bytes: the statistics of every column chunk are in them."""
    try:
        with open_file(filesystem, info.path) as source:
            footer = pq.read_metadata(source)
            size = source.size()
            length = int.from_bytes(source.read_at(_TAIL_BYTES, size - _TAIL_BYTES)[:4], "little")
            raw = source.read_at(length, max(0, size - _TAIL_BYTES - length))
            return footer, hashlib.sha256(raw).hexdigest()
    except (OSError, pa.ArrowInvalid) as error:
        raise CatalogError(f"{info.path} is not a readable Parquet file: {error}") from error


def _cut(
    uri: str, info: pafs.FileInfo, footer: pq.FileMetaData, footer_digest: str, partition_bytes: int
) -> Iterator[Partition]:
    """The file's row groups in consecutive ranges of at most `partition_bytes`, at least one group each."""
    name = _with_scheme(uri, info.path)
    identity = _identity(info)
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    sizes = [sum(g.column(c).total_compressed_size for c in range(g.num_columns)) for g in groups]
    start, row = 0, 0
    while start < len(groups):
        stop = start + 1
        while stop < len(groups) and sum(sizes[start : stop + 1]) <= partition_bytes:
            stop += 1
        rows = sum(g.num_rows for g in groups[start:stop])
        is_whole = start == 0 and stop == len(groups)
        part = name if is_whole else f"{name}#{start}-{stop - 1}"
        digest = hashlib.sha256(f"{identity} {footer_digest} {start} {stop}".encode()).hexdigest()[:32]
        groups_here = tuple(range(start, stop))
        yield Partition(part, info.path, groups_here, row, rows, sum(sizes[start:stop]), identity, digest)
        start, row = stop, row + rows


def _identity(info: pafs.FileInfo) -> str:
    """Size and modification time: what a listing says of a file's content.

    A store's ETag would say more, but pyarrow does not tell it; S3 counts the time of an object in whole seconds.
    """
    return f"{info.size}:{info.mtime_ns if info.mtime_ns is not None else ''}"


def _check(path: str, schema: pa.Schema, columns: ColumnsConfig, shape: str) -> _Checked:
    """Compare a file's schema with the mapping."""
    defaults = ColumnsConfig()

    def find(role: str, is_wanted: bool, expected: str, accepts: object) -> str:
        name = getattr(columns, role)
        if not name and not is_wanted:
            return ""
        if name not in schema.names:
            if is_wanted or name != getattr(defaults, role):
                raise CatalogError(
                    f"{path} has no column {name!r} for {role} (expected {expected}); it has "
                    f"{', '.join(schema.names)}. Map another with --set columns.{role}=NAME"
                )
            return ""
        found = schema.field(name).type
        if not accepts(found):  # type: ignore[operator]
            raise CatalogError(f"{path}: column {name!r} for {role} is {found}; expected {expected}")
        return str(name)

    id_name = find("product_id", True, "string or integer", lambda t: _is_string(t) or pa.types.is_integer(t))
    named = {
        role: find(role, False, "string", _is_string)
        for role in ("title", "description", "broad_category", "fine_category")
    }
    images = find("images", False, "binary or string, or a list of them", lambda t: _is_image(_element(t)))
    ordinal = find("image_ordinal", False, "integer", pa.types.is_integer)
    if not images and not named["title"] and not named["description"]:
        raise CatalogError(
            f"{path} has neither a text column (title, description) nor an images column; it has "
            f"{', '.join(schema.names)}. Map them with --set columns.title=NAME and so on"
        )
    is_list = bool(images) and _is_list(schema.field(images).type)
    if shape == "image" and is_list:
        raise CatalogError(f"{path}: column {images!r} is a list, but catalog.shape=image wants one image a row")
    found_shape = shape if shape != "auto" else ("product" if is_list or not images else "image")
    carried = []
    for name in columns.carried:
        if name not in schema.names:
            raise CatalogError(
                f"{path} has no column {name!r} named in columns.carried; it has {', '.join(schema.names)}"
            )
        if "." in name or "`" in name or name in ("and", "or", "not"):
            raise CatalogError(
                f"{path}: the column {name!r} in columns.carried has a name that tables or filters cannot have; give "
                "it another one, without a dot or a backtick and not `and`, `or` or `not`"
            )
        carried.append(pa.field(name, schema.field(name).type))
    id_kind = "string" if _is_string(schema.field(id_name).type) else "integer"
    mapping = ColumnsConfig(
        product_id=id_name,
        images=images,
        image_ordinal=ordinal if found_shape == "image" else "",
        carried=columns.carried,
        **named,
    )
    return _Checked(found_shape, id_kind, mapping, tuple(carried))


def _difference(path: str, first: _Checked, other_path: str, other: _Checked) -> str:
    """The sentence for two files of one catalog that do not agree."""
    if first.id_kind != other.id_kind:
        return (
            f"product ids are {first.id_kind} in {path} and {other.id_kind} in {other_path}; in one catalog they must "
            "be of one kind, because 1 and '1' would become one product"
        )
    if first.shape != other.shape:
        return f"{path} has one row per {first.shape} and {other_path} one per {other.shape}; set catalog.shape"
    for field in ("product_id", "title", "description", "images", "image_ordinal", "broad_category", "fine_category"):
        if getattr(first.columns, field) != getattr(other.columns, field):
            lacking = other_path if getattr(first.columns, field) else path
            return f"{lacking} has no column for {field}, which other files of the catalog have"
    return f"the carried columns differ: {list(first.carried)} in {path}, {list(other.carried)} in {other_path}"


def _is_string(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _is_image(type_: pa.DataType) -> bool:
    is_binary = pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_)
    return bool(is_binary or pa.types.is_fixed_size_binary(type_) or _is_string(type_))


def _is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _element(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if _is_list(type_) else type_
