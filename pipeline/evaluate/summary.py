"""What came out, in sentences: which mode is best and how sure that is, and what different pictures first cost."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.evaluate.results import CUTOFFS, Comparison, Evaluation, Interval

SIGNIFICANCE = 0.05

MODE_NAMES = {"text": "description", "image": "image", "avg": "average"}
METHOD_NAMES = {
    "text": "text, as it comes",
    "avg": "average, as it comes",
    "kmeans-3": "k-means, 3 clusters",
    "kmeans-5": "k-means, 5 clusters",
    "kmeans-8": "k-means, 8 clusters",
    "mmr": "marginal relevance",
}
LEVEL_NAMES = {"broad": "broad category", "fine": "fine category", "judged": "judgements"}
PUBLISHED_METHOD = "kmeans-5"


def sentences(evaluation: Evaluation) -> list[str]:
    """The headline: one sentence for each level, one for diversity."""
    return [*_modes(evaluation), *_diversity(evaluation)]


def interval(value: Interval, digits: int = 3, *, sign: bool = False) -> str:
    """The bounds of an interval, as `0.761 to 0.785`."""
    kind = f"{'+' if sign else ''}.{digits}f"
    return f"{value.low:{kind}} to {value.high:{kind}}"


def _modes(evaluation: Evaluation) -> Iterator[str]:
    k = CUTOFFS[0]
    for level in evaluation.levels:
        values = {mode: evaluation.figure(level, mode, "precision", k).micro.mean for mode in evaluation.modes}
        listed = ", ".join(
            f"{MODE_NAMES[mode]} {value:.4f}" for mode, value in sorted(values.items(), key=lambda item: -item[1])
        )
        against = [_beats(c) for c in evaluation.comparisons if (c.level, c.k, c.first) == (level, k, "avg")]
        yield f"By {LEVEL_NAMES[level]}, precision@{k}: {listed}. Averaging " + ", and ".join(against) + "."


def _beats(comparison: Comparison) -> str:
    """What one comparison says."""
    other, mean = MODE_NAMES[comparison.second], comparison.difference.mean
    if comparison.p_holm > SIGNIFICANCE:
        return f"cannot be told from {other} ({mean:+.4f}, p = {comparison.p_holm:.2f})"
    verb = "beats" if mean > 0 else "loses to"
    return f"{verb} {other} by {abs(mean):.4f} (95% {interval(comparison.difference, 4, sign=True)})"


def _diversity(evaluation: Evaluation) -> Iterator[str]:
    found = {figure.method: figure for figure in evaluation.diversity}
    if not {"text", PUBLISHED_METHOD} <= found.keys():
        return
    before, after = found["text"], found[PUBLISHED_METHOD]
    kept = " and ".join(f"{after.kept[level].mean:.1%} ({level})" for level in after.kept)
    pairs = {level: (before.precision[level].mean, after.precision[level].mean) for level in after.precision}
    changed = " and ".join(f"{first:.4f} to {then:.4f} ({level})" for level, (first, then) in pairs.items())
    near = {
        5: (before.near_duplicates_5.mean, after.near_duplicates_5.mean),
        10: (before.near_duplicates_10.mean, after.near_duplicates_10.mean),
    }
    fall = " and ".join(f"from {first:.2f} to {then:.2f} in the first {k}" for k, (first, then) in near.items())
    yield (
        f"Different pictures first, five clusters of the 50 best by text: images lie {after.distance.mean:.2f} apart "
        f"in place of {before.distance.mean:.2f}, near-duplicates go {fall}; of the precision of the 50, {kept} is "
        f"kept. Against text as it comes, precision@10 goes from {changed}."
    )
