"""What training reads of the tables that lie beside a store: correlated items, and neighbors."""

from typing import NamedTuple

from distrl.data.config import DataConfig
from distrl.data.correlation_table import check_substitutes, read_substitutes
from distrl.data.neighbors import check_neighbors, read_near_items
from distrl.data.side_tables import SideManifest
from distrl.ops.ragged import Ragged
from distrl.schema import Manifest


class Beside(NamedTuple):
    """The tables that a config asks for; None for those that it does not."""

    correlated: Ragged | None = None
    """Items correlated with each, for views that substitute."""
    neighbors: SideManifest | None = None
    """Manifest of the table of neighbors, whose windows the readers join into samples."""
    near_items: Ragged | None = None
    """Items near each by their texts, for semantic views."""


def check_beside(config: DataConfig, manifest: Manifest) -> SideManifest | None:
    """Refuses what `read_beside` would refuse, by listings alone: for the driver.

    Returns:
        The manifest of the table of neighbors, if one is asked for.

    Raises:
        ConfigError: If a table is missing, or not made for what is asked of it.
        SchemaError: If a table is of another store, or a part is missing or of another size.
        StorageError: If the place cannot be read.
    """
    check_substitutes(config, manifest)
    return check_neighbors(config, manifest)


def beside_hashes(config: DataConfig, manifest: Manifest) -> dict[str, str]:
    """What the tables that a config asks for hold, as sha256 in hex, by what they are.

    Raises:
        DistrlError: As `check_beside`.
    """
    tables = {
        "correlated_table": check_substitutes(config, manifest),
        "neighbors_table": check_neighbors(config, manifest),
    }
    return {what: table.content_hash for what, table in tables.items() if table is not None}


def read_beside(config: DataConfig, manifest: Manifest) -> Beside:
    """The tables; of the neighbors of windows nothing but where they are.

    Raises:
        ConfigError: As `check_beside`.
        SchemaError: Also if a part is torn.
        StorageError: If a table cannot be read.
    """
    correlated = read_substitutes(config, manifest)
    table = check_neighbors(config, manifest)
    if table is None:
        return Beside(correlated)
    return Beside(correlated, table, read_near_items(config, manifest, table))
