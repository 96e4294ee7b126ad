"""The table of correlated items on a real local Ray, and a training whose views use it."""

from math import log, sqrt

import numpy as np
import pytest

from distrl import storage
from distrl.config import RunConfig
from distrl.data.config import AugmentConfig, DataConfig
from distrl.data.correlation import CorrelateConfig, correlate
from distrl.data.correlation_table import read_substitutes
from distrl.data.store import read_manifest
from distrl.errors import ConfigError, SchemaError
from distrl.train.local import train_locally
from tests.integration.servers import ray_here
from tests.store_factory import make_store

NUM_ITEMS = 900


@pytest.fixture(scope="module")
def cluster():
    with ray_here():
        yield


@pytest.fixture(scope="module")
def sequences():
    """Enough different pairs that a counting task gives several pieces away."""
    rng = np.random.default_rng(11)
    popular = rng.permutation(NUM_ITEMS) + 1
    return [
        popular[rng.integers(0, NUM_ITEMS, length) * rng.integers(1, 5, length) % NUM_ITEMS]
        .astype(int)
        .tolist()
        for length in rng.integers(3, 70, 500)
    ]


def table_of(store):
    augment = AugmentConfig(operations=("crop", "substitute"), substitute_among=7)
    table = read_substitutes(DataConfig(store_uri=store, augment=augment), read_manifest(store))
    return [row.tolist() for row in np.split(table.values, table.offsets[1:-1])]


def similarities(sequences, item):
    """CoSeRec's formula for one item, in plain Python, over training parts."""
    histories = [set(sequence[:-2]) for sequence in sequences]
    users = {}
    for history in histories:
        for other in history:
            users[other] = users.get(other, 0) + 1
    found = {}
    for history in (history for history in histories if item in history):
        for other in history - {item}:
            found[other] = found.get(other, 0) + 1 / log(1 + len(history))
    return {other: sum_ / sqrt(users[item] * users[other]) for other, sum_ in found.items()}


def made(folder, sequences, num_shards, **settings):
    make_store(folder, sequences, num_shards=num_shards, num_items=NUM_ITEMS)
    store = str(folder)
    config = CorrelateConfig(store_uri=store, num_correlated=7, window=100, chunk_mb=1, **settings)
    correlate(config, say=lambda line: None)
    return store


def test_shards_and_partitions_do_not_change_the_table(cluster, sequences, tmp_path):
    one = made(tmp_path / "one", sequences, 1, num_partitions=1)
    many = made(tmp_path / "many", sequences, 3, num_partitions=4)
    table = table_of(one)
    assert table == table_of(many)
    assert len(storage.listing(f"{many}/correlated")) == 4 + 1
    for item in (1, 2, 77, 500, NUM_ITEMS):
        likeness = similarities(sequences, item)
        best = sorted(likeness.values(), reverse=True)[:7]
        assert [likeness[other] for other in table[item]] == pytest.approx(best, abs=1e-8)


def test_a_table_is_remade_with_other_settings_only_when_told_to(cluster, sequences, tmp_path):
    store = made(tmp_path / "store", sequences, 2)
    config = CorrelateConfig(store_uri=store, num_correlated=3, window=100)
    with pytest.raises(ConfigError, match="num_correlated=7, not 3: --overwrite"):
        correlate(config)
    assert correlate(config, overwrite=True, say=lambda line: None).num_correlated == 3


def test_a_torn_shard_leaves_no_table(cluster, sequences, tmp_path):
    manifest = make_store(tmp_path / "store", sequences, num_shards=2, num_items=NUM_ITEMS)
    path = tmp_path / "store" / manifest.sequences[1].path
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(SchemaError, match=r"part-00001\.parquet has sha256"):
        correlate(CorrelateConfig(store_uri=str(tmp_path / "store")), say=lambda line: None)
    assert not (tmp_path / "store/correlated").exists()


def test_a_training_substitutes_out_of_the_table(cluster, sequences, tmp_path):
    store = made(tmp_path / "store", sequences, 2)

    def contrast(name):
        described = {
            "name": "r",
            "data": {"store_uri": store, "batch_size": 128, "max_len": 20},
            "method": {"name": "cl4srec", "hidden_size": 32, "inner_size": 32},
            "training": {"epochs": 1},
        }
        described["data"]["augment"] = {"operations": ["mask", "substitute"]}
        run = RunConfig.model_validate(described)
        (validated,) = train_locally(run, str(tmp_path / name))
        return validated.curves["encoder/data_contrast"]

    before = contrast("before")
    assert contrast("again") == before
    config = CorrelateConfig(store_uri=store, num_correlated=7, window=2)
    correlate(config, overwrite=True, say=lambda line: None)
    assert contrast("after") != before
