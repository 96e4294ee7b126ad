"""A store's texts to vectors, on Ray Data actors; `distrl.data.side_tables` has the format.

    texts of items (one task) -> [items: a part a unit] -> [windows: a sequence shard a unit]

Each actor of a pool holds the model and makes one part after another. A part is written whole and
carries a key of all that decides its content, so a job that was killed goes on: parts that have its
key are taken over, others are made. The driver holds the list of parts and references; nothing on
it grows with the number of interactions. Texts and vectors of all items lie once in each node's
shared memory.
"""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.exceptions import OutOfMemoryError, RayActorError

from distrl import errors, storage
from distrl.data.ray_stage import fetch
from distrl.data.side_tables import (
    Part,
    SideManifest,
    check_part_sizes,
    clear_table,
    find_table,
    write_manifest,
)
from distrl.data.store import check_sizes, one_place_for_all, read_manifest
from distrl.errors import ConfigError, SchemaError
from distrl.schema import Manifest
from distrl.semantics.embed_checks import check_capacity, look_at_model
from distrl.semantics.embed_config import EmbedConfig
from distrl.semantics.embed_identity import (
    Identity,
    check_same,
    check_unfinished,
    find_descriptions,
    identify,
)
from distrl.semantics.embed_parts import Done, EmbedActor, EmbedTask, Unit
from distrl.semantics.embed_progress import Counter, Progress
from distrl.semantics.embed_shared import item_texts, item_vectors
from distrl.semantics.embedders import LoadedModel
from distrl.semantics.window_vectors import most_windows

_RETRIES = 2
"""How often a part is tried again whose actor died, before the job fails."""

logger = logging.getLogger(__name__)


def embed(
    config: EmbedConfig,
    *,
    trained: Any = None,  # noqa: ANN401
    overwrite: bool = False,
    connect: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = logger.info,
) -> SideManifest:
    """Makes the table of a store's embeddings, goes on with it, or finds that it is made.

    A table of another store that once lay in the place is replaced.

    Args:
        config: What to make of which store.
        trained: The `TrainedModel`, for embedder.kind=trained.
        overwrite: Start anew, whatever is there, a torn table too.
        connect: Connects to Ray, unless that is done; called when all that can be checked without
            Ray has been.
        say: Told of progress, a line at a time.

    Raises:
        ConfigError: If a table of the same store was made with other settings, or the model or its
            endpoint is not what the config says.
        SchemaError: If the store, the texts or a table that is there are torn, or an item has no
            text.
        StorageError: If a place cannot be read or written.
    """
    manifest = read_manifest(config.store_uri)
    check_sizes(config.store_uri, manifest)
    descriptions = find_descriptions(config, manifest)
    model = look_at_model(config, manifest, trained)
    identity = identify(config, manifest, model, descriptions)
    # A torn manifest cannot be read, and what is replaced anyway need not be.
    found = None if overwrite else find_table(config.store_uri, "embeddings", config.name)
    if found is not None and found.store_hash == identity.store_hash:
        check_same(config, found, identity)
        check_part_sizes(config.store_uri, config.name, found)
        say(f"{config.store_uri} already has embeddings {config.name}: nothing to do")
        return found
    if found is None and not overwrite:
        check_unfinished(config, identity.key)
    storage.check_writable(config.store_uri)
    connect()
    check_capacity(config)
    if found is not None or overwrite:
        clear_table(config.store_uri, "embeddings", config.name)
    if trained is not None:
        model = replace(model, trained=ray.put(trained))
    return _Run(config, manifest, identity, descriptions, model, say).run()


class _Run:
    """One run: items, then windows, then the manifest."""

    def __init__(
        self,
        config: EmbedConfig,
        manifest: Manifest,
        identity: Identity,
        descriptions: SideManifest | None,
        model: LoadedModel,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._manifest, self._identity = config, manifest, identity
        self._descriptions, self._model, self._say = descriptions, model, say
        self._shared: dict[str, Any] = {}
        self._num_missing = 0

    def run(self) -> SideManifest:
        """Makes all parts that are not there, and the manifest last."""
        start = time.monotonic()
        self._share_texts()
        items, windows = self._units()
        if self._config.windows_need_items:
            done = self._make(items)
            dimension = done[0].dimension
            self._share_vectors(_parts(done, "items"), dimension)
            done += self._make(windows)
        else:
            done = self._make(items + windows)
        table = self._table(done, time.monotonic() - start)
        with one_place_for_all(self._config.store_uri):
            check_part_sizes(self._config.store_uri, self._config.name, table)
        write_manifest(self._config.store_uri, self._config.name, table)
        return table

    def _units(self) -> tuple[list[Unit], list[Unit]]:
        config, manifest = self._config, self._manifest
        num_parts = math.ceil(manifest.num_items / config.items_per_part)
        num_shards = 0 if config.windows.which == "none" else len(manifest.sequences)
        return (
            [Unit(folder="items", number=number) for number in range(num_parts)],
            [Unit(folder="windows", number=number) for number in range(num_shards)],
        )

    def _share_texts(self) -> None:
        if self._config.embedder.kind == "trained":
            self._num_missing = self._model.num_unknown
            return
        # Ray's stubs do not know that a task with two returns gives two references.
        made: Any = item_texts.remote(self._config, self._manifest, self._descriptions)
        count, self._shared["texts"] = made
        self._num_missing = fetch(count)

    def _share_vectors(self, parts: Sequence[Part], dimension: int) -> None:
        self._shared["item_vectors"] = item_vectors.remote(
            self._config.store_uri, tuple(parts), self._manifest.num_items, dimension
        )
        ray.wait([self._shared["item_vectors"]], fetch_local=False)

    def _make(self, units: list[Unit]) -> list[Done]:
        """Has every unit made; what became of each, in order.

        Raises:
            DistrlError: As the first unit that failed says.
            ConfigError: If actors die of one part again and again.
        """
        counter: Any = Counter.remote()
        finished: dict[str, Done] = {}
        with Progress(counter, self._num_rows(units), len(units), self._say) as progress:
            try:
                for done in self._made(units, counter):
                    finished[done.unit.name] = done
                    progress.part()
            except (RayActorError, OutOfMemoryError) as error:
                first = str(error).strip().splitlines()[0]
                raise ConfigError(
                    f"an embedding actor failed {_RETRIES + 1} times at one part ({first}): if it "
                    "ran out of memory, lower embedder.batch_size or concurrency; the same command "
                    "goes on with the parts that are left"
                ) from error
        return [finished[unit.name] for unit in units]

    def _made(self, units: list[Unit], counter: Any) -> Iterator[Done]:  # noqa: ANN401
        """Units as the pool of actors is done with them.

        Raises:
            DistrlError: As the first unit that failed says.
            RayActorError: If actors die of one part again and again.
        """
        config = self._config
        task = EmbedTask(
            config,
            self._manifest,
            self._identity.key,
            self._descriptions,
            self._model,
            counter,
            self._shared,
        )
        rows = [{"unit": unit.model_dump_json()} for unit in units]
        size = min(config.concurrency, len(rows))
        with warnings.catch_warnings():
            # Ray Data 2.60 has no other way to say it, and would by itself try a part that runs out
            # of memory again without end.
            warnings.filterwarnings("ignore", message="`ray_remote_args_fn` is deprecated")
            made = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                EmbedActor,
                fn_constructor_args=(task,),
                batch_size=1,
                compute=ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
                num_cpus=config.cpus_per_actor,
                num_gpus=config.gpus_per_actor or None,
                ray_remote_args_fn=lambda: {"max_task_retries": _RETRIES},
            )
        # It would warn that the job's own lines take the place of its bars.
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        # Rows would come one part late, behind what Ray Data fetches ahead.
        for batch in made.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            for described in batch["done"]:
                yield _checked(Done.model_validate_json(str(described)))

    def _num_rows(self, units: list[Unit]) -> int:
        """Vectors of some units, about."""
        shards = [self._manifest.sequences[u.number] for u in units if u.folder == "windows"]
        windows = sum(most_windows(shard, self._config.windows) for shard in shards)
        return windows + self._manifest.num_items * (len(shards) < len(units))

    def _table(self, done: list[Done], seconds: float) -> SideManifest:
        dimension = done[0].dimension
        if {one.dimension for one in done} != {dimension}:
            raise SchemaError(f"the parts have vectors of {sorted({d.dimension for d in done})}")
        texts = sum(one.texts for one in done)
        items = [one for one in done if one.unit.folder == "items"]
        return SideManifest(
            kind="embeddings",
            store_hash=self._identity.store_hash,
            made_with={**self._identity.made_with, "dimension": dimension},
            **self._identity.windows,
            dimension=dimension,
            items=_parts(done, "items"),
            window_parts=_parts(done, "windows"),
            facts={
                "parts_taken_over": sum(one.taken_over for one in done),
                "parts_made": sum(not one.taken_over for one in done),
                "texts": texts,
                "distinct_texts": sum(one.distinct_texts for one in done),
                "items_missing": self._num_missing,
                "seconds": round(seconds, 3),
                "items_cpu_seconds": round(sum(d.cpu_s for d in items), 3),
                "windows_cpu_seconds": round(sum(d.cpu_s for d in done if d not in items), 3),
            },
        )


def _checked(done: Done) -> Done:
    """What became of a unit, unless it failed.

    Raises:
        DistrlError: As the actor raised it.
    """
    if done.error_type:
        raise getattr(errors, done.error_type)(done.error)
    return done


def _parts(done: Sequence[Done], folder: str) -> tuple[Part, ...]:
    return tuple(one.part for one in done if one.unit.folder == folder and one.part is not None)
