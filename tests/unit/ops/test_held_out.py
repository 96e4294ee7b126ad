import numpy as np

from distrl.ops.held_out import held_out_cases, last_occurrence, renamed, training_items
from distrl.ops.ragged import Ragged


def ragged(*rows):
    return Ragged.of(rows)


def rows_of(sequences):
    return [
        sequences.values[start:end].tolist()
        for start, end in zip(sequences.offsets, sequences.offsets[1:], strict=False)
    ]


SEQUENCES = ragged([1, 2, 3, 4, 5], [6], [7, 8], [], [9, 10, 11])


def test_the_test_target_is_the_last_item_and_all_before_is_history():
    cases = held_out_cases(SEQUENCES, "test")
    assert rows_of(cases.histories) == [[1, 2, 3, 4], [7], [9, 10]]
    assert cases.targets.tolist() == [5, 8, 11]
    assert cases.lengths.tolist() == [5, 2, 3]
    assert cases.rows.tolist() == [0, 2, 4]


def test_the_validation_target_is_the_last_item_but_one():
    cases = held_out_cases(SEQUENCES, "validation")
    assert rows_of(cases.histories) == [[1, 2, 3], [9]]
    assert cases.targets.tolist() == [4, 10]
    assert cases.lengths.tolist() == [5, 3]
    assert cases.rows.tolist() == [0, 4]


def test_sequences_without_a_case_give_empty_cases():
    cases = held_out_cases(ragged([1], []), "test")
    assert rows_of(cases.histories) == []
    assert cases.targets.tolist() == []


def test_training_never_sees_the_two_held_out_items():
    assert training_items(SEQUENCES).tolist() == [1, 2, 3, 9]


def test_the_newest_items_stay_when_a_history_is_cut():
    assert rows_of(SEQUENCES.newest(2)) == [[4, 5], [6], [7, 8], [], [10, 11]]


def test_rows_are_taken_in_the_order_asked_for():
    taken = SEQUENCES.take(np.array([4, 3, 0]))
    assert rows_of(taken) == [[9, 10, 11], [], [1, 2, 3, 4, 5]]


def test_each_distinct_item_stands_where_it_is_newest():
    histories = ragged([1, 2, 1, 3, 2, 2], [2, 1])
    assert rows_of(histories.keep(last_occurrence(histories))) == [[1, 3, 2], [2, 1]]


def test_unknown_items_leave_histories_and_unknown_targets_become_pad():
    cases = renamed(held_out_cases(ragged([1, 2, 3], [2, 2, 1]), "test"), np.array([0, 5, 0, 7]))
    assert rows_of(cases.histories) == [[5], []]
    assert cases.targets.tolist() == [7, 5]
    unknown = renamed(held_out_cases(ragged([1, 2]), "test"), np.array([0, 5, 0, 7]))
    assert unknown.targets.tolist() == [0]
