from pathlib import Path

import pytest

from distrl.config import load_config
from distrl.data.prepare_config import PrepareConfig
from distrl.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[3] / "configs/prepare").glob("*.yaml"))
START = ["store_uri=s", "source.uri=e.csv"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_prepare_config_loads(path):
    # Of a dataset whose size is known shards are counted, of one's own log they follow its size.
    assert (load_config(PrepareConfig, path, []).num_shards is None) == (path.stem == "events")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("k_core.min_users=5", "k_core.min_users: unknown key"),
        ("num_shards=0", "num_shards=0"),
        ("filters.event_types=[buy]", "filters.event_types needs source.event_type"),
        ("filters.min_rating=4", "filters.min_rating needs source.rating"),
        ("source.column_names=[a, b]", "source.column_names is for source.format csv or tsv"),
        ("max_user_interactions=0", "max_user_interactions=0"),
        ("deduplicate=all", "deduplicate='all'"),
    ],
)
def test_a_wrong_setting_is_named(override, said):
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        load_config(PrepareConfig, None, [*START, override])


def test_an_upper_bound_of_a_user_may_not_be_below_the_lower_one():
    settings = [*START, "k_core.min_user_interactions=5", "max_user_interactions=4"]
    said = "max_user_interactions=4 is below k_core.min_user_interactions=5"
    with pytest.raises(ConfigError, match=said):
        load_config(PrepareConfig, None, settings)


def test_a_time_range_needs_a_time():
    with pytest.raises(ConfigError, match=r"time_from and time_to need source\.timestamp"):
        load_config(
            PrepareConfig, None, [*START, "source.timestamp=null", "filters.time_from=2014-01-01"]
        )


def test_a_date_in_yaml_is_a_moment():
    config = load_config(PrepareConfig, None, [*START, "filters.time_from=2014-07-01"])
    assert config.filters.time_from == "2014-07-01"


def test_only_what_decides_the_content_is_decisive():
    config = load_config(PrepareConfig, None, START)
    how = ["store_uri=t", "num_cpus=3", "chunk_mb=1", "partition_mb=9", "num_partitions=5"]
    assert load_config(PrepareConfig, None, [*START, *how]).decisive() == config.decisive()
    assert load_config(PrepareConfig, None, [*START, "seed=1"]).decisive() != config.decisive()


def test_what_is_not_asked_for_leaves_the_store_the_one_it_was_before_that_could_be_asked():
    clean = load_config(PrepareConfig, CONFIGS[0], [])
    noisy = load_config(PrepareConfig, CONFIGS[0], ["noise_share=0.1", "noise_seed=2"])
    bounded = load_config(PrepareConfig, CONFIGS[0], ["max_user_interactions=9"])
    assert not {"noise_share", "noise_seed", "max_user_interactions"} & set(clean.decisive())
    assert bounded.decisive() == {**clean.decisive(), "max_user_interactions": 9}
    assert noisy.decisive()["noise_share"] == 0.1
    assert noisy.decisive()["noise_seed"] == 2
