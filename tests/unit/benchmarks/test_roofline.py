import pytest
import torch

from benchmarks.roofline import (
    Rates,
    Work,
    adam,
    contrast,
    encoder_forward,
    limit_s,
    limit_with_softmax_s,
    next_item,
    pairs_seen,
    step_work,
)
from distrl.contract import Batch, Catalog, Packed
from distrl.methods.sasrec import SASRecConfig

SIZES = SASRecConfig(hidden_size=4, inner_size=8, num_layers=2, num_heads=2)


def two_segments_in_a_row():
    """Segments of 2 and 1 items in a row of 4: slots 0 1 | 2 | padding."""
    return Packed(
        items=torch.tensor([[5, 6, 7, 0]]),
        segment=torch.tensor([[0, 0, 1, -1]]),
        position=torch.tensor([[0, 1, 0, 0]]),
        last=torch.tensor([1, 2]),
    )


def test_a_slot_and_what_it_may_look_at_is_a_pair_and_padding_is_none():
    # 0 sees 0; 1 sees 0 and 1; 2 sees 2.
    assert pairs_seen(two_segments_in_a_row()) == 1 + 2 + 1


def test_three_products_of_a_next_item_loss_and_one_softmax_pass():
    # 2 targets, 3 items, width 4: three products of 2 * 2*3*4 = 48 operations.
    passed = {"activation_bytes": 2 * 4 * 2 * 3, "exponentials": 2 * 3}
    assert next_item(2, 3, 4, "fp32") == Work(fp32_flops=144.0, **passed)
    passed["activation_bytes"] /= 2
    assert next_item(2, 3, 4, "bf16") == Work(bf16_flops=144.0, **passed)


def test_a_contrast_is_one_product_and_its_two_in_the_backward():
    # 2 pairs are 4 views: 4x4 similarities of width 3, three times 2*4*3*4 operations.
    expected = Work(fp32_flops=3 * 96.0, activation_bytes=3 * 2 * 16 * 4, exponentials=16)
    assert contrast(2, 3) == expected


def test_adam_touches_eight_numbers_a_weight():
    assert adam(10) == Work(state_bytes=8 * 4 * 10)


def test_the_last_block_works_only_where_a_state_is_asked_for():
    all_asked = encoder_forward(slots=3, asked=3, seen=4, config=SIZES).fp32_flops
    # A block at 3 slots: 2*3*4*12 + 2*3*4*4 + 2 * 2*3*4*8 = 288 + 96 + 384 = 768 for its products,
    # 2 * 2*4*4 = 64 for the 4 pairs of attention.
    assert all_asked == 2 * (768 + 64)
    one_asked = encoder_forward(slots=3, asked=1, seen=4, config=SIZES).fp32_flops
    # The last one: 288 still for query, key and value, a third of all the rest.
    assert one_asked == pytest.approx(768 + 64 + 288 + (96 + 384 + 64) / 3)


def test_a_step_is_forward_three_times_the_loss_and_the_optimizer():
    packed = two_segments_in_a_row()
    batch = Batch(packed, torch.tensor([0, 1, 2]), torch.tensor([6, 8, 9]), None)
    method = SASRecConfig(
        hidden_size=4, inner_size=8, num_layers=2, num_heads=2, updates_per_batch=2
    ).build(Catalog(num_items=9, max_len=4))
    work = step_work(method, method.config, batch)
    # Two updates; rows 0..9 of the table are classes.
    assert work.fp32_flops == 2 * (3 * 2 * (768 + 64) + 3 * 2 * 3 * 10 * 4)
    assert work.bf16_flops == 0
    # 4 pairs in each of 2 heads and 2 blocks, and 3 targets times 10 classes; no more backwards.
    assert work.exponentials == 2 * (4 * 2 * 2 + 3 * 10)
    parameters = sum(parameter.numel() for parameter in method.parameters())
    assert work.state_bytes == 2 * 8 * 4 * parameters


def test_the_limit_adds_what_no_machine_can_overlap():
    work = Work(
        fp32_flops=10.0, bf16_flops=20.0, activation_bytes=30.0, state_bytes=40.0, exponentials=50.0
    )
    rates = Rates(
        fp32_flops=10.0, bf16_flops=40.0, cache_bytes=60.0, memory_bytes=20.0, exponentials=25.0
    )
    assert limit_s(work, rates) == 1.0 + 0.5 + 0.5 + 2.0
    assert limit_with_softmax_s(work, rates) == 4.0 + 2.0
