import numpy as np
import pytest

from distrl.ops.ragged import Ragged
from distrl.semantics.examples import examples_of, lowest, no_examples


def all_endings(sequences, example_len, held_out):
    """Every history of two items or more that ends with an item, in plain Python."""
    endings = {}
    for sequence in sequences:
        for length in range(2, len(sequence) - (0 if held_out else 2)):
            shown = sequence[:length][-example_len:]
            endings.setdefault(shown[-1], []).append(shown)
    return endings


@pytest.fixture
def sequences():
    rng = np.random.default_rng(3)
    return [rng.integers(1, 12, length).tolist() for length in rng.integers(1, 30, 60)]


@pytest.mark.parametrize("held_out", [False, True])
def test_examples_are_histories_that_end_with_the_item(sequences, held_out):
    endings = all_endings(sequences, 6, held_out)
    whole = examples_of(Ragged.of(sequences), 6, 0, held_out=held_out)
    everything = lowest([whole], 10_000)
    kept = lowest([whole], 5)
    for item in range(1, 12):
        assert sorted(everything.of(item)) == sorted(endings[item])
        assert len(kept.of(item)) == min(5, len(endings[item]))
        assert all(history in endings[item] for history in kept.of(item))
    assert kept.of(12) == []


def test_the_draw_depends_on_the_seed_and_not_on_shards(sequences):
    def drawn(parts, seed):
        found = no_examples(6)
        for part in parts:
            new = examples_of(Ragged.of(part), 6, seed, held_out=False)
            found = lowest([found, new], 5)
        return [found.of(item) for item in range(1, 12)]

    once = drawn([sequences], 0)
    assert drawn([sequences[40:], sequences[:7], sequences[7:40]], 0) == once
    assert drawn([sequences], 1) != once


def test_a_validation_target_ends_no_example_by_default():
    histories = Ragged.of([[1, 2, 3, 4, 5]])
    shown = examples_of(histories, 3, 0, held_out=False)
    assert shown.items.tolist() == [[0, 1, 2]]
    shown = examples_of(histories, 3, 0, held_out=True)
    assert shown.items.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_users_too_short_give_none():
    assert (
        len(examples_of(Ragged.of([[1], [1, 2], [1, 2, 3], []]), 3, 0, held_out=False).items) == 0
    )
