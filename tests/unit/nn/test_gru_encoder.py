"""The recurrent encoder over packed rows against torch's GRU over each sequence alone."""

import torch

from distrl.contract import Packed
from distrl.nn.gru_encoder import GRUEncoder
from distrl.ops.packing import pack
from distrl.ops.ragged import Ragged

ROWS = [[1, 2, 3, 4], [5], [6, 7, 8], [2, 9]]


def made(dropout=0.0):
    torch.manual_seed(0)
    return GRUEncoder(num_items=9, hidden_size=6, inner_size=10, num_layers=2, dropout=dropout)


def alone(encoder, row):
    embedded = encoder.item_table(torch.tensor(row))[None]
    return encoder.output(encoder.recurrent(embedded)[0])[0]


def test_every_state_is_that_of_its_sequence_alone():
    encoder, (packed, slots) = made(), pack(Ragged.of(ROWS), 5)
    states = encoder(packed)
    expected = torch.cat([alone(encoder, row) for row in ROWS])
    torch.testing.assert_close(states.flatten(0, 1)[torch.from_numpy(slots)], expected)
    assert (states[packed.segment < 0] == 0).all()
    last = torch.stack([alone(encoder, row)[-1] for row in ROWS])
    torch.testing.assert_close(encoder.last_states(packed), last)


def test_states_may_be_asked_for_anywhere_and_of_nothing():
    encoder, (packed, slots) = made(), pack(Ragged.of(ROWS), 5)
    at = torch.from_numpy(slots[[1, 0, 1]])
    expected = alone(encoder, ROWS[0])[[1, 0, 1]]
    torch.testing.assert_close(encoder(packed, at), expected)
    nothing, _ = pack(Ragged.of([]), 5)
    assert encoder(nothing).shape == (1, 5, 6)
    assert encoder.last_states(nothing).shape == (0, 6)


def test_a_state_does_not_know_what_follows_it():
    encoder = made()
    whole, _ = pack(Ragged.of([[1, 2, 3, 4]]), 5)
    start = Packed(whole.items, whole.segment, whole.position, torch.tensor([1, 3]))
    torch.testing.assert_close(encoder.last_states(start)[0], alone(encoder, [1, 2])[-1])


def test_gradients_reach_the_items_that_were_read_and_no_others():
    encoder, (packed, _) = made(dropout=0.3), pack(Ragged.of([[1, 2], [4]]), 5)
    encoder.last_states(packed).square().sum().backward()
    moved = encoder.item_table.weight.grad.abs().sum(dim=1) > 0
    assert set(moved.nonzero().flatten().tolist()) <= {1, 2, 4}
    assert moved.any()
