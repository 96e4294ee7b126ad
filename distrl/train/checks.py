"""What a run asks of its store and its method, refused on the driver before Ray starts."""

import torch

from distrl.config import RunConfig
from distrl.contract import Catalog
from distrl.data.beside import check_beside
from distrl.data.item_lines import item_lines
from distrl.data.side_tables import SideManifest
from distrl.errors import ConfigError
from distrl.methods import build
from distrl.schema import Manifest


def check_run(run: RunConfig, manifest: Manifest) -> SideManifest | None:
    """Looks at the tables beside the store and at the titles, and builds the method without memory.

    Returns:
        The manifest of the table whose windows samples are to bring; None where none are wanted.

    Raises:
        ConfigError: If the engine knows no such part, a table is missing or not made for what is
            asked of it, the method contrasts windows and the table has none, or the method has
            another text size than the table.
        SchemaError: If a table is torn or of another store, or the first item's text is none.
        StorageError: If a place cannot be read.
    """
    table = check_beside(run.data, manifest)
    if run.data.item_text_uri is not None:
        # The rest is read when there are examples to show; a file may be as long as the catalog.
        next(item_lines(run.data.item_text_uri, "data.item_text_uri"), None)
    with torch.device("meta"):
        method = build(run.method, Catalog(manifest.num_items, run.data.max_len))
    run.engine.check_parts(method.parts)
    if table is None or not method.wants_neighbors:
        return None
    if table.windows == "none":
        raise ConfigError(
            f"method={run.method.name} contrasts windows with their neighbors, but data.neighbors="
            f"{run.data.neighbors} was made with windows.which=none and knows items alone: embed "
            "with windows.which=every and retrieve again, or set method.inter_weight=0"
        )
    if run.method.text_width not in (0, table.dimension):
        raise ConfigError(
            f"method.text_size={run.method.text_width}, but the texts of neighbors/"
            f"{run.data.neighbors} have vectors of {table.dimension}; set "
            f"method.text_size={table.dimension}"
        )
    return table
