"""An evaluation for the terminal, in the layout of the published table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from pipeline.evaluate.results import CUTOFFS, PUBLISHED, DiversityFigure, Evaluation, Figure
from pipeline.evaluate.summary import METHOD_NAMES, MODE_NAMES, interval, sentences

_WIDTH = 110
_WORST = 5


def lines(evaluation: Evaluation) -> str:
    """All of it, as text."""
    parts = [
        _wrapped(sentences(evaluation)),
        [f"{name:<9}{text}" for name, text in evaluation.facts.items()],
        _wrapped(evaluation.notes),
        *(_precision(evaluation, level) for level in evaluation.levels),
        _others(evaluation),
        _comparisons(evaluation),
        _categories(evaluation),
        _diversity(evaluation),
        [f"seconds  {', '.join(f'{step} {value:.1f}' for step, value in evaluation.seconds.items())}"],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _wrapped(texts: Sequence[str]) -> list[str]:
    return [line for text in texts for line in textwrap.wrap(text, _WIDTH, subsequent_indent="  ")]


def _precision(evaluation: Evaluation, level: str) -> list[str]:
    """Precision@k of one level, a row for each k and mode."""
    has_index = any(figure.index is not None for figure in evaluation.figures)
    published = evaluation.is_fashion200k and level in ("broad", "fine")
    head = f"{level + ' precision':<18}{'micro':>8}  {'95% interval':<16}{'macro':>8}{'oracle':>8}{'random':>8}"
    head += f"{'index':>8}" * has_index + f"{'article':>9}" * published
    rows = [head]
    for k in CUTOFFS:
        for mode in evaluation.modes:
            figure = evaluation.figure(level, mode, "precision", k)
            name = f"{f'@{k}' if mode == evaluation.modes[0] else '':<6}{MODE_NAMES[mode]:<12}"
            row = f"{name}{figure.micro.mean:>8.4f}  {interval(figure.micro):<16}{figure.macro:>8.4f}"
            row += f"{figure.ceiling:>8.4f}{figure.floor:>8.4f}"
            if has_index:
                row += f"{'-' if figure.index is None else format(figure.index, '.4f'):>8}"
            if published:
                row += f"{PUBLISHED[level, mode, k]:>9.4f}"
            rows.append(row)
    return rows


def _others(evaluation: Evaluation) -> list[str]:
    """Recall, nDCG and MRR, with the oracle's and a random order's beside them."""
    rows = [
        f"{'':<24}" + "".join(f"{MODE_NAMES[mode]:>13}" for mode in evaluation.modes) + f"{'oracle':>9}{'random':>9}"
    ]
    for level in evaluation.levels:
        for measure, ks in (("recall", CUTOFFS), ("ndcg", CUTOFFS), ("mrr", CUTOFFS[-1:])):
            for k in ks:
                found = [evaluation.figure(level, mode, measure, k) for mode in evaluation.modes]
                values = "".join(f"{figure.micro.mean:>13.4f}" for figure in found)
                shown = {"ndcg": "nDCG", "mrr": "MRR"}.get(measure, measure)
                rows.append(f"{f'{level} {shown}@{k}':<24}{values}{found[0].ceiling:>9.4f}{_floor(found):>9.4f}")
    return rows


def _floor(found: Sequence[Figure]) -> float:
    """The highest: modes differ by the products that have their vector."""
    return max(figure.floor for figure in found)


def _comparisons(evaluation: Evaluation) -> list[str]:
    rows = [f"{'compared, paired':<38}{'change':>9}  {'95% interval':<20}{'p (Holm)':>10}"]
    for c in evaluation.comparisons:
        name = f"{c.level} @{c.k}: {MODE_NAMES[c.first]} - {MODE_NAMES[c.second]}"
        between = interval(c.difference, 4, sign=True)
        rows.append(f"{name:<38}{c.difference.mean:>+9.4f}  {between:<20}{c.p_holm:>10.2g}")
    return rows if len(rows) > 1 else []


def _categories(evaluation: Evaluation) -> list[str]:
    """The worst of each level."""
    rows: list[str] = []
    for level in evaluation.levels:
        found = [figure for figure in evaluation.categories if figure.level == level]
        if not found:
            continue
        head = "".join(f"{MODE_NAMES[mode]:>13}" for mode in evaluation.modes)
        rows.append(f"{f'worst {level} categories, precision@10':<40}{'queries':>9}{'products':>10}{head}")
        for figure in found[:_WORST]:
            values = "".join(f"{figure.precision[mode]:>13.4f}" for mode in evaluation.modes)
            rows.append(f"  {figure.category[:37]:<38}{figure.queries:>9,}{figure.products:>10,}{values}")
    return rows


def _diversity(evaluation: Evaluation) -> list[str]:
    if not evaluation.diversity:
        return []
    levels = list(evaluation.diversity[0].precision)
    head = f"{'first 10 hits':<22}{'distance':>9}{'alike @5':>9}{'alike @10':>10}{'kinds':>7}{'colours':>8}"
    head += "".join(f"{f'{level} @10':>11}{'kept':>8}" for level in levels) + f"{'ms':>7}"
    return [head, *(_order(figure, levels) for figure in evaluation.diversity), *_legend()]


def _order(figure: DiversityFigure, levels: Sequence[str]) -> str:
    kinds = "-" if figure.fine_categories is None else f"{figure.fine_categories.mean:.2f}"
    row = f"{METHOD_NAMES[figure.method]:<22}{figure.distance.mean:>9.3f}{figure.near_duplicates_5.mean:>9.2f}"
    row += f"{figure.near_duplicates_10.mean:>10.2f}{kinds:>7}{figure.colours.mean:>8.2f}"
    row += "".join(f"{figure.precision[x].mean:>11.4f}{figure.kept[x].mean:>8.1%}" for x in levels)
    return row + f"{'-' if figure.milliseconds is None else format(figure.milliseconds, '.1f'):>7}"


def _legend() -> Iterator[str]:
    yield "distance: mean cosine distance of two images; alike: images within 0.02 of a better one's; kinds: fine"
    yield "categories; kept: of the precision of the 50 best by text; ms: median time that the reordering adds"
