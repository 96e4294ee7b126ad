import json

import pyarrow as pa
import pytest
import torch

from distrl.contract import Catalog
from distrl.errors import CheckpointError, SchemaError
from distrl.methods import build
from distrl.methods.mclrec import MCLRecConfig
from distrl.serving.artifact import Artifact, read_artifact, write_artifact

SETTINGS = MCLRecConfig(hidden_size=8, inner_size=16)
CATALOG = Catalog(num_items=4, max_len=3)


@pytest.fixture
def artifact():
    items = pa.array(["d", "b", "a", "c"])
    return Artifact(build(SETTINGS, CATALOG), SETTINGS, CATALOG, items)


def test_a_written_model_comes_back_bit_for_bit(artifact, tmp_path):
    write_artifact(tmp_path, artifact)
    back = read_artifact(tmp_path)
    assert back.settings == SETTINGS
    assert back.catalog == CATALOG
    assert back.items.to_pylist() == ["d", "b", "a", "c"]
    assert not back.method.training
    before, after = artifact.method.state_dict(), back.method.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_own_ids_of_other_integer_widths_are_understood(artifact):
    numbered = Artifact(artifact.method, SETTINGS, CATALOG, pa.array([40, 20, 10, 30]))
    asked = pa.array([10, None, 99, 40], type=pa.int32())
    assert numbered.item_ids(asked).tolist() == [3, 0, 0, 1]


def test_own_ids_of_another_type_are_an_error(artifact):
    numbered = Artifact(artifact.method, SETTINGS, CATALOG, pa.array([40, 20, 10, 30]))
    with pytest.raises(SchemaError, match="type string are asked for, the model's are int64"):
        numbered.item_ids(pa.array(["b"]))


def test_too_few_ids_are_refused(artifact, tmp_path):
    short = Artifact(artifact.method, SETTINGS, CATALOG, pa.array(["a"]))
    with pytest.raises(SchemaError, match="knows 4 items, but 1 ids were given"):
        write_artifact(tmp_path, short)


@pytest.mark.parametrize("name", ["model.safetensors", "method.json", "items.parquet"])
def test_a_torn_file_is_named(artifact, tmp_path, name):
    write_artifact(tmp_path, artifact)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_artifact(tmp_path)


def test_weights_of_other_sizes_are_refused(artifact, tmp_path):
    write_artifact(tmp_path, artifact)
    description = json.loads((tmp_path / "method.json").read_text())
    description["method"]["hidden_size"] = 16
    (tmp_path / "method.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="does not fit its method"):
        read_artifact(tmp_path)


def test_a_format_of_the_future_is_refused(artifact, tmp_path):
    write_artifact(tmp_path, artifact)
    description = json.loads((tmp_path / "method.json").read_text())
    (tmp_path / "method.json").write_text(json.dumps(description | {"format_version": 2}))
    with pytest.raises(CheckpointError, match="format_version 2; this distrl reads 1"):
        read_artifact(tmp_path)
