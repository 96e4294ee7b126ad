import numpy as np
import pytest
import torch

from distrl.ops.packing import fill_share, first_fit_decreasing, pack
from distrl.ops.ragged import Ragged


def random_sequences(seed, count, longest, row_items=1000):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, row_items, n).tolist() for n in rng.integers(1, longest + 1, count)]


def test_sequences_fill_rows_longest_first():
    packed, slots = pack(Ragged.of([[1], [2, 3, 4], [5, 6], [7, 8]]), row_length=4)
    assert packed.items.tolist() == [[2, 3, 4, 1], [5, 6, 7, 8]]
    assert packed.segment.tolist() == [[1, 1, 1, 0], [2, 2, 3, 3]]
    assert packed.position.tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert packed.last.tolist() == [3, 2, 5, 7]
    assert slots.tolist() == [3, 0, 1, 2, 4, 5, 6, 7]


def test_slots_past_the_last_segment_are_padding():
    packed, _ = pack(Ragged.of([[9, 8]]), row_length=5)
    assert packed.items.tolist() == [[9, 8, 0, 0, 0]]
    assert packed.segment.tolist() == [[0, 0, -1, -1, -1]]
    assert packed.position.tolist() == [[0, 1, 0, 0, 0]]


def test_no_sequences_make_one_row_of_padding():
    packed, slots = pack(Ragged.of([]), row_length=3)
    assert packed.items.tolist() == [[0, 0, 0]]
    assert packed.segment.tolist() == [[-1, -1, -1]]
    assert packed.last.shape == (0,)
    assert packed.last.dtype == torch.int64
    assert len(slots) == 0


@pytest.mark.parametrize("rows", [[[1], []], [[1, 2, 3, 4]]])
def test_a_sequence_that_is_empty_or_longer_than_a_row_is_an_error(rows):
    with pytest.raises(ValueError, match="do not fit rows of 3"):
        pack(Ragged.of(rows), row_length=3)


@pytest.mark.parametrize("seed", range(8))
def test_every_segment_lies_whole_within_one_row(seed):
    row_length = 50 + seed
    sequences = random_sequences(seed, count=1 + 90 * seed, longest=50)
    packed, slots = pack(Ragged.of(sequences), row_length)
    items, segment, position = (
        t.flatten().tolist() for t in (packed.items, packed.segment, packed.position)
    )
    at = iter(slots.tolist())
    for number, sequence in enumerate(sequences):
        places = [next(at) for _ in sequence]
        assert places == list(range(places[0], places[0] + len(sequence)))
        assert places[0] // row_length == places[-1] // row_length
        assert [items[p] for p in places] == sequence
        assert [segment[p] for p in places] == [number] * len(sequence)
        assert [position[p] for p in places] == list(range(len(sequence)))
        assert packed.last[number] == places[-1]
    padding = [p for p, s in enumerate(segment) if s < 0]
    assert len(padding) == len(segment) - sum(map(len, sequences))
    assert all(items[p] == position[p] == 0 for p in padding)


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_those_of_first_fit_decreasing_restated(seed):
    rng = np.random.default_rng(seed)
    longest = int(rng.integers(1, 60))
    row_length = longest + int(rng.integers(0, 30))
    lengths = rng.integers(1, longest + 1, 300)
    used, expected = [], np.zeros(300, dtype=np.int64)
    for index in np.argsort(-lengths, kind="stable"):
        row = next((r for r, u in enumerate(used) if u + lengths[index] <= row_length), len(used))
        if row == len(used):
            used.append(0)
        expected[index] = row
        used[row] += lengths[index]
    first, num_rows = first_fit_decreasing(lengths, row_length)
    assert num_rows == len(used)
    # Sequences of one length may trade places within the same kinds of rows.
    for length in set(lengths.tolist()):
        rows = first[lengths == length] // row_length
        assert sorted(rows) == sorted(expected[lengths == length])


def test_rows_of_lengths_like_beautys_are_over_95_percent_full():
    rng = np.random.default_rng(0)
    for _ in range(20):
        # Inputs of Beauty's users: 2 at least, median 3, mean 5.9, a long tail.
        lengths = np.minimum(2 + rng.geometric(0.35, 256) * rng.integers(0, 5, 256), 50)
        sequences = Ragged.of([[1] * n for n in lengths.tolist()])
        assert fill_share(pack(sequences, 50)[0]) > 0.95
