import numpy as np

from distrl.semantics import ann, retrieve_tasks
from distrl.semantics.nearest import Pool, Queries, nearest
from distrl.semantics.retrieve_config import RetrieveConfig
from distrl.semantics.retrieve_tasks import PartIndex, Vectors, _search

SIZE, NUM_PIECES = 2500, 2


def test_a_task_goes_through_all_vectors_once_however_many_queries_it_has(monkeypatch):
    rng = np.random.default_rng(0)
    pools = []
    for piece in range(NUM_PIECES):
        drawn = rng.standard_normal((SIZE, 4)).astype(np.float16)
        groups = np.arange(SIZE) + piece * SIZE
        pools.append(Pool(drawn, groups, np.ones(SIZE, bool)))
    starts = (0, SIZE)
    config = RetrieveConfig(store_uri="s", embeddings="e", index="ivf", num_lists=8, num_probes=8)
    pieces = list(zip(starts, pools, strict=True))
    queries = Queries.joined([Queries.of(pool, start, np.arange(SIZE)) for start, pool in pieces])
    index = ann.to_bytes(ann.build(pieces, queries.directions[:500], config))
    got = []

    def get(there):
        got.append(there)
        return there

    # What is in the object store stands for its references.
    monkeypatch.setattr(retrieve_tasks.ray, "get", get)
    vectors = Vectors("windows", starts, (SIZE, SIZE), tuple(pools))
    best, again = _search(queries, vectors.with_indexes([PartIndex(index, (0, 2))]), config)
    assert len(got) == 1 + NUM_PIECES
    assert again == 0
    assert (best.numbers == nearest(queries, pieces, 10, 1 << 20).numbers).mean() > 0.99
