"""Ranking a store: the same numbers however it is cut up, and the job that prints them."""

import copy
import json
import math
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.train import Checkpoint
from safetensors.torch import save_file

from distrl.contract import Catalog
from distrl.data.config import DataConfig
from distrl.data.evaluation_config import EvaluationConfig
from distrl.data.store import read_manifest
from distrl.errors import CheckpointError, DivergedError, SchemaError
from distrl.methods import build, parse_method
from distrl.nn.histories import pad_histories
from distrl.ops.metrics import MISS
from distrl.ops.ragged import Ragged
from distrl.schema import MANIFEST_NAME
from distrl.serving.artifact import Artifact
from distrl.serving.recommender import Recommender
from distrl.train.evaluate import (
    evaluate_local,
    evaluate_model,
    ranked_shards,
    write_best_items,
)
from distrl.train.fleet import ranking_fleet
from distrl.train.ranker import Ranker, RankingTask
from distrl.train.report import as_csv, as_json, length_table, main_table, picture
from distrl.train.validate import validate
from jobs.command import run
from jobs.evaluate import main
from tests.integration.s3_server import start_s3
from tests.integration.servers import run_job
from tests.store_factory import make_store

NUM_ITEMS, NUM_USERS, MAX_LEN = 5200, 400, 20
ITEM_IDS = pa.array([f"item-{i}" for i in range(1, NUM_ITEMS + 1)])
ALL_RANKS = EvaluationConfig(cutoffs=(5, 10, 20, NUM_ITEMS), num_workers=0, cpus_per_worker=0.5)
"""Every rank of the catalog is counted apart, so that no difference can hide behind a cutoff."""


def random_sequences(seed=3):
    """Sequences of 1 to 40 items, a few items in most of them, so that users meet items again."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 41, NUM_USERS)
    draws = (generator.pareto(0.6, lengths.sum()) * 3).astype(np.int64) % NUM_ITEMS + 1
    return [row.tolist() for row in np.split(draws, np.cumsum(lengths)[:-1])]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The same sequences in one shard and in five."""
    folder = tmp_path_factory.mktemp("stores")
    for num_shards in (1, 5):
        make_store(
            folder / str(num_shards), random_sequences(), num_shards=num_shards, num_items=NUM_ITEMS
        )
    return {number: str(folder / str(number)) for number in (1, 5)}


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(5)
    method = build(parse_method({"name": "sasrec"}), Catalog(NUM_ITEMS, MAX_LEN))
    with torch.no_grad():  # a few items with one vector tie in every ranking
        method.encoder.item_table.weight[40:60] = method.encoder.item_table.weight[7]
    return method


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory(prefix="distrl-ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def reference(stores, method):
    return evaluate_local(method, MAX_LEN, stores[1], "test", ALL_RANKS)


def same_counts(one, other):
    assert one.ranks.keys() == other.ranks.keys()
    for name, counts in one.ranks.items():
        np.testing.assert_array_equal(counts.counts, other.ranks[name].counts, err_msg=name)
    assert (one.num_users, one.num_skipped, one.num_unknown) == (
        other.num_users,
        other.num_skipped,
        other.num_unknown,
    )
    assert one.metrics == other.metrics


@pytest.mark.parametrize("batch_size", [7, 64, 1000])
@pytest.mark.parametrize("item_chunk", [100, 5000])
def test_ranks_do_not_depend_on_chunks_or_sharding(
    stores, method, reference, batch_size, item_chunk
):
    config = ALL_RANKS.model_copy(update={"batch_size": batch_size, "item_chunk": item_chunk})
    same_counts(evaluate_local(method, MAX_LEN, stores[5], "test", config), reference)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_ranks_do_not_depend_on_the_number_of_workers(
    cluster, stores, method, reference, num_workers
):
    config = ALL_RANKS.model_copy(update={"num_workers": num_workers})
    same_counts(evaluate_model(method, MAX_LEN, stores[5], "test", config), reference)


def test_a_worker_that_dies_is_replaced_and_nothing_is_counted_twice(
    cluster, stores, method, reference
):
    config = ALL_RANKS.model_copy(update={"num_workers": 2})
    task = RankingTask(MAX_LEN, stores[5], "test", config, popularity=None, item_map=None)
    shards = read_manifest(stores[5]).sequences
    with ranking_fleet(method, task, len(shards)) as fleet:
        tallies = fleet.rank(shards, lambda users: None)
        total = next(tallies)
        ray.kill(fleet.actors[0], no_restart=False)
        for tally in tallies:
            total += tally
    expected = reference.ranks["model/kept"].counts
    np.testing.assert_array_equal(total.ranks["model/kept"].counts, expected)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_rank_equals_a_slow_restatement(stores, method, split):
    """One user at a time, all scores sorted by (score, id); histories cut by hand."""
    result = evaluate_local(method, MAX_LEN, stores[5], split, ALL_RANKS)
    held = {"validation": 2, "test": 1}[split]
    model = build(parse_method({"name": "sasrec"}), Catalog(NUM_ITEMS, MAX_LEN))
    model.load_state_dict(method.state_dict())
    recommender_order = _orders(model.double().eval())
    expected = {"kept": [], "masked": []}
    for sequence in random_sequences():
        if len(sequence) <= held:
            continue
        history, target = sequence[:-held], sequence[-held]
        order = recommender_order(history)
        expected["kept"].append(order.index(target) + 1)
        unseen = [item for item in order if item not in history]
        expected["masked"].append(unseen.index(target) + 1 if target in unseen else MISS)
    assert MISS in expected["masked"], "no target was seen before: the test shows too little"
    for policy, ranks in expected.items():
        counted = result.ranks[f"model/{policy}"].counts.sum(axis=0)
        columns = [NUM_ITEMS if rank == MISS else rank - 1 for rank in ranks]
        np.testing.assert_array_equal(counted, np.bincount(columns, minlength=NUM_ITEMS + 1))


def _orders(model):
    """The whole catalog in the order of one history: scores rounded, so that ties are ties."""
    vectors = model.item_vectors.detach()[1:]

    def order(history):
        with torch.no_grad():
            state = model.user_states(pad_histories(Ragged.of([history]), MAX_LEN))[0]
        scores = (vectors @ state).round(decimals=9)
        return (torch.sort(scores, descending=True, stable=True).indices + 1).tolist()

    return order


def test_a_user_needs_a_history_and_the_short_ones_are_counted(reference):
    too_short = sum(len(sequence) < 2 for sequence in random_sequences())
    assert too_short > 0
    assert reference.num_skipped == too_short
    assert reference.num_users == NUM_USERS - too_short


def test_baselines_by_hand(tmp_path):
    # Training parts: [1 2 1 3], [2 2], [3]: item 1 twice, 2 three times, 3 twice, 4 and 5 never.
    # Popularity therefore ranks 2, 1, 3, 4, 5.
    sequences = [[1, 2, 1, 3, 3, 2], [2, 2, 4, 4], [3, 1, 5], [4]]
    make_store(tmp_path / "store", sequences, num_shards=2)
    method = build(parse_method({"name": "sasrec"}), Catalog(5, MAX_LEN))
    config = EvaluationConfig(cutoffs=(1, 2, 3, 5), num_workers=0)
    ranks = evaluate_local(method, MAX_LEN, str(tmp_path / "store"), "test", config).ranks

    def histogram(name):
        return ranks[name].counts.sum(axis=0).tolist()

    # Targets 2, 4, 5: first, fourth and fifth in popularity. Masked: 2 was seen, 4 was seen, and
    # the third user has seen 3 and 1, both before 5.
    assert histogram("popularity/kept") == [1, 0, 0, 1, 1, 0]
    assert histogram("popularity/masked") == [0, 0, 1, 0, 0, 2]
    # Newest first: [3, 1, 2] for target 2, [4, 2] for 4, [1, 3] for 5.
    assert histogram("repeat_recent/kept") == [1, 0, 1, 0, 0, 1]
    assert histogram("repeat_recent/masked") == [0, 0, 0, 0, 0, 3]


def test_a_model_of_another_catalog_ranks_through_an_item_map(tmp_path, stores, method, reference):
    order = np.random.default_rng(1).permutation(NUM_ITEMS) + 1
    renumbered = np.concatenate([[0], np.argsort(order) + 1])
    make_store(
        tmp_path / "store",
        [renumbered[sequence].tolist() for sequence in random_sequences()],
        num_items=NUM_ITEMS,
    )
    back = np.concatenate([[0], order])
    result = evaluate_local(
        method, MAX_LEN, str(tmp_path / "store"), "test", ALL_RANKS, item_map=back
    )
    for name in ("model/kept", "model/masked"):
        np.testing.assert_array_equal(result.ranks[name].counts, reference.ranks[name].counts)


def test_items_that_the_model_does_not_know_are_misses(tmp_path, method):
    make_store(tmp_path / "store", [[1, 2, 3], [3, 3, 1], [3, 2]], num_items=3)
    knows_1_and_2 = np.array([0, 11, 12, 0])
    result = evaluate_local(
        method, MAX_LEN, str(tmp_path / "store"), "test", ALL_RANKS, item_map=knows_1_and_2
    )
    # A target unknown; a history all unknown, twice.
    assert result.num_unknown == 3
    assert result.metrics[f"kept/hr_at_{NUM_ITEMS}"] == 0
    assert result.num_users == 3


def test_another_catalog_without_a_map_is_refused(tmp_path, method):
    make_store(tmp_path / "store", [[1, 2, 3]], num_shards=1)
    with pytest.raises(SchemaError, match=r"5200 items .* has 3"):
        evaluate_local(method, MAX_LEN, str(tmp_path / "store"), "test", ALL_RANKS)


def test_evaluating_leaves_the_model_as_it_was(stores, method):
    method.train()
    evaluate_local(method, MAX_LEN, stores[1], "test", ALL_RANKS)
    assert method.training
    assert method.encoder.item_table.weight.dtype == torch.float32
    assert method.encoder.item_table.weight.requires_grad


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_torn_shard_is_one_clear_error(cluster, tmp_path, num_workers):
    manifest = make_store(tmp_path / "store", random_sequences()[:50], num_items=NUM_ITEMS)
    path = tmp_path / "store" / manifest.sequences[1].path
    path.write_bytes(path.read_bytes()[:-100])
    method = build(parse_method({"name": "sasrec"}), Catalog(NUM_ITEMS, MAX_LEN))
    config = ALL_RANKS.model_copy(update={"num_workers": num_workers})
    with pytest.raises(SchemaError, match=r"part-00001\.parquet is torn") as raised:
        evaluate_model(method, MAX_LEN, str(tmp_path / "store"), "test", config)
    assert len(str(raised.value).splitlines()) == 1


def test_a_shard_of_another_length_than_promised_is_named(tmp_path, method):
    manifest = make_store(tmp_path / "store", random_sequences()[:50], num_items=NUM_ITEMS)
    first, second = manifest.sequences
    lying = manifest.model_copy(
        update={"sequences": (first, second.model_copy(update={"rows": 77}))}
    )
    (tmp_path / "store" / MANIFEST_NAME).write_text(lying.model_dump_json())
    with pytest.raises(SchemaError, match="holds 25 users, its manifest says 77"):
        evaluate_local(method, MAX_LEN, str(tmp_path / "store"), "test", ALL_RANKS)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_model_with_a_nan_is_refused(cluster, stores, num_workers):
    broken = build(parse_method({"name": "sasrec"}), Catalog(NUM_ITEMS, MAX_LEN))
    with torch.no_grad():
        broken.encoder.item_table.weight[17, 3] = float("nan")
    config = ALL_RANKS.model_copy(update={"num_workers": num_workers})
    with pytest.raises(DivergedError, match="NaN or infinite"):
        evaluate_model(broken, MAX_LEN, stores[5], "test", config)


def test_a_store_without_a_case_is_refused(tmp_path, method):
    make_store(tmp_path / "store", [[1], [2], [3]], num_shards=1, num_items=NUM_ITEMS)
    with pytest.raises(SchemaError, match="no user has a test case: all 3"):
        evaluate_local(method, MAX_LEN, str(tmp_path / "store"), "test", ALL_RANKS)


def test_reports_say_what_was_counted(reference):
    small = replace(reference, cutoffs=(5, 10))
    table = main_table(small)
    assert f"{small.num_users:,} users" in table
    for figure in ("kept/hr_at_5", "masked/mrr_at_10"):
        assert f"{small.metrics[figure]:.4f}" in table
    for said in ("model", "popularity", "repeat-recent", "seen kept", "seen masked", "NDCG@10"):
        assert said in table
    assert [row["length"] for row in small.by_length] == ["<=5", "6-8", "9-20", "21-50", ">50"]
    assert sum(row["num_users"] for row in small.by_length) == small.num_users
    assert "21-50" in length_table(small)
    stored = json.loads(json.dumps(as_json(small)))
    assert stored["metrics"] == small.metrics
    lines = as_csv(small).splitlines()
    assert lines[0].startswith("policy,ranker,length,num_users,hr_at_5")
    assert len(lines) == 1 + 2 * 3 * 6  # policies, rankers, all users and five lengths
    assert picture(small).startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, stores, method):
    """A checkpoint's folder as training writes it, without optimizer states."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint-000000007"
    folder.mkdir()
    weights = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"content": "weights"})
    run = {
        "name": "run",
        "method": method.config.model_dump(mode="json"),
        "data": DataConfig(store_uri=stores[5], max_len=MAX_LEN).model_dump(mode="json"),
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def test_validation_ranks_a_checkpoint_on_the_validation_split(stores, method, checkpoint):
    config = EvaluationConfig(cutoffs=(5, 20), num_workers=0)
    metrics = validate(
        Checkpoint.from_directory(checkpoint), store_uri=stores[5], config=config, step=7, epoch=1.0
    )
    expected = evaluate_local(method, MAX_LEN, stores[5], "validation", ALL_RANKS).metrics
    # NDCG@10 chooses the best checkpoint, so it is there whatever cutoffs are configured.
    assert metrics["val/ndcg_at_10"] == expected["kept/ndcg_at_10"]
    assert metrics["val/masked/hr_at_20"] == expected["masked/hr_at_20"]
    assert metrics["val/num_users"] == sum(len(s) >= 3 for s in random_sequences())


@pytest.mark.parametrize(("wanted", "num_shards"), [(1, 1), (10_000, 5), (None, 5)])
def test_validation_of_some_users_ranks_those_of_the_first_shards(
    stores, method, wanted, num_shards
):
    config = ALL_RANKS.model_copy(update={"validation_users": wanted})
    result = evaluate_local(method, MAX_LEN, stores[5], "validation", config)
    task = RankingTask(MAX_LEN, stores[5], "validation", config, popularity=None, item_map=None)
    ranker = Ranker(copy.deepcopy(method), task)
    shards = read_manifest(stores[5]).sequences[:num_shards]
    expected = reduce(add, (ranker.rank(shard) for shard in shards))
    same = result.ranks["model/kept"].counts, expected.ranks["model/kept"].counts
    np.testing.assert_array_equal(*same)
    assert 0 < result.num_users <= sum(shard.rows for shard in shards)
    # The test split is always ranked whole.
    whole = evaluate_local(method, MAX_LEN, stores[5], "test", config)
    assert whole.num_users == sum(len(sequence) >= 2 for sequence in random_sequences())


def test_a_few_more_users_than_are_wanted_come_with_their_shards(stores):
    manifest = read_manifest(stores[5])
    first, second, *_ = (shard.rows for shard in manifest.sequences)
    for wanted, rows in ((first, first), (first + 1, first + second)):
        config = EvaluationConfig(validation_users=wanted)
        assert sum(s.rows for s in ranked_shards(manifest, "validation", config)) == rows


@ray.remote
class Told:
    """Keeps what it is told."""

    def __init__(self):
        self.messages = []

    def tell(self, message):
        self.messages.append(message)

    def all(self):
        return self.messages


def test_validation_of_something_else_is_refused_and_the_user_is_told(cluster, stores, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    told = Told.remote()
    with pytest.raises(CheckpointError, match=r"holds no model.safetensors"):
        validate(
            Checkpoint.from_directory(tmp_path),
            store_uri=stores[5],
            config=ALL_RANKS,
            step=12,
            epoch=0.0,
            monitor=told,
        )
    (message,) = ray.get(told.all.remote())
    assert message.startswith("warning: validating step 12 failed: ")
    assert "holds no model.safetensors" in message


def test_the_job_prints_and_writes_one_checkpoints_figures(stores, checkpoint, method, tmp_path):
    done = run_job(
        "jobs/evaluate.py",
        f"checkpoint_uri={checkpoint}",
        f"output_uri={tmp_path}/figures",
        f"top_k_uri={tmp_path}/best",
        "top_k=5",
        "evaluation.num_workers=0",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = evaluate_local(method, MAX_LEN, stores[5], "test", EvaluationConfig(num_workers=0))
    assert main_table(expected) in done.stdout
    assert length_table(expected) in done.stdout
    figures = json.loads((tmp_path / "figures" / "evaluation-test.json").read_text())
    assert figures["metrics"] == expected.metrics
    assert (tmp_path / "figures" / "evaluation-test.csv").read_text() == as_csv(expected)
    assert (tmp_path / "figures" / "evaluation-test.png").stat().st_size > 10_000

    check_best_items(tmp_path / "best", method)


def test_sampled_ranks_do_not_depend_on_the_number_of_workers(cluster, stores, method):
    config = ALL_RANKS.model_copy(update={"protocol": "sampled99", "cutoffs": (5, 10, 20, 100)})
    expected = evaluate_local(method, MAX_LEN, stores[1], "test", config)
    two = config.model_copy(update={"num_workers": 2})
    same_counts(evaluate_model(method, MAX_LEN, stores[5], "test", two), expected)


def test_the_job_takes_the_sampled_protocol_as_a_flag(stores, checkpoint, method, tmp_path):
    done = run_job(
        "jobs/evaluate.py",
        f"checkpoint_uri={checkpoint}",
        "--protocol",
        "sampled99",
        f"output_uri={tmp_path}",
        "evaluation.num_workers=0",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    config = EvaluationConfig(num_workers=0, protocol="sampled99")
    expected = evaluate_local(method, MAX_LEN, stores[5], "test", config)
    assert main_table(expected) in done.stdout
    assert length_table(expected) in done.stdout
    names = {f"evaluation-test-sampled99.{ending}" for ending in ("json", "csv", "png")}
    assert {path.name for path in tmp_path.iterdir()} == names
    figures = json.loads((tmp_path / "evaluation-test-sampled99.json").read_text())
    assert (figures["protocol"], figures["metrics"]) == ("sampled99", expected.metrics)


@pytest.mark.parametrize("mask_seen", [False, True])
def test_workers_write_every_users_best_items(cluster, stores, method, tmp_path, mask_seen):
    config = ALL_RANKS.model_copy(update={"num_workers": 2})
    task = RankingTask(MAX_LEN, stores[5], "test", config, popularity=None, item_map=None)
    num_users = write_best_items(
        method, task, ITEM_IDS, 5, str(tmp_path / "best"), mask_seen=mask_seen
    )
    assert num_users == check_best_items(tmp_path / "best", method, mask_seen=mask_seen)


def check_best_items(folder, method, *, mask_seen=False):
    """What was written is what the served model answers to the same histories."""
    written = pq.read_table(sorted(folder.glob("part-*.parquet"))).sort_by("user")
    sequences = {user: s for user, s in enumerate(random_sequences()) if len(s) > 1}
    assert written["user"].to_pylist() == list(sequences)
    catalog = Catalog(NUM_ITEMS, MAX_LEN)
    served = build(method.config, catalog)
    served.load_state_dict(method.state_dict())
    answers = Recommender(Artifact(served, method.config, catalog, ITEM_IDS)).recommend(
        pa.array([[f"item-{i}" for i in s[:-1]] for s in sequences.values()]),
        5,
        mask_seen=mask_seen,
    )
    assert written["items"].to_pylist() == answers.items.to_pylist()
    np.testing.assert_allclose(
        written["scores"].combine_chunks().flatten(), answers.scores.flatten(), rtol=1e-5
    )
    return len(sequences)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["split=tst", "checkpoint_uri=x"], "split='tst'"),
        (["store_uri=x"], "exactly one"),
        (["checkpoint_uri=/nowhere/checkpoint"], "/nowhere/checkpoint is no checkpoint"),
        (["checkpoint_uri=x", "evaluation.cutoffs=[20,10]"], "not rising"),
        (["checkpoint_uri=x", "evaluation.protocol=sampled"], "'full' or 'sampled99'"),
    ],
)
def test_the_job_says_in_one_line_what_is_wrong(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", f"output_uri={tmp_path}", *arguments])
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert said in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_beauty_has_no_repeats_and_popularity_counts_training_parts(tmp_path, beauty_file):
    sequences = [[int(i) for i in line.split()[1:]] for line in beauty_file.open()]
    counts = np.bincount(np.concatenate([np.array(s) for s in sequences]))
    dense = np.empty(len(counts), dtype=np.int64)
    dense[np.argsort(-counts[1:], kind="stable") + 1] = np.arange(1, len(counts))
    make_store(tmp_path / "store", [dense[s].tolist() for s in sequences])
    method = build(
        parse_method({"name": "sasrec", "hidden_size": 8, "num_layers": 1}), Catalog(12101, 50)
    )
    config = EvaluationConfig(num_workers=0, dtype="float32")
    result = evaluate_local(method, 50, str(tmp_path / "store"), "test", config)
    assert result.num_users == 22363
    assert [row["num_users"] for row in result.by_length] == [7162, 8712, 5353, 983, 153]
    for policy in ("kept", "masked"):
        assert result.ranks[f"repeat_recent/{policy}"].metrics([20])["hr_at_20"] == 0
    popularity = result.ranks["popularity/kept"].metrics([10])
    in_training = Counter(int(dense[item]) for s in sequences for item in s[:-2])
    best = sorted(range(1, 12102), key=lambda item: (-in_training[item], item))[:10]
    places = [best.index(int(dense[s[-1]])) for s in sequences if int(dense[s[-1]]) in best]
    assert popularity["hr_at_10"] == pytest.approx(len(places) / 22363)
    gains = sum(1 / math.log2(place + 2) for place in places)
    assert popularity["ndcg_at_10"] == pytest.approx(gains / 22363)


def test_everything_may_lie_on_s3(tmp_path, stores, checkpoint, method, monkeypatch, capsys):
    with start_s3(tmp_path / "s3") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        bucket = server.create_bucket("evaluate")
        upload(Path(stores[5]), server, "store")
        moved = tmp_path / "checkpoint"
        moved.mkdir()
        run_settings = json.loads((checkpoint / "run.json").read_text())
        run_settings["data"]["store_uri"] = f"{bucket}/store"
        (moved / "run.json").write_text(json.dumps(run_settings))
        (moved / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
        upload(moved, server, "run/checkpoint")
        arguments = [f"output_uri={bucket}/figures", "evaluation.num_workers=0", "top_k=3"]

        def job(*more):
            monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, *more])
            with pytest.raises(SystemExit) as ended:
                run(main)
            return ended.value.code, capsys.readouterr()

        best = f"top_k_uri={bucket}/best"
        code, said = job(f"checkpoint_uri={bucket}/run/checkpoint", best)
        assert code == 0, said.err
        expected = evaluate_local(
            method, MAX_LEN, stores[1], "test", EvaluationConfig(num_workers=0)
        )
        assert main_table(expected) in said.out
        listed = server.client().list_objects_v2(Bucket="evaluate")["Contents"]
        keys = {entry["Key"] for entry in listed}
        assert {f"figures/evaluation-test.{end}" for end in ("json", "csv", "png")} <= keys
        assert {f"best/part-{number:05d}.parquet" for number in range(5)} <= keys

        code, said = job(f"checkpoint_uri={bucket}/run/checkpoint", best)
        assert (code, said.err.count("is not empty")) == (2, 1)
        code, said = job(f"checkpoint_uri={bucket}/nowhere")
        assert (code, said.err.count("nowhere is no checkpoint: it holds no run.json")) == (2, 1)


def upload(folder, server, prefix):
    for path in folder.rglob("*"):
        if path.is_file():
            server.client().upload_file(
                str(path), "evaluate", f"{prefix}/{path.relative_to(folder)}"
            )
