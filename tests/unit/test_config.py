import pickle
import re
import shlex
from pathlib import Path

import pytest
import yaml

from distrl import errors
from distrl.config import RunConfig, dump_config, load_config
from distrl.data.correlation import CorrelateConfig
from distrl.data.prepare_config import PrepareConfig
from distrl.errors import ConfigError
from distrl.promote import PromoteConfig
from distrl.semantics.describe_config import DescribeConfig
from distrl.semantics.embed_config import EmbedConfig
from distrl.semantics.retrieve_config import RetrieveConfig
from distrl.study.config import StudyConfig
from jobs.evaluate import EvaluateConfig
from jobs.map_views import MapViewsConfig

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
OTHER_JOBS = ("prepare", "studies", "describe", "embed", "retrieve")
RUNS = [CONFIGS / "quickstart.yaml", *sorted(CONFIGS.glob("*/*.yaml"))]
RUNS = [path for path in RUNS if path.parent.name not in OTHER_JOBS]
NOT_TRAINING = {
    "prepare": PrepareConfig,
    "correlate": CorrelateConfig,
    "describe": DescribeConfig,
    "embed": EmbedConfig,
    "retrieve": RetrieveConfig,
    "study": StudyConfig,
    "evaluate": EvaluateConfig,
    "promote": PromoteConfig,
    "map_views": MapViewsConfig,
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nmethod: {name: mclrec}\ndata: {store_uri: s}\n")
    return path


def refused(file, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, file, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_run_config_loads_and_is_read_back_from_its_dump(path, tmp_path):
    run = load_config(RunConfig, path, [])
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(run))
    assert load_config(RunConfig, dumped, []) == run


@pytest.mark.parametrize("path", sorted((CONFIGS / "prepare").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_prepare_config_loads(path):
    assert load_config(PrepareConfig, path, []).store_uri


def test_the_shipped_configs_of_evaluate_and_promote_load():
    assert load_config(EvaluateConfig, CONFIGS / "evaluate.yaml", []).store_uri
    assert load_config(PromoteConfig, CONFIGS / "promote.yaml", []).model == "quickstart"


def test_every_config_opens_with_what_it_is_and_its_command():
    for path in CONFIGS.rglob("*.yaml"):
        head = path.read_text().split("\n\n")[0]
        assert head.startswith("# "), path
        assert "#   python jobs/" in head or "make quickstart" in head, path


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_every_command_above_a_config_resolves_and_names_the_files_it_reads(path):
    lines = [line for line in path.read_text().splitlines() if line.startswith("#   ")]
    text = "\n".join(line.removeprefix("#") for line in lines).replace("\\\n", " ")
    commands = re.findall(r"python (jobs/[^;\n]+)", text)
    assert commands or "make quickstart" in path.read_text()
    for command in commands:
        job, config, *overrides = shlex.split(command.replace("$share", "10"))  # of a loop
        job = Path(job).stem
        load_config(NOT_TRAINING.get(job, RunConfig), REPOSITORY / config, overrides)
        asked = {"prepare": "source.uri=", "embed": "item_text_uri=", "describe": "item_texts.uri="}
        if job in asked and config != "configs/prepare/quickstart.yaml":
            assert any(override.startswith(asked[job]) for override in overrides), command


def test_an_override_changes_one_value_and_leaves_the_rest(file):
    run = load_config(RunConfig, file, ["engine.lr=1e-4", "workers.num_workers=2"])
    assert run.engine.lr == 1e-4  # PyYAML reads 1e-4 as a string, pydantic as a number
    assert run.workers.num_workers == 2
    assert run.training == load_config(RunConfig, file, []).training


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.lrr=1", "engine.lrr: unknown key (did you mean engine.lr?)"),
        (
            "method.hiden_size=1",
            "method.hiden_size: unknown key (did you mean method.hidden_size?)",
        ),
        ("method.updates_per_batch=2", "method.updates_per_batch: unknown key"),
        ("enigne.lr=1", "enigne: unknown key (did you mean engine?)"),
        ("data.batch_size=many", "data.batch_size='many': Input should be a valid integer"),
        ("data.batch_size=0", "data.batch_size=0: Input should be greater than 0"),
        ("method.name=sasrek", "sasrek"),
        ("method.hidden_size=63", "hidden_size=63 is not a multiple of num_heads=2"),
        ("data.row_length=10", "row_length=10 is below max_len=50"),
        ("name=a/b", "name='a/b' becomes a folder"),
        ("engine.zero_stage=4", "engine.zero_stage=4"),
        ("name.first=x", "name is a value, not a section"),
        ("engine.lr", "not of the form section.key=value"),
        ("evaluation.protocol=sampled", "evaluation.protocol='sampled': Input should be 'full' or"),
        ("evaluation.protocol=sampled99", "with jobs/evaluate.py --protocol sampled99"),
    ],
)
def test_a_wrong_override_is_named(file, override, said):
    assert said in refused(file, override)


def test_a_gate_refuses_the_sampled_protocol():
    overrides = ["evaluation.protocol=sampled99"]
    with pytest.raises(ConfigError, match=r"protocol=sampled99: a gate .* leave protocol=full"):
        load_config(PromoteConfig, CONFIGS / "promote.yaml", overrides)
    config = load_config(EvaluateConfig, CONFIGS / "evaluate.yaml", overrides)
    assert config.evaluation.protocol == "sampled99"


def test_an_impossible_combination_names_both_values(file):
    said = refused(file, "data.batch_size=100", "workers.num_workers=3")
    assert "data.batch_size=100 is not a multiple of workers.num_workers=3" in said
    assert "at least 2" in refused(file, "data.batch_size=2", "workers.num_workers=2")


def test_all_mistakes_are_told_at_once(file):
    said = refused(file, "engine.lrr=1", "data.max_len=-3", "training.epoch=2")
    assert "engine.lrr" in said
    assert "data.max_len=-3" in said
    assert "training.epoch: unknown key (did you mean training.epochs?)" in said


def test_a_missing_key_and_a_missing_file_are_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nmethod: {name: sasrec}\n")
    with pytest.raises(ConfigError, match="data: missing"):
        load_config(RunConfig, path, [])
    with pytest.raises(ConfigError, match="No such file"):
        load_config(RunConfig, tmp_path / "nothing.yaml", [])
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="holds no keys"):
        load_config(RunConfig, path, [])
    path.write_text("a: [b\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(RunConfig, path, [])


def test_a_config_is_frozen(file):
    run = load_config(RunConfig, file, [])
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 3


def test_a_dump_holds_no_credentials_because_a_config_refuses_them(file):
    said = refused(file, "tracking.uri=http://me:secret@host")
    assert "secret" not in said
    assert "credentials" in said


def test_every_error_survives_the_way_between_processes():
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(kinds) == 7
    for kind in kinds:
        copy = pickle.loads(pickle.dumps(kind("what is wrong")))
        assert type(copy) is kind
        assert str(copy) == "what is wrong"


def test_yaml_is_what_overrides_are_written_in(file):
    run = load_config(RunConfig, file, ["method={name: sasrec, updates_per_batch: 2}"])
    assert run.method.name == "sasrec"
    assert yaml.safe_load(dump_config(run))["method"]["updates_per_batch"] == 2


def test_a_decay_that_ends_before_training_does_is_an_error(file):
    message = refused(file, "training.epochs=5", "engine.decay=linear", "engine.decay_epochs=3")
    assert "decay_epochs=3 ends before training.epochs=5" in message
