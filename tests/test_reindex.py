"""Re-indexing: only what changed is embedded and written, and the tables are those of a backfill from nothing."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_folder import tensors, write_folder
from small_catalog import PRODUCT_SCHEMA, Item, assert_equal_tables, items, jpeg, table, write_images, write_products

from jobs.reindex import main
from pipeline.config import load_config
from pipeline.errors import ConfigError, ReleaseRefused
from pipeline.query import Searcher
from pipeline.run.backfill import backfill, reindex
from pipeline.run.plan import Order
from pipeline.run.preview import preview
from pipeline.store.releases import list_releases, newest_release

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

SETTINGS = ("pool.gpus_per_actor=0", "max_reject_share=0.6", 'columns.carried=["price"]', "max_delete_share=0.4")


def config(catalog: Path | str, db: Path, model: str, *sets: str) -> Any:
    return load_config(None, [*SETTINGS, *sets], catalog_uri=str(catalog), db=str(db), model_name=model)


def fill(catalog: Path | str, db: Path, model: str, *sets: str, **kwargs: Any) -> dict[str, Any]:
    return backfill(config(catalog, db, model, *sets), **kwargs)


def follow(catalog: Path | str, db: Path, model: str, *sets: str, **kwargs: Any) -> dict[str, Any]:
    """A re-index."""
    return reindex(config(catalog, db, model, *sets), **kwargs)


def rewrite(folder: Path, groups: Sequence[Sequence[Item]]) -> Path:
    """The same files anew; those that stay the same byte by byte keep their time, as an export that syncs does."""
    before = {path: (path.read_bytes(), path.stat()) for path in folder.glob("*.parquet")}
    for path in before:
        path.unlink()
    write_products(folder, groups)
    for path, (data, stat) in before.items():
        if path.exists() and path.read_bytes() == data:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return folder


def tower_inputs(products: Sequence[Item]) -> set[str | bytes]:
    """Distinct inputs, by a count of the test's own."""
    texts: set[str | bytes] = {f"{p.title}. {p.description}" for p in products}
    return texts | {image for p in products for image in p.images or () if isinstance(image, bytes)}


@pytest.fixture
def groups() -> list[list[Item]]:
    """Four files of eight products with two images each."""
    products = items(32)
    return [products[at : at + 8] for at in range(0, 32, 8)]


def test_every_kind_of_change_at_once(tmp_path: Path, tiny_model: str, groups: list[list[Item]]) -> None:
    catalog = write_products(tmp_path / "catalog", groups)
    fill(catalog, tmp_path / "db", tiny_model)
    before = tower_inputs([p for group in groups for p in group])
    groups[0][1].title = "edited"
    groups[0][2].images = [jpeg(900), *(groups[0][2].images or ())[1:]]
    groups[1][0].price = 99.0
    groups[1][1].images = [groups[0][4].images[0], b"not an image"]  # type: ignore[index]
    del groups[2][3]
    groups[3].append(Item("new", "a new one", "of wool", [jpeg(901), jpeg(20)]))
    groups[3][2].title, groups[3][2].description = "title 0 of 0", "a wool coat number 0"
    rewrite(catalog, groups)
    told = preview(config(catalog, tmp_path / "db", tiny_model), Order("reindex", is_truth=True, is_shown=True))
    report = follow(catalog, tmp_path / "db", tiny_model)
    new = tower_inputs([p for group in groups for p in group]) - before - {b"not an image"}
    # The plan cannot know that one of the new images is none.
    assert (report["embedded"], told["inputs"]["to_embed"]) == (len(new), len(new) + 1) == (4, 5)
    assert told["products"] == {
        "catalog": 32, "new": 1, "inputs_changed": 4, "metadata_changed": 1, "unchanged": 26, "deleted": 1,
        "averaged_anew": 0,
    }  # fmt: skip
    assert (report["products"], report["deleted"], report["released"]) == (32, 1, True)
    assert (report["inputs"], report["rejected"]) == (32 + 64, 1)
    assert report["inputs"] == report["embedded"] + report["reused"] + report["rejected"]
    whole = fill(catalog, tmp_path / "whole", tiny_model)
    assert {k: report[k] for k in ("inputs", "texts", "images", "rejected", "products")} == {
        k: whole[k] for k in ("inputs", "texts", "images", "rejected", "products")
    }
    assert_equal_tables(tmp_path / "db", tmp_path / "whole")
    again = follow(catalog, tmp_path / "db", tiny_model)
    assert (again["released"], again["embedded"], again["actors"]) == (False, 0, [])


def test_nothing_changed_reads_nothing_and_writes_nothing(
    tmp_path: Path, tiny_model: str, groups: list[list[Item]], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups[1][3].images = [b"broken", jpeg(1)]
    catalog = write_products(tmp_path / "catalog", groups)
    first = fill(catalog, tmp_path / "db", tiny_model)
    monkeypatch.setattr("pipeline.run.scan.read_products", lambda *_: pytest.fail("a partition was read"))
    monkeypatch.setattr("pipeline.run.checks.connected", lambda *_: pytest.fail("Ray was started"))
    again = follow(catalog, tmp_path / "db", tiny_model)
    assert (again["released"], again["release"], again["embedded"], again["actors"]) == (False, 1, 0, [])
    assert again["versions"] == first["versions"]
    for name in ("products", "inputs", "texts", "images", "rejected", "rejected_rows"):
        assert again[name] == first[name], name
    assert [release.release for release in list_releases(str(tmp_path / "db"))] == [1]


def test_a_file_written_again_with_the_same_rows_is_no_change(tmp_path: Path, tiny_model: str) -> None:
    groups = [items(5), items(5, seed=1)]
    groups[0][0].images = [b"broken"]
    catalog = write_products(tmp_path / "catalog", groups)
    fill(catalog, tmp_path / "db", tiny_model)
    write_products(catalog, [list(reversed(groups[0])), groups[1]])
    report = follow(catalog, tmp_path / "db", tiny_model)
    assert (report["released"], report["embedded"]) == (True, 0), "the rejected image is in another row now"
    write_products(catalog, [groups[1], groups[0][1:]])
    follow(catalog, tmp_path / "db", tiny_model)
    fill(catalog, tmp_path / "whole", tiny_model)
    assert_equal_tables(tmp_path / "db", tmp_path / "whole")
    os.utime(catalog / "part-00000.parquet", (1, 1))
    report = follow(catalog, tmp_path / "db", tiny_model)
    assert (report["released"], report["release"]) == (False, 3)


def test_metadata_alone_needs_no_tower(tmp_path: Path, tiny_model: str, groups: list[list[Item]]) -> None:
    catalog = write_products(tmp_path / "catalog", groups)
    fill(catalog, tmp_path / "db", tiny_model)
    for product in groups[2]:
        product.price, product.broad_category = -1.0, "shoes"
    rewrite(catalog, groups)
    report = follow(catalog, tmp_path / "db", tiny_model)
    assert (report["released"], report["embedded"], report["actors"]) == (True, 0, [])
    fill(catalog, tmp_path / "whole", tiny_model)
    assert_equal_tables(tmp_path / "db", tmp_path / "whole")


def test_a_new_carried_column_needs_no_tower(tmp_path: Path, tiny_model: str, groups: list[list[Item]]) -> None:
    catalog = write_products(tmp_path / "catalog", groups)
    fill(catalog, tmp_path / "db", tiny_model, "columns.carried=[]")
    report = follow(catalog, tmp_path / "db", tiny_model)
    assert (report["released"], report["embedded"], report["actors"]) == (True, 0, [])
    fill(catalog, tmp_path / "whole", tiny_model)
    assert_equal_tables(tmp_path / "db", tmp_path / "whole")


def test_other_weights_need_no_tower(tmp_path: Path, tiny_model: str, groups: list[list[Item]]) -> None:
    groups[0][0].images = []
    groups[0][1].title = groups[0][1].description = None
    catalog = write_products(tmp_path / "catalog", groups)
    fill(catalog, tmp_path / "db", tiny_model)
    groups[3][3].title = "edited at the same time"
    rewrite(catalog, groups)
    report = follow(catalog, tmp_path / "db", tiny_model, "average.text_weight=0.7")
    assert (report["released"], report["embedded"]) == (True, 1)
    fill(catalog, tmp_path / "whole", tiny_model, "average.text_weight=0.7")
    assert_equal_tables(tmp_path / "db", tmp_path / "whole")
    back = follow(catalog, tmp_path / "db", tiny_model)
    assert (back["released"], back["embedded"], back["actors"]) == (True, 0, [])
    release = newest_release(str(tmp_path / "db"))
    assert release is not None
    assert release.average_text_weight == 0.5
    with pytest.raises(ConfigError, match=r"average\.text_weight"):
        fill(f"{catalog}/part-00000*", tmp_path / "db", tiny_model, "average.text_weight=0.7")


def test_another_model_is_released_whole_while_readers_stay(
    tmp_path: Path, tiny_model: str, groups: list[list[Item]]
) -> None:
    catalog = write_products(tmp_path / "catalog", groups)
    fill(catalog, tmp_path / "db", tiny_model)
    other = str(write_folder(tmp_path / "other", weights={name: t.flip(0) for name, t in tensors().items()}))
    del groups[0][0]
    rewrite(catalog, groups)
    vectors = {"old": table(tmp_path / "db", "products").column("text_vector")[3].as_py()}
    seen: list[tuple[int, float]] = []
    is_over = threading.Event()

    def read() -> None:
        searcher = Searcher.open(str(tmp_path / "db"))
        while not is_over.is_set():
            searcher.refresh()
            hits = searcher.search(np.array(vectors["old"], np.float32), mode="text", k=32)
            seen.append((searcher.release.release, hits[0].score))

    reader = threading.Thread(target=read)
    reader.start()
    report = follow(catalog, tmp_path / "db", other)
    is_over.set()
    reader.join()
    assert (report["release"], report["embedded"], report["deleted"]) == (2, 31 + 62, 1)
    assert {release for release, _ in seen} <= {1, 2}
    assert all(score > 0.999 for release, score in seen if release == 1)
    assert all(score < 0.999 for release, score in seen if release == 2)
    fill(catalog, tmp_path / "whole", other)
    assert_equal_tables(tmp_path / "db", tmp_path / "whole")


def test_a_catalog_that_lost_rows_deletes_nothing(tmp_path: Path, tiny_model: str, groups: list[list[Item]]) -> None:
    catalog = write_products(tmp_path / "catalog", groups)
    fill(catalog, tmp_path / "db", tiny_model)
    half = write_products(tmp_path / "half", [groups[0], groups[1][:7]])
    with pytest.raises(ReleaseRefused, match=r"17 of 32 products \(53.1%\).*--confirm-deletes 17"):
        follow(half, tmp_path / "db", tiny_model)
    for wrong in (0, 16, 32):
        with pytest.raises(ReleaseRefused, match="17 of 32"):
            follow(half, tmp_path / "db", tiny_model, confirm_deletes=wrong)
    assert table(tmp_path / "db", "products").num_rows == 32
    assert len(list_releases(str(tmp_path / "db"))) == 1
    report = follow(half, tmp_path / "db", tiny_model, confirm_deletes=17)
    assert (report["deleted"], report["products"], report["embedded"]) == (17, 15, 0)
    fill(half, tmp_path / "whole", tiny_model)
    assert_equal_tables(tmp_path / "db", tmp_path / "whole")


def test_a_backfill_of_a_part_deletes_nothing_and_takes_over(tmp_path: Path, tiny_model: str) -> None:
    products = items(12)
    catalog = tmp_path / "catalog"
    write_products(catalog / "day=old", [products[:6], products[6:]])
    fill(catalog, tmp_path / "db", tiny_model)
    edited = copy.deepcopy(products[2])
    edited.title = "of today"
    write_products(catalog / "day=today", [[edited, *items(1, seed=9)]])
    report = fill(f"{catalog}/day=today/*", tmp_path / "db", tiny_model)
    assert (report["deleted"], report["embedded"], report["products"]) == (0, 1 + 3, 2)
    titles = dict(
        zip(*table(tmp_path / "db", "products").select(["product_id", "title"]).to_pydict().values(), strict=True)
    )
    assert len(titles) == 13
    assert titles["p0-0002"] == "of today"
    old = fill(f"{catalog}/day=old/*", tmp_path / "db", tiny_model)
    assert old["released"], "the older partition speaks again"
    assert old["embedded"] == 1
    assert fill(f"{catalog}/day=old/*", tmp_path / "db", tiny_model)["released"] is False
    follow(catalog, tmp_path / "db", tiny_model)
    fill(catalog, tmp_path / "whole", tiny_model)
    assert_equal_tables(tmp_path / "db", tmp_path / "whole")


@pytest.mark.parametrize("dedupe", [False, True])
def test_one_photo_in_many_products(tmp_path: Path, tiny_model: str, dedupe: bool) -> None:
    photo = jpeg(77)
    products = [Item(f"p{i:03d}", f"number {i}", None, [photo]) for i in range(35)]
    groups = [products[at : at + 5] for at in range(0, 35, 5)]
    catalog = write_products(tmp_path / "catalog", groups)
    sets = ("plan.dedupe=true",) if dedupe else ()
    report = fill(catalog, tmp_path / "db", tiny_model, *sets)
    assert (report["embedded"], report["reused"]) == (35 + (1 if dedupe else 7), 34 if dedupe else 28)
    for group in groups:
        group[0].price = 5.0
    groups[3].append(Item("more", "one more", None, [photo]))
    rewrite(catalog, groups)
    assert follow(catalog, tmp_path / "db", tiny_model)["embedded"] == 1, "its text alone"
    fill(catalog, tmp_path / "whole", tiny_model)
    assert_equal_tables(tmp_path / "db", tmp_path / "whole")


def test_rows_of_a_product_in_many_partitions(tmp_path: Path, tiny_model: str) -> None:
    products = items(15, images=3)
    catalog = write_images(tmp_path / "catalog", products, files=5, seed=1)
    fill(catalog, tmp_path / "db", tiny_model)
    products[4].images = [jpeg(800), *(products[4].images or ())]
    products[5].title = "edited"
    products[6].images = [b"broken", jpeg(801)]
    del products[9]
    for path in catalog.glob("*"):
        path.unlink()
    write_images(catalog, products, files=5, seed=1)
    report = follow(catalog, tmp_path / "db", tiny_model)
    assert (report["embedded"], report["deleted"], report["rejected"]) == (3, 1, 1)
    whole = fill(catalog, tmp_path / "whole", tiny_model)
    assert report["inputs"] == whole["inputs"]
    assert_equal_tables(tmp_path / "db", tmp_path / "whole")


def test_a_duplicate_takes_the_place_of_a_row_that_left(tmp_path: Path, tiny_model: str) -> None:
    first, other = items(6), items(6, seed=1)
    second = copy.deepcopy(first[0])
    second.title = "the second of two"
    catalog = write_products(tmp_path / "catalog", [first, [*other, second]])
    fill(catalog, tmp_path / "db", tiny_model)
    rewrite(catalog, [first[1:], [*other, second]])
    report = follow(catalog, tmp_path / "db", tiny_model)
    assert (report["embedded"], report["deleted"], report["rejected_rows"]) == (1, 0, 0)
    fill(catalog, tmp_path / "whole", tiny_model)
    assert_equal_tables(tmp_path / "db", tmp_path / "whole")


def test_verify_content_sees_what_a_digest_does_not(tmp_path: Path, tiny_model: str) -> None:
    at = PRODUCT_SCHEMA.get_field_index("images")
    references = PRODUCT_SCHEMA.set(at, pa.field("images", pa.list_(pa.string())))
    products = [Item("a", "a", None, ["a.jpg"]), *items(3, images=0)]
    catalog = write_products(tmp_path / "catalog", [products], references)
    (catalog / "a.jpg").write_bytes(jpeg(1))
    fill(catalog, tmp_path / "db", tiny_model)
    (catalog / "a.jpg").write_bytes(jpeg(2))
    assert follow(catalog, tmp_path / "db", tiny_model)["released"] is False
    report = follow(catalog, tmp_path / "db", tiny_model, verify_content=True)
    assert (report["released"], report["embedded"]) == (True, 1)


ACTIONS = st.tuples(
    st.sampled_from(["text", "image", "break", "price", "remove", "add", "move", "copy", "swap"]),
    st.integers(0, 10_000),
)


@pytest.mark.slow
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(st.lists(ACTIONS, min_size=1, max_size=5), min_size=1, max_size=3))
def test_any_history_ends_as_a_backfill_from_nothing(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: str, rounds: list[list[tuple[str, int]]]
) -> None:
    folder = tmp_path_factory.mktemp("history")
    files = [items(3), items(3, seed=1), items(2, seed=2)]
    catalog = write_products(folder / "catalog", files)
    fill(catalog, folder / "db", tiny_model, "max_reject_share=1.0")
    for number, actions in enumerate(rounds):
        for what, n in actions:
            change(files, what, n)
        rewrite(catalog, files)
        follow(catalog, folder / "db", tiny_model, "max_delete_share=1.0", "max_reject_share=1.0")
        report = follow(catalog, folder / "db", tiny_model, "max_delete_share=1.0", "max_reject_share=1.0")
        assert not report["released"]
        whole = fill(catalog, folder / f"whole{number}", tiny_model, "max_reject_share=1.0")
        for name in ("products", "inputs", "texts", "images", "rejected", "rejected_rows"):
            assert report[name] == whole[name], name
        assert_equal_tables(folder / "db", folder / f"whole{number}")


def change(files: list[list[Item]], what: str, n: int) -> None:
    """One edit of a catalog, drawn by a number; it never empties a file."""
    file = files[n % len(files)]
    item = file[n // 7 % len(file)]
    images = list(item.images or ())
    if what == "text":
        item.title = f"edited {n}" if n % 5 else None
    elif what == "image":
        item.images = [*images, jpeg(n)] if n % 2 else images[1:]
    elif what == "break":
        item.images = [b"broken", *images]
    elif what == "price":
        item.price = float(n)
    elif what == "remove" and len(file) > 1:
        file.remove(item)
    elif what == "add":
        file.insert(0, Item(f"added-{n}", f"added {n}", None, [jpeg(n)]))
    elif what == "move" and len(file) > 1:
        file.remove(item)
        files[(n + 1) % len(files)].append(item)
    elif what == "copy":
        files[(n + 1) % len(files)].append(copy.deepcopy(item))
    elif what == "swap":
        file.reverse()


def test_the_command_line(tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    groups = [items(8)]
    catalog = write_products(tmp_path / "catalog", groups)
    sets = [word for value in SETTINGS for word in ("--set", value)]
    given_ = ["--catalog", str(catalog), "--db", str(tmp_path / "db"), "--model", tiny_model, *sets]
    assert main([*given_, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "texts to embed" in told
    assert "no estimate" in told
    assert not (tmp_path / "db").exists()
    assert main([*given_, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["release"] == 1
    write_products(catalog, [groups[0][:4]])
    assert main([*given_, "--json"]) == 1
    assert "--confirm-deletes 4" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert main([*given_, "--dry-run", "--json", "--price-per-gpu-hour", "2.5"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (plan["products"]["deleted"], plan["is_refused"]) == (4, True)
    assert main([*given_, "--confirm-deletes", "4"]) == 0
    assert "deleted    4 products" in capsys.readouterr().out
    for wrong in (["--confirm-deletes", "many"], ["--price-per-gpu-hour", "-1"]):
        with pytest.raises(SystemExit) as ended:
            main([*given_, *wrong])
        assert ended.value.code == 2
