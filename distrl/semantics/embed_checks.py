"""What can be known of an embedder and a cluster before anything is embedded."""

from typing import Any

from distrl.cluster import Need, check_room, live_nodes
from distrl.data.store import read_item_ids
from distrl.errors import ConfigError, SchemaError
from distrl.schema import Manifest
from distrl.semantics.embed_config import (
    EmbedConfig,
    EndpointConfig,
    SentenceTransformersConfig,
    TransformersConfig,
)
from distrl.semantics.embedders import LoadedModel, endpoint
from distrl.semantics.weights import weights_folder, weights_hash


def look_at_model(config: EmbedConfig, manifest: Manifest, trained: Any) -> LoadedModel:  # noqa: ANN401
    """Label and hash of the model; an endpoint is asked for a vector, a trained one for items.

    Raises:
        ConfigError: If there is no such model, or it cannot do what is asked.
        SchemaError: If a trained model does not know all items, and an endpoint's answer is none.
        StorageError: If an endpoint cannot be reached.
    """
    chosen = config.embedder
    if isinstance(chosen, SentenceTransformersConfig | TransformersConfig):
        folder = weights_folder(chosen)
        package = chosen.package if isinstance(chosen, SentenceTransformersConfig) else None
        return LoadedModel(package or folder.resolve().name, weights_hash(folder))
    if isinstance(chosen, EndpointConfig):
        endpoint(chosen).embed(["Is somebody there?"])
        return LoadedModel(chosen.model, "")
    assert trained is not None, "the job reads the model"
    if config.source == "user_states" and config.max_len > trained.catalog.max_len:
        raise ConfigError(
            f"max_len={config.max_len}: the trained model reads {trained.catalog.max_len} items at "
            "most"
        )
    if len(trained.unknown) and config.missing == "error":
        first = read_item_ids(config.store_uri, manifest)[int(trained.unknown[0]) - 1].as_py()
        raise SchemaError(
            f"the trained model does not know {len(trained.unknown):,} of {manifest.num_items:,} "
            f"items of {config.store_uri}, such as item {first!r}: set missing=zero for vectors of "
            "zeros"
        )
    place = chosen.model_uri or str(chosen.checkpoint_uri)
    label = place.rstrip("/").rpartition("/")[2]
    return LoadedModel(label, trained.content_hash, num_unknown=len(trained.unknown))


def check_capacity(config: EmbedConfig) -> None:
    """Proves that the cluster can ever hold the actors, for which Ray would wait without end.

    Raises:
        ConfigError: Naming what an actor takes, for how many there is room, and the largest node.
    """
    each = {"CPU": config.cpus_per_actor, "GPU": config.gpus_per_actor}
    keys = "concurrency, cpus_per_actor or gpus_per_actor"
    check_room(Need("actors", each, config.concurrency), live_nodes(), keys=keys)
