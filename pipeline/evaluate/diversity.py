"""The second experiment: text hits reordered by their images, how much more they differ, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.evaluate import measures
from pipeline.evaluate.answers import Answers
from pipeline.evaluate.colours import colours_of
from pipeline.evaluate.products import read_blocks
from pipeline.evaluate.results import DiversityFigure
from pipeline.evaluate.statistics import bootstrap, share
from pipeline.query import Diversify
from pipeline.query.rerank import rerank
from pipeline.query.results import Hits
from pipeline.store.tables import Database

CANDIDATES = 50
"""So many of the best hits by text are reordered, as published."""

SHOWN = 10
FIRST = 5

METHODS: Mapping[str, Diversify] = {
    "kmeans-3": Diversify(candidates=CANDIDATES, clusters=3),
    "kmeans-5": Diversify(candidates=CANDIDATES, clusters=5),
    "kmeans-8": Diversify(candidates=CANDIDATES, clusters=8),
    "mmr": Diversify(candidates=CANDIDATES, method="mmr"),
}

Vectors = Sequence[npt.NDArray[np.float32] | None]


@dataclass(frozen=True)
class Images:
    """Image vectors of the products that are candidates of some query.

    Attributes:
        rows: int32 (N,), row of each product in `vectors`, -1 where it has no image or is no candidate.
        vectors: float32 (n, D).
    """

    rows: npt.NDArray[np.int32]
    vectors: npt.NDArray[np.float32]

    def of(self, places: npt.NDArray[np.int32]) -> Vectors:
        """Vectors (D,) of products, None where one has no image."""
        return [self.vectors[row] if row >= 0 else None for row in self.rows[places].tolist()]


def read_images(db: Database, version: int, answers: Answers) -> Images:
    """Image vectors of the best hits by text and by average, in one pass over the table."""
    best = [answers.rankings[mode].places[:, :CANDIDATES] for mode in ("text", "avg")]
    wanted = np.zeros(len(answers.products), bool)
    for places in best:
        wanted[places[places >= 0]] = True
    rows, parts, count = np.full(len(answers.products), -1, np.int32), [], 0
    for block in read_blocks(db, version, answers.products, ["image"]):
        taken = wanted[block.places] & block.present["image"]
        rows[block.places[taken]] = np.arange(count, count + taken.sum())
        parts.append(block.vectors["image"][taken])
        count += int(taken.sum())
    return Images(rows, np.concatenate(parts) if parts else np.zeros((0, 1), np.float32))


def diversity(answers: Answers, images: Images, *, seed: int) -> list[DiversityFigure]:
    """Every order of the hits: as text and as average give them, and the reorderings of the best by text.

    Pages of fewer than two images are left out of the mean distance, which is 0 where there are no others.
    """
    orders = {mode: answers.rankings[mode].places for mode in ("text", "avg")}
    pool = orders["text"][:, :CANDIDATES]
    found = [_figure(mode, places, answers, images, None, seed) for mode, places in orders.items()]
    for method, how in METHODS.items():
        places, seconds = pool.copy(), []
        for row, scores in zip(places, answers.rankings["text"].scores, strict=True):
            count = int((row >= 0).sum())
            vectors = images.of(row[:count])
            start = time.perf_counter()
            order = rerank(vectors, how, scores[:count].tolist()).order
            seconds.append(time.perf_counter() - start)
            row[:count] = row[list(order)]
        found.append(_figure(method, places, answers, images, 1000 * float(np.median(seconds)), seed))
    return found


def _figure(
    method: str,
    places: npt.NDArray[np.int32],
    answers: Answers,
    images: Images,
    milliseconds: float | None,
    seed: int,
) -> DiversityFigure:
    products, fine = answers.products, answers.products.levels["fine"]
    rows, distances = [], []
    for row in places[:, :SHOWN]:
        shown = row[row >= 0]
        page = Hits([], vectors=partial(images.of, shown))
        alike = page.look_alikes()
        if page.diversity is not None:  # a page of fewer than two images says nothing of how they differ
            distances.append(page.diversity)
        codes = fine.codes[shown]
        colours = set().union(*(colours_of(products.texts[place].as_py()) for place in shown.tolist()))
        rows.append(
            (
                sum(place < FIRST for place in alike),
                len(alike),
                len(np.unique(codes[codes >= 0])),
                len(colours),
            )
        )
    near_5, near_10, categories, colours_seen = bootstrap(np.array(rows, np.float64), seed=seed)
    distance = bootstrap(np.array(distances or [0.0])[:, None], seed=seed)[0]
    pooled = answers.rankings["text"].places[:, :CANDIDATES] >= 0  # a small catalog has fewer candidates
    sizes = np.maximum(pooled.sum(axis=1), 1)
    precision, kept = {}, {}
    for level, relevance in answers.relevance.items():
        asked = relevance.asked
        values = measures.precision(relevance.gains_of(places)[asked], SHOWN)
        pool = (answers.gains(level, "text")[asked, :CANDIDATES] > 0).sum(axis=1) / sizes[asked]
        precision[level] = bootstrap(values[:, None], seed=seed)[0]
        kept[level] = share(values, pool, seed=seed)
    return DiversityFigure(
        method,
        distance,
        near_5,
        near_10,
        categories if fine.names else None,
        colours_seen,
        precision,
        kept,
        milliseconds,
    )
