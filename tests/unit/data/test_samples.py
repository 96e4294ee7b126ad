import numpy as np
import pytest

from distrl.data.config import AugmentConfig, DataConfig
from distrl.data.samples import BatchMaker, Samples, empty_batch, windows
from distrl.ops.ragged import Ragged
from distrl.schema import PAD_ID

NUM_ITEMS = 500
KEEP_ALL = AugmentConfig(operations=("crop",), crop_ratio=0.0, distinct=False)
"""Removes nothing, so that views show what was contrasted."""


def maker(num_views=2, seed=0, **settings):
    return BatchMaker(DataConfig(store_uri="unused", **settings), num_views, NUM_ITEMS, seed)


def served(rows, serials=None):
    serials = np.arange(len(rows)) if serials is None else np.array(serials)
    zeros = np.zeros(len(rows), dtype=np.int64)
    return Samples(zeros, zeros + 3, serials, Ragged.of(rows))


def users(seed, count, longest):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, NUM_ITEMS, n).tolist() for n in rng.integers(2, longest + 1, count)]


def segments(packed):
    """Items and positions of each segment, in segment order, read slot by slot."""
    found = [[] for _ in packed.last]
    flat = (t.flatten().tolist() for t in (packed.segment, packed.items, packed.position))
    for segment, item, position in zip(*flat, strict=True):
        if segment >= 0:
            assert position == len(found[segment])
            found[segment].append(item)
    return found


def predictions(batch):
    """(visible history, target) of each target, read slot by slot."""
    items = batch.clean.items.flatten().tolist()
    position = batch.clean.position.flatten().tolist()
    return [
        (tuple(items[at - position[at] : at + 1]), target)
        for at, target in zip(batch.target_at.tolist(), batch.targets.tolist(), strict=True)
    ]


def test_every_position_predicts_the_item_that_follows_it():
    batch = maker(0).make(served([[4, 5, 6, 7], [8, 9]]))
    assert segments(batch.clean) == [[4, 5, 6], [8]]
    assert predictions(batch) == [((4,), 5), ((4, 5), 6), ((4, 5, 6), 7), ((8,), 9)]
    assert batch.views is None
    assert batch.num_pairs == 0


def test_a_prefix_predicts_its_target_alone():
    batch = maker(0, samples="prefix").make(served([[4, 5, 6, 7], [8, 9]]))
    assert segments(batch.clean) == [[4, 5, 6], [8]]
    assert predictions(batch) == [((4, 5, 6), 7), ((8,), 9)]


def test_a_long_sequence_is_cut_into_windows_counted_from_its_end():
    cut = windows(Ragged.of([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3], [1, 2, 3, 4, 5, 6]]), 3)
    assert cut.lengths.tolist() == [1, 3, 3, 3, 3, 3]
    assert cut.values.tolist() == [1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 1, 2, 3, 4, 5, 6]


def test_windows_hold_every_target_once():
    rows = users(seed=1, count=60, longest=40)
    batch = maker(0, max_len=7).make(served(rows))
    expected = []
    for row in rows:
        inputs = row[:-1]
        for place, target in enumerate(row[1:]):
            # The window that input `place` lies in, counted from the newest input.
            from_end = (len(inputs) - 1 - place) // 7
            start = max(len(inputs) - 7 * (from_end + 1), 0)
            expected.append((tuple(inputs[start : place + 1]), target))
    assert predictions(batch) == expected
    assert max(map(len, segments(batch.clean))) == 7


def test_last_keeps_the_newest_inputs_and_their_targets():
    batch = maker(0, max_len=3, long_sequences="last").make(served([[1, 2, 3, 4, 5, 6], [7, 8]]))
    assert predictions(batch) == [((3,), 4), ((3, 4), 5), ((3, 4, 5), 6), ((7,), 8)]


def test_the_whole_history_up_to_the_limit_is_what_is_contrasted():
    batch = maker(max_len=3, augment=KEEP_ALL).make(served([[1, 2, 3, 4, 5, 6], [7, 8], [9, 1, 2]]))
    assert segments(batch.views[0]) == segments(batch.views[1]) == [[3, 4, 5], [7], [9, 1]]


def test_further_contrasted_prefixes_are_different_shorter_ones_cut_to_the_limit():
    rows = [[10, 11, 12, 13, 14, 15], [20, 21], [30, 31, 32]]
    batch = maker(max_len=3, contrasted_prefixes=3, augment=KEEP_ALL).make(served(rows))
    first = segments(batch.views[0])
    assert first == segments(batch.views[1])
    assert first[:3] == [[12, 13, 14], [20], [30, 31]]
    assert first[-1] == [30]
    shorter = first[3:-1]
    assert len(shorter) == len({tuple(s) for s in shorter}) == 2
    assert all(s in ([10], [10, 11], [10, 11, 12], [11, 12, 13]) for s in shorter)


def test_shorter_prefixes_are_drawn_from_all_there_are():
    rows = [[1, 2, 3, 4, 5]] * 3000
    batch = maker(contrasted_prefixes=2, augment=KEEP_ALL).make(served(rows))
    lengths = [len(s) for s in segments(batch.views[0])[3000:]]
    counts = np.bincount(lengths, minlength=4)
    assert counts.tolist()[0] == 0
    assert counts[1:] == pytest.approx([1000] * 3, abs=5 * (3000 * 2 / 9) ** 0.5)


def test_views_are_row_aligned_pairs_of_the_contrasted_prefixes():
    rows = users(seed=2, count=80, longest=30)
    batch = maker(contrasted_prefixes=4).make(served(rows))
    first, second = map(segments, batch.views)
    assert len(first) == len(second) == batch.num_pairs
    assert batch.num_pairs == sum(min(4, len(row) - 1) for row in rows)
    by_row = {row: set(items) for row, items in enumerate(rows)}
    for row in range(80):
        assert set(first[row]) | set(second[row]) <= by_row[row] | {PAD_ID}


@pytest.mark.parametrize("mode", ["all_positions", "prefix"])
@pytest.mark.parametrize("contrasted", [1, 3])
def test_a_samples_views_are_the_same_in_any_batch(mode, contrasted):
    rows = users(seed=3, count=50, longest=80)
    make = maker(samples=mode, contrasted_prefixes=contrasted, max_len=20).make
    if mode == "prefix":
        rows = [row[-21:] for row in rows]
    whole = [segments(view) for view in make(served(rows)).views]
    alone = [make(served([row], [serial])).views for serial, row in enumerate(rows)]
    # In a batch the whole histories come first, then the shorter prefixes user by user.
    per_view = [[segments(pair[number]) for pair in alone] for number in range(2)]
    for number in range(2):
        expected = [s[0] for s in per_view[number]]
        expected += [shorter for s in per_view[number] for shorter in s[1:]]
        assert whole[number] == expected


def test_views_change_with_the_seed_and_the_serial():
    rows = [list(range(1, 22))] * 20
    views = segments(maker(seed=0).make(served(rows)).views[0])
    assert len({tuple(view) for view in views}) > 15
    assert views != segments(maker(seed=1).make(served(rows)).views[0])


def test_a_mask_token_is_one_past_the_last_item():
    augment = AugmentConfig(operations=("mask",), distinct=False, mask_with="token")
    batch = maker(augment=augment).make(served([[1, 2, 3, 4, 5]]))
    assert all(s.count(NUM_ITEMS + 1) == 2 for view in batch.views for s in segments(view))


def test_views_substitute_out_of_the_table_as_the_config_says():
    augment = AugmentConfig(operations=("substitute",), distinct=False, substitute_among=2)
    config = DataConfig(store_uri="unused", augment=augment)
    table = Ragged.of([[]] + [[item + 100, item + 200, item + 300] for item in range(1, 11)])
    make = BatchMaker(config, 2, NUM_ITEMS, 0, correlated=table).make
    found = [s for view in make(served([list(range(1, 12))] * 40)).views for s in segments(view)]
    for items in found:
        # Of 10 inputs three, floor(.3 * 10), become one of their two best.
        changed = [(place, item) for place, item in enumerate(items, start=1) if item != place]
        assert len(changed) == 3
        assert all(item - place in (100, 200) for place, item in changed)
    assert {item // 100 for items in found for item in items} == {0, 1, 2}


def test_rows_may_be_longer_than_sequences():
    rows = users(seed=4, count=100, longest=30)
    batch = maker(max_len=20, row_length=64).make(served(rows))
    shapes = {packed.items.shape[1] for packed in (batch.clean, *batch.views)}
    assert shapes == {64}


@pytest.mark.parametrize("num_views", [0, 2])
@pytest.mark.parametrize("mode", ["all_positions", "prefix"])
def test_nothing_left_makes_a_batch_without_targets(num_views, mode):
    config = DataConfig(store_uri="unused", max_len=5, row_length=8, samples=mode)
    batch = empty_batch(BatchMaker(config, num_views, NUM_ITEMS, 0))
    assert batch.clean.items.tolist() == [[0] * 8]
    assert batch.clean.segment.tolist() == [[-1] * 8]
    assert batch.num_targets == batch.num_pairs == 0
    assert batch.target_at.shape == batch.targets.shape == (0,)
    assert (batch.views is None) == (num_views == 0)
    for view in batch.views or ():
        assert view.items.shape == (1, 8)
        assert view.last.shape == (0,)


@pytest.mark.parametrize(("mode", "contrasted"), [("all_positions", 3), ("prefix", 1)])
def test_pairs_name_their_sample_and_the_item_that_follows(mode, contrasted):
    settings = {"samples": mode, "contrasted_prefixes": contrasted, "augment": KEEP_ALL}
    rows = [[1, 2], [3, 4, 5], [6, 7, 8, 9]]
    batch = maker(**settings).make(served(rows))
    followed = [
        [*prefix, target]
        for prefix, target in zip(segments(batch.views[0]), batch.pair_target.tolist(), strict=True)
    ]
    whose = [next(row for row in rows if row[: len(f)] == f)[0] for f in followed]
    numbers = dict(zip(whose, batch.pair_sample.tolist(), strict=True))
    assert [numbers[first] for first in whose] == batch.pair_sample.tolist()
    assert len(set(numbers.values())) == 3
    assert len(followed) == (6 if mode == "all_positions" else 3)
    again = maker(**settings).make(served(rows[1:], serials=[1, 2]))
    assert set(again.pair_sample.tolist()) == {numbers[3], numbers[6]}


def test_methods_without_views_number_no_pairs():
    batch = maker(num_views=0).make(served([[1, 2, 3]]))
    assert batch.pair_sample is None
    assert batch.pair_target is None
