"""Plots of an evaluation as SVG: precision against k by mode, and precision against diversity."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.errors import MissingExtra
from pipeline.evaluate.results import CUTOFFS, PUBLISHED, Evaluation, Interval
from pipeline.evaluate.summary import LEVEL_NAMES, METHOD_NAMES, MODE_NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE_IN = (4.4, 3.8)  # narrow: on a phone's page letters of 10 points stay legible
_COLOURS = {"text": "#0072b2", "image": "#d55e00", "avg": "#00785a"}  # Okabe and Ito's, told apart by the colour-blind
_MARKERS = {"text": "o", "image": "s", "avg": "^"}
_STYLE = {
    "svg.hashsalt": "twotower",  # without it the ids in a file are drawn at random
    "svg.fonttype": "path",
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def plots(evaluation: Evaluation) -> Mapping[str, str]:
    """SVG by name: `precision-<level>` for each level, and `diversity-<level>`; equal evaluations give equal bytes.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise MissingExtra("plots need matplotlib: pip install 'twotower[evaluate]'") from error
    with mpl.rc_context(_STYLE):
        return dict(_drawn(evaluation))


def described(evaluation: Evaluation) -> Mapping[str, str]:
    """What each plot shows, for those who do not see it."""
    texts = {}
    for level in evaluation.levels:
        values = "; ".join(
            f"{MODE_NAMES[mode]} "
            + ", ".join(f"{evaluation.figure(level, mode, 'precision', k).micro.mean:.3f} at {k}" for k in CUTOFFS)
            for mode in evaluation.modes
        )
        texts[f"precision-{level}"] = f"Precision against k by {LEVEL_NAMES[level]}: {values}"
        points = "; ".join(
            f"{METHOD_NAMES[f.method]}: distance {f.distance.mean:.2f}, precision {f.precision[level].mean:.3f}"
            for f in evaluation.diversity
            if level in f.precision
        )
        texts[f"diversity-{level}"] = f"Precision@10 by {LEVEL_NAMES[level]} against distance of images: {points}"
    return texts


def _drawn(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    for level in evaluation.levels:
        yield f"precision-{level}", _svg(_precision(evaluation, level))
        if evaluation.diversity:
            yield f"diversity-{level}", _svg(_diversity(evaluation, level))


def _precision(evaluation: Evaluation, level: str) -> Figure:
    figure, axes = _axes()
    for mode in evaluation.modes:
        found = [evaluation.figure(level, mode, "precision", k) for k in CUTOFFS]
        colour = _COLOURS[mode]
        axes.fill_between(
            CUTOFFS, [f.micro.low for f in found], [f.micro.high for f in found], color=colour, alpha=0.18, lw=0
        )
        means = [f.micro.mean for f in found]
        axes.plot(CUTOFFS, means, color=colour, marker=_MARKERS[mode], label=MODE_NAMES[mode], lw=1.8)
        if evaluation.is_fashion200k and (level, mode, CUTOFFS[0]) in PUBLISHED:
            axes.plot(
                CUTOFFS, [PUBLISHED[level, mode, k] for k in CUTOFFS], color=colour, marker=_MARKERS[mode],
                mfc="none", ls=":", lw=1, label=f"{MODE_NAMES[mode]}, article",
            )  # fmt: skip
    bounds = [evaluation.figure(level, evaluation.modes[0], "precision", k) for k in CUTOFFS]
    axes.plot(CUTOFFS, [f.ceiling for f in bounds], color="#555555", ls="--", lw=1, label="oracle")
    axes.plot(CUTOFFS, [f.floor for f in bounds], color="#555555", ls=":", lw=1, label="random order")
    axes.set_xscale("log")
    axes.set_xticks(CUTOFFS, [str(k) for k in CUTOFFS])
    axes.minorticks_off()
    axes.set_ylim(0, 1.04)
    axes.set_xlabel("k")
    axes.set_ylabel(f"precision@k, {level}")
    figure.legend(fontsize=9, ncols=3, frameon=False, loc="outside lower center")
    return figure


def _diversity(evaluation: Evaluation, level: str) -> Figure:
    figure, axes = _axes()
    for number, found in enumerate(f for f in evaluation.diversity if level in f.precision):
        value = found.precision[level]
        axes.errorbar(
            found.distance.mean, value.mean, fmt="o" if found.milliseconds is None else "D", ms=6, capsize=2, lw=1.2,
            yerr=_bars(value), xerr=_bars(found.distance),
            color=f"C{number}", label=METHOD_NAMES[found.method],
        )  # fmt: skip
    axes.set_xlabel("mean cosine distance of two images of the first 10")
    axes.set_ylabel(f"precision@10, {level}")
    axes.margins(0.12)
    figure.legend(fontsize=9, ncols=2, frameon=False, loc="outside lower center")
    return figure


def _bars(value: Interval) -> list[list[float]]:
    """Lengths down and up; where nothing varies rounding may put the mean a last digit beyond its bounds."""
    return [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]


def _axes() -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_IN, layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    """The figure on white, without the date and version that matplotlib would note."""
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines()) + "\n"
