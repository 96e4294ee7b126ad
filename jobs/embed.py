r"""Turn the texts of a store's items, and its windows, into vectors.

    python jobs/embed.py configs/embed/beauty.yaml item_text_uri=PATH key=value ...
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/embed.py configs/embed/beauty.yaml concurrency=8 gpus_per_actor=1

Writes <store>/embeddings/<name>: float32 vectors of all items and, unless windows.which=none, of
the windows that neighbors are looked for among. max_len must be data.max_len of the training that
will read them. The embedder is a model inside a package, one in a folder, an OpenAI-compatible
server (its key comes from the environment variable that embedder.api_key_env names), or a model
that distrl trained.

The same command again goes on where a killed job stopped, or finds the finished table and does
nothing. Without RAY_ADDRESS a Ray is started on this machine.
"""

import time
from typing import TYPE_CHECKING

from distrl.cluster import connect
from distrl.data.side_tables import SideManifest
from distrl.data.store import read_item_ids, read_manifest
from distrl.semantics.embed import embed
from distrl.semantics.embed_config import EmbedConfig, TrainedConfig
from distrl.storage import absolute
from jobs.command import arguments, resolve, run

if TYPE_CHECKING:
    from distrl.semantics.trained import TrainedModel


def main() -> None:
    """Resolves the config, makes the table, and prints what it holds.

    Raises:
        DistrlError: If the config, the store, the texts, the model or a place is wrong.
    """
    parser = arguments(__doc__)
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew, whatever lies under that name"
    )
    args = parser.parse_intermixed_args()
    config = with_absolute_paths(resolve(EmbedConfig, args))
    start = time.monotonic()
    trained = _trained(config) if isinstance(config.embedder, TrainedConfig) else None
    table = embed(
        config,
        trained=trained,
        overwrite=args.overwrite,
        connect=lambda: connect(config.concurrency * config.cpus_per_actor),
        say=lambda line: print(line, flush=True),
    )
    print(summary(config, table, time.monotonic() - start), flush=True)


def with_absolute_paths(config: EmbedConfig) -> EmbedConfig:
    """The config as actors need it: they work in folders of their own."""
    changed = {"store_uri": absolute(config.store_uri)}
    if config.item_text_uri is not None:
        changed["item_text_uri"] = absolute(config.item_text_uri)
    folder = getattr(config.embedder, "folder", None)
    if folder is not None:
        moved = config.embedder.model_copy(update={"folder": absolute(folder)})
        return config.model_copy(update={**changed, "embedder": moved})
    return config.model_copy(update=changed)


def _trained(config: EmbedConfig) -> "TrainedModel":
    # Slow to import, and needed by this embedder alone.
    from distrl.semantics.trained import TrainedModel
    from distrl.tracking.config import resolve_tracking_uri
    from distrl.train.saved import read_checkpoint, read_registered
    from jobs.map_views import checkpoint_of

    chosen = config.embedder
    assert isinstance(chosen, TrainedConfig), "the caller has looked"
    if chosen.checkpoint_uri is not None:
        artifact, _ = read_checkpoint(checkpoint_of(absolute(chosen.checkpoint_uri)))
    else:
        assert chosen.model_uri is not None, "the config has one or the other"
        tracking_uri = resolve_tracking_uri(chosen.tracking, chosen.storage_uri)
        artifact = read_registered(chosen.model_uri, tracking_uri)
    ids = read_item_ids(config.store_uri, read_manifest(config.store_uri))
    return TrainedModel.of(artifact, ids)


def summary(config: EmbedConfig, table: SideManifest, elapsed_s: float) -> str:
    """What a table holds, in lines."""
    facts, made = table.facts, table.made_with
    windows = sum(part.rows for part in table.window_parts)
    source = f" ({table.windows}, {made['source']}, max_len {table.max_len})" if windows else ""
    lines = {
        "table": f"{config.store_uri}/embeddings/{config.name}",
        "model": f"{made['embedder']['kind']} {made['model']}",
        "weights": made["weights_sha256"] or "of the endpoint, not known",
        "dimension": f"{table.dimension:,}",
        "items": f"{sum(part.rows for part in table.items):,}, {facts['items_missing']:,} missing",
        "windows": f"{windows:,}{source}",
        "parts": f"{facts['parts_made']:,} made, {facts['parts_taken_over']:,} taken over",
        "texts": f"{facts['texts']:,} read, {facts['distinct_texts']:,} embedded",
        "size": f"{sum(part.bytes for part in table.parts) / 1e6:,.1f} MB",
        "time": f"{elapsed_s:.1f} s, {facts['seconds']:,.1f} s of it embedding",
    }
    return "\n".join(f"{name:<12}{value}" for name, value in lines.items())


if __name__ == "__main__":
    run(main)
