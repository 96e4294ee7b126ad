import pytest

from distrl.nn.histories import pad_histories
from distrl.ops.ragged import Ragged


def test_histories_are_cut_to_their_newest_items_and_padded_on_the_right():
    packed = pad_histories(Ragged.of([[5, 6], [1, 2, 3, 4], [9]]), max_len=3)

    assert packed.items.tolist() == [[5, 6, 0], [2, 3, 4], [9, 0, 0]]
    assert packed.segment.tolist() == [[0, 0, -1], [1, 1, 1], [2, -1, -1]]
    assert packed.position.tolist() == [[0, 1, 0], [0, 1, 2], [0, 0, 0]]
    assert packed.last.tolist() == [1, 5, 6]


def test_rows_are_no_wider_than_the_longest_history():
    assert pad_histories(Ragged.of([[5, 6], [1]]), max_len=50).items.shape == (2, 2)


def test_no_histories_make_an_empty_batch():
    packed = pad_histories(Ragged.of([]), max_len=50)
    assert packed.items.shape == (0, 0)
    assert packed.last.shape == (0,)


def test_an_empty_history_is_named():
    with pytest.raises(ValueError, match="history 1 is empty"):
        pad_histories(Ragged.of([[1], []]), max_len=50)
