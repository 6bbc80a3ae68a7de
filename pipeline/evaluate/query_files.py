"""A user's own queries from a file, with the categories or judgements that say what is relevant to them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import QueryError
from pipeline.evaluate.products import Products
from pipeline.evaluate.queries import Query
from pipeline.evaluate.vocabulary import qualified

_COLUMNS = ("query_id", "text", "broad_category", "fine_category")


def read_queries(path: Path, products: Products, *, qrels: Path | None = None) -> list[Query]:
    """A user's queries, with what is relevant to them.

    Args:
        path: CSV, TSV or JSON lines with the column `text` and, optional, `query_id` (else the line's number),
            `broad_category` and `fine_category`.
        products: of the release: a category that it does not have is refused.
        qrels: judgements in TREC's form, `query_id 0 product_id grade` a line, grades whole numbers from 0.

    Raises:
        QueryError: a file that cannot be read, a line that cannot be used, a query to which nothing says what is
            relevant; the sentence names the file and the line.
    """
    judged = {} if qrels is None else _read_qrels(qrels)
    queries: dict[str, Query] = {}
    for number, row in _rows(path):
        where = f"{path}, line {number}"
        if unknown := row.keys() - set(_COLUMNS):
            raise QueryError(f"{where}: no column {sorted(unknown)[0]!r}; there are {', '.join(_COLUMNS)}.")
        text, name = row.get("text", "").strip(), row.get("query_id", "").strip() or str(number)
        if not text:
            raise QueryError(f"{where}: the query has no text.")
        if name in queries:
            raise QueryError(f"{where}: there is a query {name!r} above already.")
        broad, fine = (row.get(f"{level}_category", "").strip() or None for level in ("broad", "fine"))
        if fine is not None and qualified(broad, fine) in products.levels["fine"].code_of:
            fine = qualified(broad, fine)
        for level, category in (("broad", broad), ("fine", fine)):
            if category is not None and category not in products.levels[level].code_of:
                raise QueryError(f"{where}: the release has no {level} category {category!r}.")
        if name not in judged and broad is None and fine is None:
            raise QueryError(f"{where}: nothing says what is relevant to {text!r}: neither a category nor a judgement.")
        queries[name] = Query(name, text, "file", broad, fine, judged=judged.get(name))
    if not queries:
        raise QueryError(f"{path} holds no query.")
    if unknown := judged.keys() - queries.keys():
        raise QueryError(f"{qrels} judges {len(unknown)} queries that {path} does not have, {min(unknown)!r} for one.")
    return list(queries.values())


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers from 1 and rows of a CSV, TSV or JSON lines file."""
    lines = _lines(path)
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _object(path, number, line)
        return
    table = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() in (".tsv", ".tab") else ",", strict=True)
    if "text" not in (table.fieldnames or ()):
        raise QueryError(f"{path} has no column `text`: its first line names the columns, {', '.join(_COLUMNS)}.")
    try:
        for row in table:
            if None in row:
                raise QueryError(f"{path}, line {table.line_num}: there are more fields than columns.")
            yield table.line_num, {name: value or "" for name, value in row.items()}
    except csv.Error as error:
        raise QueryError(f"{path}, line {table.line_num}: {error}.") from error


def _object(path: Path, number: int, line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise QueryError(f"{path}, line {number} is no JSON: {error}.") from error
    if not isinstance(row, dict):
        raise QueryError(f"{path}, line {number} is no JSON object.")
    return {name: "" if value is None else str(value) for name, value in row.items()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise QueryError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def _read_qrels(path: Path) -> dict[str, dict[str, int]]:
    judged: dict[str, dict[str, int]] = {}
    for number, line in enumerate(_lines(path), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 4 or not fields[3].lstrip("-").isdecimal():
            raise QueryError(f"{path}, line {number} is not of the form `query_id 0 product_id grade`.")
        query_id, _, product_id, grade = fields
        judged.setdefault(query_id, {})[product_id] = max(0, int(grade))  # trec_eval too takes negative ones for 0
    return judged
