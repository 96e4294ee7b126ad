import torch

from distrl.contract import Packed
from distrl.nn.attention import attend, visible_keys
from distrl.nn.augmenters import MLPAugmenter
from distrl.nn.encoder import SequenceEncoder, stack
from tests.packed import pack_rows


def small_encoder():
    return SequenceEncoder(
        num_items=20, max_len=6, hidden_size=8, inner_size=16, num_layers=2, num_heads=2
    ).eval()


def test_parameter_counts_are_those_of_the_authors_code_on_beauty():
    encoder = SequenceEncoder(num_items=12_101, max_len=50)
    assert sum(p.numel() for p in encoder.parameters()) == 877_888
    assert sum(p.numel() for p in MLPAugmenter(hidden_size=64).parameters()) == 3_696


def test_packing_does_not_change_a_state():
    encoder = small_encoder()
    alone = encoder.last_states(pack_rows([[3, 4, 5], [7], [9, 1]], 6))
    together = Packed(
        items=torch.tensor([[3, 4, 5, 7, 9, 1]]),
        segment=torch.tensor([[0, 0, 0, 1, 2, 2]]),
        position=torch.tensor([[0, 1, 2, 0, 0, 1]]),
        last=torch.tensor([2, 3, 5]),
    )
    torch.testing.assert_close(encoder.last_states(together), alone)


def test_padding_never_changes_a_state():
    encoder = small_encoder()
    torch.testing.assert_close(
        encoder.last_states(pack_rows([[3, 4, 5]], 3)),
        encoder.last_states(pack_rows([[3, 4, 5]], 6)),
    )


def test_a_state_knows_nothing_of_the_future():
    encoder = small_encoder()
    short = encoder(pack_rows([[3, 4, 5]], 6))[0, :3]
    long = encoder(pack_rows([[3, 4, 5, 6, 7]], 6))[0, :3]
    torch.testing.assert_close(short, long)


def test_a_hidden_item_is_nobodys_key_but_its_own_slot_has_a_state():
    encoder = small_encoder()
    encoder.item_table.weight.data[0] = 5.0
    with_pad = encoder(pack_rows([[0, 4, 5]], 3))
    encoder.item_table.weight.data[0] = -3.0
    other_pad = encoder(pack_rows([[0, 4, 5]], 3))
    torch.testing.assert_close(with_pad[0, 1:], other_pad[0, 1:])
    assert not torch.allclose(with_pad[0, 0], other_pad[0, 0])
    assert torch.isfinite(with_pad).all()


def test_a_fresh_state_has_the_norm_that_its_layer_norm_gives_it():
    states = SequenceEncoder(num_items=50, max_len=6).eval().last_states(pack_rows([[3, 4]], 6))
    torch.testing.assert_close(states.norm(dim=1), torch.tensor([8.0]), rtol=1e-4, atol=1e-4)


def test_a_stack_is_its_members_one_after_the_other():
    first, second = pack_rows([[3, 4], [5]], 6), pack_rows([[6, 7, 8]], 6)
    encoder = small_encoder()
    both = encoder.last_states(stack([first, second]))
    torch.testing.assert_close(
        both, torch.cat([encoder.last_states(first), encoder.last_states(second)])
    )
    assert stack([first, second]).segment.max() == 2


def test_learned_views_have_norm_one_unless_told_otherwise():
    states = torch.randn(4, 64)
    torch.testing.assert_close(
        MLPAugmenter(hidden_size=64)(states).norm(dim=1), torch.ones(4), rtol=1e-5, atol=1e-5
    )
    raw = MLPAugmenter(hidden_size=64, normalize=False)(states)
    assert not torch.allclose(raw.norm(dim=1), torch.ones(4), rtol=1e-2)


def test_states_at_some_slots_are_those_of_all_slots_and_have_their_gradients():
    encoder, packed = small_encoder(), pack_rows([[3, 4, 5], [7], [9, 1]], 6)
    at = torch.tensor([2, 0, 13, 6, 2])
    found, expected = encoder(packed, at), encoder(packed).flatten(0, 1)[at]
    torch.testing.assert_close(found, expected)
    weights = list(encoder.parameters())
    gradients = [torch.autograd.grad(s.square().sum(), weights) for s in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_with_its_own_dropout_is_torchs_in_the_mean():
    torch.manual_seed(0)
    packed = pack_rows([[3, 4, 5, 6], [7, 0]], 4)
    query, key, value = torch.randn(3, 2, 1, 4, 8).double()
    visible = visible_keys(packed)
    plain = attend(query, key, value, visible, dropout=0.0)
    dropped = [attend(query, key, value, visible, dropout=0.5) for _ in range(4000)]
    mean, spread = torch.stack(dropped).mean(0), torch.stack(dropped).std(0)
    assert ((mean - plain).abs() < 6 * spread / 4000**0.5 + 1e-9).all()
    assert spread.max() > 0.1


def test_attention_without_dropout_is_the_same_through_either_kernel():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 4, 8).double()
    visible = visible_keys(pack_rows([[3, 4, 5, 6], [7, 0]], 4))
    fused = attend(query, key, value, visible, dropout=0.0)
    ours = attend(query, key, value, visible, dropout=2**-17)  # rounds to nothing dropped
    torch.testing.assert_close(fused, ours, rtol=1e-5, atol=1e-6)
