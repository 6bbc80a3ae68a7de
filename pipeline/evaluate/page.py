"""An evaluation as one self-contained page: no script, nothing loaded, the same bytes for the same numbers."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from pipeline.evaluate.results import CUTOFFS, PUBLISHED, CategoryFigure, Evaluation, Example
from pipeline.evaluate.summary import METHOD_NAMES, MODE_NAMES, interval, sentences
from pipeline.query.contact_page import list_of
from pipeline.query.contact_page import style as contact_style
from pipeline.query.contact_sheet import Section
from pipeline.query.results import Hits
from pipeline.shown import escaped, html_page

_NAMED_CATEGORIES = 20


def page(
    evaluation: Evaluation, plots: Mapping[str, str], described: Mapping[str, str], thumbnails: Mapping[str, bytes]
) -> str:
    """The report.

    Args:
        evaluation: what came out; its times are left out.
        plots: SVG by name, as `pipeline.evaluate.plots` draws them.
        described: what each shows, in words.
        thumbnails: JPEG bytes by product_id, of the examples' hits.
    """
    lead = "\n".join(f"<p>{escaped(sentence)}</p>" for sentence in sentences(evaluation))
    facts = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>" for name, text in evaluation.facts.items())
    notes = "".join(f"<li>{escaped(note)}</li>" for note in evaluation.notes)
    parts = [
        *(_precision(evaluation, level, plots, described) for level in evaluation.levels),
        _others(evaluation),
        _diversity(evaluation, plots, described),
        _comparisons(evaluation),
        *(_categories(evaluation, level) for level in evaluation.levels),
    ]
    examples = "\n".join(
        _example(example, f"e{number}", thumbnails) for number, example in enumerate(evaluation.examples)
    )
    body = (
        '<a class="skip" href="#results">Skip to the results</a>\n'
        f"<header><h1>How good search is</h1>\n{lead}\n<dl>{facts}</dl>\n<ul>{notes}</ul></header>\n"
        f'<main id="results" tabindex="-1">\n{"".join(parts)}\n'
        f'<section aria-labelledby="examples"><h2 id="examples">Examples, from the worst to the best by average</h2>\n'
        f"{examples}</section>\n</main>"
    )
    own = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    return html_page("How good search is", contact_style() + own, body, sources="img-src data:")


def _precision(evaluation: Evaluation, level: str, plots: Mapping[str, str], described: Mapping[str, str]) -> str:
    has_index = any(figure.index is not None for figure in evaluation.figures)
    is_published = evaluation.is_fashion200k and (level, "text", CUTOFFS[0]) in PUBLISHED
    head = ["k", "mode", "micro", "95% interval", "macro", "oracle", "random order"]
    head += ["index"] * has_index + ["article"] * is_published
    rows = []
    for k in CUTOFFS:
        for mode in evaluation.modes:
            figure = evaluation.figure(level, mode, "precision", k)
            row = [f"@{k}", MODE_NAMES[mode], f"{figure.micro.mean:.4f}", interval(figure.micro), f"{figure.macro:.4f}"]
            row += [f"{figure.ceiling:.4f}", f"{figure.floor:.4f}"]
            row += ["-" if figure.index is None else f"{figure.index:.4f}"] * has_index
            row += [f"{PUBLISHED.get((level, mode, k), 0):.4f}"] * is_published
            rows.append(row)
    shown = _table(f"Precision by {level}", head, rows, names=2)
    return _section(f"Precision, {level}", _picture(f"precision-{level}", plots, described) + shown)


def _others(evaluation: Evaluation) -> str:
    head = ["measure", *(MODE_NAMES[mode] for mode in evaluation.modes), "oracle", "random order"]
    rows = []
    for level in evaluation.levels:
        for measure, shown, ks in (("recall", "recall", CUTOFFS), ("ndcg", "nDCG", CUTOFFS), ("mrr", "MRR", (100,))):
            for k in ks:
                found = [evaluation.figure(level, mode, measure, k) for mode in evaluation.modes]
                values = [f"{figure.micro.mean:.4f}" for figure in found]
                floor = max(figure.floor for figure in found)
                rows.append([f"{level} {shown}@{k}", *values, f"{found[0].ceiling:.4f}", f"{floor:.4f}"])
    return _section("Recall, nDCG and MRR", _table("Means over queries", head, rows))


def _diversity(evaluation: Evaluation, plots: Mapping[str, str], described: Mapping[str, str]) -> str:
    if not evaluation.diversity:
        return ""
    levels = list(evaluation.diversity[0].precision)
    head = ["first 10 hits", "distance of images", "alike in 5", "alike in 10", "fine categories", "colours"]
    head += [name for level in levels for name in (f"precision@10, {level}", f"kept of the 50's, {level}")]
    rows = []
    for found in evaluation.diversity:
        kinds = "-" if found.fine_categories is None else f"{found.fine_categories.mean:.2f}"
        row = [METHOD_NAMES[found.method], f"{found.distance.mean:.3f}", f"{found.near_duplicates_5.mean:.2f}"]
        row += [f"{found.near_duplicates_10.mean:.2f}", kinds, f"{found.colours.mean:.2f}"]
        for level in levels:
            row += [f"{found.precision[level].mean:.4f}", f"{found.kept[level].mean:.1%}"]
        rows.append(row)
    drawn = "".join(_picture(f"diversity-{level}", plots, described) for level in levels)
    return _section("Different pictures first", drawn + _table("Orders of the hits, means over queries", head, rows))


def _comparisons(evaluation: Evaluation) -> str:
    head = ["precision@k", "less", "change", "95% interval", "p, Holm"]
    rows = [
        [f"{c.level} @{c.k}: {MODE_NAMES[c.first]}", MODE_NAMES[c.second], f"{c.difference.mean:+.4f}",
         interval(c.difference, 4, sign=True), f"{c.p_holm:.2g}"]
        for c in evaluation.comparisons
    ]  # fmt: skip
    return _section("Modes compared", _table("Paired over queries", head, rows, names=2)) if rows else ""


def _categories(evaluation: Evaluation, level: str) -> str:
    found: Sequence[CategoryFigure] = [figure for figure in evaluation.categories if figure.level == level]
    if not found:
        return ""
    head = ["category", "queries", "products", *(MODE_NAMES[mode] for mode in evaluation.modes)]
    rows = [
        [figure.category, f"{figure.queries:,}", f"{figure.products:,}",
         *(f"{figure.precision[mode]:.4f}" for mode in evaluation.modes)]
        for figure in found[:_NAMED_CATEGORIES]
    ]  # fmt: skip
    more = f"<p>{len(found) - len(rows):,} better ones are in figures.json.</p>" if len(found) > len(rows) else ""
    return _section(f"Worst categories, {level}", _table("Precision@10, the worst first", head, rows) + more)


def _example(example: Example, name: str, thumbnails: Mapping[str, bytes]) -> str:
    lists = "\n".join(_lists(example, name, thumbnails))
    asked = f"<p>asks for {escaped(example.asked)}</p>" if example.asked else ""
    heading = f'<h3 id="{name}" dir="auto">{escaped(example.text)}</h3>'
    return f'<section aria-labelledby="{name}">{heading}{asked}\n{lists}</section>'


def _lists(example: Example, name: str, thumbnails: Mapping[str, bytes]) -> Iterator[str]:
    for number, (label, hits) in enumerate(example.rows):
        remarks = {place: "✓ relevant" for place, hit in enumerate(hits) if hit.product_id in example.relevant}
        alike = hits.look_alikes() if isinstance(hits, Hits) else {}
        yield list_of(Section(label, hits, alike=alike, remarks=remarks), f"{name}r{number}", thumbnails, heading="h4")


def _section(title: str, body: str) -> str:
    name = "".join(letter for letter in title.lower().replace(" ", "-") if letter.isalnum() or letter == "-")
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>\n{body}</section>\n'


def _picture(name: str, plots: Mapping[str, str], described: Mapping[str, str]) -> str:
    """A plot as an image, which a page's policy for styles does not reach into."""
    if name not in plots:
        return ""
    data = base64.b64encode(plots[name].encode()).decode()
    return f'<img class="plot" src="data:image/svg+xml;base64,{data}" alt="{escaped(described[name])}">\n'


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1) -> str:
    """A table that scrolls by itself where it is too wide; its first `names` columns name the row."""
    kinds = [' class="name"'] * names + [""] * len(head)
    top = "".join(f'<th scope="col"{kind}>{escaped(cell)}</th>' for cell, kind in zip(head, kinds, strict=False))
    body = "\n".join(
        "<tr>"
        + "".join(f'<th scope="row">{escaped(cell)}</th>' for cell in row[:names])
        + "".join(f"<td>{escaped(cell)}</td>" for cell in row[names:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{escaped(caption)}"><table>'
        f"<caption>{escaped(caption)}</caption><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>\n"
    )
