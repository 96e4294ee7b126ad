"""Weights without engines: what evaluation and serving read. Saving is in parity/test_engine."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from distrl.engine.checkpoint import WEIGHTS_FILE, load_weights
from distrl.errors import CheckpointError
from tests.parity.engine_methods import Tiny


def weights_of(method):
    return {name: tensor.clone() for name, tensor in method.state_dict().items()}


def write(folder, weights, content="weights"):
    save_file(weights, folder / WEIGHTS_FILE, {"content": content})


def assert_refused(folder, match):
    """The error says what is wrong, and the method is as it was."""
    method = Tiny()
    before = weights_of(method)
    with pytest.raises(CheckpointError, match=match) as refused:
        load_weights(method, folder)
    assert str(folder / WEIGHTS_FILE) in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_weights_and_buffers_come_back_without_a_process_group(tmp_path):
    saved, method = Tiny(), Tiny()
    saved.scale.fill_(0.25)
    write(tmp_path, weights_of(saved))
    was_a_group = dist.is_initialized()
    load_weights(method, tmp_path)
    assert dist.is_initialized() == was_a_group
    for name, value in saved.state_dict().items():
        assert torch.equal(value, method.state_dict()[name]), name


def test_a_missing_file_is_named(tmp_path):
    assert_refused(tmp_path, "is missing")


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_torn_file_is_named(tmp_path, kept):
    write(tmp_path, weights_of(Tiny()))
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(tmp_path, "is torn")


def test_a_catalog_of_another_size_is_named_with_both_shapes(tmp_path):
    weights = weights_of(Tiny())
    weights["encoder.table.weight"] = torch.zeros(20, 8)
    write(tmp_path, weights)
    assert_refused(tmp_path, r"encoder.table.weight has shape \(20, 8\), expected \(13, 8\)")


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    weights = weights_of(Tiny())
    del weights["head.2.bias"]
    write(tmp_path, weights)
    assert_refused(tmp_path, "has no tensor head.2.bias")


def test_a_tensor_too_many_is_named(tmp_path):
    write(tmp_path, weights_of(Tiny()) | {"head.4.bias": torch.zeros(3)})
    assert_refused(tmp_path, "holds head.4.bias, which the method does not have")


def test_another_kind_of_file_is_named(tmp_path):
    write(tmp_path, weights_of(Tiny()), content="optimizer")
    assert_refused(tmp_path, "content is 'optimizer', expected 'weights'")
