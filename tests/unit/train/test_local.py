"""A run in one process: what it leaves, and that a cut changes nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file

from distrl.config import RunConfig
from distrl.errors import CheckpointError
from distrl.train.kept import KeptCheckpoints
from distrl.train.local import UNRANKED, is_over, train_locally
from tests.store_factory import make_store

SEQUENCES = [[1 + (u + i) % 12 for i in range(4 + u % 5)] for u in range(40)]


@pytest.fixture
def run(tmp_path):
    make_store(tmp_path / "store", SEQUENCES, num_items=12)
    return RunConfig.model_validate(
        {
            "name": "r",
            "data": {"store_uri": str(tmp_path / "store"), "batch_size": 8, "max_len": 6},
            "method": {"name": "mclrec", "hidden_size": 8, "inner_size": 16},
            "training": {"epochs": 4},
        }
    )


TWO_STAGES = {
    "name": "laclrec", "hidden_size": 8, "inner_size": 16, "pretrain_epochs": 2,
    "pretrain_patience": 1,
}  # fmt: skip


def weights(folder):
    kept = KeptCheckpoints.of(str(folder))
    return load_file(folder / kept.latest / "model.safetensors")


def test_a_run_cut_between_validations_goes_on_to_the_same_weights_and_scores(run, tmp_path):
    whole = list(train_locally(run, str(tmp_path / "whole")))
    cut = train_locally(run, str(tmp_path / "cut"))
    found = [next(cut), next(cut)]
    cut.close()
    found += train_locally(run, str(tmp_path / "cut"))
    assert [v.epoch for v in whole] == [v.epoch for v in found] == [1, 2, 3, 4]
    assert [(v.step, v.metrics, v.targets) for v in whole] == [
        (v.step, v.metrics, v.targets) for v in found
    ]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert list(train_locally(run, str(tmp_path / "cut"))) == []


@pytest.mark.parametrize("stages", ["two", "joint"])
def test_a_method_with_stages_goes_on_in_the_stage_it_was_in(run, tmp_path, stages):
    settings = run.model_dump(mode="json")
    settings["method"] = {**TWO_STAGES, "stages": stages}
    run = RunConfig.model_validate(settings)
    whole = list(train_locally(run, str(tmp_path / "whole")))
    # Nothing is ranked before the recommender has been trained.
    assert [(v.epoch, v.score > UNRANKED) for v in whole] == [
        (1, False), (2, False), (3, True), (4, True),
    ]  # fmt: skip
    assert {"augmenter/total", "augmenter/held_out_loss"} <= set(whole[0].curves)
    phases = {key.partition("/")[0] for key in whole[3].curves}
    assert phases == ({"recommender", "augmenter"} if stages == "two" else {"joint", "augmenter"})
    assert {"augmenter/delete_recall", "augmenter/keep_share"} <= set(whole[2].curves)
    cut, found = train_locally(run, str(tmp_path / "cut")), []
    for _ in whole:  # a cut in each stage, and between them
        found.append(next(cut))
        cut.close()
        cut = train_locally(run, str(tmp_path / "cut"))
    assert [(v.step, v.metrics) for v in found] == [(v.step, v.metrics) for v in whole]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_end_of_a_stage_that_cannot_rank_is_kept_between_validations_too(run, tmp_path):
    settings = run.model_dump(mode="json")
    settings["method"] = {**TWO_STAGES, "pretrain_epochs": 1}
    settings["training"]["validate_every_epochs"] = 2
    whole = list(train_locally(RunConfig.model_validate(settings), str(tmp_path / "whole")))
    assert [(v.epoch, bool(v.metrics)) for v in whole] == [(1, False), (2, True), (4, True)]


def test_the_latest_and_the_best_checkpoint_stay(run, tmp_path):
    kept = KeptCheckpoints.of(str(tmp_path / "kept"))
    (tmp_path / "files").mkdir()
    for number, score in enumerate([0.1, 0.3, 0.2, 0.3]):
        (tmp_path / "files" / "x").write_text(str(number))
        kept.add(tmp_path / "files", {"number": number}, score)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "checkpoint-000001", "checkpoint-000003", "validations.json",
    ]  # fmt: skip
    again = KeptCheckpoints.of(str(tmp_path / "kept"))
    assert (again.best, again.latest) == ("checkpoint-000001", "checkpoint-000003")
    with again.files(again.best) as folder:
        assert (folder / "x").read_text() == "1"


def test_a_torn_index_is_told(tmp_path):
    (tmp_path / "validations.json").write_text(json.dumps({"scores": []}))
    with pytest.raises(CheckpointError, match="is torn"):
        KeptCheckpoints.of(str(tmp_path))


def test_patience_counts_validations_since_the_best(run, tmp_path):
    (first,) = [next(train_locally(run, str(tmp_path / "one")))]
    run = run.model_copy(update={"training": run.training.model_copy(update={"patience": 2})})

    def scored(*scores):
        return [first.model_copy(update={"metrics": {"val/ndcg_at_10": s}}) for s in scores]

    assert not is_over(run, scored(0.2, 0.1))
    assert is_over(run, scored(0.2, 0.1, 0.2))
    assert not is_over(run, scored(0.2, 0.1, 0.3, 0.1))
    unranked = [first.model_copy(update={"metrics": {}})] * 3
    assert not is_over(run, unranked)
    assert not is_over(run, [*unranked, *scored(0.2, 0.1)])
    assert is_over(run, [*unranked, *scored(0.2, 0.1, 0.1)])
