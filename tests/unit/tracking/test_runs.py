from distrl.schema import Config
from distrl.tracking.runs import environment_tags, flat_params


class Inner(Config):
    rate: float = 0.1
    sizes: tuple[int, ...] = (5, 10)


class Outer(Config):
    name: str = "run"
    limit: int | None = None
    inner: Inner = Inner()


def test_a_nested_config_becomes_one_param_a_leaf():
    assert flat_params(Outer()) == {
        "name": "run",
        "limit": "null",
        "inner.rate": "0.1",
        "inner.sizes": "[5, 10]",
    }


def test_the_versions_that_decide_the_numbers_are_tagged():
    tags = environment_tags()
    assert tags["version.torch"].startswith("2.")
    assert {"version.ray", "version.deepspeed", "version.mlflow"} <= tags.keys()
