from pathlib import Path

import pytest

from distrl.config import dump_config, load_config
from distrl.errors import ConfigError
from distrl.semantics.describe_config import DescribeConfig

CONFIGS = Path(__file__).parents[3] / "configs" / "describe"
FILE = CONFIGS / "ml-latest-small.yaml"


def refused(*overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(DescribeConfig, FILE, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads_and_is_read_back_from_its_dump(path, tmp_path):
    config = load_config(DescribeConfig, path, [])
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(DescribeConfig, tmp_path / "dumped.yaml", []) == config


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2@host/v1",
        "https://hunter2@host/v1",
        "https://host/v1?key=hunter2",
        "https://host/v1#hunter2",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    said = refused(f"endpoint.base_url={url}")
    assert "carries credentials or a query" in said
    assert "LLM_KEY" in said
    assert "hunter2" not in said


def test_a_key_has_no_place_in_a_config():
    said = refused("endpoint.api_key=hunter2")
    assert "endpoint.api_key: unknown key" in said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("endpoint.base_url=host/v1", "base_url=host/v1 is not of the form"),
        ("prompts.item_user=costs $5", "item_user has a lone $"),
        ("prompts.item_user=$titel", "item_user has $titel; it knows $attributes"),
        ("prompts.window_system=$examples", "window_system has $examples"),
        ("name=a/b", "name='a/b' becomes a folder"),
        ("budget.max_cost=1", "needs prices.input_per_million"),
        ("windows=all", "windows='all'"),
        ("endpoint.concurrency=0", "endpoint.concurrency=0"),
        ("endpoint.concurrency=1001", "endpoint.concurrency=1001"),
        ("endpoint.base_url=https://host:abc/v1", "host:abc/v1 is not of the form"),
        ("generation.extra={max_tokens: 4000}", "extra has max_tokens: set generation.max_tokens_"),
        ("generation.extra={stream: true}", "extra has stream: a reply is read in one piece"),
        ("generation.extra_item={n: 3}", "extra_item has n: one reply a request is kept"),
        ("endpoint.timeout=5", "did you mean endpoint.timeout_s"),
    ],
)
def test_what_is_wrong_is_named(override, said):
    assert said in refused(override)


def test_combinations_that_cannot_be_are_refused():
    assert "nothing to describe" in refused("items=false", "windows=none")
    assert "budget is of engine=endpoint" in refused("engine=vllm", "budget.max_tokens=5")
    extra = "generation.extra_item={response_format: {type: json_object}}"
    assert "generation.extra has response_format" in refused("engine=vllm", extra)


def test_copies_of_a_model_over_several_gpus_are_counted():
    parallel = "vllm.engine_kwargs={tensor_parallel_size: 2, pipeline_parallel_size: 3}"
    config = load_config(DescribeConfig, FILE, ["vllm.concurrency=4", parallel])
    assert config.vllm.gpus == 24


def test_replies_are_kept_beside_the_store_unless_told_otherwise():
    assert load_config(DescribeConfig, FILE, ["store_uri=s3://b/s/"]).kept_uri == "s3://b/s/replies"
    config = load_config(DescribeConfig, FILE, ["replies_uri=s3://b/r"])
    assert config.kept_uri == "s3://b/r"
