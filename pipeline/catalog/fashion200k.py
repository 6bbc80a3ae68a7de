"""Fashion200k as its owners publish it: label files and a tree of images, read as products."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.catalog.import_source import ImportReason, ImportReject, SourceImage, SourceProduct
from pipeline.errors import CatalogError, InputRejected
from pipeline.paths import absolute, is_uri

BROAD = {"dresses": "dress", "jackets": "jacket", "pants": "pants", "skirts": "skirt", "tops": "top"}
"""The folders under `women`, and what the label files call them."""
LABEL_FILES = tuple(
    sorted(f"{broad}_{split}_detect_all.txt" for broad in BROAD.values() for split in ("test", "train"))
)
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("product_id", "title", "description")),
        *(pa.field(name, pa.string()) for name in ("broad_category", "fine_category", "split")),
        *(pa.field(name, pa.list_(pa.string())) for name in ("descriptions", "image_names", "image_splits")),
        pa.field("detection_scores", pa.list_(pa.float64())),
    ]
)
_PATH = re.compile(r"women/([a-z]+)/([\w-]+)/([\w-]+)/([\w-]+)_([0-9]{1,9})\.jpe?g", re.ASCII)
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BLANK = " \t\r\n\v\f"  # what str.strip() takes beyond these may be half of a letter that was encoded twice
_BOM = b"\xef\xbb\xbf"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Label:
    """One line of a label file.

    Attributes:
        path: of the image, under the root: `women/dresses/gowns/123/123_0.jpeg`.
        ordinal: the number in its name; a product's numbers have gaps.
        score: of the owners' detector; finite, of either sign.
        description: without blanks around it; None where there is none.
    """

    path: str
    product_id: str
    ordinal: int
    broad_category: str
    fine_category: str
    score: float
    description: str | None


@dataclass
class Labels:
    """What the label files hold.

    Attributes:
        files: sha256, bytes and lines of each file that is there.
        missing: names of those that are not.
        products: of each product id the lines that count, as image and label, in file order.
        rejects: the lines that do not count.
        named: every path that a readable line names, whether it counts or not.
    """

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    products: dict[str, list[tuple[SourceImage, Label]]] = field(default_factory=dict)
    rejects: list[ImportReject] = field(default_factory=list)
    named: set[str] = field(default_factory=set)


class Fashion200k:
    """The data set as a source of products, one per product id; an `import_source.ImportSource`.

    A product's description is that of its first image, in the order of the numbers in their names, that has one. Its
    `split` is `train`, `test`, or `both` where its images are in both; `image_splits` tells each image's. Images whose
    product id lies in another sub-category's folder than its first line's are rejected: a product has one category.

    Args:
        root: the local folder that holds `labels` and `women`.
        repair_text: undo a second UTF-8 encoding of descriptions.

    Raises:
        CatalogError: the folder is not of that shape.
    """

    schema = SCHEMA
    needs_images = True

    def __init__(self, root: str, *, repair_text: bool = False) -> None:
        if is_uri(root):
            raise CatalogError(f"Fashion200k is read from a local folder, not from {root}; copy it first")
        self._repair_text = repair_text
        self._root = Path(absolute(root))
        self.images_root = _images_root(self._root)
        self._labels = read_labels(self._root / "labels", repair_text=repair_text)
        self._extra_files = 0

    def identity(self) -> Mapping[str, Any]:
        """Digests of the label files, which are missing, and whether text is repaired."""
        labels = self._labels
        return {"label_files": labels.files, "missing_label_files": labels.missing, "repair_text": self._repair_text}

    def products(self) -> Iterator[SourceProduct | ImportReject]:
        """The products by id, after the lines that were rejected."""
        yield from self._labels.rejects
        for product_id, lines in sorted(self._labels.products.items()):
            ordered = sorted(lines, key=lambda line: (line[1].ordinal, line[1].path))
            first = ordered[0][1]
            values = {"broad_category": first.broad_category, "fine_category": first.fine_category}
            yield SourceProduct(product_id, tuple(image for image, _ in ordered), values)
        self._extra_files = _count_extra(self.images_root, self._labels.named)

    def row(self, product: SourceProduct, images: Sequence[SourceImage]) -> Mapping[str, Any]:
        """A catalog row; the title stays null, as the description is the only text."""
        texts, scores, splits = zip(*(image.values for image in images), strict=True)
        descriptions = list(dict.fromkeys(text for text in texts if text is not None))
        return {
            "product_id": product.product_id,
            "title": None,
            "description": descriptions[0] if descriptions else None,
            **product.values,
            "split": splits[0] if len(set(splits)) == 1 else "both",
            "descriptions": descriptions,
            "image_names": [os.path.basename(image.reference) for image in images],  # noqa: PTH119 -- a reference
            "image_splits": list(splits),
            "detection_scores": list(scores),
        }

    def counts(self) -> Mapping[str, Any]:
        """Lines of the label files, and image files that none of them names."""
        lines = sum(file["lines"] for file in self._labels.files.values())
        return {"lines": lines, "extra_files": self._extra_files}


def read_labels(folder: Path, *, repair_text: bool = False) -> Labels:
    """Read the ten label files in the order of their names; a path counts where it first stands in a good line.

    Raises:
        CatalogError: none of them is there, or one cannot be read.
    """
    labels = Labels()
    owners: dict[str, tuple[str, int]] = {}
    for name in LABEL_FILES:
        try:
            raw = (folder / name).read_bytes()
        except FileNotFoundError:
            labels.missing.append(name)
            continue
        except OSError as error:
            raise CatalogError(f"the label file {folder / name} cannot be read: {error}") from error
        lines = raw.removeprefix(_BOM).split(b"\n")  # splitlines() would cut at letters, too
        if not lines[-1]:
            lines.pop()
        labels.files[name] = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw), "lines": len(lines)}
        for number, line in enumerate(lines, 1):
            _add(labels, owners, (name, number), line, repair_text)
    if not labels.files:
        raise CatalogError(f"{folder} holds none of Fashion200k's label files ({LABEL_FILES[0]} and so on)")
    if labels.missing:
        log.warning("%s lacks %s; their products are not imported", folder, ", ".join(labels.missing))
    return labels


def parse_line(raw: bytes, *, repair_text: bool = False) -> Label:
    r"""One line: path, detection score and description, parted by tabs.

    Args:
        raw: the line without its `\n`; a `\r` at its end is no part of it.
        repair_text: undo a second UTF-8 encoding of the description.

    Raises:
        InputRejected: with an `ImportReason`.
    """
    try:
        fields = raw.removesuffix(b"\r").decode().split("\t")
    except UnicodeDecodeError as error:
        raise InputRejected(ImportReason.NOT_UTF8, f"byte {error.start} of the line is not UTF-8") from error
    if len(fields) != 3:
        detail = f"the line has {len(fields)} fields parted by tabs; it should have path, score and description"
        raise InputRejected(ImportReason.WRONG_FIELDS, detail)
    path, written, text = fields
    if path.startswith(("/", "~")) or ".." in path.replace("\\", "/").split("/"):
        raise InputRejected(ImportReason.PATH_OUTSIDE, "the path is absolute or climbs out of the data set")
    match = _PATH.fullmatch(path)
    if match is None or match[1] not in BROAD or match[3] != match[4]:
        expected = "women/<dresses, jackets, pants, skirts or tops>/<sub-category>/<id>/<id>_<n>.jpeg"
        raise InputRejected(ImportReason.PATH_SHAPE, f"the path is not of the shape {expected}")
    score = float(written) if _NUMBER.fullmatch(written := written.strip(_BLANK)) else math.nan
    if not math.isfinite(score):
        raise InputRejected(
            ImportReason.SCORE_NOT_A_NUMBER, f"the detection score {written[:40]!r} is no finite number"
        )
    text = text.strip(_BLANK)
    if repair_text:
        text = repaired(text).strip(_BLANK)
    fine = f"{match[1]}/{match[2]}"
    return Label(path, match[3], int(match[5]), BROAD[match[1]], fine, score, text or None)


def repaired(text: str) -> str:
    """Text whose UTF-8 was taken for Latin-1 or Windows-1252 and encoded again, as it was; other text as it is."""
    for encoding in ("latin-1", "cp1252"):
        try:
            return text.encode(encoding).decode()
        except UnicodeError:
            continue
    return text


def _add(
    labels: Labels, owners: dict[str, tuple[str, int]], place: tuple[str, int], line: bytes, repair_text: bool
) -> None:
    """Take a line up, or say why it does not count.

    Args:
        labels: what was read so far.
        owners: of each path that counts, the place that named it first.
        place: file and line number.
        line: as it stands in the file.
        repair_text: as of `parse_line`.
    """
    written = line.partition(b"\t")[0].removesuffix(b"\r").decode(errors="backslashreplace")
    name, number = place
    label = None
    try:
        label = parse_line(line, repair_text=repair_text)
        if label.path in owners:
            other, line_there = owners[label.path]
            detail = f"line {line_there} of {other} has this image already; the first one counts"
            raise InputRejected(ImportReason.DUPLICATE_IMAGE, detail)
        lines = labels.products.setdefault(label.product_id, [])
        if lines and lines[0][1].fine_category != label.fine_category:
            first = lines[0][0]
            detail = (
                f"the product is in {lines[0][1].fine_category} by line {first.row} of {first.source}; it has one "
                "category, the first one"
            )
            raise InputRejected(ImportReason.CONFLICTING_CATEGORY, detail)
    except InputRejected as why:
        labels.named.add(written)
        product_id = label.product_id if label else None
        labels.rejects.append(ImportReject(name, number, "image", product_id, written, str(why.reason), why.detail))
        return
    owners[label.path] = place
    labels.named.add(label.path)
    split = name.split("_")[1]
    lines.append((SourceImage(label.path, name, number, (label.description, label.score, split)), label))


def _images_root(root: Path) -> str:
    """The folder that holds `women`, which may be a link to a folder of that name.

    Raises:
        CatalogError: there is none.
    """
    women = root / "women"
    if not women.is_dir():
        raise CatalogError(f"{root} is not Fashion200k's folder: it has no folder women; give the one that does")
    real = women.resolve()
    if real.name != "women":
        raise CatalogError(f"{women} is a link to {real}, which has another name; paths begin with women/: rename it")
    return str(real.parent)


def _count_extra(images_root: str, named: set[str]) -> int:
    """Files under `women` that no label names."""
    extra: Counter[bool] = Counter()
    for folder, _, files in os.walk(f"{images_root}/women"):
        inside = os.path.relpath(folder, images_root)
        extra.update(f"{inside}/{file}" not in named for file in files)
    return extra[True]
