"""Fashion200k to a catalog of Parquet partitions: `python -m jobs.import_fashion200k ROOT --out DIR`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.cli import JobParser, add_log_level, positive, run_and_tell

if TYPE_CHECKING:
    from pipeline.catalog.import_source import ImportSource


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(
        prog="python -m jobs.import_fashion200k",
        description="Write Fashion200k, as its owners publish it, to Parquet partitions with one row per product. What "
        "is left out is in a file of rejects, with its reason. Broken off, the same command goes on.",
        epilog="exit codes: 0 imported, with what was rejected reported; 1 it was broken off, or nothing could be "
        "imported; 2 wrong arguments, ROOT or DIR",
    )
    result.add_argument("root", metavar="ROOT", help="the folder that holds labels/ and women/")
    result.add_argument("--images", choices=("bytes", "references"), default="bytes", help=IMAGES_HELP)
    result.add_argument("--repair-text", action="store_true", help="undo a second UTF-8 encoding in descriptions")
    add_import_arguments(result)
    return result


IMAGES_HELP = "put the images into the partitions (the default), or references to their files"


def add_import_arguments(result: argparse.ArgumentParser) -> None:
    """What all imports share."""
    result.add_argument("--out", required=True, metavar="DIR", help="a local folder for this import alone")
    result.add_argument(
        "--partition-mb", type=positive, default=128, metavar="MB", help="images in a partition, about (default 128)"
    )
    result.add_argument(
        "--partition-products", type=positive, default=10_000, metavar="N", help="in a partition at most (10,000)"
    )
    result.add_argument("--json", action="store_true", help="print one JSON object")
    add_log_level(result)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)

    def job() -> Mapping[str, Any]:
        from pipeline.catalog.fashion200k import Fashion200k

        source = Fashion200k(arguments.root, repair_text=arguments.repair_text)
        return imported(source, source.images_root, arguments.images, arguments, "import_fashion200k", arguments.root)

    return run_and_tell(arguments, job, describe)


def imported(
    source: ImportSource, images_root: str, images: str, arguments: argparse.Namespace, job: str, given: str
) -> Mapping[str, Any]:
    """Run an import with the arguments that all share.

    Args:
        source: an `import_source.ImportSource`.
        images_root: local folder of the images.
        images: `bytes` or `references`.
        arguments: as `add_import_arguments` made them.
        job: the job's name.
        given: the folder or file that is imported.
    """
    from pipeline.catalog.importing import ImportOptions, run_import
    from pipeline.paths import absolute

    options = ImportOptions(images_root, images, arguments.partition_mb * 1_000_000, arguments.partition_products)
    return run_import(source, arguments.out, options, {"job": job, "source": absolute(given)})


def describe(result: Mapping[str, Any]) -> str:
    """The result as a few lines for people."""
    size_mb = sum(partition["bytes"] for partition in result["partitions"]) / 1e6
    read = f"{result['lines']:,} lines" if "lines" in result else f"{result['rows']:,} rows"
    broad, fine = (sum(name != "" for name in result[f"{kind}_categories"]) for kind in ("broad", "fine"))
    lines = [
        f"read       {read}",
        f"products   {result['products']:,} with {result['images']:,} images ({result['images_kind']})",
        f"categories {broad} broad, {fine} fine",
        f"partitions {len(result['partitions'])} of {size_mb:,.1f} MB: {result['written']} written, "
        f"{result['kept']} kept",
    ]
    if result["rejected"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in result["rejects"].items())
        lines.append(f"rejects    {reasons}: {result['rejects_path']}")
    if missing := result["source"].get("missing_label_files"):
        lines.append(f"missing    {', '.join(missing)}")
    if result.get("extra_files"):
        lines.append(f"extra      {result['extra_files']:,} files that no label names, not imported")
    lines.append(f"time       {result['seconds']:.1f} s")
    words = ["python", "-m", "jobs.backfill", "--catalog", result["catalog"], "--db", "DB", "--model", "M"]
    if result["images_kind"] == "references":
        words += ["--set", f"images.root={result['images_root']}"]
    return "\n".join([*lines, f"next       {shlex.join(words)}"])


if __name__ == "__main__":
    raise SystemExit(main())
