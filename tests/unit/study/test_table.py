import csv
import io
import math

import pytest
from pydantic import ValidationError

from distrl.config import RunConfig
from distrl.data.evaluation_config import EvaluationConfig
from distrl.study.config import StudyConfig
from distrl.study.judging import Figures, Judged
from distrl.study.picture import picture, shares_of_first, short_names
from distrl.study.table import VALIDATION, as_csv, as_markdown, rows
from distrl.study.trials import Trial
from distrl.train.local import Validated

RUN = RunConfig.model_validate(
    {"name": "r", "data": {"store_uri": "s"}, "method": {"name": "sasrec"}}
)
METRICS = ("hr_at_5", "hr_at_10", "ndcg_at_5", "ndcg_at_10")


def trial(name, variant, seed):
    return Trial(
        name=name, variant=variant, values={}, seed=seed, run=RUN,
        evaluations={"test": EvaluationConfig(cutoffs=(5, 10))},
    )  # fmt: skip


def validated(epoch, score):
    return Validated(
        epoch=epoch, step=epoch, metrics={"val/ndcg_at_10": score}, curves={},
        seconds=2.0 * epoch, targets=100 * epoch,
    )  # fmt: skip


def judged(name, value, *, num_short=4):
    metrics = {f"{policy}/{metric}": value for policy in ("kept", "masked") for metric in METRICS}
    figures = [
        Figures(evaluation="test", length="all", num_users=10, metrics=metrics),
        Figures(evaluation="test", length="<=5", num_users=num_short, metrics=metrics),
        Figures(evaluation="test", length=">5", num_users=6, metrics=metrics),
    ]
    return Judged(trial=name, best=validated(2, value / 2), last=validated(3, 0.0),
                  figures=tuple(figures))  # fmt: skip


TRIALS = [trial("0", "a", 0), trial("1", "a", 1), trial("2", "b", 0), trial("3", "b", 1)]
JUDGED = [judged("0", 0.1), judged("1", 0.3), judged("2", 0.5)]


def test_a_row_is_the_mean_and_the_sample_deviation_over_seeds():
    first, second = rows(TRIALS, JUDGED, by_length=False)
    assert (first.label, first.num_seeds) == ("a", 2)
    assert first.means["kept/ndcg_at_10"] == pytest.approx(0.2)
    assert first.deviations["kept/ndcg_at_10"] == pytest.approx(math.sqrt(0.02))
    assert first.means[VALIDATION] == pytest.approx(0.1)
    assert first.means["best_epoch"] == 2
    assert first.means["epochs"] == 3
    assert first.means["seconds"] == 6
    assert first.means["targets_per_s"] == 50
    assert second.num_seeds == 1
    assert math.isnan(second.deviations["kept/hr_at_5"])


def test_length_buckets_are_told_apart_where_asked_for_and_not_where_empty():
    with_empty = [judged("0", 0.1, num_short=0)]
    assert [row.length for row in rows(TRIALS, JUDGED, by_length=True)] == ["all", "<=5", ">5"] * 2
    assert [row.length for row in rows(TRIALS, with_empty, by_length=True)] == ["all", ">5"]


def test_csv_holds_every_figure_and_nothing_for_the_deviation_of_one_seed():
    first, second = csv.DictReader(io.StringIO(as_csv(rows(TRIALS, JUDGED, by_length=False))))
    assert float(first["kept/hr_at_10_mean"]) == pytest.approx(0.2)
    assert float(first["masked/hr_at_10_std"]) == pytest.approx(math.sqrt(0.02))
    assert second["masked/hr_at_10_std"] == ""
    assert (first["variant"], first["num_users"], second["num_seeds"]) == ("a", "10", "1")


def test_markdown_names_policies_and_leaves_out_what_does_not_vary():
    head, _, first, second = as_markdown(
        rows(TRIALS, JUDGED, by_length=False), (5, 10)
    ).splitlines()
    assert head == (
        "| variant | seeds | val. NDCG@10 | HR@5 | HR@10 | NDCG@5 | NDCG@10 | masked NDCG@10 "
        "| epochs | seconds |"
    )
    assert first.startswith("| a | 2 | 0.1000 ± 0.0707 | 0.2000 ± 0.1414 |")
    assert second.startswith("| b | 1 | 0.2500 | 0.5000 |")
    assert "| variant | length | users |" in as_markdown(
        rows(TRIALS, JUDGED, by_length=True), (5, 10)
    )


@pytest.mark.parametrize("settings", [{}, {"by_length": True}, {"seeds": [0, 1]}])
def test_every_kind_of_study_has_a_picture(settings):
    study = StudyConfig.model_validate({"name": "s", "base": "b", "variants": {"a": [], "b": []}})
    study = study.model_copy(update=settings)
    table = rows(TRIALS, JUDGED, by_length=study.by_length)
    assert picture(study, table, 10).startswith(b"\x89PNG")


def test_a_searchs_picture_has_a_panel_for_each_key():
    search = {"engine.lr": {"loguniform": [1e-4, 1e-2]}, "data.batch_size": {"choice": [32, 64]}}
    study = StudyConfig.model_validate({"name": "s", "base": "b", "search": search})
    values = {"engine.lr": 1e-3, "data.batch_size": 64}
    found = TRIALS[0].model_copy(update={"values": values})
    image = picture(study, rows([found], JUDGED, by_length=False), 10)
    width, height = (int.from_bytes(image[at : at + 4]) for at in (16, 20))
    assert (width, height) == (2 * 4 * 120, 540)


def test_a_relative_picture_has_a_second_panel_and_needs_something_to_go_along():
    settings = {"name": "s", "base": "b", "relative": True}
    evaluations = {"0 %": [], "10 %": ["evaluation.noise_share=0.1"]}
    study = StudyConfig.model_validate({**settings, "evaluations": evaluations})
    image = picture(study, rows(TRIALS, JUDGED, by_length=False), 10)
    assert int.from_bytes(image[16:20]) == 2 * 6 * 120
    with pytest.raises(ValidationError, match="along a grid or several evaluations"):
        StudyConfig.model_validate(settings)
    with pytest.raises(ValidationError, match="along a grid or several evaluations"):
        StudyConfig.model_validate({**settings, "evaluations": evaluations, "by_length": True})


def test_what_is_left_is_a_share_of_the_first_figure_and_unknown_without_it():
    assert shares_of_first({0: 0.5, 2: 0.25}) == {0: 1.0, 2: 0.5}
    assert shares_of_first({1: 0.5}) == {}
    assert shares_of_first({0: 0.0, 1: 0.0}) == {}


def test_paths_below_an_axis_are_as_short_as_they_can_be_told_apart():
    assert short_names(["a/store", "a/store-10/"]) == {
        "a/store": "store",
        "a/store-10/": "store-10",
    }
    assert short_names(["a/store", "b/store"]) == {"a/store": "a/store", "b/store": "b/store"}
    assert short_names([0.1, 3]) == {"0.1": "0.1", "3": "3"}
