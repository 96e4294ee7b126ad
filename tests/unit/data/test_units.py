import hashlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrl.data.config import DataConfig
from distrl.data.plan import UnitWork
from distrl.data.units import BLOCK_SAMPLES, UnitReader
from distrl.errors import SchemaError, StorageError
from tests.store_factory import make_store


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 300, n).tolist() for n in rng.integers(3, 40, 500)]


@pytest.fixture(scope="module")
def store(sequences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("units") / "store"
    return folder, make_store(folder, sequences, num_shards=2, row_group_rows=60, num_items=300)


def reader_of(store, seed=0, **settings):
    folder, manifest = store
    return UnitReader(manifest, DataConfig(store_uri=str(folder), **settings), seed)


def read(reader, epoch=0, shard=0, done=()):
    """(serial, items) of what is left of a unit."""
    tables = list(reader.read(UnitWork(epoch, shard, list(done), epoch == 0)))
    return [(row["serial"], row["items"]) for table in tables for row in table.to_pylist()]


def test_a_sample_is_a_users_training_part(store, sequences):
    expected = Counter(tuple(s[:-2]) for s in sequences[1::2] if len(s) >= 4)
    samples = read(reader_of(store), shard=1)
    assert Counter(tuple(items) for _, items in samples) == expected
    assert [serial for serial, _ in samples] == list(range(expected.total()))


def test_a_prefix_sample_is_a_target_after_the_newest_items_before_it(store, sequences):
    expected = Counter()
    for sequence in sequences[::2]:
        for place in range(1, len(sequence) - 2):
            expected[tuple(sequence[max(place - 10, 0) : place + 1])] += 1
    samples = read(reader_of(store, samples="prefix", max_len=10))
    assert Counter(tuple(items) for _, items in samples) == expected
    assert [serial for serial, _ in samples] == list(range(expected.total()))
    assert expected.total() == store[1].sequences[0].prefixes


def test_the_newest_inputs_are_all_that_is_sent_where_no_others_are_used(store, sequences):
    samples = read(reader_of(store, long_sequences="last", max_len=10))
    expected = Counter(tuple(s[:-2][-11:]) for s in sequences[::2] if len(s) >= 4)
    assert Counter(tuple(items) for _, items in samples) == expected


def test_the_order_follows_seed_and_epoch(store):
    first = read(reader_of(store))
    assert first == read(reader_of(store))
    assert first != read(reader_of(store), epoch=1)
    assert first != read(reader_of(store, seed=1))
    assert sorted(items for _, items in first) == sorted(
        items for _, items in read(reader_of(store), epoch=1)
    )


def test_row_groups_and_the_users_in_them_are_shuffled(store, sequences):
    place = {tuple(s[:-2]): number for number, s in enumerate(sequences[::2])}
    order = [place[tuple(items)] for _, items in read(reader_of(store))]
    groups = [number // 60 for number in order]
    changes = [a for a, b in zip(groups, [*groups[1:], None], strict=True) if a != b]
    assert sorted(changes) == [0, 1, 2, 3, 4], "a row group at a time"
    assert changes != sorted(changes)
    assert all(
        (inside := [n for n in order if n // 60 == group]) != sorted(inside) for group in changes
    )


@pytest.mark.parametrize("mode", ["all_positions", "prefix"])
def test_what_is_left_keeps_its_serials(store, mode):
    reader = reader_of(store, samples=mode)
    everything = read(reader)
    left = read(reader, done=[(0, 7), (100, 180)])
    assert left == everything[7:100] + everything[180:]


def test_blocks_are_bounded_however_many_prefixes_a_user_has(tmp_path):
    manifest = make_store(tmp_path / "store", [list(range(1, 6001))], num_shards=1)
    config = DataConfig(store_uri=str(tmp_path / "store"), samples="prefix")
    blocks = list(UnitReader(manifest, config, 0).read(UnitWork(0, 0, [], True)))
    assert sum(map(len, blocks)) == 5997
    assert max(map(len, blocks)) == BLOCK_SAMPLES
    assert all(block.nbytes < 2**20 for block in blocks)


def test_blocks_are_bounded_however_long_the_sequences_are(tmp_path):
    manifest = make_store(tmp_path / "store", [[1] * 50_000] * 20, num_shards=1)
    config = DataConfig(store_uri=str(tmp_path / "store"))
    blocks = list(UnitReader(manifest, config, 0).read(UnitWork(0, 0, [], True)))
    assert sum(map(len, blocks)) == 20
    assert max(map(len, blocks)) <= 6


@pytest.fixture
def small(tmp_path):
    folder = tmp_path / "store"
    return folder, make_store(folder, [[1, 2, 3, 4, 5]] * 20, num_shards=1)


def rewritten(small, table=None, content=None, **promised):
    """The store with another first shard, and with a manifest that promises it, or not."""
    folder, manifest = small
    shard = manifest.sequences[0]
    path = folder / shard.path
    if table is not None:
        pq.write_table(table, path)
    if content is not None:
        path.write_bytes(content)
    shard = shard.model_copy(update=promised)
    return folder, manifest.model_copy(update={"sequences": (shard,)})


def measured(folder, shard):
    content = (folder / shard.path).read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_changed_byte_is_found_at_the_first_reading(small):
    folder, manifest = small
    path = folder / manifest.sequences[0].path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SchemaError, match=r"part-00000.parquet has sha256 .* manifest says"):
        read(reader_of(small))


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_torn_shard_is_named(small, epoch):
    path = small[0] / small[1].sequences[0].path
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SchemaError, match=r"part-00000.parquet has bytes|parquet has \d+ bytes"):
        read(reader_of(small), epoch=epoch)


def test_a_file_that_is_no_parquet_is_named(small):
    size = small[1].sequences[0].bytes
    store = rewritten(small, content=b"x" * size)
    with pytest.raises(SchemaError, match=r"part-00000.parquet is torn or no Parquet file"):
        read(reader_of(store, verify_checksums=False))


def test_a_shard_of_another_row_count_is_named(small):
    store = rewritten(small, rows=21)
    with pytest.raises(SchemaError, match=r"part-00000.parquet has rows 20, the manifest says 21"):
        read(reader_of(store))
    with pytest.raises(SchemaError, match=r"part-00000.parquet has 20 rows, its manifest says 21"):
        read(reader_of(store), epoch=1)


def test_a_shard_that_gives_other_samples_than_promised_is_named(small):
    store = rewritten(small, trainable_rows=19)
    with pytest.raises(SchemaError, match=r"gave 20 samples, its manifest promises 19"):
        read(reader_of(store))


@pytest.mark.parametrize("item", [0, 6])
def test_an_item_that_the_catalog_has_not_is_named(small, item):
    table = pa.table({"items": pa.array([[1, 2, item, 4, 5]] * 20, pa.list_(pa.int32()))})
    rewritten(small, table)
    store = rewritten(small, **measured(small[0], small[1].sequences[0]))
    with pytest.raises(SchemaError, match=r"holds items \d to \d, its manifest says 1 to 5"):
        read(reader_of(store))


@pytest.mark.parametrize("column", [{"item": [[1]] * 20}, {"items": [1] * 20}])
def test_a_missing_or_mistyped_column_is_named(small, column):
    rewritten(small, pa.table(column))
    store = rewritten(small, **measured(small[0], small[1].sequences[0]))
    with pytest.raises(SchemaError, match=r"part-00000.parquet has no column `items` of lists"):
        read(reader_of(store))


def test_a_missing_shard_is_named(small):
    (small[0] / small[1].sequences[0].path).unlink()
    with pytest.raises(StorageError, match=r"part-00000.parquet: it does not exist"):
        read(reader_of(small))
