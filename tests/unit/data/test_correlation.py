"""The table of correlated items: what it is made of, and that a wrong one is refused."""

import json
from math import log, sqrt
from pathlib import Path

import numpy as np
import pytest
import ray

from distrl.config import RunConfig, load_config
from distrl.data.config import AugmentConfig, DataConfig
from distrl.data.correlation import CorrelateConfig, correlate, counted, training_parts
from distrl.data.correlation_table import (
    CorrelationManifest,
    check_substitutes,
    clear_table,
    read_substitutes,
    write_manifest,
    write_part,
)
from distrl.data.store import manifest_hash, read_manifest
from distrl.errors import ConfigError, SchemaError
from distrl.launch import fit
from distrl.ops.correlation import UNIT, RunningSums, items_of, most_correlated, users_of
from distrl.ops.ragged import Ragged
from distrl.study.config import StudyConfig
from distrl.study.study import run_study
from tests.store_factory import make_store

# All but the last two items of each are trained on: 1 2 3, 1 2, and nothing.
SEQUENCES = [[1, 2, 3, 4, 5], [1, 2, 4, 5], [4, 5]]
LISTS = Ragged.of([[2, 3], [1, 3], [2, 1], [], []])
COMMAND = "python jobs/correlate.py configs/correlate.yaml store_uri="


@pytest.fixture
def store(tmp_path):
    make_store(tmp_path / "store", SEQUENCES, num_shards=2)
    return str(tmp_path / "store")


def write_table(store, rows=LISTS, num_partitions=2, **changes):
    """A table as the job writes it."""
    parts = []
    for part in range(num_partitions):
        items = items_of(part, num_partitions, 5)
        parts.append(write_part(store, part, items, rows.take(items - 1)))
    settings = {
        "store_hash": manifest_hash(read_manifest(store)),
        "num_correlated": 2,
        "window": 50,
        "num_empty": 2,
        "parts": tuple(parts),
    }
    write_manifest(store, CorrelationManifest(**(settings | changes)))


def data(store, among=1, operations=("crop", "substitute")):
    augment = AugmentConfig(operations=operations, substitute_among=among)
    return DataConfig(store_uri=store, augment=augment)


def read(store, **settings):
    return read_substitutes(data(store, **settings), read_manifest(store))


def rows_of(table):
    return [row.tolist() for row in np.split(table.values, table.offsets[1:-1])]


def test_the_shipped_config_loads():
    path = Path(__file__).parents[3] / "configs" / "correlate.yaml"
    assert load_config(CorrelateConfig, path, []) == CorrelateConfig(
        store_uri="data/stores/beauty", num_correlated=10, window=50
    )


@pytest.mark.parametrize("most", [1, 1000])
def test_what_is_held_out_is_not_counted(store, most):
    manifest, held = read_manifest(store), RunningSums()
    for shard in manifest.sequences:
        for (piece,) in counted(training_parts(store, shard, 5), 5, 1, 50, most):
            held.add(piece)
    found = dict(zip(held.whole().keys.tolist(), held.whole().values.tolist(), strict=True))
    # Keys are 6 i + j. Items 4 and 5 are three times side by side, and always held out.
    both, one = round(UNIT / log(4)) + round(UNIT / log(3)), round(UNIT / log(4))
    assert found == {
        6: 2, 12: 2, 18: 1, 8: both, 13: both, 9: one, 19: one, 15: one, 20: one,
    }  # fmt: skip
    items = items_of(0, 1, 5)
    users = np.append(0, users_of(held.whole(), items, 6))
    assert users.tolist() == [0, 2, 2, 1, 0, 0]
    lists = most_correlated(held.whole(), items, users, 1)
    # 1 and 2: (1/ln 4 + 1/ln 3) / 2 = .82; 1 and 3, 2 and 3: 1/ln 4 / sqrt 2 = .51.
    assert both / UNIT / 2 > one / UNIT / sqrt(2)
    assert rows_of(lists) == [[2], [1], [1], [], []]


def test_items_beyond_the_catalog_are_refused(store):
    (shard, _) = read_manifest(store).sequences
    with pytest.raises(SchemaError, match="holds items 1 to 5, its manifest says 1 to 4"):
        list(training_parts(store, shard, 4))


def test_a_changed_shard_is_refused(store):
    (shard, _) = read_manifest(store).sequences
    content = bytearray((Path(store) / shard.path).read_bytes())
    content[40] ^= 1
    (Path(store) / shard.path).write_bytes(content)
    with pytest.raises(SchemaError, match="has sha256"):
        list(training_parts(store, shard, 5))


@pytest.mark.parametrize("num_partitions", [1, 2, 5])
def test_a_table_is_read_as_it_was_written(store, num_partitions):
    write_table(store, num_partitions=num_partitions)
    assert rows_of(read(store, among=2)) == [[], [2, 3], [1, 3], [2, 1], [], []]
    assert rows_of(read(store)) == [[], [2], [1], [2], [], []]


def test_views_that_do_not_substitute_need_no_table(store):
    assert read(store, operations=("crop", "mask")) is None


def test_no_table_is_one_error_that_names_the_command(store):
    with pytest.raises(ConfigError, match=f"no table of correlated items; make it: {COMMAND}"):
        read(store)


def test_parts_without_a_manifest_are_no_table(store):
    write_table(store)
    (Path(store) / "correlated/manifest.json").unlink()
    with pytest.raises(ConfigError, match="no table of correlated items"):
        check_substitutes(data(store), read_manifest(store))


def test_a_table_of_another_store_is_refused(store, tmp_path):
    write_table(store)
    make_store(tmp_path / "other", [*SEQUENCES, [1, 2, 3]], num_shards=2)
    (Path(store) / "correlated").rename(tmp_path / "other/correlated")
    other = str(tmp_path / "other")
    with pytest.raises(SchemaError, match=f"made of another store .*{COMMAND}.* --overwrite"):
        check_substitutes(data(other), read_manifest(other))


def test_a_missing_or_shorter_part_is_named_without_reading_it(store):
    write_table(store)
    part = Path(store) / "correlated/part-00001.parquet"
    size = part.stat().st_size
    part.write_bytes(part.read_bytes()[:-1])
    said = f"part-00001.parquet has {size - 1} bytes, its manifest says {size}"
    with pytest.raises(SchemaError, match=said):
        check_substitutes(data(store), read_manifest(store))
    part.unlink()
    with pytest.raises(SchemaError, match="has no bytes"):
        check_substitutes(data(store), read_manifest(store))


def test_a_changed_byte_is_found_when_the_table_is_read(store):
    write_table(store)
    part = Path(store) / "correlated/part-00000.parquet"
    content = bytearray(part.read_bytes())
    content[10] ^= 1
    part.write_bytes(content)
    check_substitutes(data(store), read_manifest(store))
    with pytest.raises(SchemaError, match=r"part-00000\.parquet has sha256"):
        read(store)


@pytest.mark.parametrize("rows", [[[2], [1], [6], [], []], [[0], [1], [1], [], []]])
def test_a_list_of_what_is_no_item_is_refused(store, rows):
    write_table(store, Ragged.of(rows))
    with pytest.raises(SchemaError, match=r"does not hold the items 1\.\.5"):
        read(store)


def test_an_item_in_no_part_is_refused(store):
    write_table(store, num_partitions=2)
    path = Path(store) / "correlated/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "parts": manifest["parts"][:1]}))
    with pytest.raises(SchemaError, match=r"does not hold the items 1\.\.5 once each"):
        read(store)


def test_a_manifest_of_another_version_is_refused(store):
    write_table(store)
    path = Path(store) / "correlated/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 7}))
    with pytest.raises(SchemaError, match="no manifest of correlated items: format_version"):
        read(store)


def test_more_choices_than_are_listed_are_refused(store):
    write_table(store)
    with pytest.raises(ConfigError, match=r"substitute_among=3, but .* lists 2 .*correlated=3"):
        read(store, among=3)


def test_a_finished_table_is_found_again_without_ray(store):
    write_table(store)
    config = CorrelateConfig(store_uri=store, num_correlated=2)

    def unwanted():
        raise AssertionError("Ray was asked for")

    assert correlate(config, connect=unwanted).num_empty == 2
    with pytest.raises(ConfigError, match="made with window=50, not 9: --overwrite"):
        correlate(config.model_copy(update={"window": 9}), connect=unwanted)


def test_clearing_takes_only_the_table(store):
    write_table(store)
    (Path(store) / "correlated/notes.txt").write_text("mine")
    clear_table(store)
    left = [path.name for path in (Path(store) / "correlated").iterdir()]
    assert left == ["notes.txt"]
    assert read_manifest(store).num_items == 5


def described(store, folder):
    return {
        "name": "r",
        "storage_uri": str(folder),
        "data": {"store_uri": store, "augment": {"operations": ["crop", "substitute"]}},
        "method": {"name": "cl4srec"},
    }


def test_a_run_without_its_table_is_refused_before_ray_starts(store, tmp_path):
    run = RunConfig.model_validate(described(store, tmp_path / "runs"))
    with pytest.raises(ConfigError, match=COMMAND):
        fit(run, resume=False, say=print)
    assert not ray.is_initialized()
    assert not (tmp_path / "runs").exists()


def test_a_study_without_its_table_is_refused_before_ray_starts(store, tmp_path):
    (tmp_path / "base.yaml").write_text(json.dumps(described(store, tmp_path / "runs")))
    study = StudyConfig.model_validate(
        {
            "name": "s",
            "base": str(tmp_path / "base.yaml"),
            "storage_uri": str(tmp_path / "studies"),
            "variants": {"without": ["data.augment.operations=[crop, mask]"], "with": []},
        }
    )
    with pytest.raises(ConfigError, match=COMMAND):
        run_study(study, resume=False, say=print)
    assert not ray.is_initialized()
    assert not (tmp_path / "studies").exists()
