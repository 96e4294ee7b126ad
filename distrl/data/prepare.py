"""Raw events to a sequence store, on Ray.

    read, filter -> by user -> [k-core rounds] -> dense item ids -> sequences -> shards -> manifest

Users are cut into partitions by a hash, and everything about a user happens in its partition; items
are counted and numbered in buckets of their hash. What passes between tasks lies in Ray's object
store and spills to disk: the driver holds references, counts, and samples of a few items. One
partition, and one bucket of items, must fit into a task's memory; nothing else must.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import ray
from ray import ObjectRef

from distrl import storage
from distrl.data import prepare_tasks as tasks
from distrl.data.event_columns import EventColumns
from distrl.data.events import EventCleaner, ReadCounts, parse_moment
from distrl.data.id_hash import slot_of
from distrl.data.prepare_config import PrepareConfig
from distrl.data.prepare_identity import finished_store, identity, identity_hash
from distrl.data.prepare_items import NumberedItems, Work, k_core, num_buckets, number_items
from distrl.data.prepare_sizes import derived_partitions, reading_bytes, unit_bytes
from distrl.data.ray_stage import Stage, run_generators, run_tasks
from distrl.data.source_files import (
    SourceFile,
    file_format,
    find_files,
    reading_units,
)
from distrl.data.source_schema import learn_columns
from distrl.data.store import check_sizes, one_place_for_all
from distrl.data.store_writer import clear_parts
from distrl.errors import SchemaError
from distrl.schema import MANIFEST_NAME, Manifest, Shard

_MB = 1 << 20
_LONG_HISTORY = 10_000
"""Interactions from which on a single user weighs more than a usual batch of hundreds."""

logger = logging.getLogger(__name__)


def prepare(
    config: PrepareConfig,
    *,
    overwrite: bool = False,
    connect: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = logger.info,
) -> Manifest:
    """Makes a sequence store from raw events, or finds that it is already made.

    The store is whole when its manifest is there, which is written last.

    Args:
        config: What to make from what.
        overwrite: Replace a store made with other settings or inputs.
        connect: Connects to Ray, unless that is done; called when all that can be checked without
            Ray has been.
        say: Told of progress, a line at a time.

    Returns:
        The manifest of the store.

    Raises:
        ConfigError: If settings are wrong, or another store is in the place.
        SchemaError: If the input has not the promised form, or nothing of it is left.
        StorageError: If a place cannot be read or written.
    """
    _check_moments(config)
    files = find_files(config.source)
    described = identity(config, files)
    if not overwrite:
        manifest = finished_store(config.store_uri, described)
        if manifest is not None:
            say(f"{config.store_uri} is already prepared from the same inputs: nothing to do")
            return manifest
    format_ = file_format(config.source, files)
    columns = learn_columns(config.source, files, format_)
    storage.check_writable(config.store_uri)
    connect()
    return _Preparation(config, files, columns, say).run(described)


def _check_moments(config: PrepareConfig) -> None:
    for name, moment in config.filters:
        if name in ("time_from", "time_to") and moment is not None:
            parse_moment(moment, config.source.timestamp_unit, f"filters.{name}")


class _Preparation:
    """One run: the stages in order, each leaving references to the next."""

    def __init__(
        self,
        config: PrepareConfig,
        files: Sequence[SourceFile],
        columns: EventColumns,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._files, self._columns, self._say = config, files, columns, say
        cluster_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._limit = config.num_cpus or cluster_cpus
        megabytes = sum(file.size for file in files) * columns.inflation / _MB
        self._num_partitions = derived_partitions(config, megabytes, self._limit)
        self._left: list[str] = []
        """Interactions left after each step, for the error that nothing is."""

    def run(self, described: dict[str, Any]) -> Manifest:
        """Runs all stages; what is in the place already stays until the input has proved good."""
        # Nothing here keeps what a stage has left behind, so that Ray can forget it.
        work = k_core(
            self._assemble(self._read()),
            self._config.k_core,
            self._limit,
            self._say,
            self._note_left,
        )
        self._tell_of_longest(work.longest)
        numbered = number_items(work, self._limit, self._say)
        sequences = self._sequences(work, numbered)
        store_uri = self._config.store_uri
        # The manifest goes first and comes last: at no moment a part of a store looks whole.
        storage.delete(storage.join(store_uri, MANIFEST_NAME))
        clear_parts(store_uri)
        items = self._write_items(numbered)
        shards = self._write_sequences(work, sequences)
        manifest = Manifest(
            prepare=described,
            prepare_hash=identity_hash(described),
            num_users=work.users,
            num_items=numbered.num_items,
            num_interactions=sum(shard.tokens for shard in shards),
            user_type=_type_name(self._columns.user_type),
            item_type=_type_name(self._columns.item_type),
            has_timestamps=self._columns.time != "none",
            sequences=shards,
            items=items,
        )
        with one_place_for_all(self._config.store_uri):
            check_sizes(self._config.store_uri, manifest)
        content = manifest.model_dump_json(indent=1).encode()
        storage.write_bytes(storage.join(store_uri, MANIFEST_NAME), content)
        return manifest

    def _tell_of_longest(self, longest: int) -> None:
        line = f"longest history: {longest:,} interactions"
        if longest >= _LONG_HISTORY:
            line += (
                ", which one training step has at once; max_user_interactions keeps the newest so "
                "many of each user"
            )
        self._say(line)

    def _note_left(self, step: str, interactions: int) -> None:
        """Remembers what a step left over.

        Raises:
            SchemaError: If that is nothing; tells what every step left.
        """
        self._left.append(f"{step}: {interactions:,}")
        if interactions == 0:
            uri = self._config.source.uri
            raise SchemaError(f"no interaction is left of {uri} ({', '.join(self._left)})")

    def _read(self) -> list[list[ObjectRef]]:
        """For each partition, references to its events in the order of the input."""
        config, num = self._config, self._num_partitions
        cleaner = EventCleaner(config.source, config.filters, self._columns)
        chunk_bytes = reading_bytes(config, num)
        inflation = self._columns.inflation
        all_bytes = sum(file.size for file in self._files) * inflation
        each = unit_bytes(config, chunk_bytes, all_bytes, self._limit)
        units = reading_units(self._files, self._columns.format, inflation, each)
        read = partial(tasks.read_unit.remote, cleaner, num, config.seed, chunk_bytes)
        with Stage("read events", len(units), self._say) as stage:
            launches = [partial(read, unit) for unit in units]
            finished = run_generators(launches, self._limit, stage, lambda counts: counts.read)
        counts, pieces = ReadCounts(), [[] for _ in range(num)]
        for of_unit, references in finished:
            counts.add(of_unit)
            for place, reference in enumerate(references):
                pieces[place % num].append(reference)
        self._check(counts)
        return pieces

    def _check(self, counts: ReadCounts) -> None:
        if counts.nulls:
            names = dict(self._columns.names)
            found = ", ".join(
                f"{names[role]} in {number:,} rows" for role, number in counts.nulls.items()
            )
            raise SchemaError(
                f"source.uri={self._config.source.uri} has events without a value: {found}; the "
                f"first is {counts.null_example}. Every event that passes the filters needs a user,"
                " an item and a time; drop these rows, or set source.timestamp=null for no times"
            )
        self._note_left("rows read", counts.read)
        self._note_left("after filters.event_types", counts.after_event_types)
        self._note_left("after filters.min_rating", counts.after_rating)
        self._note_left("after filters.time_from and time_to", counts.after_time)

    def _assemble(self, pieces: list[list[ObjectRef]]) -> Work:
        keep, most = self._config.deduplicate, self._config.max_user_interactions
        buckets = num_buckets(self._num_partitions)
        launch = tasks.assemble_partition.options(num_returns=2 + buckets).remote
        seed = self._config.seed
        launches = [partial(launch, refs, keep, most, seed, buckets) for refs in pieces if refs]
        with Stage("order by user and time", len(launches), self._say) as stage:
            work = Work.of(run_tasks(launches, self._limit, stage, lambda size: size.interactions))
        step = f"after deduplicate={keep}"
        if most is not None:
            step += f" and max_user_interactions={most}"
        self._note_left(step, work.interactions)
        return work

    def _sequences(self, work: Work, items: NumberedItems) -> list[tuple[tasks.Span, ObjectRef]]:
        noise = self._config.noise_share, self._config.noise_seed, items.num_items
        make = partial(tasks.make_sequences.options(num_returns=2).remote, *noise)
        launches = [partial(make, reference, items.by_bucket) for reference in work.partitions]
        with Stage("make sequences", len(launches), self._say) as stage:
            finished = run_tasks(launches, self._limit, stage, lambda span: span.interactions)
        return [(span, refs[0]) for span, refs in finished]

    def _write_items(self, items: NumberedItems) -> tuple[Shard, ...]:
        store_uri, per_part = self._config.store_uri, self._config.items_per_part
        write = tasks.write_item_part.options(num_returns=2).remote
        launches = [
            partial(write, store_uri, part, items.rows(start, per_part))
            for part, start in enumerate(range(0, items.num_items, per_part))
        ]
        with Stage("write items", len(launches), self._say) as stage:
            finished = run_tasks(launches, self._limit, stage, lambda shard: shard.rows)
        return tuple(shard for shard, _ in finished)

    def _write_sequences(
        self, work: Work, sequences: list[tuple[tasks.Span, ObjectRef]]
    ) -> tuple[Shard, ...]:
        config = self._config
        num_shards = config.num_shards or self._derived_shards(work)
        write = partial(
            tasks.write_sequence_shard.options(num_returns=2).remote,
            config.store_uri,
            num_shards,
            config.row_group_rows,
            config.row_group_mb * _MB,
        )
        # Shards and partitions are ranges of one order of users, so a shard is in few partitions.
        spans = [
            (slot_of(span.first, num_shards), slot_of(span.last, num_shards), reference)
            for span, reference in sequences
        ]
        launches = [
            partial(write, shard, [ref for first, last, ref in spans if first <= shard <= last])
            for shard in range(num_shards)
        ]
        with Stage("write shards", num_shards, self._say) as stage:
            finished = run_tasks(
                launches, self._limit, stage, lambda shard: shard.tokens if shard else 0
            )
        return tuple(shard for shard, _ in finished if shard is not None)

    def _derived_shards(self, work: Work) -> int:
        per_interaction = 4 if self._columns.time == "none" else 12
        needed = math.ceil(work.interactions * per_interaction / (self._config.shard_mb * _MB))
        return min(needed, work.users)


def _type_name(type_: pa.DataType) -> Literal["string", "int64"]:
    return "int64" if pa.types.is_integer(type_) else "string"
