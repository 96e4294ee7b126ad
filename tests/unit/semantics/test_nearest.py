import numpy as np
import pytest

from distrl.semantics import nearest as module
from distrl.semantics.nearest import Best, Pool, Queries, among, directions_of, nearest, recall

BLOCK = 1 << 20


def pool_of(rows, groups=None):
    vectors = np.array(rows, np.float16)
    groups = np.arange(len(rows)) if groups is None else np.array(groups)
    return Pool(vectors, groups, vectors.any(axis=1))


def nearest_within(pool, num_neighbors, block_bytes=BLOCK, num_pieces=1):
    """Neighbors of all that have any, cut into pieces at whole groups."""
    ends = np.searchsorted(pool.groups, np.array_split(np.unique(pool.groups), num_pieces)[-1])
    pieces = [(0, Pool(*(part[: ends[0]] for part in pool)))] if num_pieces > 1 else []
    first = ends[0] if num_pieces > 1 else 0
    pieces.append((int(first), Pool(*(part[first:] for part in pool))))
    queries = Queries.of(pool, 0, np.arange(len(pool.groups)))
    return nearest(queries, pieces, num_neighbors, block_bytes)


# By angle: 0 at 0, 1 at 90, 2 at about 37, 3 at 0 but longer, 4 at 180 degrees, 5 nowhere.
SIX = [[1, 0], [0, 2], [4, 3], [3, 0], [-1, 0], [0, 0]]


def test_neighbors_are_by_cosine_and_the_lower_number_wins_a_tie():
    best = nearest_within(pool_of(SIX), 3)
    assert best.numbers.tolist() == [[3, 2, 1], [2, 0, 3], [0, 3, 1], [0, 2, 1], [1, 2, 0]]
    np.testing.assert_allclose(
        best.scores, [[1, 0.8, 0], [0.6, 0, 0], [0.8, 0.8, 0.6], [1, 0.8, 0], [0, -0.8, -1]],
        atol=1e-6,
    )  # fmt: skip


def test_a_group_is_left_out_and_lists_become_shorter():
    best = nearest_within(pool_of(SIX, [0, 0, 7, 8, 8, 9]), 4)
    assert best.numbers.tolist() == [
        [3, 2, 4, -1],
        [2, 3, 4, -1],
        [0, 3, 1, 4],
        [0, 2, 1, -1],
        [1, 2, 0, -1],
    ]
    assert np.isneginf(best.scores[0, 3])


def by_loop(pool, num_neighbors):
    wide = pool.vectors.astype(np.float64)
    found = []
    for query in np.flatnonzero(pool.sought):
        scored = []
        for other in range(len(wide)):
            if pool.groups[other] != pool.groups[query] and wide[other].any():
                norms = np.linalg.norm(wide[query]) * np.linalg.norm(wide[other])
                scored.append((-round(float(wide[query] @ wide[other] / norms), 6), other))
        numbers = [other for _, other in sorted(scored)[:num_neighbors]]
        found.append(numbers + [-1] * (num_neighbors - len(numbers)))
    return found


@pytest.mark.parametrize("block_bytes", [144, 4000, BLOCK])
@pytest.mark.parametrize("num_pieces", [1, 2])
@pytest.mark.parametrize("num_neighbors", [1, 10, 200])
def test_blocks_and_pieces_find_what_a_loop_finds(block_bytes, num_pieces, num_neighbors):
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((120, 5))
    vectors[60:90] = vectors[:30]
    vectors[rng.integers(0, 120, 9)] = 0
    pool = pool_of(vectors, np.sort(rng.integers(0, 30, 120)))
    best = nearest_within(pool, num_neighbors, block_bytes, num_pieces)
    assert best.numbers.tolist() == by_loop(pool, num_neighbors)


def test_a_crowd_of_equal_vectors_gives_the_lowest_numbers_in_any_blocks():
    rng = np.random.default_rng(6)
    one = rng.standard_normal(48)
    pool = pool_of(np.tile(one, (700, 1)))
    for block_bytes in (4 * 33**2, BLOCK):
        best = nearest_within(pool, 4, block_bytes)
        assert best.numbers[300].tolist() == [0, 1, 2, 3]
        assert best.numbers[1].tolist() == [0, 2, 3, 4]
        assert (best.scores == best.scores[0, 0]).all()


def test_similarities_have_no_rounding_error():
    rng = np.random.default_rng(7)
    pool = pool_of(rng.standard_normal((40, 384)))
    grid = np.rint(directions_of(pool.vectors).astype(np.float64) * 2**24).astype(np.int64)
    exact = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in grid.tolist()]
             for x in grid.tolist()]  # fmt: skip
    best = nearest_within(pool, 39)
    for query, (numbers, scores) in enumerate(zip(best.numbers, best.scores, strict=True)):
        assert [int(score * 2**48) for score in scores] == [exact[query][n] for n in numbers]


def test_candidates_are_ranked_as_all_are_and_none_is_minus_one():
    pool = pool_of(SIX, [0, 0, 7, 8, 8, 9])
    queries = Queries.of(pool, 0, np.array([0, 2]))
    candidates = np.array([[4, -1, 1, 2], [1, 3, 0, -1]])
    pieces = [(0, Pool(*(part[:3] for part in pool))), (3, Pool(*(part[3:] for part in pool)))]
    best = among(queries, candidates, pieces, 3)
    assert best.numbers.tolist() == [[2, 4, -1], [0, 3, 1]]


def test_queries_know_where_their_group_is():
    pool = pool_of(SIX, [2, 2, 2, 8, 8, 9])
    queries = Queries.of(pool, 100, np.array([1, 4, 5]))
    assert queries.group_first.tolist() == [100, 103]
    assert queries.group_sizes.tolist() == [3, 2]
    joined = Queries.joined([queries, queries.take(np.array([1]))])
    assert joined.groups.tolist() == [2, 8, 8]


def best_of(scores, numbers):
    best = Best(*np.shape(scores))
    rows = np.repeat(np.arange(len(scores)), len(scores[0]))
    best.add(rows, np.ravel(scores).astype(float), np.ravel(numbers))
    return best


def test_recall_counts_any_of_several_equals_as_found():
    exact = best_of([[0.9, 0.5], [0.7, 0.7]], [[1, 2], [3, 4]])
    assert recall(exact, exact) == 1
    assert recall(best_of([[0.9, 0.4], [0.7, 0.7]], [[1, 9], [8, 9]]), exact) == 0.75
    short = best_of([[0.9, -np.inf], [-np.inf, -np.inf]], [[1, -1], [-1, -1]])
    assert recall(short, exact) == 0.25
    assert recall(exact, short) == 1


def test_candidates_are_compared_in_blocks_that_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    pool = pool_of(rng.standard_normal((60, 5)), np.repeat(np.arange(20), 3))
    queries = Queries.of(pool, 0, np.arange(60))
    candidates = np.stack([rng.permutation(60)[:25] for _ in range(60)])
    candidates[::4, 20:] = -1
    pieces = [(0, Pool(*(part[:33] for part in pool))), (33, Pool(*(part[33:] for part in pool)))]
    whole = among(queries, candidates, pieces, 4)
    sizes = []

    def counted(vectors):
        sizes.append(len(vectors))
        return directions_of(vectors)

    monkeypatch.setattr(module, "_PAIRS_AT_ONCE", 7)
    monkeypatch.setattr(module, "_ADDED_AT_ONCE", 100)
    monkeypatch.setattr(module, "directions_of", counted)
    blocks = among(queries, candidates, pieces, 4)
    assert (blocks.numbers == whole.numbers).all()
    assert (blocks.scores == whole.scores).all()
    assert max(sizes) <= 7
