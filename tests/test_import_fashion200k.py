"""Fashion200k to a catalog: a drawn data set of its shape with every trap counted by hand, and its real label text."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from job_process import JobProcess
from small_catalog import assert_equal_tables, jpeg, table

from jobs import backfill, import_fashion200k
from pipeline.catalog.fashion200k import BROAD, LABEL_FILES, Fashion200k, Label, parse_line, repaired
from pipeline.catalog.import_source import ImportReject, SourceProduct
from pipeline.catalog.importing import ImportOptions, run_import
from pipeline.catalog.partitions import open_catalog
from pipeline.catalog.products import RowPlan, read_products
from pipeline.config import CatalogConfig, ColumnsConfig
from pipeline.errors import InputRejected

GOWNS = "women/dresses/gowns"
TEES = "women/tops/t-shirts"
TWICE = "women\u00e2\u0080\u0099s red gown"
WRONG = {
    b"women/dresses/gowns/9/9_0.jpeg\t1.0": "wrong_fields",
    b"women/dresses/gowns/9/9_1.jpeg\t1.0\ta\tb": "wrong_fields",
    b"": "wrong_fields",
    b"women/dresses/gowns/9/9_2.jpeg\tnan\ta": "score_not_a_number",
    b"women/dresses/gowns/9/9_3.jpeg\tinf\ta": "score_not_a_number",
    b"women/dresses/gowns/9/9_4.jpeg\t1e999\ta": "score_not_a_number",
    b"women/dresses/gowns/9/9_5.jpeg\t\ta": "score_not_a_number",
    b"women/dresses/gowns/9/9_6.jpeg\t1_0\ta": "score_not_a_number",
    b"women/dresses/gowns/9/9_7.jpeg\t1.0\ta\xff": "not_utf8",
    b"../women/dresses/gowns/9/9_0.jpeg\t1.0\ta": "path_outside",
    b"women/dresses/../gowns/9/9_0.jpeg\t1.0\ta": "path_outside",
    b"/etc/passwd\t1.0\ta": "path_outside",
    b"women/dresses/gowns/9/8_0.jpeg\t1.0\ta": "path_shape",
    b"women/hats/gowns/9/9_0.jpeg\t1.0\ta": "path_shape",
    b"women/dresses/9/9_0.jpeg\t1.0\ta": "path_shape",
    b"women/dresses/gowns/9/9_0.gif\t1.0\ta": "path_shape",
    b"women/dresses/gowns/9/9_x.jpeg\t1.0\ta": "path_shape",
    "women/dresses/gowns/9/9_\u0663.jpeg\t1.0\ta".encode(): "path_shape",
}
"""Lines that are none, and why."""


def line(path: str, score: str = "-1.5", text: str = "green dress") -> bytes:
    return f"{path}\t{score}\t{text}".encode()


def write_labels(root: Path, files: Mapping[str, bytes]) -> None:
    (root / "labels").mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        (root / "labels" / f"{name}_detect_all.txt").write_bytes(raw)


def write_images(root: Path, paths: Iterable[str], *, is_photo: bool = False) -> None:
    for i, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(i) if is_photo else path.encode())


def run(root: Path, out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """The job in this process: exit code and result."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = import_fashion200k.main([str(root), "--out", str(out), "--json", "--log-level", "error", *more])
    return code, json.loads(said.getvalue().splitlines()[-1])


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((out / "catalog").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def rejects(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "_rejects.parquet").to_pylist()


def content(out: Path) -> dict[str, bytes]:
    """All files that an import hands over."""
    found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("_state")}


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion200k's shape with every trap. What it comes to is counted by hand in the test below."""
    root = tmp_path_factory.mktemp("fashion") / "set"
    write_labels(
        root,
        {
            # 4 lines: two are the product 1, whose other images are in train, one has no file
            "dress_test": b"\xef\xbb\xbf" + b"\r\n".join([
                line(f"{GOWNS}/1/1_12.jpeg", text=" red gown  "),
                line(f"{GOWNS}/1/1_3.jpeg", text=TWICE),
                line(f"{GOWNS}/2/2_0.jpeg", text=""),
                line(f"{GOWNS}/3/3_0.jpeg"),  # missing, and the product's only one
                b"",
            ]),
            # 4 lines, and 18 wrong ones
            "dress_train": b"\n".join([
                line(f"{GOWNS}/1/1_12.jpeg", text="another text"),  # a duplicate of test's
                line(f"{GOWNS}/1/1_0.jpeg", "2", ""),
                line(f"{GOWNS}/2/2_7.jpeg", text="   "),
                line(f"{GOWNS}/2/2_1.jpeg"),  # missing, though the product has others
                *WRONG,
            ]),
            # 6 lines: hyphens; the product 1 in another category; a good line after a bad one of the same path; NEL
            "top_train": b"\n".join([
                line(f"{TEES}/a-b_c/a-b_c_0.jpeg", "-0", "white t-shirt \u00e2\u0080\u0085"),
                line(f"{TEES}/1/1_1.jpeg"),
                line(f"{TEES}/5/5_0.jpeg", "bad"),
                line(f"{TEES}/5/5_0.jpeg", "+1.5e-1"),
                line(f"{TEES}/6/6_0.jpeg"),  # a link out of the root
                line("women/pants/wide-leg_and_palazzo_pants/7/7_0.jpeg", text="black trousers"),  # another file's
            ]) + b"\n",
            "jacket_test": b"",
        },
    )  # fmt: skip
    write_images(
        root,
        [
            f"{GOWNS}/1/1_0.jpeg", f"{GOWNS}/1/1_3.jpeg", f"{GOWNS}/1/1_12.jpeg", f"{GOWNS}/2/2_0.jpeg",
            f"{GOWNS}/2/2_7.jpeg", f"{TEES}/a-b_c/a-b_c_0.jpeg", f"{TEES}/1/1_1.jpeg", f"{TEES}/5/5_0.jpeg",
            "women/pants/wide-leg_and_palazzo_pants/7/7_0.jpeg",
            "women/tops/shirts/8/8_0.jpeg", f"{GOWNS}/1/.DS_Store",  # the two that no label names
        ],
    )  # fmt: skip
    (root.parent / "secret.jpeg").write_bytes(b"secret")
    (root / TEES / "6").mkdir()
    (root / TEES / "6" / "6_0.jpeg").symlink_to(root.parent / "secret.jpeg")
    return root


EXPECTED = Counter(WRONG.values()) + Counter(
    {"duplicate_image": 1, "image_not_found": 2, "conflicting_category": 1, "score_not_a_number": 1, "fetch_refused": 1}
)


def test_every_trap_is_counted(traps: Path, tmp_path: Path) -> None:
    code, told = run(traps, tmp_path / "out")
    assert code == 0
    assert told["lines"] == 4 + 4 + len(WRONG) + 6
    assert (told["products"], told["images"], told["rejected"]) == (5, 8, 24)
    assert told["lines"] == told["images"] + told["rejected"]
    assert told["rejects"] == EXPECTED
    assert told["extra_files"] == 2
    assert set(told["source"]["missing_label_files"]) == set(LABEL_FILES) - {
        f"{name}_detect_all.txt" for name in ("dress_test", "dress_train", "top_train", "jacket_test")
    }
    assert told["broad_categories"] == {
        "dress": {"products": 2, "images": 5}, "pants": {"products": 1, "images": 1},
        "top": {"products": 2, "images": 2},
    }  # fmt: skip
    assert told["fine_categories"]["pants/wide-leg_and_palazzo_pants"] == {"products": 1, "images": 1}
    written = rejects(tmp_path / "out")
    assert Counter(row["reason"] for row in written) == EXPECTED
    wrong = [row for row in written if row["source"] == "dress_train_detect_all.txt" and row["row"] > 4]
    assert [row["reason"] for row in sorted(wrong, key=lambda row: row["row"])] == list(WRONG.values())
    (duplicate,) = (row for row in written if row["reason"] == "duplicate_image")
    assert (duplicate["source"], duplicate["row"]) == ("dress_train_detect_all.txt", 1)
    assert "line 1 of dress_test_detect_all.txt" in duplicate["detail"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {name: told[name] for name in manifest} == manifest


def test_a_product_says_what_its_labels_say(traps: Path, tmp_path: Path) -> None:
    run(traps, tmp_path / "out")
    by_id = {row["product_id"]: row for row in rows(tmp_path / "out")}
    assert list(by_id) == ["1", "2", "5", "7", "a-b_c"]
    assert by_id["1"] == {
        "product_id": "1", "title": None, "description": TWICE, "broad_category": "dress",
        "fine_category": "dresses/gowns", "split": "both", "descriptions": [TWICE, "red gown"],
        "image_names": ["1_0.jpeg", "1_3.jpeg", "1_12.jpeg"], "image_splits": ["train", "test", "test"],
        "detection_scores": [2.0, -1.5, -1.5],
        "images": [f"{GOWNS}/1/1_{n}.jpeg".encode() for n in (0, 3, 12)],
    }  # fmt: skip
    assert (by_id["2"]["description"], by_id["2"]["descriptions"]) == (None, [])
    assert by_id["2"]["image_names"] == ["2_0.jpeg", "2_7.jpeg"]
    assert by_id["a-b_c"]["description"] == "white t-shirt \u00e2\u0080\u0085"
    assert by_id["5"]["split"] == "train"
    assert by_id["7"]["broad_category"] == "pants"


def test_text_is_repaired_where_that_is_asked_for(traps: Path, tmp_path: Path) -> None:
    run(traps, tmp_path / "out", "--repair-text")
    texts = {row["product_id"]: row["description"] for row in rows(tmp_path / "out")}
    assert texts["1"] == "women\u2019s red gown"
    assert repaired("women\u00e2\u20ac\u2122s") == "women\u2019s"
    for right in ("coupé vest", "women\u2019s ua coldgear\u00ae", "gray boucl\u00e3\u00a9 jacket", "plain", "\u00e9"):
        assert repaired(right) == right


def test_references_are_relative_to_the_root_and_partitions_are_bounded(traps: Path, tmp_path: Path) -> None:
    options = ("--images", "references", "--partition-products", "2")
    code, told = run(traps, tmp_path / "out", *options)
    assert code == 0
    assert (len(told["partitions"]), told["written"]) == (3, 3)
    assert told["rejects"] == EXPECTED
    assert rows(tmp_path / "out")[0]["images"] == [f"{GOWNS}/1/1_{n}.jpeg" for n in (0, 3, 12)]
    assert told["images_root"] == str(traps)
    # As bytes a partition is bounded by them: 8 images of some 30 bytes each, 100 at most.
    small = ImportOptions(str(traps), partition_bytes=100)
    result = run_import(Fashion200k(str(traps)), str(tmp_path / "small"), small, {"job": "j", "source": "s"})
    assert [part["images"] for part in result["partitions"]] == [3, 3, 2]


def test_the_catalog_reader_takes_the_result_and_ignores_the_rest(traps: Path, tmp_path: Path) -> None:
    run(traps, tmp_path / "out", "--partition-products", "2")
    for place in (tmp_path / "out", tmp_path / "out" / "catalog"):
        catalog = open_catalog(str(place), CatalogConfig(), ColumnsConfig(carried=("split",)))
        assert len(catalog.partitions) == 3
        assert catalog.shape == "product"
        read = [read_products(catalog, partition, RowPlan()) for partition in catalog.partitions]
        batches = [batch for partition in read for batch in partition]
        assert not [reject for _, bad in batches for reject in bad]
        products = {product.product_id: product for good, _ in batches for product in good}
        assert products["2"].text is None
        assert products["1"].text == TWICE
        assert len(products["1"].images) == 3


def test_the_same_input_gives_the_same_bytes_and_is_not_written_again(traps: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        run(traps, tmp_path / name, "--partition-products", "2")
    assert content(tmp_path / "one") == content(tmp_path / "other")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "catalog").iterdir()}
    _, told = run(traps, tmp_path / "one", "--partition-products", "2")
    assert (told["written"], told["kept"]) == (0, 3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "catalog").iterdir()} == before


def test_what_changed_is_written_again_and_what_is_left_over_goes(traps: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(traps, root, symlinks=True)
    out = tmp_path / "out"
    run(root, out, "--partition-products", "2")
    (root / GOWNS / "1" / "1_0.jpeg").write_bytes(b"another photo")
    damaged = out / "catalog" / "part-00002.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    _, told = run(root, out, "--partition-products", "2")
    assert (told["written"], told["kept"]) == (2, 1)
    assert rows(out)[0]["images"][0] == b"another photo"
    _, told = run(root, out)
    assert (told["written"], told["kept"]) == (1, 0)
    assert [path.name for path in (out / "catalog").iterdir()] == ["part-00000.parquet"]
    assert len(rows(out)) == 5
    run(root, tmp_path / "fresh")
    assert content(out) == content(tmp_path / "fresh")


class Vanishing(Fashion200k):
    """A data set whose first image goes away after it was looked for."""

    def products(self) -> Iterator[SourceProduct | ImportReject]:
        first = Path(self.images_root, GOWNS, "000", "000_0.jpeg")
        for number, product in enumerate(super().products()):
            if number == 290:
                first.rename(first.with_suffix(".away"))
            yield product


def test_an_image_that_goes_away_meanwhile_is_rejected_and_tried_again(tmp_path: Path) -> None:
    root, options, origin = tmp_path / "set", ImportOptions(str(tmp_path / "set")), {"job": "j", "source": "s"}
    paths = [f"{GOWNS}/{i:03d}/{i:03d}_0.jpeg" for i in range(300)]
    write_labels(root, {"dress_train": b"\n".join(line(path) for path in paths)})
    write_images(root, paths)
    told = run_import(Vanishing(str(root)), str(tmp_path / "out"), options, origin)
    assert (told["products"], told["images"], told["rejects"]) == (299, 299, {"image_not_found": 1})
    assert [row["input"] for row in rejects(tmp_path / "out")] == paths[:1]
    (root / paths[0]).with_suffix(".away").rename(root / paths[0])
    told = run_import(Fashion200k(str(root)), str(tmp_path / "out"), options, origin)
    assert (told["products"], told["images"], told["rejected"], told["kept"]) == (300, 300, 0, 0)


@pytest.mark.parametrize("killed_at", [3, 30])
def test_killed_and_started_again_it_ends_like_an_unbroken_import(tmp_path: Path, killed_at: int) -> None:
    root = tmp_path / "set"
    paths = [f"{GOWNS}/{i:03d}/{i:03d}_{n}.jpeg" for i in range(100) for n in range(2)]
    write_labels(root, {"dress_train": b"\n".join([*(line(path) for path in paths), *WRONG])})
    write_images(root, paths)
    arguments = [str(root), "--partition-products", "1", "--json"]
    command = ("-m", "jobs.import_fashion200k")
    out = tmp_path / "out"
    job = JobProcess([*arguments, "--out", str(out)], tmp_path / "killed", command=command)
    job.wait_until(lambda: (out / "_state" / f"part-{killed_at:05d}.json").exists())
    job.signal(signal.SIGKILL)
    assert job.end() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    again = JobProcess([*arguments, "--out", str(out)], tmp_path / "again", command=command)
    assert again.end() == 0, again.log
    told = again.last_line()
    assert told["kept"] > killed_at
    assert told["kept"] + told["written"] == 100
    assert run(root, tmp_path / "unbroken", *arguments[1:3])[0] == 0
    assert content(out) == content(tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{}/none"], "no folder women"),
        (["{}/empty"], "no folder women"),
        (["{}/bare"], "none of Fashion200k's label files"),
        (["s3://bucket/set"], "local folder"),
        (["{}/renamed"], "another name"),
        (["{}/good", "--out", "{}/full"], "not empty"),
        (["{}/good", "--out", "{}/good/labels/dress_test_detect_all.txt"], "cannot be used|not empty"),
        (["{}/good", "--out", "s3://bucket/x"], "local folder"),
        (["{}/good", "--images", "pixels"], "invalid choice"),
        (["{}/good", "--partition-mb", "0"], "whole number from 1"),
    ],
)
def test_what_cannot_start_is_one_sentence_and_exit_2(
    traps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], said: str
) -> None:
    (tmp_path / "good").symlink_to(traps)
    (tmp_path / "empty" / "labels").mkdir(parents=True)
    (tmp_path / "bare" / "women").mkdir(parents=True)
    (tmp_path / "renamed").mkdir()
    (tmp_path / "renamed" / "women").symlink_to(traps / "labels")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    given_arguments = ["--out", str(tmp_path / "out"), "--json", *(a.replace("{}", str(tmp_path)) for a in arguments)]
    try:
        code = import_fashion200k.main(given_arguments)
    except SystemExit as ended:
        code = int(str(ended.code))
    out, err = capsys.readouterr()
    assert code == 2
    assert re.search(said, json.loads(out.splitlines()[-1])["error"])
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_to_one_import(traps: Path, tmp_path: Path) -> None:
    assert run(traps, tmp_path / "out")[0] == 0
    (tmp_path / "link").symlink_to(traps)
    code, told = run(tmp_path / "link", tmp_path / "out")
    assert (code, "holds an import of" in told["error"]) == (2, True)
    with (tmp_path / "out" / "_state" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, told = run(traps, tmp_path / "out")
        assert (code, "another import writes" in told["error"]) == (1, True)
    (tmp_path / "out" / "catalog" / "mine.parquet").write_bytes(b"PAR1")
    code, told = run(traps, tmp_path / "out")
    assert (code, "mine.parquet, which no import wrote" in told["error"]) == (2, True)


def test_nothing_that_could_be_imported_is_an_error_that_names_the_rejects(traps: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    write_labels(root, {"dress_train": b"\n".join(WRONG)})
    (root / "women").mkdir()
    code, told = run(root, tmp_path / "out")
    assert code == 1
    assert "_rejects.parquet says why" in told["error"]
    assert len(rejects(tmp_path / "out")) == len(WRONG)


def test_women_may_be_a_link_to_another_disk(traps: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("labels", "women"):
        (tmp_path / "set" / name).symlink_to(traps / name)
    code, told = run(tmp_path / "set", tmp_path / "out")
    assert (code, told["images"], told["images_root"]) == (0, 8, str(traps))


TEXT = st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=("Cs",)), max_size=30)
WORD = st.text("abcxyz019-_", min_size=1, max_size=12)


@settings(deadline=None)
@given(
    broad=st.sampled_from(sorted(BROAD)),
    fine=WORD,
    product_id=WORD,
    ordinal=st.integers(0, 10**9 - 1),
    score=st.floats(allow_nan=False, allow_infinity=False),
    text=TEXT,
    end=st.sampled_from([b"", b"\r"]),
)
@example("tops", "t-shirts", "a_1", 0, -0.0, "\x85\xa0\u2028 x", b"\r")
def test_a_line_that_is_written_is_read(
    broad: str, fine: str, product_id: str, ordinal: int, score: float, text: str, end: bytes
) -> None:
    path = f"women/{broad}/{fine}/{product_id}/{product_id}_{ordinal}.jpeg"
    label = parse_line(f"{path}\t{score!r}\t{text}".encode() + end)
    description = text.strip(" \t\r\n\v\f") or None
    assert label == Label(path, product_id, ordinal, BROAD[broad], f"{broad}/{fine}", score, description)


@settings(deadline=None)
@given(raw=st.binary(max_size=60) | st.lists(TEXT | WORD, max_size=5).map(lambda parts: "\t".join(parts).encode()))
def test_any_line_is_a_label_or_rejected(raw: bytes) -> None:
    with contextlib.suppress(InputRejected):
        label = parse_line(raw, repair_text=True)
        assert label.path.startswith("women/")
        assert ".." not in label.path


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_what_was_encoded_twice_comes_back(text: str) -> None:
    assert repaired(text.encode().decode("latin-1")) == text


def test_the_real_label_text_is_all_accounted_for(shared: Path, tmp_path: Path) -> None:
    labels = pq.read_table(shared / "data" / "fashion200k" / "labels.parquet").to_pylist()
    root = tmp_path / "set"
    files: dict[str, list[bytes]] = {}
    for label in labels:
        path = label["image_path"] or label["image_id"]  # of half of them the path is not known
        name = f"{label['broad_category'] or 'dress'}_{label['split'] or 'train'}"
        files.setdefault(name, []).append(line(path, "-2.25", label["label"] + " "))
    write_labels(root, {name: b"\n".join(lines) + b"\n" for name, lines in files.items()})
    known = [label for label in labels if label["image_path"]]
    write_images(root, (label["image_path"] for label in known))
    code, told = run(root, tmp_path / "out", "--partition-products", "1000")
    assert code == 0
    assert told["lines"] == len(labels) == 11_653
    found = rows(tmp_path / "out")
    imported = [name.removesuffix(".jpeg") for row in found for name in row["image_names"]]
    left_out = [row["input"] for row in rejects(tmp_path / "out")]
    assert sorted(imported + left_out) == sorted(label["image_id"] for label in labels)
    assert sorted(imported) == sorted(label["image_id"] for label in known)
    assert told["rejects"] == {"path_shape": 11_653 - 5_000}
    assert (len(told["broad_categories"]), len(told["fine_categories"])) == (5, 31)
    assert {row["product_id"] for row in found} == {label["product_id"] for label in known}
    texts = {label["image_id"]: label for label in known}
    for row in found:
        first = texts[row["image_names"][0].removesuffix(".jpeg")]
        assert row["description"] == first["label"]
        assert row["broad_category"] == first["broad_category"]
        assert row["fine_category"].split("/")[1] == first["fine_category"]
    _, mended = run(root, tmp_path / "mended", "--repair-text")
    assert mended["images"] == 5_000
    by_id = {row["product_id"]: row["description"] for row in rows(tmp_path / "mended")}
    changed = {text for row in found if (text := by_id[row["product_id"]]) != row["description"]}
    assert changed
    assert all("\u2019" in text for text in changed)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_backfill_takes_what_was_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "set"
    paths = [f"{GOWNS}/{i}/{i}_{n}.jpeg" for i in range(4) for n in range(2)]
    write_labels(root, {"dress_train": b"\n".join(line(path, text=f"gown {path}") for path in paths)})
    write_images(root, paths, is_photo=True)
    for form, more in (("bytes", ()), ("references", ("--set", f"images.root={root}"))):
        _, told = run(root, tmp_path / form, "--images", form)
        arguments = ["--catalog", told["catalog"], "--db", str(tmp_path / f"{form}-db"), "--model", "demo", "--json"]
        sets = ["--set", 'columns.carried=["split","image_names"]', "--set", "pool.gpus_per_actor=0", *more]
        capsys.readouterr()
        assert backfill.main([*arguments, *sets, "--log-level", "error"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (result["products"], result["embedded"], result["rejected"]) == (4, 12, 0)
    assert_equal_tables(tmp_path / "bytes-db", tmp_path / "references-db")
    assert table(tmp_path / "bytes-db", "products").to_pylist()[0]["image_names"] == ["0_0.jpeg", "0_1.jpeg"]
