"""What a search returns: the hits, and how much they differ from each other and from the order that they had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.errors import QueryError
from pipeline.records import Hit

if TYPE_CHECKING:
    import numpy as np

    from pipeline.query.encoder import Vector


SAME_PICTURE = 0.02
"""Cosine distance up to which two products look the same: as far as that go pictures of one thing."""


class Hits(list[Hit]):
    """A list of hits, best first.

    Args:
        hits: the page.
        vectors: called at most once, for the unit image vectors (D,) of the hits, None where one has no image.
        places: where each hit stood before the result was reordered; None where it was not.
    """

    def __init__(
        self,
        hits: Iterable[Hit] = (),
        *,
        vectors: Callable[[], Sequence[Vector | None]] = tuple,
        places: Sequence[int] | None = None,
    ) -> None:
        super().__init__(hits)
        self._vectors = vectors
        self._places = places

    @cached_property
    def diversity(self) -> float | None:
        """Mean cosine distance, 0 to 2, between the images of two hits; None with fewer than two images.

        Of a result that was not reordered the image vectors are read when this is asked for the first time.
        """
        import numpy as np

        vectors = [vector for vector in self._images if vector is not None]
        if len(vectors) < 2:
            return None
        points: np.ndarray = np.stack(vectors).astype(np.float64)
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        n = len(points)
        total = float(np.square(points.sum(axis=0)).sum())  # all pairs, each twice, and each with itself
        return max(0.0, 1.0 - (total - n) / (n * (n - 1)))

    def look_alikes(self, within: float = SAME_PICTURE) -> dict[int, int]:
        """Hits of this page that look like a better one of it: place to place, from 0.

        Of a result that was not reordered the image vectors are read when this is asked for the first time.

        Args:
            within: cosine distance, 0 to 2, up to which two images look the same.

        Returns:
            By place of each worse hit the place of the best one that it looks like, which is in no such pair itself.

        Raises:
            QueryError: `within` is no such distance.
        """
        from pipeline.query.rerank import distinct, is_distance

        if not is_distance(within):
            raise QueryError(f"look_alikes takes a cosine distance from 0 to 2, not {within!r}.")
        _, left_out = distinct(self._images, within)
        return {place: kept for kept, places in left_out.items() for place in places}

    @cached_property
    def _images(self) -> Sequence[Vector | None]:
        return self._vectors()

    @cached_property
    def rank_correlation(self) -> float | None:
        """Kendall's tau between the order of the hits and the one that they had, 1 where nothing moved.

        None where the result was not reordered, or holds fewer than two hits.
        """
        places = self._places
        if places is None or len(places) < 2:
            return None
        import numpy as np

        before = np.asarray(places)
        signs = np.sign(before[None, :] - before[:, None])[np.triu_indices(len(before), 1)]
        return float(signs.mean())
