import math
from pathlib import Path

import pytest

from distrl.config import load_config
from distrl.errors import ConfigError
from distrl.study.config import Choice, LogUniform, StudyConfig, Uniform
from distrl.study.trials import draw, trials

REPOSITORY = Path(__file__).parents[3]
STUDIES = REPOSITORY / "configs" / "studies"

BASE = """
name: base
data: {store_uri: store, batch_size: 64, max_len: 12}
method: {name: mclrec, model_weight: 0.02}
training: {epochs: 9, patience: 4}
workers: {num_workers: 2}
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)

    def of(**settings):
        return StudyConfig.model_validate(
            {"name": "s", "base": str(tmp_path / "base.yaml"), **settings}
        )

    return of


def test_a_grid_is_every_combination_of_every_variant_with_every_seed(study):
    found = trials(
        study(
            variants={"a": [], "b": ["method.steps_per_batch=joint"]},
            grid={"engine.lr": ["1e-4", 0.01], "method.data_weight": [0.5]},
            seeds=[0, 7],
        )
    )
    assert [(t.variant, t.values["engine.lr"], t.seed) for t in found] == [
        ("a", "1e-4", 0), ("a", "1e-4", 7), ("a", 0.01, 0), ("a", 0.01, 7),
        ("b", "1e-4", 0), ("b", "1e-4", 7), ("b", 0.01, 0), ("b", 0.01, 7),
    ]  # fmt: skip
    assert [t.run.engine.lr for t in found] == [1e-4, 1e-4, 0.01, 0.01] * 2
    assert [t.run.method.steps_per_batch for t in found] == [3] * 4 + ["joint"] * 4
    assert {t.run.method.data_weight for t in found} == {0.5}
    assert [t.run.seed for t in found] == [0, 7] * 4
    assert len({t.name for t in found}) == 8
    assert found[0].label == "a lr=1e-4 data_weight=0.5"


def test_a_trial_is_one_process_and_takes_the_studys_epochs_and_patience(study):
    (as_base,) = trials(study())
    assert as_base.label == "base"
    assert as_base.run.workers.num_workers == 1
    assert (as_base.run.training.epochs, as_base.run.training.patience) == (9, 4)
    (changed,) = trials(study(epochs=3, patience=2))
    assert (changed.run.training.epochs, changed.run.training.patience) == (3, 2)


def test_a_variant_may_be_another_method(study):
    (trial,) = trials(study(variants={"control": ["method={name: sasrec}"]}))
    assert trial.run.method.name == "sasrec"


def test_wrong_keys_of_all_trials_are_one_error_that_names_each_once(study):
    wrong = study(grid={"engine.lrr": [1, 2], "method.model_weight": [0.1, -1]}, seeds=[0, 1])
    with pytest.raises(ConfigError) as error:
        trials(wrong)
    said = str(error.value)
    assert said.count("did you mean engine.lr?") == 2  # alone, and beside the wrong weight
    assert "method.model_weight=-1" in said


def test_evaluations_are_resolved_beside_the_training_and_leave_it_alone(study):
    (trial,) = trials(
        study(evaluations={"0": [], "5": ["evaluation.noise_share=0.05", "evaluation.cutoffs=[5]"]})
    )
    assert trial.run.evaluation.noise_share == trial.evaluations["0"].noise_share == 0.0
    assert trial.evaluations["5"].noise_share == 0.05
    assert trial.evaluations["5"].cutoffs == (5,)


def test_draws_fill_their_range_and_come_again(study):
    search = {"engine.lr": {"loguniform": ["1e-4", 0.01]}, "data.batch_size": {"choice": [32, 64]}}
    found = trials(study(search=search, num_samples=200))
    rates = [trial.run.engine.lr for trial in found]
    assert all(1e-4 <= rate <= 0.01 for rate in rates)
    assert 70 < sum(rate < 1e-3 for rate in rates) < 130
    assert 70 < sum(trial.run.data.batch_size == 32 for trial in found) < 130
    assert found == trials(study(search=search, num_samples=200))
    assert rates != [t.run.engine.lr for t in trials(study(name="t", search=search))]


def test_the_middle_of_each_distribution():
    assert draw(Uniform(uniform=(1.0, 3.0)), 0.5) == 2.0
    assert draw(LogUniform(loguniform=(1e-4, 1e-2)), 0.5) == pytest.approx(1e-3)
    assert draw(Choice(choice=("a", "b", "c")), 0.5) == "b"
    assert draw(Choice(choice=("a", "b")), math.nextafter(1.0, 0.0)) == "b"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"grid": {"seed": [1]}, "search": {"engine.lr": {"uniform": [0, 1]}}}, "one or the other"),
        ({"halving": {}}, "it is for a search"),
        ({"name": "a/b"}, "becomes a folder"),
        ({"evaluations": {"x": ["engine.lr=1"]}}, "no key of evaluation"),
        ({"seeds": [1, 1]}, "repeats one"),
        ({"gird": {}}, "did you mean grid?"),
    ],
)
def test_an_impossible_study_is_refused(tmp_path, settings, said):
    (tmp_path / "study.yaml").write_text(str({"name": "s", "base": "b.yaml", **settings}))
    with pytest.raises(ConfigError, match=r"study\.yaml") as error:
        load_config(StudyConfig, tmp_path / "study.yaml", [])
    assert said in str(error.value)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_resolves_to_the_trials_that_readme_counts(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    study = load_config(StudyConfig, path, [])
    found = trials(study)
    assert study.name == path.stem
    readme = (REPOSITORY / "README.md").read_text()
    (row,) = (line for line in readme.splitlines() if line.startswith(f"| `{path.name}` |"))
    assert row.endswith(f"| {len(found)} |")
    assert len({trial.name for trial in found}) == len(found) >= 3
    assert len({(trial.label, trial.seed) for trial in found}) == len(found)
    for trial in found:
        # A decay that ends after training does is one that was not thought of.
        assert trial.run.engine.decay_epochs in (None, trial.run.training.epochs), trial.label
