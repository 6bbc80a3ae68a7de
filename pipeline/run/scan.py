"""A partition read without a tower: what every row says, its texts and images as hashes, for the plan to compare."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.catalog.fetch import Fetcher
from pipeline.catalog.partitions import Catalog, Partition
from pipeline.catalog.products import RowPlan, read_products, row_digest
from pipeline.config import FetchConfig
from pipeline.errors import InputRejected
from pipeline.paths import is_uri, open_file, resolve
from pipeline.records import ImageInput, ImageLimits, Product, Reason, Rejected

METADATA = ("title", "description", "broad_category", "fine_category")
TEXT_EMPTY = "title and description hold nothing but white space"
_FILE_BATCH_ROWS = 2048


@dataclass(frozen=True)
class LoadSettings:
    """How the bytes of images are come by."""

    root: str
    limits: ImageLimits = field(default_factory=ImageLimits)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    threads: int = 1


@dataclass(frozen=True)
class Scanned:
    """A partition that was scanned: where its rows lie now."""

    partition: str
    path: str
    rows: int


class ImageLoader:
    """Bytes and hashes of images. Safe for threads."""

    def __init__(self, root: str, limits: ImageLimits, fetch: FetchConfig) -> None:
        self._fetcher = Fetcher(root, limits, fetch)

    def load(self, image: ImageInput) -> tuple[bytes, str]:
        """The image's bytes and their sha256.

        Raises:
            InputRejected: there are none, or they cannot be fetched.
        """
        if image.data is None:
            raise InputRejected(Reason.IMAGE_NULL, "the element is null")
        data = self._fetcher.fetch(image.data) if isinstance(image.data, str) else image.data
        return data, hashlib.sha256(data).hexdigest()


class Loads:
    """Images loaded by threads where they have to be fetched, and at once where they lie in the row.

    Args:
        settings: how.
        timed: a context that each load runs in.
    """

    def __init__(self, settings: LoadSettings, timed: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._loader, self._timed = ImageLoader(settings.root, settings.limits, settings.fetch), timed
        self.threads = ThreadPoolExecutor(
            fetch_threads(settings.fetch, settings.root) or settings.threads, thread_name_prefix="fetch"
        )

    def begin(self, image: ImageInput) -> Future[tuple[bytes, str]]:
        """The image's bytes and their hash, to come."""
        if isinstance(image.data, str):
            return self.threads.submit(self._load, image)
        done: Future[tuple[bytes, str]] = Future()
        try:
            done.set_result(self._load(image))
        except InputRejected as rejection:
            done.set_exception(rejection)
        return done

    def _load(self, image: ImageInput) -> tuple[bytes, str]:
        with self._timed():
            return self._loader.load(image)


def fetch_threads(fetch: FetchConfig, root: str) -> int:
    """How many threads fetch; 0: as many as decode. Waiting for a network must not keep others from decoding."""
    return fetch.threads if fetch.http or is_uri(root) else 0


def text_sha256(text: str) -> str:
    """Of a text as it was assembled."""
    return hashlib.sha256(text.encode()).hexdigest()


def image_mark(image: ImageInput, sha256: str | None, rejection: InputRejected | None) -> tuple[int | None, str]:
    """An image as `row_digest` takes it: where there is no hash, the reference and the reason stand for it."""
    if sha256 is not None:
        return image.ordinal, sha256
    reference = image.data if isinstance(image.data, str) else ""
    return image.ordinal, f"{rejection.reason if rejection else ''} {reference}"


def scanned_schema(carried: Sequence[pa.Field]) -> pa.Schema:
    """One row per catalog row. A row with a `reason` is a reject; an image without a `sha256` has one of its own."""
    image = pa.struct(
        [
            ("ordinal", pa.int32()),
            ("sha256", pa.string()),
            ("bytes", pa.int64()),
            ("reason", pa.string()),
            ("detail", pa.string()),
        ]
    )
    return pa.schema(
        [
            pa.field("product_id", pa.string()),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("digest", pa.binary(16)),
            pa.field("reason", pa.string()),
            pa.field("detail", pa.string()),
            *[pa.field(name, pa.string()) for name in METADATA],
            *[pa.field(f"carried.{field.name}", field.type) for field in carried],
            pa.field("text_sha256", pa.string()),
            pa.field("is_blank", pa.bool_()),
            pa.field("images", pa.list_(image)),
        ]
    )


def scan_partition(catalog: Catalog, partition: Partition, settings: LoadSettings, path: str) -> Scanned:
    """Read all rows of a partition, hash its texts and images, and write what it says to a file of the run's own.

    Args:
        catalog: the checked catalog.
        partition: one of its partitions.
        settings: how image references are read.
        path: of the file; a folder that the driver and all tasks see.

    Raises:
        RunError: the partition's file is gone, or was changed since the catalog was opened.
    """
    schema = scanned_schema(catalog.carried)
    loads = Loads(settings)
    count = 0
    filesystem, inside = resolve(path)
    try:
        with (
            filesystem.open_output_stream(inside) as sink,
            pq.ParquetWriter(sink, schema, compression="zstd") as writer,
        ):
            for products, rejects in read_products(catalog, partition, RowPlan()):
                rows = [*_rows(products, loads, catalog.carried), *map(_reject, rejects)]
                count += len(rows)
                if rows:
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    finally:
        loads.threads.shutdown(wait=False, cancel_futures=True)
    return Scanned(partition.name, path, count)


def scan_partitions(catalog: Catalog, work: Sequence[tuple[Partition, str]], settings: LoadSettings) -> list[Scanned]:
    """Several small partitions, one after another: a task for each would cost more than they do."""
    return [scan_partition(catalog, partition, settings, path) for partition, path in work]


def read_scanned(path: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Stream a scanned file."""
    filesystem, inside = resolve(path)
    with open_file(filesystem, inside) as source:
        file = pq.ParquetFile(source)
        for batch in file.iter_batches(batch_size=_FILE_BATCH_ROWS, columns=list(columns) if columns else None):
            yield pa.Table.from_batches([batch])


def _rows(products: Sequence[Product], loads: Loads, carried: Sequence[pa.Field]) -> list[dict[str, object]]:
    begun = [[loads.begin(image) for image in product.images] for product in products]
    return [_row(product, pending, carried) for product, pending in zip(products, begun, strict=True)]


def _row(
    product: Product, loads: Sequence[Future[tuple[bytes, str]]], carried: Sequence[pa.Field]
) -> dict[str, object]:
    images: list[dict[str, object]] = []
    marks: list[tuple[int | None, str]] = []
    for image, load in zip(product.images, loads, strict=True):
        data, sha256, rejection = b"", None, None
        try:
            data, sha256 = load.result()
        except InputRejected as error:
            rejection = error
        marks.append(image_mark(image, sha256, rejection))
        told = {"reason": str(rejection.reason), "detail": rejection.detail} if rejection else {}
        images.append({"ordinal": image.ordinal, "sha256": sha256, "bytes": len(data), **told})
    return {
        "product_id": product.product_id,
        "row": product.row,
        "digest": row_digest(product.content, marks),
        **{name: product.metadata[name] for name in METADATA},
        **{f"carried.{field.name}": product.metadata[field.name] for field in carried},
        "text_sha256": None if product.text is None else text_sha256(product.text),
        "is_blank": product.text == "",
        "images": images,
    }


def _reject(reject: Rejected) -> dict[str, object]:
    said = hashlib.blake2b(f"{reject.reason} {reject.detail}".encode(), digest_size=16).digest()
    return {
        "product_id": reject.product_id, "row": reject.row, "digest": said, "reason": str(reject.reason),
        "detail": reject.detail,
    }  # fmt: skip
