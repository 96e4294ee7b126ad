from collections import Counter
from fractions import Fraction
from math import floor

import numpy as np
import pytest

from distrl.ops.ragged import Ragged
from distrl.ops.sequences import (
    Views,
    below,
    chosen,
    crop,
    mask,
    mixed,
    permutation,
    reorder,
    sample_keys,
    seed_key,
    share_of,
    substitute,
)
from distrl.schema import PAD_ID

LENGTHS = np.arange(1, 51)
EVERY_LENGTH = Ragged.of([range(1, length + 1) for length in LENGTHS] * 40)
ALL_LENGTHS = np.tile(LENGTHS, 40)
MCLREC = Views(("crop", "mask", "reorder"), 0.5, 0.5, 0.8, distinct=True, mask_id=PAD_ID)


def keys_of(count, seed=3):
    zeros = np.zeros(count, dtype=np.int64)
    return sample_keys(seed, zeros, zeros, np.arange(count))


def lists(sequences):
    return [
        sequences.values[a:b].tolist()
        for a, b in zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    ]


def operation_of(view):
    """Which operation made a view of 1..10."""
    if len(view) < 10:
        return "crop"
    return "mask" if PAD_ID in view else "reorder"


def test_the_hash_is_splitmix64():
    # The first three outputs of the reference generator seeded with 0.
    drawn = mixed(np.zeros(3, dtype=np.uint64), np.arange(3))
    assert drawn.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_numbers_below_a_bound_fill_its_range_evenly():
    drawn = below(keys_of(12000), 6)
    assert np.bincount(drawn, minlength=6) == pytest.approx(2000, abs=5 * (12000 * 5 / 36) ** 0.5)


def test_a_permutation_holds_every_number_once_and_follows_its_key():
    first = permutation(100, seed_key(1))
    assert sorted(first.tolist()) == list(range(100))
    assert first.tolist() == permutation(100, seed_key(1)).tolist()
    assert first.tolist() != permutation(100, seed_key(2)).tolist()
    assert permutation(0, seed_key(1)).tolist() == []


def test_keys_differ_with_seed_epoch_shard_and_serial():
    place = [np.repeat(np.arange(6), 36), np.tile(np.repeat(np.arange(6), 6), 6)]
    place.append(np.tile(np.arange(6), 36))
    keys = np.concatenate([sample_keys(seed, *place) for seed in range(4)])
    assert len(set(keys.tolist())) == 4 * 6**3


def test_a_seed_beyond_64_bits_is_taken():
    assert seed_key(2**64 + 5) == seed_key(5)


@pytest.mark.parametrize("ratio", ["0.1", "0.2", "0.3", "0.5", "0.6", "0.7", "0.8", "0.9", "1.0"])
def test_a_share_of_a_length_is_the_floor_of_the_exact_product(ratio):
    lengths = np.arange(1, 2001)
    exact = [floor(Fraction(ratio) * length) for length in lengths.tolist()]
    assert share_of(lengths, float(ratio)).tolist() == exact
    rest = [floor((1 - Fraction(ratio)) * length) for length in lengths.tolist()]
    assert share_of(lengths, 1.0 - float(ratio)).tolist() == rest


def test_crop_keeps_one_piece_of_the_length_asked_for():
    kept = np.maximum(ALL_LENGTHS // 2, 1)
    views = lists(crop(EVERY_LENGTH, kept, keys_of(len(kept))))
    for length, keep, view in zip(ALL_LENGTHS, kept, views, strict=True):
        assert len(view) == keep
        assert view == list(range(view[0], view[0] + keep))
        assert 1 <= view[0] <= length - keep + 1


def test_crop_starts_anywhere_with_the_same_chance():
    rows = Ragged.of([[1, 2, 3, 4, 5]] * 4000)
    starts = Counter(view[0] for view in lists(crop(rows, np.full(4000, 2), keys_of(4000))))
    assert set(starts) == {1, 2, 3, 4}
    assert list(starts.values()) == pytest.approx([1000] * 4, abs=5 * (4000 * 3 / 16) ** 0.5)


def test_mask_hides_the_number_asked_for_and_touches_nothing_else():
    hidden = ALL_LENGTHS // 2
    views = lists(mask(EVERY_LENGTH, hidden, keys_of(len(hidden)), PAD_ID))
    for length, count, view in zip(ALL_LENGTHS, hidden, views, strict=True):
        assert len(view) == length
        assert view.count(PAD_ID) == count
        assert all(item in (PAD_ID, place) for place, item in enumerate(view, start=1))


def test_mask_hides_every_place_with_the_same_chance():
    rows = Ragged.of([[1, 2, 3, 4, 5]] * 4000)
    views = np.array(lists(mask(rows, np.full(4000, 2), keys_of(4000), 99)))
    assert (views == 99).sum(axis=0) == pytest.approx(1600, abs=5 * (4000 * 0.24) ** 0.5)


def test_reorder_permutes_a_window_and_leaves_the_rest():
    width = share_of(ALL_LENGTHS, 0.8)
    views = lists(reorder(EVERY_LENGTH, width, keys_of(len(width))))
    for length, window, view in zip(ALL_LENGTHS, width, views, strict=True):
        assert sorted(view) == list(range(1, length + 1))
        moved = [place for place, item in enumerate(view, start=1) if item != place]
        assert not moved or moved[-1] - moved[0] < window
    assert any(view != sorted(view) for view in views)


def test_reorder_shuffles_a_window_into_every_order_with_the_same_chance():
    rows = Ragged.of([[1, 2, 3]] * 6000)
    views = Counter(map(tuple, lists(reorder(rows, np.full(6000, 3), keys_of(6000)))))
    assert len(views) == 6
    assert list(views.values()) == pytest.approx([1000] * 6, abs=5 * (6000 * 5 / 36) ** 0.5)


def test_chosen_values_are_as_many_as_asked_for_in_each_row():
    rows = Ragged.of([[7], [1, 2, 3], [], [4, 5, 6, 7]])
    picked = chosen(rows, np.array([1, 0, 0, 3]), keys_of(4))
    assert rows.rows[picked].tolist() == [0, 3, 3, 3]
    assert len(set(picked.tolist())) == 4


# Row i of item i, row 0 of none: item 3 has no correlated one, of the others the best is i + 100.
CORRELATED = Ragged.of([[] if item in (0, 3) else [item + 100, item + 200] for item in range(51)])


def test_substitute_replaces_the_number_asked_for_at_different_places_by_the_best():
    replaced = share_of(ALL_LENGTHS, 0.3)
    views = lists(substitute(EVERY_LENGTH, replaced, keys_of(len(replaced)), CORRELATED, 1))
    for length, count, view in zip(ALL_LENGTHS.tolist(), replaced.tolist(), views, strict=True):
        assert len(view) == length
        changed = [(place, item) for place, item in enumerate(view, start=1) if item != place]
        assert all(item == place + 100 for place, item in changed)
        # Item 3, where it was drawn, has stayed.
        assert len(changed) in ((count, count - 1) if length >= 3 else (count,))


def test_substitute_draws_every_place_with_the_same_chance_and_an_item_without_others_stays():
    rows = Ragged.of([[1, 2, 3, 4, 5]] * 4000)
    views = np.array(lists(substitute(rows, np.full(4000, 2), keys_of(4000), CORRELATED, 1)))
    changed = (views > 5).sum(axis=0)
    assert changed[2] == 0
    assert changed[[0, 1, 3, 4]] == pytest.approx(1600, abs=5 * (4000 * 0.24) ** 0.5)
    # Where 3 was drawn nothing else takes its place.
    assert Counter((views > 5).sum(axis=1).tolist())[1] == pytest.approx(
        1600, abs=5 * (4000 * 0.24) ** 0.5
    )


def test_substitute_takes_each_of_the_first_few_with_the_same_chance():
    few = Ragged.of([[], [11, 12, 13, 14], [21, 22]])
    rows = Ragged.of([[1, 2]] * 3000)
    views = np.array(lists(substitute(rows, np.full(3000, 2), keys_of(3000), few, 3)))
    counts = Counter(views[:, 0].tolist())
    assert set(counts) == {11, 12, 13}
    assert list(counts.values()) == pytest.approx([1000] * 3, abs=5 * (3000 * 2 / 9) ** 0.5)
    # A list shorter than that is taken whole, and apart from what the other item becomes.
    pairs = Counter(map(tuple, views.tolist()))
    assert len(pairs) == 6
    assert list(pairs.values()) == pytest.approx([500] * 6, abs=5 * (3000 * 5 / 36) ** 0.5)


def test_a_view_that_substitutes_depends_on_its_key_alone():
    views = Views(("crop", "substitute"), 0.5, 0.5, 0.8, True, PAD_ID, 0.3, 2, CORRELATED)
    keys = keys_of(len(ALL_LENGTHS))
    whole = [lists(view) for view in views.draw(EVERY_LENGTH, keys)]
    some = np.array([1999, 3, 700, 45, 46])
    part = [lists(view) for view in views.draw(EVERY_LENGTH.take(some), keys[some])]
    assert part == [[view[row] for row in some] for view in whole]
    for length, *pair in zip(ALL_LENGTHS.tolist(), *whole, strict=True):
        # One of the two is a crop, the other has its length and so many items from elsewhere.
        counts = [sum(item > 50 for item in view) for view in pair]
        assert min(counts) == 0
        assert max(counts) <= max(1, floor(Fraction("0.3") * length))
        assert length == 1 or {len(view) for view in pair} == {length // 2, length}


def test_a_short_sequence_has_one_item_substituted():
    views = Views(("substitute",), 0.5, 0.5, 0.8, False, PAD_ID, 0.3, 1, CORRELATED)
    first, second = views.draw(Ragged.of([[1, 2]] * 20), keys_of(20))
    for row in lists(first) + lists(second):
        assert sum(item not in (1, 2) for item in row) == 1


def test_views_that_substitute_need_a_table():
    with pytest.raises(ValueError, match="need the table of correlated items"):
        Views(("substitute",), 0.5, 0.5, 0.8, False, PAD_ID, 0.3)


def test_a_single_item_stays_as_it_is_in_both_views():
    rows = Ragged.of([[item] for item in range(1, 101)])
    first, second = MCLREC.draw(rows, keys_of(100))
    assert lists(first) == lists(second) == lists(rows)


def test_two_items_lose_one_to_crop_hide_one_under_mask_and_keep_their_order_under_reorder():
    pairs = zip(*map(lists, MCLREC.draw(Ragged.of([[8, 9]] * 600), keys_of(600))), strict=True)
    crops, masks, unmoved = {(8,), (9,)}, {(PAD_ID, 9), (8, PAD_ID)}, {(8, 9)}
    expected = {
        (a, b)
        for one, other in (
            (crops, masks),
            (masks, crops),
            (crops, unmoved),
            (unmoved, crops),
            (masks, unmoved),
            (unmoved, masks),
        )
        for a in one
        for b in other
    }
    assert {(tuple(a), tuple(b)) for a, b in pairs} == expected


def test_views_obey_the_specification_at_every_length():
    for view in MCLREC.draw(EVERY_LENGTH, keys_of(len(ALL_LENGTHS))):
        for length, items in zip(ALL_LENGTHS.tolist(), lists(view), strict=True):
            if len(items) < length:
                assert len(items) == length // 2
                assert items == list(range(items[0], items[0] + length // 2))
            elif PAD_ID in items:
                assert items.count(PAD_ID) == length // 2
            else:
                moved = [place for place, item in enumerate(items, start=1) if item != place]
                assert sorted(items) == list(range(1, length + 1))
                assert not moved or moved[-1] - moved[0] < floor(Fraction("0.8") * length)


@pytest.mark.parametrize(("distinct", "kinds"), [(True, 6), (False, 9)])
def test_each_pair_of_operations_is_as_likely(distinct, kinds):
    count = 9000
    views = Views(("crop", "mask", "reorder"), 0.5, 0.5, 0.8, distinct=distinct, mask_id=PAD_ID)
    drawn = views.draw(Ragged.of([range(1, 11)] * count), keys_of(count))
    pairs = Counter(
        (operation_of(a), operation_of(b)) for a, b in zip(*map(lists, drawn), strict=True)
    )
    assert len(pairs) == kinds
    sigma = (count * (kinds - 1)) ** 0.5 / kinds
    assert list(pairs.values()) == pytest.approx([count / kinds] * kinds, abs=5 * sigma)


def test_the_same_operation_twice_gives_two_different_views():
    views = Views(("crop",), 0.5, 0.5, 0.8, distinct=False, mask_id=PAD_ID)
    first, second = views.draw(Ragged.of([range(1, 11)] * 300), keys_of(300))
    same = sum(a == b for a, b in zip(lists(first), lists(second), strict=True))
    assert same < 90, "of 6 starts, one in six pairs meets by chance"


def test_views_depend_on_the_key_alone_and_not_on_the_batch():
    keys = keys_of(len(ALL_LENGTHS))
    whole = [lists(view) for view in MCLREC.draw(EVERY_LENGTH, keys)]
    some = np.array([1999, 3, 700, 45, 46])
    part = [lists(view) for view in MCLREC.draw(EVERY_LENGTH.take(some), keys[some])]
    assert part == [[view[row] for row in some] for view in whole]


def test_no_sequences_have_no_views():
    first, second = MCLREC.draw(Ragged.of([]), keys_of(0))
    assert lists(first) == lists(second) == []
