"""An import: products of any source to a catalog's partitions, bounded in memory, and again from where it broke off."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.catalog.fetch import Fetcher
from pipeline.catalog.import_folder import CATALOG, MANIFEST, REJECTS, ImportFolder, Note, RejectsFile
from pipeline.catalog.import_source import ImportReject, ImportSource, SourceImage, SourceProduct
from pipeline.errors import ImageRejected, RunError
from pipeline.records import ImageLimits, Reason
from pipeline.shown import redacted

_FORMAT = 1  # of what is written: another number writes every partition again
_THREADS = 8  # that look for files and read them: a disk, or a network's, answers side by side
_LOOKED_AT = 256  # products whose files are looked for together
_GROUP_BYTES = 32_000_000  # of images in a row group, which is what is held in memory
_GROUP_PRODUCTS = 500
_PRODUCT_BYTES = 1_000_000_000  # of one product's images; a row has to fit into memory
_URL = ("http://", "https://")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportOptions:
    """How a catalog is written.

    Attributes:
        images_root: local folder that references are relative to, and do not leave.
        images: `bytes` into the partitions, or `references` to the files as they lie.
        partition_bytes: of images in a partition, after which another one begins.
        partition_products: products in a partition at most.
    """

    images_root: str
    images: str = "bytes"
    partition_bytes: int = 128_000_000
    partition_products: int = 10_000

    @property
    def has_bytes(self) -> bool:
        """Whether partitions hold the images themselves."""
        return self.images == "bytes"


@dataclass(frozen=True, slots=True)
class _Found:
    """A product whose images were looked for: those that are there, in bytes, and the digest of what was found."""

    product: SourceProduct
    sizes: tuple[int, ...]
    digest: bytes
    rejects: tuple[ImportReject, ...]


def run_import(source: ImportSource, out: str, options: ImportOptions, origin: Mapping[str, str]) -> dict[str, Any]:
    """Write a source's products to `out/catalog`, with `out/manifest.json` and `out/_rejects.parquet`.

    The same source gives the same bytes. Partitions that an import left finished, broken off or not, are kept where
    the source's digests, the options and the images' sizes and times are what they were.

    Args:
        source: the products.
        out: a local folder of this import alone.
        options: how they are written.
        origin: `source` and `job`, told when the folder belongs to another one.

    Returns:
        The manifest, with `catalog`, `rejects_path`, `manifest` and `images_root`, `written` and `kept` partitions and
        `seconds`.

    Raises:
        CatalogError: `out` cannot be used.
        RunError: nothing at all could be imported, or another import writes to `out`.
    """
    started = time.monotonic()
    images = _ImageFiles(options)
    notes: list[Note] = []
    kept = 0
    with ImportFolder.opened(out, origin) as folder:
        settings = {"format": _FORMAT, "images_kind": options.images, "source": source.identity()}
        with folder.rejects() as rejects:
            found = _found(source, images, rejects)
            for number, group in enumerate(_groups(found, options)):
                inputs = _digest(settings, group)
                note = folder.kept(number, inputs)
                kept += note is not None
                if note is None:
                    note, unread = _write(folder, number, inputs, group, source, images)
                    rejects.add(unread)
                notes.append(note)
                log.info("%s", _progress(notes, kept=kept, rejected=sum(rejects.counts.values())))
        manifest = folder.finish(len(notes), _manifest(settings, source, notes, rejects))
    if not manifest["products"]:
        raise RunError(f"nothing of {origin['source']} could be imported; {folder.path / REJECTS} says why")
    places = {"catalog": str(folder.path / CATALOG), "rejects_path": str(folder.path / REJECTS)}
    places |= {"manifest": str(folder.path / MANIFEST), "images_root": options.images_root}
    seconds = round(time.monotonic() - started, 3)
    return {**manifest, **places, "written": len(notes) - kept, "kept": kept, "seconds": seconds}


class _ImageFiles:
    """The images' files: looked for, and read. Safe for threads."""

    def __init__(self, options: ImportOptions) -> None:
        self._fetcher = Fetcher(options.images_root, ImageLimits())
        self.has_bytes = options.has_bytes

    def look(self, image: SourceImage) -> tuple[int, int] | ImageRejected:
        """Size in bytes and time of an image, or why it cannot be taken; a URL that stays one has neither."""
        if image.reference.lower().startswith(_URL):
            if not self.has_bytes:
                return 0, 0
            detail = "a URL is not read by an import; keep references, and a run with fetch.http=true reads it"
            return ImageRejected(Reason.FETCH_REFUSED, detail)
        try:
            found = self._fetcher.stat(image.reference)
        except ImageRejected as rejected:
            return rejected
        return found.st_size, found.st_mtime_ns

    def read(self, image: SourceImage) -> bytes | str | ImageRejected:
        """What stands for the image in the catalog, or why it cannot be read."""
        if not self.has_bytes:
            return image.reference
        try:
            return self._fetcher.fetch(image.reference)
        except ImageRejected as rejected:
            return rejected


def _found(source: ImportSource, images: _ImageFiles, rejects: RejectsFile) -> Iterator[_Found]:
    """The source's products with their images looked for; what is rejected on the way is written down."""
    items = source.products()
    with ThreadPoolExecutor(_THREADS) as threads:
        while batch := list(islice(items, _LOOKED_AT)):
            wanted = [image for item in batch if isinstance(item, SourceProduct) for image in item.images]
            looked = threads.map(images.look, wanted)
            for item in batch:
                if isinstance(item, ImportReject):
                    rejects.add([item])
                    continue
                found = _with_files(item, list(islice(looked, len(item.images))))
                rejects.add(found.rejects)
                if found.product.images or not source.needs_images:
                    yield found


def _with_files(product: SourceProduct, looked: Sequence[tuple[int, int] | ImageRejected]) -> _Found:
    """The product with those images that are there."""
    left: list[SourceImage] = []
    sizes: list[int] = []
    rejects: list[ImportReject] = []
    for image, found in zip(product.images, looked, strict=True):
        if not isinstance(found, ImageRejected) and sum(sizes) + found[0] > _PRODUCT_BYTES:
            detail = f"the images of a product that come before it have {sum(sizes):,} bytes; a row may have 1 GB"
            found = ImageRejected(Reason.IMAGE_TOO_LARGE_BYTES, detail)
        if isinstance(found, ImageRejected):
            rejects.append(_reject(product, image, found))
        else:
            left.append(image)
            sizes.append(found[0])
    told = repr((product.product_id, [(i.reference, i.row, s) for i, s in zip(product.images, looked, strict=True)]))
    digest = hashlib.sha256(told.encode("utf-8", "surrogatepass")).digest()
    whole = SourceProduct(product.product_id, tuple(left), product.values)
    return _Found(whole, tuple(sizes), digest, tuple(rejects))


def _groups(found: Iterable[_Found], options: ImportOptions) -> Iterator[list[_Found]]:
    """Consecutive products of a partition: as many as its bounds allow, one at least."""
    group: list[_Found] = []
    size_bytes = 0
    for product in found:
        adds = sum(product.sizes) if options.has_bytes else 0
        if group and (len(group) == options.partition_products or size_bytes + adds > options.partition_bytes):
            yield group
            group, size_bytes = [], 0
        group.append(product)
        size_bytes += adds
    if group:
        yield group


def _digest(settings: Mapping[str, Any], group: Sequence[_Found]) -> str:
    """Of all that a partition is made of."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for found in group:
        digest.update(found.digest)
    return digest.hexdigest()


def _write(
    folder: ImportFolder,
    number: int,
    inputs: str,
    group: Sequence[_Found],
    source: ImportSource,
    images: _ImageFiles,
) -> tuple[Note, list[ImportReject]]:
    """Write a partition, a row group at a time, and note what is in it; also the images that could not be read."""
    element = pa.binary() if images.has_bytes else pa.string()
    schema = source.schema.append(pa.field("images", pa.list_(element)))
    named = source.schema.names  # the statistics and dictionaries of images would be images again
    products = n_images = 0
    rejects: list[ImportReject] = []
    kinds: dict[str, dict[str, list[int]]] = {"broad_category": {}, "fine_category": {}}
    with (
        folder.partition(number) as path,
        pq.ParquetWriter(path, schema, use_dictionary=named, write_statistics=named) as writer,
        ThreadPoolExecutor(_THREADS) as threads,
    ):
        for part in _row_groups(group):
            rows = list(_rows(part, source, threads, images, rejects))
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=len(rows))
            products += len(rows)
            for row in rows:
                n_images += len(row["images"])
                for name, counts in kinds.items():
                    count = counts.setdefault(row[name] if row[name] is not None else "", [0, 0])
                    count[0], count[1] = count[0] + 1, count[1] + len(row["images"])
    told = {"products": products, "images": n_images, "broad": kinds["broad_category"], "fine": kinds["fine_category"]}
    return folder.remember(number, {"inputs": inputs, **told, "unread": len(rejects)}), rejects


def _row_groups(group: Sequence[_Found]) -> Iterator[list[_Found]]:
    """Consecutive products whose images are held together."""
    part: list[_Found] = []
    size_bytes = 0
    for found in group:
        if part and (len(part) == _GROUP_PRODUCTS or size_bytes + sum(found.sizes) > _GROUP_BYTES):
            yield part
            part, size_bytes = [], 0
        part.append(found)
        size_bytes += sum(found.sizes)
    if part:
        yield part


def _rows(
    part: Sequence[_Found],
    source: ImportSource,
    threads: ThreadPoolExecutor,
    images: _ImageFiles,
    rejects: list[ImportReject],
) -> Iterator[dict[str, Any]]:
    """The rows of a row group; images that cannot be read now, though they were there, go to the rejects."""
    read = threads.map(images.read, [image for found in part for image in found.product.images])
    for found in part:
        product = found.product
        pairs = list(zip(product.images, islice(read, len(product.images)), strict=True))
        good = [(image, data) for image, data in pairs if not isinstance(data, ImageRejected)]
        rejects += [_reject(product, image, data) for image, data in pairs if isinstance(data, ImageRejected)]
        if good or not source.needs_images:
            row = source.row(product, [image for image, _ in good])
            yield {**row, "images": [data for _, data in good]}


def _reject(product: SourceProduct, image: SourceImage, why: ImageRejected) -> ImportReject:
    return ImportReject(
        image.source, image.row, "image", product.product_id, redacted(image.reference), str(why.reason), why.detail
    )


def _manifest(
    settings: Mapping[str, Any], source: ImportSource, notes: Sequence[Note], rejects: RejectsFile
) -> dict[str, Any]:
    """What was imported; it holds no time and no path, so that equal imports have equal manifests."""
    return {
        **settings,
        "products": sum(note.products for note in notes),
        "images": sum(note.images for note in notes),
        "rejected": sum(rejects.counts.values()),
        "rejected_rows": rejects.total("row"),
        "rejected_images": rejects.total("image"),
        "rejects": rejects.by_reason(),
        **source.counts(),
        "broad_categories": _summed([note.broad for note in notes]),
        "fine_categories": _summed([note.fine for note in notes]),
        "partitions": [
            {
                "name": f"{CATALOG}/part-{number:05d}.parquet",
                "products": note.products,
                "images": note.images,
                "bytes": note.size_bytes,
                "sha256": note.sha256,
            }
            for number, note in enumerate(notes)
        ],
    }


def _summed(counts: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, dict[str, int]]:
    """Products and images by category, in its order."""
    names = sorted({name for count in counts for name in count})
    return {
        name: {
            "products": sum(count[name][0] for count in counts if name in count),
            "images": sum(count[name][1] for count in counts if name in count),
        }
        for name in names
    }


def _progress(notes: Sequence[Note], *, kept: int, rejected: int) -> str:
    """The line on standard error after each partition."""
    products, images = sum(note.products for note in notes), sum(note.images for note in notes)
    size_mb = sum(note.size_bytes for note in notes) / 1e6
    return (
        f"{len(notes)} partitions ({kept} kept): {products:,} products, {images:,} images, {size_mb:,.1f} MB, "
        f"{rejected:,} rejected"
    )
