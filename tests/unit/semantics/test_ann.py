import numpy as np
import pytest

from distrl.semantics.ann import build, candidates, from_bytes, sample_size, to_bytes
from distrl.semantics.nearest import Pool, Queries, among, directions_of, nearest, recall
from distrl.semantics.retrieve_config import RetrieveConfig

NUM, DIMENSION, FIRST = 600, 16, 1000


@pytest.fixture(scope="module")
def pool():
    """Clusters; groups of 1 to 59 vectors; two vectors without a direction."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((30, DIMENSION))
    vectors = centers[rng.integers(0, 30, NUM)] + 0.3 * rng.standard_normal((NUM, DIMENSION))
    vectors[[3, 500]] = 0
    groups = np.repeat(np.arange(60), np.arange(60))[:NUM]
    vectors = vectors.astype(np.float16)
    return Pool(vectors, groups, vectors.any(axis=1))


def config_of(index, **settings):
    config = RetrieveConfig(store_uri="s", embeddings="e", index=index, **settings)
    return config.resolved(NUM)


def index_of(pool, config):
    sample = directions_of(pool.vectors[pool.sought])[: sample_size(config)]
    return to_bytes(build([(FIRST, pool)], sample, config))


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
@pytest.mark.parametrize("most_more", [1, 20, 64])
def test_an_index_answers_with_other_groups_whatever_the_size_of_the_own(pool, index, most_more):
    config = config_of(index, num_probes=12, ef_search=200, most_more=most_more)
    queries = Queries.of(pool, FIRST, np.arange(NUM))
    found = candidates(from_bytes(index_of(pool, config)), queries, config)
    assert not np.isin([FIRST + 3, FIRST + 500], found).any()
    assert {FIRST - 1, FIRST + NUM}.isdisjoint(np.unique(found))
    pieces = [(FIRST, pool)]
    best = among(queries, found, pieces, 10)
    exact = nearest(queries, pieces, 10, 1 << 20)
    assert (best.numbers >= 0).all()
    assert recall(best, exact) > 0.95
    of_large = np.flatnonzero(queries.group_sizes > most_more)
    own = pool.groups[found[of_large].clip(FIRST) - FIRST] == queries.groups[of_large, None]
    assert not own[found[of_large] >= 0].any()


def test_one_probe_finds_less_than_all_of_them(pool):
    queries = Queries.of(pool, FIRST, np.arange(NUM))
    exact = nearest(queries, [(FIRST, pool)], 10, 1 << 20)
    shares = []
    for probes in (1, 49):
        config = config_of("ivf", num_probes=probes)
        found = candidates(from_bytes(index_of(pool, config)), queries, config)
        shares.append(recall(among(queries, found, [(FIRST, pool)], 10), exact))
    assert shares[0] < 0.9 < shares[1] == 1


def test_an_index_has_no_more_cells_than_it_is_trained_on(pool):
    config = config_of("ivf", num_lists=5000)
    content = index_of(pool, config)
    assert from_bytes(content).nlist == NUM - 2
    assert from_bytes(content).ntotal == NUM - 2
