"""A query becomes a vector: a text or an image through the release's model, a vector through its checks."""

from __future__ import annotations

import hashlib
import math
import os
import stat
import threading
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ImageRejected, MissingExtra, QueryError, first_line
from pipeline.query.filter_values import is_storable, shown
from pipeline.query.recent import Recent
from pipeline.records import ImageLimits

Vector = npt.NDArray[np.float32]

MAX_TEXT_CHARACTERS = 20_000
MAX_PARTS = 64
_CACHED_TEXTS = 4096
_CACHED_IMAGES = 256
_LEAST_LENGTH = 1e-4  # of the sum of the weights: below that float32 rounding has a say in the direction


class Mixture:
    """Several queries as one: the direction of the weighted sum of their unit vectors.

    Like this photo, but red, and without stripes: `Mixture([(Path("photo.jpg"), 1.0), ("red", 0.6), ("stripes",
    -0.3)])`. Texts lie apart from images in the model's space, so weights between the two kinds are a matter of trial.

    Args:
        parts: queries as `Searcher.search` takes them, each with a finite weight that is not zero; negative: less so.
    """

    def __init__(self, parts: Iterable[tuple[object, float]]) -> None:
        self.parts: list[tuple[object, float]] = []
        if not isinstance(parts, Iterable):
            raise QueryError("A Mixture takes a list of pairs of a query and its weight.")
        for part in parts:
            if isinstance(part, str | bytes) or not isinstance(part, Sequence) or len(part) != 2:
                raise QueryError("A Mixture takes pairs of a query and its weight.")
            query, weight = part
            if not _is_weight(weight):
                raise QueryError(f"A Mixture's weights are finite numbers other than 0, not {shown(weight)}.")
            if isinstance(query, Mixture):
                raise QueryError("A Mixture cannot be a part of another one.")
            self.parts.append((query, float(weight)))
        if not 1 <= len(self.parts) <= MAX_PARTS:
            raise QueryError(f"A Mixture takes 1 to {MAX_PARTS} queries, got {len(self.parts)}.")


class Encoder:
    """Turns queries into float32 (D,) vectors of unit L2 norm; safe for threads.

    Towers load with the first query that needs them, each one alone, so text search holds no image tower.

    Args:
        model: name of the model, as `load_model` takes it.
        model_id: of the vectors that are searched; a model with another one is refused.
        dim: D of the vectors that are searched.
        settings: arguments of `load_model` that are part of the model_id, as the release keeps them.
        device: where the towers run.
    """

    def __init__(
        self, model: str, model_id: str, dim: int, *, settings: Mapping[str, Any] | None = None, device: str = "cpu"
    ) -> None:
        self.model = model
        self.model_id = model_id
        self.dim = dim
        self.settings = dict(settings or {})
        self.device = device
        self._towers: dict[str, Any] = {}
        self._texts: Recent[str, Vector] = Recent(_CACHED_TEXTS)
        self._images: Recent[bytes, Vector] = Recent(_CACHED_IMAGES)  # the next page, or mode, of the same image
        self._loading = threading.Lock()

    def encode(self, queries: Sequence[object]) -> list[Vector]:
        """Vectors of the queries, in order; all texts go through the tower in one batch.

        Raises:
            QueryError: a query is empty, unreadable, of another dimension, not finite or zero.
        """
        parts = [query.parts if isinstance(query, Mixture) else [(query, 1.0)] for query in queries]
        texts = self._encode_texts([part for mixed in parts for part, _ in mixed if isinstance(part, str)])

        def vector(part: object) -> Vector:
            return texts[part] if isinstance(part, str) else self._encode_other(part)

        return [
            _mixed([(vector(part), weight) for part, weight in query.parts])
            if isinstance(query, Mixture)
            else vector(query)
            for query in queries
        ]

    def knows(self, text: str) -> bool:
        """Whether the vector of a text is remembered."""
        return text in self._texts

    def _encode_texts(self, texts: list[str]) -> dict[str, Vector]:
        for text in texts:
            if not text.strip():
                raise QueryError("The query text is empty.")
            if len(text) > MAX_TEXT_CHARACTERS:
                raise QueryError(f"The query text has {len(text)} characters; {MAX_TEXT_CHARACTERS} are the most.")
            if not is_storable(text):
                raise QueryError("The query text holds half of a surrogate pair or bytes that are no UTF-8.")
        known = {text: vector for text in texts if (vector := self._texts.get(text)) is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            vectors = self._tower("text").embed_texts(missing)
            fresh = {text: self._checked(vector) for text, vector in zip(missing, vectors, strict=True)}
            for text, vector in fresh.items():
                self._texts.put(text, vector)
            known |= fresh
        return known

    def _encode_other(self, query: object) -> Vector:
        if isinstance(query, bytes | bytearray | memoryview | os.PathLike) or _is_pil(query):
            return self._encode_image(_image(query))
        return self._checked(query)

    def _encode_image(self, image: Any) -> Vector:
        digest = hashlib.sha256(image).digest() if isinstance(image, bytes) else None
        known = None if digest is None else self._images.get(digest)
        if known is None:
            try:
                known = self._checked(self._tower("image").embed_images([image])[0])
            except ImageRejected as error:
                raise QueryError(f"The query image cannot be used: {error.detail}") from error
            if digest is not None:
                self._images.put(digest, known)
        return known

    def _checked(self, vector: object) -> Vector:
        """The vector as float32 (D,) with unit L2 norm."""
        try:
            array = np.asarray(vector)
        except ValueError as error:
            raise QueryError(f"The query vector has no regular shape: {error}") from error
        except (TypeError, RuntimeError) as error:  # as a tensor says that is on a GPU, or holds a gradient
            raise QueryError(f"The query vector cannot be read as an array: {first_line(error)}") from error
        if array.dtype.kind not in "fiu":
            raise QueryError(f"A query is a text, an image or a vector of numbers, not a {type(vector).__name__}.")
        if array.shape != (self.dim,):
            raise QueryError(f"The query vector has shape {array.shape}, and this release needs ({self.dim},).")
        wide = array.astype(np.float64)
        largest = np.abs(wide).max()
        if not np.isfinite(largest):
            raise QueryError("The query vector holds a value that is not finite.")
        if largest == 0:
            raise QueryError("The query vector is all zeros, which has no direction.")
        wide /= largest
        return (wide / np.linalg.norm(wide)).astype(np.float32)

    def _tower(self, kind: str) -> Any:
        """The model with one tower, loaded once."""
        with self._loading:
            if kind not in self._towers:
                self._towers[kind] = self._load(kind)
            return self._towers[kind]

    def _load(self, kind: str) -> Any:
        try:
            from pipeline.model import describe_model, load_model

            model_id = describe_model(self.model, **self.settings).model_id
            if model_id == self.model_id:
                return load_model(self.model, device=self.device, towers=(kind,), **self.settings)
        except ModuleNotFoundError as error:
            raise MissingExtra(
                f"A {kind} query needs {error.name}, which is not installed: pip install 'twotower[search]'."
            ) from error
        raise QueryError(
            f"{self.model} is not the model of this release: its model_id is {model_id}, the release has "
            f"{self.model_id}; name the release's own model."
        )


def words_of(query: object) -> str:
    """The words of a query: a text, or those of a Mixture's texts that count for it; empty where it has none."""
    if isinstance(query, Mixture):
        return " ".join(part for part, weight in query.parts if isinstance(part, str) and weight > 0)
    return query if isinstance(query, str) else ""


def _is_weight(weight: Any) -> bool:
    try:
        is_number = not isinstance(weight, bool) and isinstance(weight, Real)
        return is_number and math.isfinite(weight) and weight != 0
    except OverflowError:  # 10**400 is no float
        return False


def _mixed(parts: Sequence[tuple[Vector, float]]) -> Vector:
    largest = max(abs(weight) for _, weight in parts)  # only their proportions count, however large or small they are
    total = np.sum([weight / largest * vector.astype(np.float64) for vector, weight in parts], axis=0)
    length = float(np.linalg.norm(total))
    if length < _LEAST_LENGTH * sum(abs(weight) / largest for _, weight in parts):
        raise QueryError("The parts of the Mixture cancel each other out: no direction is left to search in.")
    mixed: Vector = (total / length).astype(np.float32)
    return mixed


def _is_pil(query: object) -> bool:
    """Whether it is a PIL image, asked without importing PIL."""
    return any(kind.__module__ == "PIL.Image" for kind in type(query).__mro__)


def _image(query: Any) -> Any:
    """Image bytes or the PIL image; nothing larger than an image may be is read."""
    limit = ImageLimits().max_bytes
    if isinstance(query, os.PathLike):
        query, size = _read(Path(query), limit)
    elif _is_pil(query):
        return query
    else:
        size = memoryview(query).nbytes
    if size > limit:
        raise QueryError(f"The query image has {size} bytes; {limit} are the most.")
    if size == 0:
        raise QueryError("The query image is empty.")
    return bytes(query)


def _read(path: Path, limit: int) -> tuple[bytes, int]:
    """A file's bytes, unless there are more than may be, and how many there are. A pipe or device may have no end."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise QueryError(f"The query image {path} cannot be read: it is no file.")
        if status.st_size > limit:
            return b"", status.st_size
        with path.open("rb") as file:
            data = file.read(limit + 1)  # a file may grow, and those of /proc say that they are empty
    except OSError as error:
        raise QueryError(f"The query image {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # a NUL in the name
        raise QueryError(f"The query image {str(path)!r} cannot be read: {error}.") from error
    return data, len(data)
