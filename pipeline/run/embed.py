"""Products in, vectors and rejects out: the plain class that an actor wraps, and a partition's way through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import FetchConfig
from pipeline.errors import InputRejected
from pipeline.model.tokens import TokenBatch
from pipeline.records import ImageLimits, Product, Reason, Rejected
from pipeline.run.memory import FittingBatch, keep_freed_memory
from pipeline.run.progress import Busy, Progress
from pipeline.run.scan import TEXT_EMPTY, Loads, LoadSettings, fetch_threads, image_mark, text_sha256
from pipeline.run.staging import EmbeddedInput

if TYPE_CHECKING:
    from pipeline.model.lanes import Lanes
    from pipeline.model.preprocess import PreparedImage

_NORM_TOLERANCE = 1e-3
_CHUNK_IMAGES, _CHUNK_BYTES = 8, 65_536


@dataclass(frozen=True)
class EmbedSettings:
    """What an embedder is made of; it travels to the actors."""

    model_name: str
    dtype: str = "float32"
    device: str = "cpu"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `load_model` that decide which vectors come out: preprocessing, max_tokens and so on."""
    compile: bool = False
    limits: ImageLimits = field(default_factory=ImageLimits)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode_threads: int = 1
    torch_threads: int | None = None
    memory_bytes: int | None = None
    """Most that an actor's process may take; None: no limit of ours."""


@dataclass(frozen=True)
class ReuseSource:
    """The released tables whose vectors have this run's fingerprint."""

    db: str
    products_version: int
    images_version: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image's place in a chunk that a thread decodes."""

    results: Future[list[PreparedImage | InputRejected]]
    index: int


@dataclass(slots=True)
class Pending:
    """An input on its way: its bytes' hash, what stands for it in its row's digest, and the work begun for it."""

    product_id: str
    row: int
    kind: str
    ordinal: int | None
    sha256: str | None
    text: str | None = None
    decoded: Decoded | None = None
    rejection: InputRejected | None = None
    mark: tuple[int | None, str] | None = None


@dataclass(frozen=True, slots=True)
class _Call:
    """A tower at work: inputs, of images what they were decoded to, and vectors float32 (B, D) to come."""

    items: Sequence[Pending]
    images: Sequence[PreparedImage | None]
    vectors: Future[np.ndarray]


@dataclass(frozen=True, slots=True)
class Begun:
    """A batch that the towers have been given."""

    pending: Sequence[Pending]
    calls: Sequence[_Call]


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of an input's content: its vector, or why it was rejected."""

    vector: np.ndarray | None
    width_px: int = 0
    height_px: int = 0
    thumbnail: bytes | None = None
    rejection: InputRejected | None = None


class Embedder:
    """Both towers around a decode pool. Its vectors do not depend on how inputs are batched, up to float rounding.

    Args:
        settings: the model and how it runs; loading it checks its canaries.
        images_root: where references in the images column point.
        reuse: released tables to take equal inputs' vectors from, or None.

    Raises:
        ModelError: the model is not what it claims to be.
    """

    def __init__(self, settings: EmbedSettings, images_root: str, reuse: ReuseSource | None = None) -> None:
        import torch

        from pipeline.model import load_model

        if settings.memory_bytes is None:
            keep_freed_memory()
        if settings.torch_threads is not None:
            torch.set_num_threads(settings.torch_threads)
        self.model = load_model(
            settings.model_name,
            device=settings.device,
            dtype=settings.dtype,
            compile=settings.compile,
            limits=settings.limits,
            **settings.settings,
        )
        self.progress = Progress()
        self._reuse = reuse
        self.decode_threads, self.fetch_threads = settings.decode_threads, fetch_threads(settings.fetch, images_root)
        self.busy = Busy(lambda seconds: self.progress.spend("towers", seconds))
        lanes = self.model.run_in_lanes(self.busy)
        self._lanes = lanes if lanes and lanes.count == self.decode_threads else None
        self._threads: Lanes | ThreadPoolExecutor = self._lanes or ThreadPoolExecutor(self.decode_threads, "decode")
        load = LoadSettings(images_root, settings.limits, settings.fetch, self.decode_threads)
        self._loads = Loads(load, lambda: self.progress.timed("fetch"))
        self._known: dict[tuple[str, str], _Known] = {}
        self._begun: set[tuple[str, str]] = set()
        self._lanes_before_s = 0.0
        self._fitting = {kind: FittingBatch(kind) for kind in ("text", "image")}
        # Two batches of products are begun at once, each with texts and images, so that there is always one to go on
        # with. Where the towers' batches do not run beside each other, calls follow each other.
        self._towers = ThreadPoolExecutor(4 if lanes else 1, "towers")
        self._around: AbstractContextManager[None] = nullcontext() if lanes else self.busy
        self._calls: set[Future[Any]] = set()

    @property
    def lanes_s(self) -> float:
        """Seconds since `forget` that towers took of the threads that decode; 0 where those are others."""
        return self._lanes.towers_s - self._lanes_before_s if self._lanes else 0.0

    def embed(self, products: Sequence[Product]) -> tuple[list[EmbeddedInput], list[Rejected]]:
        """Every text and image of the products, each either embedded or rejected.

        Returns:
            Inputs with their float32 (D,) unit vectors, and rejects, in the products' order within each list.
        """
        return self.finish(self.begin(self.prepare(products)))

    def forget(self) -> None:
        """Forget the inputs seen so far: equal inputs are embedded once between two calls.

        What was begun and never finished is waited for.
        """
        wait(self._calls)
        self._calls.clear()
        self._lanes_before_s += self.lanes_s
        self._known.clear()
        self._begun.clear()

    def prepare(self, products: Sequence[Product], wanted: frozenset[tuple[str, str]] | None = None) -> list[Pending]:
        """Fetch, hash and begin to decode; safe to run in another thread than `finish`, one batch ahead.

        Args:
            products: in the order in which their inputs are to come out.
            wanted: kind and sha256 of the only inputs that are to come out, each once; None: all.
        """
        with self.progress.timed("read"):
            loads = [(product, image, self._loads.begin(image)) for product in products for image in product.images]
            pending = [_pending_text(product) for product in products if product.text is not None]
        data: dict[int, bytes] = {}
        with self.progress.waited("fetched"):
            for product, image, load in loads:
                item = Pending(product.product_id, product.row, "image", image.ordinal, None)
                try:
                    loaded, item.sha256 = load.result()
                    data[id(item)] = loaded
                except InputRejected as rejection:
                    item.rejection = rejection
                item.mark = image_mark(image, item.sha256, item.rejection)
                pending.append(item)
        if wanted is not None:
            pending = self._chosen(pending, wanted)
        self._look_up(pending)
        with self.progress.timed("read"):
            fresh: list[tuple[Pending, bytes]] = []
            for item in pending:
                if item.rejection is None and (item.kind, item.sha256 or "") not in self._begun:
                    self._begun.add((item.kind, item.sha256 or ""))
                    if item.kind == "image":
                        fresh.append((item, data[id(item)]))
                elif item.kind == "text":
                    item.text = None if item.rejection is None else item.text
            for some in _chunks(fresh):
                results = self._threads.submit(self._decode, [image for _, image in some])
                for index, (item, _) in enumerate(some):
                    item.decoded = Decoded(results, index)
        return pending

    def settle(self, wall_s: float, before: Mapping[str, float]) -> None:
        """Book what the fetch and decode threads, or the lanes, did not work since `forget` as waiting.

        Args:
            wall_s: how long it was.
            before: the stage seconds at its beginning.
        """
        busy = {stage: seconds - before[stage] for stage, seconds in self.progress.seconds.items()}
        decoding = busy["decode"] + (0.0 if self.fetch_threads else busy["fetch"])
        decoding += self.lanes_s
        self.progress.wait("decode_idle", max(0.0, self.decode_threads * wall_s - decoding))
        if self.fetch_threads:
            self.progress.wait("fetch_idle", max(0.0, self.fetch_threads * wall_s - busy["fetch"]))

    def begin(self, pending: Sequence[Pending]) -> Begun:
        """Hand what was prepared to the towers once it is decoded; they work on it, and on one more, until `finish`."""
        return Begun(pending, [call for call in (self._begin_texts(pending), self._begin_images(pending)) if call])

    def finish(self, begun: Begun) -> tuple[list[EmbeddedInput], list[Rejected]]:
        """Wait for the towers, and give every input its vector or its rejection; what was begun first comes first."""
        pending, fresh = begun.pending, set()
        for call in begun.calls:
            with self.progress.waited("decoded", self.busy):  # where lanes have images to decode in hand
                vectors = call.vectors.result()
            self._calls.discard(call.vectors)
            for item, image, vector in zip(call.items, call.images, vectors, strict=True):
                about = (image.width_px, image.height_px, image.thumbnail) if image else ()
                self._known[item.kind, item.sha256 or ""] = _checked(vector, _Known(vector, *about))
            fresh |= {id(item) for item in call.items}
        inputs: list[EmbeddedInput] = []
        rejects: list[Rejected] = []
        for item in pending:
            known = self._known[item.kind, item.sha256 or ""] if item.rejection is None else None
            rejection = item.rejection or (known.rejection if known else None)
            if known is None or rejection is not None or known.vector is None:
                assert rejection is not None
                reason = Reason(rejection.reason)
                self.progress.fetch_failed += reason is Reason.FETCH_FAILED
                self.progress.reasons[reason] += 1
                rejects.append(
                    Rejected(item.product_id, item.row, item.kind, reason, rejection.detail, item.ordinal, item.sha256)
                )
                continue
            is_reused = id(item) not in fresh
            inputs.append(
                EmbeddedInput(
                    item.product_id, item.row, item.kind, item.ordinal, item.sha256 or "", known.vector,
                    known.width_px, known.height_px, known.thumbnail, is_reused,
                )
            )  # fmt: skip
            self.progress.embedded += not is_reused
            self.progress.reused += is_reused
        texts = sum(item.kind == "text" for item in pending)
        self.progress.texts += texts
        self.progress.images += len(pending) - texts
        self.progress.rejected += len(rejects)
        return inputs, rejects

    def _chosen(self, pending: Sequence[Pending], wanted: frozenset[tuple[str, str]]) -> list[Pending]:
        """The first of each wanted input."""
        chosen: dict[tuple[str, str], Pending] = {}
        for item in pending:
            key = (item.kind, item.sha256 or "")
            if key in wanted and key not in self._begun:
                chosen.setdefault(key, item)
        return list(chosen.values())

    def _decode(self, images: Sequence[bytes]) -> list[PreparedImage | InputRejected]:
        with self.progress.timed("decode"):
            return [self._prepared(data) for data in images]

    def _prepared(self, data: bytes) -> PreparedImage | InputRejected:
        try:
            return self.model.prepare_image(data, thumbnail=True)
        except InputRejected as rejection:
            return rejection

    def _look_up(self, pending: Sequence[Pending]) -> None:
        """Take over vectors of the released tables for inputs that were not met yet."""
        if self._reuse is None:
            return
        from pipeline.store.tables import Database, vectors_by_sha256  # they bring Lance, which takes a while

        for kind, table, version, column, fields in (
            ("text", "products", self._reuse.products_version, "text_sha256", ["text_vector"]),
            ("image", "images", self._reuse.images_version, "sha256", ["vector", "width_px", "height_px", "thumbnail"]),
        ):
            wanted = {i.sha256 for i in pending if i.kind == kind and i.sha256 and (kind, i.sha256) not in self._begun}
            if not wanted:
                continue
            with self.progress.timed("read"):
                found = vectors_by_sha256(Database(self._reuse.db), table, version, column, sorted(wanted), fields)
            for row in found.to_pylist():
                vector = np.asarray(row.pop(fields[0]), dtype=np.float32)
                sha256 = row.pop(column)
                self._known[kind, sha256] = _Known(vector, **row)
                self._begun.add((kind, sha256))

    def _begin_texts(self, pending: Sequence[Pending]) -> _Call | None:
        """Have the texts embedded that are new."""
        items = [i for i in pending if i.kind == "text" and i.text is not None and i.rejection is None]
        if not items:
            return None
        with self.progress.timed("tokenise", self.busy):
            tokens = self.model.tokenize([str(item.text) for item in items])
            self.progress.truncated_texts += int(sum(tokens.truncated))

        def embed(part: slice) -> np.ndarray:
            return self.model.embed_tokens(TokenBatch(tokens.ids[part], tokens.truncated[part]))

        return _Call(items, [None] * len(items), self._call_tower("text", len(items), embed))

    def _begin_images(self, pending: Sequence[Pending]) -> _Call | None:
        """Have the images embedded that are new, once they are decoded."""
        items: list[Pending] = []
        prepared: list[PreparedImage] = []
        with self.progress.waited("decoded", self.busy):
            # For all at once: to look at one after another costs a switch of threads each.
            wait({item.decoded.results for item in pending if item.decoded})
            for item in pending:
                if item.decoded is None:
                    continue
                image = item.decoded.results.result()[item.decoded.index]
                item.decoded = None
                if isinstance(image, InputRejected):
                    self._known["image", item.sha256 or ""] = _Known(None, rejection=image)
                else:
                    prepared.append(image)
                    items.append(item)
        if not items:
            return None

        def embed(part: slice) -> np.ndarray:
            return self.model.embed_crops(np.stack([image.crop for image in prepared[part]]))

        return _Call(items, prepared, self._call_tower("image", len(items), embed))

    def _call_tower(self, kind: str, n: int, embed: Callable[[slice], np.ndarray]) -> Future[np.ndarray]:
        def call() -> np.ndarray:
            with self._around:  # a GPU works behind our back, but the call ends with its vectors on the CPU
                return self._fitting[kind].run(n, embed)

        future = self._towers.submit(call)
        self._calls.add(future)
        return future


def _chunks(images: Sequence[tuple[Pending, bytes]]) -> Iterator[Sequence[tuple[Pending, bytes]]]:
    """What one thread decodes at a time: small images together, since to hand one over takes a while too."""
    chunk: list[tuple[Pending, bytes]] = []
    size = 0
    for item, data in images:
        if chunk and (size + len(data) > _CHUNK_BYTES or len(chunk) == _CHUNK_IMAGES):
            yield chunk
            chunk, size = [], 0
        chunk.append((item, data))
        size += len(data)
    if chunk:
        yield chunk


def has_cuda() -> bool:
    """Whether torch can use a GPU here."""
    import torch

    return bool(torch.cuda.is_available())


def _pending_text(product: Product) -> Pending:
    text = product.text or ""
    item = Pending(product.product_id, product.row, "text", None, text_sha256(text), text)
    if not text:
        item.rejection = InputRejected(Reason.TEXT_EMPTY, TEXT_EMPTY)
    return item


def _checked(vector: np.ndarray, known: _Known) -> _Known:
    """The content, or its rejection where the tower's answer is not a unit vector."""
    norm = float(np.linalg.norm(vector))
    if abs(norm - 1.0) <= _NORM_TOLERANCE:  # false for NaN too
        return known
    return _Known(None, rejection=InputRejected(Reason.VECTOR_NOT_FINITE, f"the tower gave a vector of norm {norm}"))
