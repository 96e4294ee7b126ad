import random
from collections import Counter
from math import factorial

import numpy as np
import pytest

from distrl.ops.corruption import DELETE, INSERT, KEEP, Corrupted, Corruption, applied
from distrl.ops.ragged import Ragged
from distrl.ops.sequences import mixed, seed_key

BEAUTY_ITEMS = 12_101
PROBABILITIES = [
    (0.4, 0.45, 0.15),
    (0.8, 0.1, 0.1),
    (0.4, 0.3, 0.3),
    (0.1, 0.1, 0.8),
    (0.0, 0.5, 0.5),
    (0.0, 0.9, 0.1),
    (0.5, 0.0, 0.5),
    (0.5, 0.5, 0.0),
]


def keys_of(count, seed=3):
    return mixed(np.repeat(seed_key(seed), count), np.arange(count))


def lists(sequences):
    pairs = zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    return [sequences.values[start:stop].tolist() for start, stop in pairs]


def by_row(corrupted):
    """Items, operations and items to put back, of each row."""
    sequences, operations, inserted = corrupted
    put = lists(inserted)
    pairs = zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    return [(sequences.values[a:b].tolist(), operations[a:b].tolist(), put[a:b]) for a, b in pairs]


def same(one, other):
    return np.array_equal(one.values, other.values) and np.array_equal(one.offsets, other.offsets)


def five_deviations(chance, count):
    return 5 * (chance * (1 - chance) / count) ** 0.5


def corruption(probabilities, num_items=1000, max_len=60, **settings):
    return Corruption(*probabilities, num_items=num_items, max_len=max_len, **settings)


@pytest.fixture(scope="module")
def any_rows():
    """Lengths 1, 2 and 50 often, 0 and all others too; items repeat within a row."""
    rng = np.random.default_rng(5)
    lengths = np.concatenate([np.repeat([0, 1, 2, 50], 150), rng.integers(0, 51, 400)])
    rng.shuffle(lengths)
    return Ragged.of([rng.integers(1, 1001, length).tolist() for length in lengths])


@pytest.fixture(scope="module")
def beauty_prefixes(beauty_file):
    """20,000 of the training prefixes s_1..s_k, k >= 2, of the data that the table was measured on.

    As the authors' script has it: the earliest fifty items of each user, without the last user,
    and without the two items held out of those fifty.
    """
    users = [line.split()[1:][:50] for line in beauty_file.read_text().splitlines()][:-1]
    train = Ragged.of([[int(item) for item in user[:-2]] for user in users])
    ends = np.flatnonzero(train.positions >= 1)
    assert len(ends) == 127_596  # the published number of prefixes
    ends = np.sort(np.random.default_rng(0).permutation(ends)[:20_000])
    return train.pieces(train.offsets[:-1][train.rows[ends]], train.positions[ends] + 1)


def test_operations_are_applied_by_hand():
    sequences = Ragged.of([[1, 2, 3], [4], [], [5, 6]])
    operations = np.array([KEEP, DELETE, INSERT, DELETE, INSERT, INSERT])
    # The rows of 1, 2 and 4 are ignored: none of them is to be INSERTed in front of.
    inserted = Ragged.of([[91], [92, 93], [7, 8, 9], [94], [], [10]])
    assert lists(applied(sequences, operations, inserted)) == [[1, 9, 8, 7, 3], [], [], [5, 10, 6]]


def test_keeping_everything_changes_nothing(any_rows):
    count = len(any_rows.values)
    nothing = Ragged(np.zeros(0, dtype=np.int64), np.zeros(count + 1, dtype=np.int64))
    assert same(applied(any_rows, np.full(count, KEEP), nothing), any_rows)


@pytest.mark.parametrize("probabilities", PROBABILITIES, ids=str)
def test_damage_is_undone_exactly(any_rows, probabilities):
    for seed in range(3):
        keys = keys_of(len(any_rows.lengths), seed)
        damaged = corruption(probabilities).draw(any_rows, keys)
        assert not same(damaged.sequences, any_rows)
        assert same(applied(*damaged), any_rows)


def test_no_rows_and_empty_rows_pass():
    settings = corruption((0.4, 0.45, 0.15))
    assert by_row(settings.draw(Ragged.of([]), keys_of(0))) == []
    assert by_row(settings.draw(Ragged.of([[], []]), keys_of(2))) == [([], [], [])] * 2


def test_only_keeping_leaves_rows_as_they_are(any_rows):
    damaged = corruption((1.0, 0.0, 0.0)).draw(any_rows, keys_of(len(any_rows.lengths)))
    assert same(damaged.sequences, any_rows)
    assert set(damaged.operations.tolist()) == {KEEP}
    assert damaged.inserted.lengths.sum() == 0


def test_only_deleting_takes_five_at_a_time_and_never_the_last():
    rows = [range(1, 11), range(1, 8), range(1, 7), [1, 2], [1]]
    assert by_row(corruption((0.0, 1.0, 0.0)).draw(Ragged.of(rows), keys_of(5))) == [
        ([6, 10], [INSERT, INSERT], [[5, 4, 3, 2, 1], [9, 8, 7]]),
        ([6, 7], [INSERT, KEEP], [[5, 4, 3, 2, 1], []]),
        ([6], [INSERT], [[5, 4, 3, 2, 1]]),
        ([2], [INSERT], [[1]]),
        ([1], [KEEP], [[]]),
    ]
    [two_at_a_time] = by_row(
        corruption((0.0, 1.0, 0.0), max_inserted=2).draw(Ragged.of([range(1, 6)]), keys_of(1))
    )
    assert two_at_a_time == ([3, 5], [INSERT, INSERT], [[2, 1], [4]])


def test_only_inserting_fills_up_in_front_of_the_oldest_item():
    rows = [[1, 2, 3], [1], list(range(1, 60)), list(range(1, 61)), list(range(1, 71))]
    damaged = corruption((0.0, 0.0, 1.0)).draw(Ragged.of(rows), keys_of(5))
    for row, (items, operations, _) in zip(rows, by_row(damaged), strict=True):
        new = max(60 - len(row), 0)
        assert items[new:] == row
        assert operations == [DELETE] * new + [KEEP] * len(row)


def test_an_item_that_may_only_be_inserted_before_gets_all_there_is_room_for():
    # Nothing keeps an item and the last is not deleted, unless it already got deleted ones back.
    rows = Ragged.of([[1], [1, 2]] * 200)
    got = Counter()
    for items, operations, _ in by_row(
        corruption((0.0, 0.5, 0.5), max_len=6).draw(rows, keys_of(400))
    ):
        got[operations[-1]] += 1
        assert len(items) == 6 if operations[-1] == KEEP else len(items) <= 6
    # Row [1] has no choice, and in row [1, 2] a deletion leaves the 2 none.
    assert got[KEEP] == 200
    assert got[INSERT] == 200


def test_a_catalog_that_is_used_up_gives_no_insertion():
    rows = Ragged.of([[1, 2], [1, 2, 3, 4], [3, 3, 3]] * 100)
    damaged = corruption((0.0, 0.0, 1.0), num_items=4).draw(rows, keys_of(300))
    new = [items[: operations.count(DELETE)] for items, operations, _ in by_row(damaged)]
    assert {tuple(items) for items in new[0::3]} == {(3, 4), (4, 3)}
    assert new[1::3] == [[]] * 100
    assert {tuple(sorted(items)) for items in new[2::3]} == {(1, 2, 4)}
    assert len({tuple(items) for items in new[2::3]}) == factorial(3)


@pytest.mark.parametrize("probabilities", PROBABILITIES, ids=str)
def test_every_row_keeps_to_the_rules(any_rows, probabilities):
    damaged = corruption(probabilities).draw(any_rows, keys_of(len(any_rows.lengths)))
    assert len(damaged.inserted.lengths) == len(damaged.operations) == len(damaged.sequences.values)
    for raw, (items, operations, put) in zip(lists(any_rows), by_row(damaged), strict=True):
        assert (1 <= len(items) <= 60) if raw else not items
        assert operations[-1:] != [DELETE]
        assert items[-1:] == raw[-1:]
        new = [item for item, label in zip(items, operations, strict=True) if label == DELETE]
        assert len(set(new)) == len(new)
        assert not set(new) & set(raw)
        assert all(1 <= item <= 1000 for item in new)
        for place, (operation, back) in enumerate(zip(operations, put, strict=True)):
            assert (1 <= len(back) <= 5) if operation == INSERT else not back
            if operation != DELETE:
                # Own items so far, those that are there and those that were deleted.
                before = place - operations[:place].count(DELETE) + sum(map(len, put[:place]))
                assert items[place] == raw[before + len(back)]
                assert back == raw[before : before + len(back)][::-1]


def test_the_whole_distribution_of_short_rows_is_the_one_worked_out_by_hand():
    count = 40_000
    one, two = [[1]] * count, [[1, 2]] * count
    keep, delete, insert = 0.4, 0.45, 0.15
    # In front of the last item, a deletion is drawn again.
    last_insert = insert / (keep + insert)
    settings = corruption((keep, delete, insert))
    drawn = Counter(tuple(row[1]) for row in by_row(settings.draw(Ragged.of(one), keys_of(count))))
    for number in range(4):
        expected = last_insert**number * (1 - last_insert)
        found = drawn[(DELETE,) * number + (KEEP,)] / count
        assert found == pytest.approx(expected, abs=five_deviations(expected, count))

    drawn = Counter(tuple(row[1]) for row in by_row(settings.draw(Ragged.of(two), keys_of(count))))
    for outcome, expected in {
        (KEEP, KEEP): keep * (1 - last_insert),
        (INSERT,): delete,
        (DELETE, INSERT): insert * delete,
        (DELETE, KEEP, KEEP): insert * keep * (1 - last_insert),
        (KEEP, DELETE, KEEP): keep * last_insert * (1 - last_insert),
    }.items():
        found = drawn[outcome] / count
        assert found == pytest.approx(expected, abs=five_deviations(expected, count))


def test_a_full_row_draws_again_between_keeping_and_deleting():
    count = 40_000
    rows = Ragged.of([[1, 2, 3]] * count)
    drawn = corruption((0.2, 0.3, 0.5), max_len=4).draw(rows, keys_of(count))
    counts = Counter(tuple(row[1]) for row in by_row(drawn))
    assert max(map(len, counts)) == 4
    for outcome, expected in {
        # After one insertion it is .2 against .3, and the last item can only be kept.
        (DELETE, KEEP, KEEP, KEEP): 0.5 * 0.4 * 0.4,
        (DELETE, KEEP, INSERT): 0.5 * 0.4 * 0.6,
        # Both of the first two are deleted; the last ends the run without a draw.
        (INSERT,): 0.3 * 0.3,
        # A deletion leaves room for two in front of the last item, .2 against .5 for each.
        (INSERT, KEEP): 0.3 * 0.7 * (2 / 7),
        (INSERT, DELETE, KEEP): 0.3 * 0.7 * (5 / 7) * (2 / 7),
        (INSERT, DELETE, DELETE, KEEP): 0.3 * 0.7 * (5 / 7) ** 2,
    }.items():
        found = counts[outcome] / count
        assert found == pytest.approx(expected, abs=five_deviations(expected, count))


def test_random_items_are_any_that_the_row_does_not_hold_in_any_order():
    count = 24_000
    rows = Ragged.of([[2, 5]] * count)
    drawn = corruption((0.0, 0.0, 1.0), num_items=6, max_len=4).draw(rows, keys_of(count))
    pairs = Counter(tuple(row[0][:2]) for row in by_row(drawn))
    assert set(pairs) == {(a, b) for a in (1, 3, 4, 6) for b in (1, 3, 4, 6) if a != b}
    for found in pairs.values():
        assert found / count == pytest.approx(1 / 12, abs=five_deviations(1 / 12, count))


def test_a_row_is_damaged_alike_alone_in_any_batch_and_in_any_order(any_rows):
    settings = corruption((0.3, 0.3, 0.4), num_items=1000)
    keys = keys_of(len(any_rows.lengths))
    together = by_row(settings.draw(any_rows, keys))
    order = np.random.default_rng(1).permutation(len(keys))[:500]
    reordered = by_row(settings.draw(any_rows.take(order), keys[order]))
    assert reordered == [together[row] for row in order]
    for row in order[:100]:
        chosen = np.array([row])
        assert by_row(settings.draw(any_rows.take(chosen), keys[chosen])) == [together[row]]


def test_rows_alike_are_damaged_alike_in_a_crowded_catalog_too():
    # Half of the draws clash here, and a clash in one row moves no other.
    settings = corruption((0.1, 0.1, 0.8), num_items=12, max_len=12)
    rows, keys = Ragged.of([[1, 2, 3]] * 300), keys_of(300)
    together = by_row(settings.draw(rows, keys))
    for row in range(300):
        chosen = np.array([row])
        assert by_row(settings.draw(rows.take(chosen), keys[chosen])) == [together[row]]


def test_other_keys_give_other_damage_and_the_same_the_same(any_rows):
    settings = corruption((0.4, 0.45, 0.15))
    first, again, other = (
        by_row(settings.draw(any_rows, keys_of(len(any_rows.lengths), seed))) for seed in (3, 3, 4)
    )
    assert first == again
    changed = [one != two for one, two in zip(first, other, strict=True)]
    long = any_rows.lengths >= 10
    assert np.mean(np.array(changed)[long]) > 0.99


def corrupted_slowly(raw, probabilities, num_items, max_len, rng):
    """The algorithm as the specification has it, draw by draw."""
    keep, delete, _ = probabilities
    items, operations, put, used = [], [], [], set(raw)
    current, place = len(raw), 0

    def copy(operation, back):
        items.append(raw[place])
        operations.append(operation)
        put.append(back)

    def may_delete():
        return current != 1 and place != len(raw) - 1

    while place < len(raw):
        drawn = rng.random()
        if drawn <= keep:
            copy(KEEP, [])
            place += 1
        elif drawn <= keep + delete:
            if not may_delete():
                continue
            pending = []
            deleting = True
            while deleting:
                pending.insert(0, raw[place])
                current, place = current - 1, place + 1
                again = keep < rng.random() <= keep + delete
                deleting = again and may_delete() and len(pending) < 5
            copy(INSERT, pending)
            place += 1
        elif current < max_len and len(used) < num_items:
            item = rng.randint(1, num_items)
            while item in used:
                item = rng.randint(1, num_items)
            used.add(item)
            items.append(item)
            operations.append(DELETE)
            put.append([])
            current += 1
    return items, operations, put


def slow_damage(sequences, settings, seed):
    rng = random.Random(seed)
    chances = (settings.keep, settings.delete, settings.insert)
    rows = [
        corrupted_slowly(row, chances, settings.num_items, settings.max_len, rng)
        for row in lists(sequences)
    ]
    return Corrupted(
        Ragged.of([items for items, _, _ in rows]),
        np.array([operation for _, operations, _ in rows for operation in operations]),
        Ragged.of([back for _, _, put in rows for back in put]),
    )


def statistics(damaged):
    """Shares of labels, of changed rows and of deletions per anchor; the mean length."""
    sequences, operations, inserted = damaged
    changed = np.bincount(sequences.rows, operations != KEEP, len(sequences.lengths)) > 0
    anchors = np.bincount(inserted.lengths[operations == INSERT], minlength=6)[1:]
    return {
        "labels": np.bincount(operations, minlength=3) / len(operations),
        "changed": changed.mean(),
        "anchors": anchors / anchors.sum(),
        "length": sequences.lengths.mean(),
    }


TABLE = [
    # probabilities, keep/delete/insert, mean length before and after, changed, 1..5 per anchor
    (
        (0.4, 0.45, 0.15),
        (0.443, 0.167, 0.390),
        8.15,
        5.58,
        0.919,
        (0.618, 0.234, 0.09, 0.034, 0.024),
    ),
    (
        (0.4, 0.5, 0.1),
        (0.447, 0.111, 0.442),
        8.19,
        4.97,
        0.915,
        (0.577, 0.243, 0.101, 0.044, 0.035),
    ),
    ((0.8, 0.1, 0.1), (0.811, 0.101, 0.088), 8.06, 8.10, 0.632, (0.915, 0.078, 0.007, 0.0, 0.0)),
    (
        (0.4, 0.3, 0.3),
        (0.423, 0.316, 0.261),
        8.06,
        7.78,
        0.937,
        (0.741, 0.193, 0.049, 0.012, 0.005),
    ),
]


@pytest.fixture(scope="module")
def beauty_five_times(beauty_prefixes):
    """The same prefixes with five keys each, so that what is compared is mostly not this noise."""
    return beauty_prefixes.take(np.tile(np.arange(20_000), 5))


@pytest.mark.parametrize("expected", TABLE, ids=lambda row: str(row[0]))
def test_beauty_is_damaged_as_much_as_the_specification_measured(beauty_five_times, expected):
    probabilities, labels, before, after, changed, anchors = expected
    settings = corruption(probabilities, num_items=BEAUTY_ITEMS)
    found = statistics(settings.draw(beauty_five_times, keys_of(100_000)))
    assert found["labels"] == pytest.approx(labels, abs=0.005)
    assert found["changed"] == pytest.approx(changed, abs=0.01)
    assert found["anchors"] == pytest.approx(anchors, abs=0.01)
    # The table's rows are samples of their own: their mean length before is 8.06 to 8.19, that of
    # all prefixes 8.13. What the damage adds varies less.
    length = beauty_five_times.lengths.mean()
    assert length == pytest.approx(before, abs=0.15)
    assert found["length"] == pytest.approx(after, abs=0.15)
    assert found["length"] - length == pytest.approx(after - before, abs=0.05)


@pytest.mark.parametrize("probabilities", [row[0] for row in TABLE], ids=str)
def test_as_many_rows_are_left_alone_as_their_lengths_say(beauty_five_times, probabilities):
    keep, _, insert = probabilities
    alone = keep ** (beauty_five_times.lengths - 1) * keep / (keep + insert)
    settings = corruption(probabilities, num_items=BEAUTY_ITEMS)
    changed = statistics(settings.draw(beauty_five_times, keys_of(100_000)))["changed"]
    deviation = (alone * (1 - alone)).sum() ** 0.5 / 100_000
    assert 1 - changed == pytest.approx(alone.mean(), abs=5 * deviation)


@pytest.mark.parametrize("probabilities", [row[0] for row in TABLE], ids=str)
def test_draws_at_once_are_distributed_as_draws_one_by_one(
    beauty_prefixes, beauty_five_times, probabilities
):
    settings = corruption(probabilities, num_items=BEAUTY_ITEMS)
    slow = slow_damage(beauty_prefixes, settings, seed=11)
    assert same(applied(*slow), beauty_prefixes)
    expected = statistics(slow)
    found = statistics(settings.draw(beauty_five_times, keys_of(100_000)))
    for name in ("labels", "changed", "anchors"):
        assert found[name] == pytest.approx(expected[name], abs=0.01)
    assert found["length"] == pytest.approx(expected["length"], abs=0.05)


@pytest.mark.parametrize(("num_items", "max_len"), [(1000, 12), (14, 20)])
def test_full_rows_are_distributed_as_draws_one_by_one(num_items, max_len):
    rows = Ragged.of([range(1, length + 1) for length in (1, 2, 5, 10, 12)] * 4000)
    settings = corruption((0.3, 0.2, 0.5), num_items=num_items, max_len=max_len)
    slow, fast = slow_damage(rows, settings, seed=11), settings.draw(rows, keys_of(20_000))
    new = np.bincount(fast.sequences.rows, fast.operations == DELETE, 20_000)
    # Both the length and the catalog set limits that are often met, so they decide.
    full = (fast.sequences.lengths == max_len) | (new == num_items - rows.lengths)
    assert full.mean() > 0.1
    expected, found = statistics(slow), statistics(fast)
    for name in ("labels", "changed", "anchors"):
        assert found[name] == pytest.approx(expected[name], abs=0.01)
    assert found["length"] == pytest.approx(expected["length"], abs=0.06)
