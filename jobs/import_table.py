"""A CSV, JSONL or Parquet file with image paths to a catalog: `python -m jobs.import_table FILE --out DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.cli import JobParser, run_and_tell
from jobs.import_fashion200k import IMAGES_HELP, add_import_arguments, describe, imported

_COLUMNS = {
    "id": ("product_id", "the key; rows of one id are one product"),
    "title": ("title", "embedded as `title. description`"),
    "description": ("description", "embedded as `title. description`"),
    "broad": ("broad_category", "for filters and evaluation"),
    "fine": ("fine_category", "for filters and evaluation"),
    "images": ("images", "a path, a list of paths, or a text with a JSON list of them"),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(
        prog="python -m jobs.import_table",
        description="Write a table with image paths to Parquet partitions with one row per product; rows of one id are "
        "put together. Further columns are carried. What is left out is in a file of rejects, with its reason. Broken "
        "off, the same command goes on.",
        epilog="exit codes: 0 imported, with what was rejected reported; 1 it was broken off, or nothing could be "
        "imported; 2 wrong arguments, FILE or DIR",
    )
    result.add_argument("file", metavar="FILE", help="a local CSV, JSONL or Parquet file")
    for option, (column, text) in _COLUMNS.items():
        result.add_argument(f"--{option}", default=column, metavar="COLUMN", help=f"{text} (default {column})")
    result.add_argument("--image-separator", default="", metavar="S", help="between several paths in one text")
    result.add_argument("--image-root", metavar="DIR", help="what paths are relative to (default: FILE's folder)")
    result.add_argument("--image-form", choices=("bytes", "references"), default="bytes", help=IMAGES_HELP)
    result.add_argument(
        "--number", action="append", default=[], metavar="COLUMN", help="carry this column's text as numbers"
    )
    result.add_argument("--format", choices=("csv", "jsonl", "parquet"), help="where FILE's suffix does not tell")
    result.add_argument("--delimiter", type=_character, metavar="C", help="of CSV (default a comma, for .tsv a tab)")
    add_import_arguments(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)

    def job() -> Mapping[str, Any]:
        from pipeline.catalog.table_files import open_table
        from pipeline.catalog.table_products import TableColumns, TableProducts
        from pipeline.errors import CatalogError
        from pipeline.paths import absolute

        table = open_table(arguments.file, kind=arguments.format, delimiter=arguments.delimiter)
        columns = {column: getattr(arguments, option) for option, (column, _) in _COLUMNS.items()}
        mapping = TableColumns(**columns, separator=arguments.image_separator, numbers=tuple(arguments.number))
        root = absolute(arguments.image_root or str(Path(absolute(arguments.file)).parent))
        if not Path(root).is_dir():
            raise CatalogError(
                f"there is no folder {arguments.image_root}; --image-root is what image paths start from"
            )
        source = TableProducts(table, arguments.file, mapping, root)
        return imported(source, root, arguments.image_form, arguments, "import_table", arguments.file)

    return run_and_tell(arguments, job, describe)


def _character(text: str) -> str:
    """The type of an argument that is one character; a tab may be written as backslash and t."""
    found = "\t" if text == "\\t" else text
    if len(found) != 1 or found in '\r\n"':
        raise argparse.ArgumentTypeError(f"takes one character, not {text!r}")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
