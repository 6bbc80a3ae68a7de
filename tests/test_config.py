from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.run.checks import settle_paths


def test_defaults_are_the_documented_ones() -> None:
    config = load_config(db="/d")
    assert config.max_reject_share == 0.05
    assert config.max_delete_share == 0.1
    assert config.pool.cpus_per_actor == 0
    assert config.pool.start_timeout_s == 300
    assert config.average.text_weight == 0.5
    assert config.staging_path == "/d/_staging"
    assert config.images.limits.max_bytes == 50_000_000
    assert config.images.limits.max_pixels == 64_000_000


def test_a_setting_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('max_reject_share = 0.2\n[pool]\ngpus = 4\nactors = 2\n[columns]\ncarried = ["price"]\n')
    config = load_config(str(file), ["pool.gpus=2", "model.dtype=bfloat16", "columns.title=name"])
    assert (config.pool.gpus, config.pool.actors, config.max_reject_share) == (2, 2, 0.2)
    assert config.columns.carried == ("price",)
    assert config.columns.title == "name"
    assert config.model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("pool.gpsu=2", "unknown setting pool.gpsu; known are pool.actors"),
        ("gpus=2", "unknown setting gpus"),
        ("pool.gpus=two", "pool.gpus takes int or none; got 'two'"),
        ("pool.gpus=true", "pool.gpus takes int or none; got True"),
        ("average.text_weight=1.5", "from 0.0 to 1.0"),
        ("average.text_weight=nan", "from 0.0 to 1.0"),
        ("pool=3", "pool is a section"),
        ("pool.gpus.x=3", "pool.gpus takes"),
        ("model.dtype=int8", "one of float32, bfloat16, float16"),
        ("columns.carried=[1]", "list of strings"),
        ("nothing", "takes key=value"),
        ("catalog_uri=x", "unknown setting catalog_uri"),
    ],
)
def test_a_bad_setting_is_one_sentence(setting: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [setting])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_file_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("pool = [")
    with pytest.raises(ConfigError, match=r"c\.toml"):
        load_config(str(file))
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        load_config(str(tmp_path / "missing.toml"))


def test_a_folder_has_one_name_however_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitions are known by it: under another one all of them would be read again."""
    (tmp_path / "catalog").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    given = [f"{tmp_path}/catalog", "../catalog", f"{tmp_path}/elsewhere/../catalog"]
    names = {
        settle_paths(load_config(None, [], catalog_uri=uri, db="db", model_name="demo")).catalog_uri for uri in given
    }
    assert names == {f"{tmp_path}/catalog"}
