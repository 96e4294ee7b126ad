"""Promotion end to end: a store, a registry, and the job as users run it."""

import hashlib
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrl.errors import ConfigError, TrackingError
from distrl.promote import PromoteConfig, promote, roll_back
from distrl.schema import Manifest, Shard
from distrl.tracking.registry import CHAMPION, PREVIOUS, Registry
from tests.integration.models import fixed_ranking, registered
from tests.integration.servers import run_job, write_config

ITEMS = ["a", "b", "c", "d", "e", "f"]
"""By falling frequency: the ids 1..6."""


def write_store(folder: Path, sequences: list[list[str]], items: list[str]) -> str:
    """A store of one shard."""
    users = pa.array([f"u{n}" for n in range(len(sequences))])
    ids = [[items.index(item) + 1 for item in sequence] for sequence in sequences]
    counts = [sum(sequence.count(item) for sequence in sequences) for item in items]
    tables = {
        "sequences/part-0.parquet": pa.table(
            {"user": users, "items": pa.array(ids, type=pa.list_(pa.int32()))}
        ),
        "items/part-0.parquet": pa.table(
            {
                "item_id": pa.array(range(1, len(items) + 1), type=pa.int32()),
                "item": items,
                "count": counts,
            }
        ),
    }
    shards = {}
    for path, table in tables.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / path)
        content = (folder / path).read_bytes()
        shards[path] = Shard(
            path=path,
            rows=table.num_rows,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
    manifest = Manifest(
        prepare={},
        prepare_hash="0" * 64,
        num_users=len(sequences),
        num_items=len(items),
        num_interactions=sum(len(sequence) for sequence in sequences),
        user_type="string",
        item_type="string",
        has_timestamps=False,
        sequences=(shards["sequences/part-0.parquet"],),
        items=(shards["items/part-0.parquet"],),
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return str(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Everybody's test target is c. Nobody has seen it."""
    sequences = [["a", "b", "a", "d", "c"], ["b", "a", "e", "a", "c"], ["a", "b", "f", "c"]]
    return write_store(tmp_path_factory.mktemp("store"), sequences, ITEMS)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registry")
    return f"sqlite:///{folder}/mlflow.db", f"{folder}/artifacts"


@pytest.fixture
def place(store, database, request, tmp_path):
    """Registers versions of a model of the test's own, and promotes them."""
    return Place(store, *database, f"model-{request.node.name}", tmp_path)


class Place:
    def __init__(self, store, uri, artifacts, model, folder):
        self.store, self.uri, self.artifacts, self.model = store, uri, artifacts, model
        self.folder, self.said = folder, []
        self.registry = Registry(uri)

    def register(self, best_first, items=ITEMS):
        """A version that ranks these items first, in this order, for everybody."""
        artifact = fixed_ranking(items, best_first)
        folder = self.folder / f"version-{'-'.join(best_first)}"
        version = registered(self.uri, self.artifacts, self.model, artifact, folder)
        return version.number

    def settings(self, **changes):
        return {
            "model": self.model,
            "store_uri": self.store,
            "tracking": {"uri": self.uri},
            "evaluation": {"num_workers": 0, "cutoffs": [1, 5]},
            "gate": {"min_gain": {"ndcg_at_5": 0.0}},
        } | changes

    def promote(self, **changes):
        config = PromoteConfig.model_validate(self.settings(**changes))
        return promote(config, self.said.append)

    def roll_back(self):
        roll_back(PromoteConfig.model_validate(self.settings()), self.said.append)

    def aliases(self):
        found = (self.registry.alias(self.model, name) for name in (CHAMPION, PREVIOUS))
        return tuple(version and version.number for version in found)

    def tags(self, number):
        return dict(self.registry.version(self.model, number).tags)


def test_the_first_version_is_promoted_without_a_rival_and_says_so(place):
    number = place.register(["a", "c"])  # rank 2: NDCG = 1 / log2(3)
    done = place.promote(gate={"min_gain": {"ndcg_at_5": 0.5}, "floors": {"ndcg_at_5": 0.6}})
    assert done.verdict.promoted
    assert place.aliases() == (number, None)
    tags = place.tags(number)
    assert tags["promotion.verdict"] == "promoted"
    assert tags["promotion.reason"].startswith("the first champion: ndcg_at_5 0.63093 is at least")
    assert tags["promotion.compared_with"] == "none"
    measured = json.loads(tags["promotion.metrics"])
    assert measured["candidate"]["ndcg_at_5"] == pytest.approx(1 / math.log2(3))
    assert measured["candidate"]["hr_at_1"] == 0.0
    assert measured["champion"] is None
    assert "test, seen kept" in tags["promotion.measured_on"]
    assert tags["promotion.time"].startswith("20")


def test_the_first_version_below_a_floor_is_rejected(place):
    number = place.register(["a", "c"])
    done = place.promote(gate={"min_gain": {"ndcg_at_5": 0.0}, "floors": {"ndcg_at_5": 0.7}})
    assert not done.verdict.promoted
    assert place.aliases() == (None, None)
    assert place.tags(number)["promotion.verdict"] == "rejected"


def test_a_better_version_moves_the_aliases_and_a_worse_one_leaves_them(place):
    first = place.register(["a", "c"])
    place.promote()
    better = place.register(["c"])  # rank 1: NDCG = 1
    assert place.promote().verdict.promoted
    assert place.aliases() == (better, first)
    assert place.tags(better)["promotion.compared_with"] == str(first)

    worse = place.register(["a", "b", "c"])  # rank 3: NDCG = 1 / log2(4)
    said = place.promote()
    assert not said.verdict.promoted
    assert place.aliases() == (better, first)
    assert place.tags(worse)["promotion.reason"] == (
        "ndcg_at_5 0.50000 should be at least 1.00000 (min_gain.ndcg_at_5=0)"
    )
    table = "\n".join(place.said)
    assert f"candidate v{worse}" in table
    assert f"champion v{better}" in table
    (row,) = [line.split() for line in place.said[-8:] if line.startswith("ndcg_at_5")]
    # Popularity: training knows a, b and e; c comes behind them with no occurrence, 1 / log2(5).
    assert row == ["ndcg_at_5", "0.50000", "1.00000", "-50.0%", "0.43068"]


def test_a_rollback_lets_champion_and_previous_change_places(place):
    first = place.register(["a", "c"])
    place.promote()
    with pytest.raises(TrackingError, match="has no @previous"):
        place.roll_back()
    second = place.register(["c"])
    place.promote()
    place.roll_back()
    assert place.aliases() == (first, second)
    assert place.tags(second)["promotion.verdict"] == "rolled back"


def test_a_champion_of_an_older_store_is_compared_through_the_callers_own_ids(place):
    older = ["c", "x", "b", "a"]  # other numbers, one item that is gone, three that are new
    champion = place.register(["c"], items=older)
    place.promote()
    place.register(["a", "c"])
    done = place.promote()
    # By its own numbers the champion would rank a first; by the ids it ranks c first.
    metrics = json.loads(place.tags(champion + 1)["promotion.metrics"])
    assert metrics["champion"]["ndcg_at_5"] == 1.0
    assert not done.verdict.promoted


def test_seen_items_do_not_count_where_the_config_masks_them(place):
    place.register(["a", "b", "c"])
    place.promote(seen="masked")  # everybody has seen a and b
    metrics = json.loads(place.tags(1)["promotion.metrics"])
    assert metrics["candidate"]["hr_at_1"] == 1.0


def test_the_champion_cannot_be_promoted_again(place):
    place.register(["c"])
    place.promote()
    with pytest.raises(ConfigError, match=r"version=latest: .* is .*@champion already"):
        place.promote()


def test_a_gate_on_a_metric_that_will_not_be_measured_is_named(place):
    with pytest.raises(ValueError, match=r"gate names ndcg_at_10; evaluation\.cutoffs=\[1, 5\]"):
        place.promote(gate={"min_gain": {"ndcg_at_10": 0.0}})


@pytest.mark.slow
def test_the_job_exits_with_0_for_promoted_1_for_rejected_and_2_for_an_error(place):
    place.register(["c"])
    config = write_config(place.settings())
    assert run_job("jobs/promote.py", config, "--dry-run").stdout.startswith("model: model-")
    done = run_job("jobs/promote.py", config)
    assert done.returncode == 0, done.stderr
    assert "promoted" in done.stdout

    place.register(["a", "c"])
    done = run_job("jobs/promote.py", config)
    assert done.returncode == 1, done.stderr
    assert "rejected" in done.stdout
    assert place.aliases() == (1, None)

    done = run_job("jobs/promote.py", config, "version=7")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "has no version 7; it has 1, 2" in done.stderr
    assert "Traceback" not in done.stderr
