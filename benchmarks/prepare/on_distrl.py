"""distrl's own prepare job: plain Ray tasks."""

from pathlib import Path

from benchmarks.prepare.events import MIN_INTERACTIONS
from distrl.data.prepare import prepare
from distrl.data.prepare_config import KCoreConfig, PrepareConfig, SourceConfig


def with_distrl(folder: Path, out: Path) -> int:
    core = KCoreConfig(
        min_user_interactions=MIN_INTERACTIONS, min_item_interactions=MIN_INTERACTIONS, rounds=1
    )
    config = PrepareConfig(store_uri=str(out), source=SourceConfig(uri=str(folder)), k_core=core)
    return prepare(config, say=print).num_users
