from collections.abc import Sequence

import pyarrow as pa
import pytest
import torch
from torch import nn

from distrl.contract import Catalog, Method
from distrl.errors import SchemaError
from distrl.methods.sasrec import SASRecConfig
from distrl.serving.artifact import Artifact
from distrl.serving.recommender import Recommender


class NewestItem(Method):
    """A user is the vector of the newest item, so that scores can be worked out by hand."""

    def __init__(self, vectors: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.tensor(vectors), freeze=False)

    @property
    def parts(self):
        return {"table": self.table}

    def phases(self, epoch):
        raise AssertionError("only asked for recommendations")

    def forward(self, batch, phase):
        raise AssertionError("only asked for recommendations")

    def user_states(self, histories):
        return self.table(histories.items.flatten()[histories.last])

    @property
    def item_vectors(self):
        return self.table.weight


# PAD would win every time if it were not left out. 3 and 4 are equal, so the lower id goes first.
VECTORS = [[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]]
ITEMS = pa.array(["one", "two", "three", "four"])


@pytest.fixture
def recommender():
    artifact = Artifact(NewestItem(VECTORS), SASRecConfig(), Catalog(4, 3), ITEMS)
    return Recommender(artifact)


def ask(recommender, histories, k=4, *, mask_seen=False):
    answer = recommender.recommend(
        pa.array(histories, type=pa.list_(pa.string())), k, mask_seen=mask_seen
    )
    return answer.items.to_pylist(), answer.scores.to_pylist(), answer.num_unknown.tolist()


def test_items_rank_by_score_and_equal_scores_by_frequency(recommender):
    items, scores, _ = ask(recommender, [["two", "one"], ["one", "two"]])
    assert items == [["one", "three", "four", "two"], ["two", "three", "four", "one"]]
    assert scores == [[1.0, 0.5, 0.5, 0.0], [1.0, 0.5, 0.5, 0.0]]


def test_masked_items_of_the_history_are_left_out_even_beyond_the_models_reach(recommender):
    long = ["four", "one", "one", "one"]  # the model reads three
    items, scores, _ = ask(recommender, [long], mask_seen=True)
    assert items == [["three", "two"]]
    assert scores == [[0.5, 0.0]]


def test_unknown_items_are_counted_and_passed_over(recommender):
    items, _, unknown = ask(recommender, [["two", "nine", "one", "ten", None]], k=1)
    assert items == [["one"]]
    assert unknown == [3]


def test_a_history_without_known_items_gets_the_most_frequent_with_score_0(recommender):
    items, scores, unknown = ask(recommender, [[], ["nine"], ["one"], None], k=2)
    assert items == [["one", "two"], ["one", "two"], ["one", "three"], ["one", "two"]]
    assert scores == [[0.0, 0.0], [0.0, 0.0], [1.0, 0.5], [0.0, 0.0]]
    assert unknown == [0, 1, 0, 0]


def test_an_answer_does_not_depend_on_what_is_asked_with_it(recommender):
    histories = [["one"], [], ["two", "four"], ["nine", "three"]] * 150  # more than one pass
    together = ask(recommender, histories, k=3)
    alone = [ask(recommender, [history], k=3) for history in histories[:4]]
    for part in range(3):
        assert together[part] == [one[part][0] for one in alone] * 150


def test_more_than_the_catalog_is_the_catalog(recommender):
    items, _, _ = ask(recommender, [["one"], []], k=9)
    assert [len(row) for row in items] == [4, 4]


def test_no_histories_get_no_answers(recommender):
    assert ask(recommender, []) == ([], [], [])


def test_asking_for_nothing_is_an_error(recommender):
    with pytest.raises(SchemaError, match="k=0: at least 1"):
        ask(recommender, [["one"]], k=0)
