"""The protocol of 99 random candidates: what it ranks, what it depends on, how it is labeled."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from distrl.contract import Catalog
from distrl.data.evaluation_config import EvaluationConfig
from distrl.data.id_hash import hash_ids
from distrl.errors import ConfigError
from distrl.methods import build, parse_method
from distrl.nn.histories import pad_histories
from distrl.ops.held_out import held_out_cases
from distrl.ops.metrics import MISS
from distrl.ops.negatives import NUM_NEGATIVES, UnseenItems, negative_keys, random_unseen_items
from distrl.ops.ragged import Ragged
from distrl.study.config import StudyConfig
from distrl.study.trials import trials
from distrl.tracking.verdict import Gate, judge
from distrl.train.evaluate import evaluate_local
from distrl.train.report import (
    SAMPLED_NOTE,
    as_csv,
    as_json,
    figure,
    length_table,
    main_table,
    picture,
)
from distrl.train.sampled import sampled_popularity, sampled_recency, shared_popularity_ranks
from tests.store_factory import make_store

NUM_ITEMS, MAX_LEN = 240, 6
SEQUENCES = [
    [1 + (u * u + i * (1 + u % 7)) % NUM_ITEMS for i in range(1 + u % 9)] for u in range(120)
]
SEQUENCES += [[5, 9, 5], [8, 8], [3, 4, 4, 6]]  # two targets that the user has met
SAMPLED = EvaluationConfig(protocol="sampled99", cutoffs=(5, 10, 20, 100), num_workers=0)
HELD = {"validation": 2, "test": 1}


def random_method(num_items=NUM_ITEMS, max_len=MAX_LEN):
    """Weights so large that the state turns with the history, and items that tie."""
    torch.manual_seed(3)
    config = parse_method({"name": "sasrec", "hidden_size": 8, "inner_size": 16})
    method = build(config, Catalog(num_items, max_len))
    with torch.no_grad():
        for weights in method.parameters():
            weights.mul_(10.0)
        method.encoder.item_table.weight[40:60] = method.encoder.item_table.weight[7]
    return method


@pytest.fixture
def store(tmp_path):
    make_store(tmp_path / "store", SEQUENCES, num_items=NUM_ITEMS)
    return str(tmp_path / "store")


def evaluated(store, split="test", **settings):
    config = SAMPLED.model_copy(update=settings)
    return evaluate_local(random_method(), MAX_LEN, store, split, config)


def histograms(result):
    return {name: counts.counts.tolist() for name, counts in result.ranks.items()}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_rank_equals_a_slow_restatement(store, split):
    """One user at a time: line, negatives, scores and the count of those no worse."""
    model = random_method().double().eval()
    ranks, num_tied = [], 0
    for user, sequence in enumerate(SEQUENCES):
        if len(sequence) <= HELD[split]:
            continue
        line = sequence[: len(sequence) - HELD[split] + 1]
        key = negative_keys(hash_ids(pa.array([user]), 0), split)
        unseen = UnseenItems.of(Ragged.of([line]), NUM_ITEMS)
        (negatives,) = random_unseen_items(unseen, NUM_NEGATIVES, key).tolist()
        assert not set(negatives) & set(line)
        with torch.no_grad():
            state = model.user_states(pad_histories(Ragged.of([line[:-1]]), MAX_LEN))[0]
            scores = (model.item_vectors @ state).tolist()
        # Vectors are read with 22 bits; what is closer than that is the same vector here.
        above = [scores[item] - scores[line[-1]] for item in negatives]
        num_tied += sum(abs(gain) < 1e-9 for gain in above)
        ranks.append(1 + sum(gain > -1e-9 for gain in above))
    expected = np.bincount(ranks, minlength=101)[1:].tolist()
    assert evaluated(store, split).ranks["model/sampled99"].counts.sum(axis=0)[:-1].tolist() == (
        expected
    )
    assert num_tied, "no negative ties with a target: the test shows too little"


@pytest.mark.parametrize("num_shards", [1, 5])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_ranks_depend_on_no_batch_and_no_shard(store, tmp_path, num_shards, batch_size):
    make_store(tmp_path / "other", SEQUENCES, num_shards=num_shards, num_items=NUM_ITEMS)
    other = evaluated(str(tmp_path / "other"), batch_size=batch_size)
    assert histograms(other) == histograms(evaluated(store))


def test_another_seed_is_another_sample(store):
    first, second = (evaluated(store, negatives_seed=seed) for seed in (0, 1))
    assert histograms(first)["model/sampled99"] != histograms(second)["model/sampled99"]
    assert (
        histograms(first)["repeat_recent/sampled99"]
        == (histograms(second)["repeat_recent/sampled99"])
    )


def test_noise_reaches_the_model_and_not_the_sample(store):
    clean, noisy = (histograms(evaluated(store, noise_share=share)) for share in (0.0, 0.5))
    assert noisy["model/sampled99"] != clean["model/sampled99"]
    assert noisy["popularity/sampled99"] == clean["popularity/sampled99"]


def test_a_random_scorer_has_a_tenth_of_its_targets_in_the_first_ten(tmp_path):
    generator = np.random.default_rng(2)
    lines = [(generator.permutation(400)[:5] + 1).tolist() for _ in range(3000)]
    make_store(tmp_path / "store", lines, num_items=400)
    torch.manual_seed(1)
    config = parse_method({"name": "sasrec", "hidden_size": 16, "inner_size": 16, "num_layers": 1})
    method = build(config, Catalog(400, 4))
    result = evaluate_local(method, 4, str(tmp_path / "store"), "test", SAMPLED)
    # Deviations of a mean over 3000 users: sqrt(0.1 * 0.9 / 3000) = 0.0055, and so on.
    assert result.metrics["sampled99/hr_at_10"] == pytest.approx(0.10, abs=4 * 0.0055)
    assert result.metrics["sampled99/hr_at_20"] == pytest.approx(0.20, abs=4 * 0.0073)
    assert result.metrics["sampled99/hr_at_100"] == 1.0
    ndcg = sum(1 / np.log2(rank + 1) for rank in range(1, 11)) / 100
    assert result.metrics["sampled99/ndcg_at_10"] == pytest.approx(ndcg, abs=4 * 0.003)
    # A random target is a random rank of popularity too, but ties count against it.
    popularity = result.ranks["popularity/sampled99"].metrics((10,))["hr_at_10"]
    assert 0.05 < popularity < 0.10 + 4 * 0.0055


def test_a_model_of_another_numbering_ranks_the_same_sample(store, tmp_path):
    order = np.random.default_rng(1).permutation(NUM_ITEMS) + 1
    renamed = np.concatenate([[0], order])
    method, other = random_method(), random_method()
    with torch.no_grad():
        other.encoder.item_table.weight[order] = method.encoder.item_table.weight[1 : NUM_ITEMS + 1]
    mapped = evaluate_local(other, MAX_LEN, store, "test", SAMPLED, item_map=renamed)
    assert histograms(mapped) == histograms(evaluate_local(method, MAX_LEN, store, "test", SAMPLED))


def test_popularity_shares_ranks_and_loses_ties():
    ranks = shared_popularity_ranks(np.array([99, 1, 4, 1, 0, 4, 7]))
    assert ranks.tolist() == [MISS, 4, 2, 4, 6, 2, 1]
    cases = held_out_cases(Ragged.of([[9, 2], [9, 1], [9, 6]]), "test")
    negatives = np.array([[5, 6, 1], [3, 4, 2], [1, 2, 3]])
    # 2: 5 as often and 6 more often; 1: 3 as often and 2 more often; 6 is met most.
    assert sampled_popularity(cases, negatives, ranks).tolist() == [3, 3, 1]


def test_repeat_recent_names_only_what_the_user_has_met():
    cases = held_out_cases(Ragged.of([[4, 2, 4], [1, 2, 3]]), "test")
    assert sampled_recency(cases).tolist() == [1, MISS]


def test_baselines_stand_beside_the_model(store):
    result = evaluated(store)
    assert set(result.ranks) == {
        f"{ranker}/sampled99" for ranker in ("model", "popularity", "repeat_recent")
    }
    assert {counts.num_cases for counts in result.ranks.values()} == {result.num_users}
    assert result.num_users == sum(len(sequence) > 1 for sequence in SEQUENCES)
    repeats = sum(len(s) > 1 and s[-1] in s[:-1] for s in SEQUENCES)
    assert repeats == 2
    assert result.ranks["repeat_recent/sampled99"].counts[:, 0].sum() == repeats


def test_every_output_is_labeled_and_none_says_masked(store):
    result = replace(evaluated(store), cutoffs=(5, 10))
    assert "\n" not in SAMPLED_NOTE
    assert "not comparable with full ranking" in SAMPLED_NOTE
    assert set(result.metrics) == {
        f"sampled99/{metric}_at_{k}" for metric in ("hr", "ndcg", "mrr") for k in (5, 10)
    }
    assert {key for row in result.by_length for key in row} == {
        "length", "num_users", *result.metrics
    }  # fmt: skip
    for table in (main_table(result), length_table(result)):
        assert SAMPLED_NOTE in table.splitlines()
        assert "whole catalog" not in table
    assert f"{result.metrics['sampled99/ndcg_at_10']:.4f}" in main_table(result)
    for ranker in ("model", "popularity", "repeat-recent"):
        (line,) = [line for line in main_table(result).splitlines() if f"  {ranker} " in line]
        assert line.startswith("sampled99  ")
    lines = list(csv.DictReader(io.StringIO(as_csv(result))))
    assert len(lines) == 3 * 6  # rankers, all users and five lengths
    assert {(line["policy"], line["note"]) for line in lines} == {("sampled99", SAMPLED_NOTE)}
    stored = json.loads(json.dumps(as_json(result)))
    assert (stored["protocol"], stored["note"]) == ("sampled99", SAMPLED_NOTE)
    assert stored["metrics"] == result.metrics
    (panel,) = figure(result).axes
    assert panel.get_title() == f"test split, {SAMPLED_NOTE}"
    assert picture(result).startswith(b"\x89PNG")
    for text in (main_table(result), length_table(result), as_csv(result), json.dumps(stored)):
        assert "masked" not in text
        assert "kept" not in text


def test_full_ranking_is_not_labeled_sampled(store):
    result = evaluated(store, protocol="full")
    assert {name.partition("/")[0] for name in result.metrics} == {"kept", "masked"}
    stored = as_json(result)
    assert stored["protocol"] == "full"
    assert "note" not in stored
    titles = [panel.get_title() for panel in figure(result).axes]
    assert titles == ["test split, seen items kept", "test split, seen items masked"]
    for text in (main_table(result), length_table(result), as_csv(result)):
        assert "sampled" not in text


def test_a_catalog_without_99_others_is_refused_before_a_shard_is_read(tmp_path):
    manifest = make_store(tmp_path / "store", [[1, 2, 3]], num_shards=1, num_items=99)
    (tmp_path / "store" / manifest.sequences[0].path).unlink()
    with pytest.raises(ConfigError, match=r"among 99 other items; .* has 99 in all") as raised:
        evaluate_local(random_method(99), MAX_LEN, str(tmp_path / "store"), "test", SAMPLED)
    assert len(str(raised.value).splitlines()) == 1


def test_users_with_too_few_unseen_items_are_counted_over_all_shards(tmp_path):
    # Of 101 items [1, 2, 3] leaves 98, and up to the validation target [1, 2] leaves 99.
    sequences = [[1, 2, 3], [4, 5], [6, 7, 8], [9, 9, 9], [10, 11, 12, 13], [5]]
    make_store(tmp_path / "store", sequences, num_shards=3, num_items=101)
    for batch_size in (1, 1000):
        config = SAMPLED.model_copy(update={"batch_size": batch_size})
        with pytest.raises(ConfigError, match="; 3 users have fewer left") as raised:
            evaluate_local(random_method(101), MAX_LEN, str(tmp_path / "store"), "test", config)
        assert len(str(raised.value).splitlines()) == 1
    make_store(tmp_path / "fewer", sequences[:4], num_shards=3, num_items=101)
    found = evaluate_local(
        random_method(101), MAX_LEN, str(tmp_path / "fewer"), "validation", SAMPLED
    )
    assert found.num_users == 3


def test_a_model_that_does_not_know_the_whole_catalog_is_refused(store):
    item_map = np.arange(NUM_ITEMS + 1)
    item_map[[17, 90]] = 0
    with pytest.raises(ConfigError, match="does not know 2 items of the store"):
        evaluate_local(random_method(), MAX_LEN, store, "test", SAMPLED, item_map=item_map)


def test_no_gate_takes_sampled_figures(store):
    metrics = evaluated(store).metrics
    with pytest.raises(ConfigError, match="the gate names ndcg_at_10; measured are sampled99/"):
        judge(metrics, metrics, Gate())


def test_no_study_takes_the_sampled_protocol(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "name: base\ndata: {store_uri: store, batch_size: 64}\nmethod: {name: sasrec}\n"
    )
    study = StudyConfig(
        name="s",
        base=str(tmp_path / "base.yaml"),
        evaluations={"test": (), "sampled": ("evaluation.protocol=sampled99",)},
    )
    with pytest.raises(ConfigError, match=r"jobs/evaluate\.py --protocol sampled99"):
        trials(study)
