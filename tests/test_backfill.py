"""The main job on a real Ray and real tables, with small catalogs and a tiny model."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_catalog import (
    Item,
    assert_equal_tables,
    items,
    jpeg,
    table,
    vectors,
    write_images,
    write_products,
)

from pipeline.config import load_config
from pipeline.errors import (
    CatalogError,
    ClusterError,
    ConfigError,
    LeaseHeld,
    ModelError,
    ReleaseRefused,
    UsageError,
)
from pipeline.run.backfill import backfill
from pipeline.store.lease import Lease, read_lease
from pipeline.store.releases import list_releases, newest_release
from pipeline.store.tables import Database

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

CPU = ("pool.gpus_per_actor=0",)


def run(catalog: Path | str, db: Path, model: str, *sets: str, **kwargs: Any) -> dict[str, Any]:
    settings = [*CPU, *sets]
    config = load_config(None, settings, catalog_uri=str(catalog), db=str(db), model_name=model)
    return backfill(config, **kwargs)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> tuple[Path, Path, dict[str, Any]]:
    """A catalog with one of everything, its database, and the run's report."""
    folder = tmp_path_factory.mktemp("loaded")
    good = items(8, images=3)
    odd = [
        Item("text-only", "only words"),
        Item("image-only", None, None, [jpeg(500)]),
        Item("half", "good text", None, [jpeg(501), b"not an image", None, jpeg(502)]),
        Item("blank", "  ", "", [jpeg(503)]),
        Item("nothing", None, None, []),
        Item("lost", " ", None, [b""]),
        Item(None, "no id"),
        Item("p0-0001", "a second time"),
    ]
    twin = Item("twin", "title 0 of 0", "a wool coat number 0", [jpeg(0)])
    catalog = write_products(folder / "catalog", [[*good, twin], odd])
    report = run(catalog, folder / "db", tiny_model, "max_reject_share=0.5", "columns.carried=['price']")
    return catalog, folder / "db", report


def test_every_input_is_accounted_for(loaded: tuple[Path, Path, dict[str, Any]]) -> None:
    _, db, report = loaded
    counts = {
        name: report[name] for name in ("products", "inputs", "texts", "images", "embedded", "reused", "rejected")
    }
    # texts: 8 good, text-only, half, blank, lost, twin; images: 24, 1, 4, 1, 1, 1. The twin's text and image are known.
    assert counts == {
        "products": 13, "inputs": 45, "texts": 13, "images": 32, "embedded": 38, "reused": 2, "rejected": 5,
    }  # fmt: skip
    assert report["rejected_rows"] == 3
    found = {(r["product_id"], r["input"]): r["reason"] for r in table(db, "rejects").to_pylist()}
    assert found == {
        ("half", "image/1"): "image_not_an_image",
        ("half", "image/2"): "image_null",
        ("blank", "text"): "text_empty",
        ("lost", "text"): "text_empty",
        ("lost", "image/0"): "image_empty",
        ("nothing", "row"): "no_text_and_no_image",
        (None, "row"): "missing_id",
        ("p0-0001", "row"): "duplicate_id",
    }


def test_averages_are_what_the_tables_say(loaded: tuple[Path, Path, dict[str, Any]]) -> None:
    _, db, _ = loaded
    products, images = table(db, "products"), table(db, "images")
    check_averages(products, images, weight=0.5)
    by_id = {row["product_id"]: row for row in products.to_pylist()}
    assert by_id["text-only"]["image_vector"] is None
    assert by_id["text-only"]["avg_vector"] == by_id["text-only"]["text_vector"]
    assert by_id["image-only"]["text_vector"] is None
    assert (by_id["half"]["n_images"], by_id["blank"]["has_text"]) == (2, False)
    assert by_id["p0-0003"]["price"] == 3.0
    assert by_id["p0-0001"]["title"] == "title 1 of 0", "the first row of an id wins"


def check_averages(products: pa.Table, images: pa.Table, *, weight: float) -> None:
    """Recompute every average from `images` and the text vectors, by plain numpy."""
    of: dict[str, list[np.ndarray]] = {}
    for row, vector in zip(images.select(["product_id"]).to_pylist(), vectors(images.column("vector")), strict=True):
        of.setdefault(row["product_id"], []).append(vector)
    text, image, average = (vectors(products.column(f"{n}_vector")) for n in ("text", "image", "avg"))
    for i, product_id in enumerate(products.column("product_id").to_pylist()):
        expected = text[i]
        if product_id in of:
            mean = np.mean(of[product_id], axis=0)
            mean /= np.linalg.norm(mean)
            np.testing.assert_allclose(image[i], mean, atol=1e-6)
            expected = mean if np.isnan(text[i]).any() else weight * text[i] + (1 - weight) * mean
        else:
            assert np.isnan(image[i]).all()
        np.testing.assert_allclose(average[i], expected / np.linalg.norm(expected), atol=1e-6)
    norms = np.linalg.norm(np.concatenate([text, image, average, vectors(images.column("vector"))]), axis=1)
    assert np.abs(norms[~np.isnan(norms)] - 1).max() <= 1e-5


def test_a_table_opened_directly_is_the_release(loaded: tuple[Path, Path, dict[str, Any]]) -> None:
    _, db, report = loaded
    release = newest_release(str(db))
    assert release is not None
    assert release.release == report["release"] == 1
    for name in ("products", "images", "rejects"):
        direct = lancedb.connect(db).open_table(name)
        assert direct.version == release.versions[name]
        direct.checkout("release-1")
        assert direct.to_arrow().num_rows == table(db, name, release.versions[name]).num_rows
    assert not list((db / "_staging").glob("*.parquet")), "staged files end with their release"


def test_the_same_catalog_again_changes_nothing(loaded: tuple[Path, Path, dict[str, Any]], tiny_model: str) -> None:
    catalog, db, first = loaded
    again = run(catalog, db, tiny_model, "max_reject_share=0.5", "columns.carried=['price']")
    assert (again["released"], again["release"], again["embedded"]) == (False, 1, 0)
    assert again["reused"] == first["embedded"] + first["reused"]
    assert again["versions"] == first["versions"]
    statuses = table(db, "runs").column("status").to_pylist()
    assert sorted(statuses) == ["released", "unchanged"]


def test_image_rows_shuffled_over_files_give_equal_tables(tmp_path: Path, tiny_model: str) -> None:
    products = items(20, images=3)
    products[3].images = [jpeg(900), b"broken", jpeg(901)]
    products[5].images = []
    by_product = write_products(tmp_path / "a", [products[:9], products[9:]])
    by_image = write_images(tmp_path / "b", products, files=7, seed=1)
    one = run(by_product, tmp_path / "db1", tiny_model)
    other = run(by_image, tmp_path / "db2", tiny_model)
    assert {k: one[k] for k in ("products", "inputs", "rejected")} == {
        k: other[k] for k in ("products", "inputs", "rejected")
    }
    assert_equal_tables(tmp_path / "db1", tmp_path / "db2")


def test_without_ordinals_the_hash_gives_the_places(tmp_path: Path, tiny_model: str) -> None:
    products = items(9, images=3)
    products[2].images = [jpeg(700), b"broken", jpeg(701)]
    one = write_images(tmp_path / "a", products, files=3, seed=1, has_ordinal=False)
    other = write_images(tmp_path / "b", products, files=5, seed=2, has_ordinal=False)
    run(one, tmp_path / "db1", tiny_model)
    run(other, tmp_path / "db2", tiny_model)
    assert_equal_tables(tmp_path / "db1", tmp_path / "db2")
    images = table(tmp_path / "db1", "images").to_pylist()
    by_product: dict[str, list[dict[str, Any]]] = {}
    for image in images:
        by_product.setdefault(image["product_id"], []).append(image)
    for found in by_product.values():
        found.sort(key=lambda row: row["ordinal"])
        assert [row["sha256"] for row in found] == sorted(row["sha256"] for row in found)
    reject = table(tmp_path / "db1", "rejects").to_pylist()[0]
    taken = {row["ordinal"] for row in by_product["p0-0002"]}
    assert {*taken, int(reject["input"].removeprefix("image/"))} == {0, 1, 2}


def test_a_backfill_upserts_and_never_deletes(tmp_path: Path, tiny_model: str) -> None:
    products = items(12)
    run(write_products(tmp_path / "a", [products]), tmp_path / "db", tiny_model)
    edited = products[4:6]
    edited[0].title = "quite another title"
    added = items(2, seed=7)
    report = run(write_products(tmp_path / "b", [[*edited, *added]]), tmp_path / "db", tiny_model)
    assert (report["release"], report["products"]) == (2, 4)
    assert (report["embedded"], report["reused"]) == (1 + 6, 5)
    run(write_products(tmp_path / "c", [[*products, *added]]), tmp_path / "whole", tiny_model)
    assert_equal_tables(tmp_path / "db", tmp_path / "whole")
    assert [release.parent for release in list_releases(str(tmp_path / "db"))] == [None, 1]
    old = table(tmp_path / "db", "products", list_releases(str(tmp_path / "db"))[0].versions["products"])
    assert "quite another title" not in old.column("title").to_pylist()


def test_a_repaired_input_leaves_the_rejects(tmp_path: Path, tiny_model: str) -> None:
    products = items(30)
    images = products[3].images
    products[3].images = [jpeg(1), b"broken"]
    catalog = write_products(tmp_path / "a", [products])
    assert run(catalog, tmp_path / "db", tiny_model)["rejected"] == 1
    products[3].images = images
    write_products(tmp_path / "a", [products])
    report = run(catalog, tmp_path / "db", tiny_model)
    assert (report["rejected"], report["released"]) == (0, True)
    assert table(tmp_path / "db", "rejects").num_rows == 0


def test_a_limit_is_a_trial_of_the_first_products(tmp_path: Path, tiny_model: str) -> None:
    catalog = write_products(tmp_path / "a", [items(5), items(5, seed=1), items(5, seed=2)])
    report = run(catalog, tmp_path / "db", tiny_model, limit=7)
    assert (report["products"], report["inputs"]) == (7, 21)
    ids = table(tmp_path / "db", "products").column("product_id").to_pylist()
    assert ids == [i.product_id for i in [*items(5), *items(5, seed=1)[:2]]]


def test_references_are_read_beside_the_catalog(tmp_path: Path, tiny_model: str) -> None:
    schema = pa.schema([("product_id", pa.string()), ("title", pa.string()), ("images", pa.list_(pa.string()))])
    (tmp_path / "a" / "img").mkdir(parents=True)
    (tmp_path / "a" / "img" / "x.jpg").write_bytes(jpeg(1))
    rows = [Item(f"p{i}", f"t{i}", images=["img/x.jpg"]) for i in range(9)]
    rows.append(Item("bad", "t", images=["../secret.jpg", "img/missing.jpg"]))
    catalog = write_products(tmp_path / "a", [rows], schema)
    report = run(catalog, tmp_path / "db", tiny_model, "max_reject_share=0.2")
    assert report["reasons"] == {"fetch_refused": 1, "image_not_found": 1}
    assert table(tmp_path / "db", "images").num_rows == 9


@pytest.mark.parametrize("n", [1, 10])
def test_text_alone_and_few_products_work(tmp_path: Path, tiny_model: str, n: int) -> None:
    pq.write_table(
        pa.table({"product_id": list(range(n)), "title": [f"t {i}" for i in range(n)]}), tmp_path / "a.parquet"
    )
    report = run(tmp_path / "a.parquet", tmp_path / "db", tiny_model)
    assert (report["products"], report["images"], report["released"]) == (n, 0, True)
    products = table(tmp_path / "db", "products")
    assert products.column("image_vector").null_count == n
    assert products.column("avg_vector").equals(products.column("text_vector"))


def test_a_catalog_without_a_valid_product_is_refused(tmp_path: Path, tiny_model: str) -> None:
    catalog = write_products(tmp_path / "a", [[Item("a", " ", None, [b"x"]), Item(None, "t")]])
    with pytest.raises(ReleaseRefused, match=r"no product of the catalog has a valid text or image .*text_empty 1"):
        run(catalog, tmp_path / "db", tiny_model, "max_reject_share=1.0")
    assert newest_release(str(tmp_path / "db")) is None
    assert not (tmp_path / "db" / "products.lance").exists()


def test_too_many_rejects_stop_before_the_release(tmp_path: Path, tiny_model: str) -> None:
    products = items(10)
    run(write_products(tmp_path / "a", [products]), tmp_path / "db", tiny_model)
    for item in products[:2]:
        item.images = [b"broken", b"broken too"]
    with pytest.raises(ReleaseRefused, match=r"4 of 30 inputs were rejected, 13\.3%; max_reject_share is 5\.0%"):
        run(write_products(tmp_path / "b", [products]), tmp_path / "db", tiny_model)
    release = newest_release(str(tmp_path / "db"))
    assert release is not None
    assert release.release == 1
    assert lancedb.connect(tmp_path / "db").open_table("products").version == release.versions["products"]
    assert len(list((tmp_path / "db" / "products.lance" / "data").iterdir())) == 1, "not a fragment was written"
    (kept,) = (tmp_path / "db" / "_staging").glob("rejects-*.parquet")
    assert pq.read_table(kept).num_rows == 4


def test_actors_see_one_gpu_each_and_different_ones(tmp_path: Path, tiny_model: str) -> None:
    catalog = write_products(tmp_path / "a", [items(3, seed=i) for i in range(6)])
    config = load_config(None, [], catalog_uri=str(catalog), db=str(tmp_path / "db"), model_name=tiny_model)
    actors = backfill(config)["actors"]
    assert sorted(actor["gpu_ids"] for actor in actors) == [("0",), ("1",)]
    assert all(actor["cuda_visible_devices"] == actor["gpu_ids"][0] for actor in actors)
    shared = backfill(
        load_config(
            None, ["pool.gpus_per_actor=0.5"], catalog_uri=str(catalog), db=str(tmp_path / "d2"), model_name=tiny_model
        )
    )
    assert sorted(actor["gpu_ids"] for actor in shared["actors"]) == [("0",), ("0",), ("1",), ("1",)]
    assert_equal_tables(tmp_path / "db", tmp_path / "d2")


def test_more_gpus_than_there_are_end_with_a_sentence(tmp_path: Path, tiny_model: str) -> None:
    catalog = write_products(tmp_path / "a", [items(3)])
    with pytest.raises(ClusterError, match=r"asked for 3 x 1 GPUs, the cluster has 2"):
        run(catalog, tmp_path / "db", tiny_model, "pool.actors=3", "pool.gpus_per_actor=1")
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize(
    ("catalog", "model", "sets", "error", "said"),
    [
        ("good", "nowhere", (), ModelError, "nowhere"),
        ("none", "", (), CatalogError, "does not exist"),
        ("empty", "", (), CatalogError, "holds no Parquet file"),
        ("mixed", "", (), CatalogError, "product ids are integer in"),
        ("good", "", ("columns.title=name",), CatalogError, "has no column 'name'"),
    ],
)
def test_what_cannot_start_writes_nothing(
    tmp_path: Path, tiny_model: str, catalog: str, model: str, sets: tuple[str, ...], error: type[UsageError], said: str
) -> None:
    write_products(tmp_path / "good", [items(3)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    pq.write_table(pa.table({"product_id": [1], "title": ["t"]}), tmp_path / "mixed" / "a.parquet")
    pq.write_table(pa.table({"product_id": ["1"], "title": ["t"]}), tmp_path / "mixed" / "b.parquet")
    name = str(tmp_path / model) if model else tiny_model
    with pytest.raises(error) as caught:
        run(tmp_path / catalog, tmp_path / "db", name, *sets)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "db").exists()


def test_vectors_of_two_settings_never_mix(tmp_path: Path, tiny_model: str) -> None:
    products = items(6)
    catalog = write_products(tmp_path / "a", [products])
    run(catalog, tmp_path / "db", tiny_model)
    part = write_products(tmp_path / "b", [products[:2]])
    with pytest.raises(ConfigError, match=r"average\.text_weight \(0\.5, now 0\.7\).*4 of its 6 products"):
        run(part, tmp_path / "db", tiny_model, "average.text_weight=0.7")
    with pytest.raises(ConfigError, match="another model"):
        run(part, tmp_path / "db", tiny_model, "model.max_tokens=64")
    report = run(catalog, tmp_path / "db", tiny_model, "average.text_weight=0.7")
    assert (report["embedded"], report["release"]) == (0, 2)
    check_averages(table(tmp_path / "db", "products"), table(tmp_path / "db", "images"), weight=0.7)
    report = run(catalog, tmp_path / "db", tiny_model, "images.preprocessing=published")
    assert (report["embedded"], report["release"]) == (18, 3)


def test_luma_whole_and_as_image_rows_shuffled_over_files(tmp_path: Path, tiny_model: str, shared: Path) -> None:
    luma = run(shared / "data/catalog/luma", tmp_path / "luma", tiny_model)
    assert (luma["products"], luma["texts"], luma["images"], luma["inputs"]) == (191, 191, 725, 916)
    assert luma["embedded"] + luma["reused"] + luma["rejected"] == 916
    check_averages(table(tmp_path / "luma", "products"), table(tmp_path / "luma", "images"), weight=0.5)
    rows = pq.read_table(shared / "data/catalog/luma").to_pylist()
    names = ("product_id", "title", "description", "broad_category", "fine_category", "images")
    products = [Item(**{name: row[name] for name in names}) for row in rows]
    by_image = write_images(tmp_path / "rows", products, files=7, seed=3)
    run(by_image, tmp_path / "shuffled", tiny_model)
    assert_equal_tables(tmp_path / "luma", tmp_path / "shuffled")


def test_clothing_whole(tmp_path: Path, tiny_model: str, shared: Path) -> None:
    clothing = run(shared / "data/catalog/clothing", tmp_path / "db", tiny_model)
    assert clothing["products"] == 1313
    check_averages(table(tmp_path / "db", "products"), table(tmp_path / "db", "images"), weight=0.5)


def test_a_run_beside_another_plans_again_on_what_that_released(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run publishes while this one embeds; it holds the lease then, and this one waits for it."""
    from pipeline.run import backfill as module

    other, mine = write_products(tmp_path / "a", [items(3)]), write_products(tmp_path / "b", [items(3, seed=1)])
    stage = module.stage

    def stage_and_be_overtaken(*args: Any, **kwargs: Any) -> Any:
        results = stage(*args, **kwargs)
        monkeypatch.setattr(module, "stage", stage)
        run(other, tmp_path / "db", tiny_model)
        return results

    monkeypatch.setattr(module, "stage", stage_and_be_overtaken)
    report = run(mine, tmp_path / "db", tiny_model, "lease.when_held=replan")
    assert (report["release"], report["embedded"], report["deleted"]) == (2, 9, 0)
    found = set(table(tmp_path / "db", "products").column("product_id").to_pylist())
    assert found == {item.product_id for item in (*items(3), *items(3, seed=1))}


def test_a_second_run_ends_with_the_holder_or_waits_for_it(tmp_path: Path, tiny_model: str) -> None:
    catalog, db = write_products(tmp_path / "a", [items(3)]), Database(str(tmp_path / "db"))
    holder = Lease(db, run_id="holder", job="reindex")
    holder.acquire()
    with pytest.raises(LeaseHeld, match=r"another run holds the database .*: reindex holder on host .* since "):
        run(catalog, tmp_path / "db", tiny_model)
    with pytest.raises(LeaseHeld):
        run(catalog, tmp_path / "db", tiny_model, "lease.when_held=wait", "lease.wait_s=0.5")
    threading.Timer(1.0, holder.release).start()
    assert run(catalog, tmp_path / "db", tiny_model, "lease.when_held=wait")["release"] == 1
    assert read_lease(db) is None


def test_only_what_was_rejected_is_taken_again(tmp_path: Path, tiny_model: str) -> None:
    """After a repair of some inputs: a replay reads only their partitions, and embeds only what was rejected."""
    groups = [items(6, seed=seed) for seed in range(3)]
    whole = items(1, images=3, seed=7)[0]
    groups[0] += [Item("half", "a text", None, [whole.images[0], b"broken", b"still broken"])]
    groups[1] += [Item(None, "without an id"), Item("lost", None, None, [b"nothing"])]
    catalog = write_products(tmp_path / "a", groups)
    loose = ("max_reject_share=0.5",)
    assert run(catalog, tmp_path / "db", tiny_model, *loose)["rejected"] == 3
    again = run(catalog, tmp_path / "db", tiny_model, replay=True)
    assert (again["released"], again["embedded"], again["rejected"], again["rejected_rows"]) == (False, 0, 3, 1)

    groups[0][-1].images = [whole.images[0], whole.images[1], b"still broken"]
    groups[1][-2].product_id = "found"
    groups[2][0].title = "an edit that a replay leaves alone"
    write_products(catalog, groups)
    report = run(catalog, tmp_path / "db", tiny_model, replay=True)
    assert (report["products"], report["embedded"], report["reused"], report["rejected"]) == (2, 2, 2, 2)
    rejects = {(r["product_id"], r["input"]) for r in table(tmp_path / "db", "rejects").to_pylist()}
    assert rejects == {("half", "image/2"), ("lost", "image/0")}
    products = {r["product_id"]: r for r in table(tmp_path / "db", "products").to_pylist()}
    assert len(products) == 20
    assert products["half"]["n_images"] == 2
    assert products["p2-0000"]["title"] == "title 0 of 2"
    with pytest.raises(ConfigError, match="nothing is released in"):
        run(catalog, tmp_path / "empty", tiny_model, replay=True)


@pytest.mark.slow
def test_the_full_architecture_fills_768_dimensions(tmp_path: Path, shared: Path) -> None:
    """The published configuration with seeded weights, through the main job."""
    from model_folder import write_folder

    from pipeline.model.image_tower import ImageConfig
    from pipeline.model.text_tower import TextConfig

    model = write_folder(tmp_path / "full", text=TextConfig(), image=ImageConfig())
    report = run(shared / "data/catalog/luma", tmp_path / "db", str(model), limit=6)
    assert (report["products"], report["dim"], report["rejected"]) == (6, 768, 0)
    products = table(tmp_path / "db", "products")
    assert products.column("avg_vector").type.list_size == 768
    check_averages(products, table(tmp_path / "db", "images"), weight=0.5)
