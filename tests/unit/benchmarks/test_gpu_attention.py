import torch
import torch.nn.functional as F

from benchmarks.gpu_attention import attention, items_of, sees, varlen
from benchmarks.gpu_step import batch_of
from distrl.nn import encoder
from distrl.nn.attention import attend, visible_keys


def by_segment(query, key, value, offsets, longest):
    """The variable-length kernel, one segment at a time."""
    parts = []
    for start, stop in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        assert stop - start <= longest
        rows = [t[start:stop].transpose(0, 1) for t in (query, key, value)]
        parts.append(F.scaled_dot_product_attention(*rows, is_causal=True).transpose(0, 1))
    return torch.cat(parts)


def test_items_are_counted_segment_by_segment_as_they_lie_in_the_rows():
    packed = batch_of(6, 50, row_length=50, seed=0).clean
    items = items_of(packed)
    assert items.offsets[-1] == (packed.segment >= 0).sum() == len(items.slots)
    assert len(items.offsets) == 6 + 1
    segments = packed.segment.flatten()[items.slots]
    for start, stop in zip(items.offsets.tolist(), items.offsets.tolist()[1:], strict=False):
        assert len(segments[start:stop].unique()) == 1


def test_the_variable_length_way_mixes_what_the_masked_way_mixes():
    packed = batch_of(6, 50, row_length=50, seed=0).clean
    rows, length = packed.segment.shape
    query, key, value = torch.randn(3, rows, 2, length, 4)
    masked = attend(query, key, value, visible_keys(packed), dropout=0.0)
    mixed = varlen(by_segment)(query, key, value, items_of(packed), dropout=0.0)
    real = packed.segment >= 0
    assert torch.allclose(mixed.transpose(1, 2)[real], masked.transpose(1, 2)[real], atol=1e-6)


def test_the_encoder_attends_its_own_way_again_afterwards():
    own = encoder.visible_keys, encoder.attend
    with attention("varlen", by_segment):
        assert encoder.visible_keys is items_of
        assert encoder.attend is not own[1]
    assert (encoder.visible_keys, encoder.attend) == own


def test_flex_attentions_predicate_is_the_mask_wherever_an_item_asks():
    packed = batch_of(6, 50, row_length=50, seed=0).clean
    rows, length = packed.segment.shape
    row, query, key = torch.meshgrid(
        torch.arange(rows), torch.arange(length), torch.arange(length), indexing="ij"
    )
    seen = sees(packed)(row, torch.zeros_like(row), query, key)
    real = packed.segment >= 0
    assert torch.equal(seen[real], visible_keys(packed)[:, 0][real])
