"""The stages of a retrieval in their order; `distrl.semantics.retrieve` says what it makes."""

import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from ray import ObjectRef

from distrl import storage
from distrl.cluster import Need, check_room, live_nodes, room_for
from distrl.data.ray_stage import Tasks
from distrl.data.side_tables import (
    Part,
    SideManifest,
    check_part_sizes,
    clear_table,
    write_manifest,
)
from distrl.data.store import manifest_hash, one_place_for_all
from distrl.schema import Manifest
from distrl.semantics.neighbor_table import total
from distrl.semantics.retrieve_config import RetrieveConfig
from distrl.semantics.retrieve_index import ROUNDED, indexed
from distrl.semantics.retrieve_tasks import (
    Loaded,
    Vectors,
    Written,
    load_items,
    load_windows,
    search,
    write_items,
    write_windows,
)
from distrl.semantics.searched import (
    Facts,
    found_folder,
    found_key,
    keep_facts,
    kept_facts,
)


def resolved(config: RetrieveConfig, table: SideManifest) -> dict[str, RetrieveConfig]:
    """How items and windows are searched; windows that are held out count too."""
    parts = {"items": table.items, "windows": table.window_parts}
    return {what: config.resolved(sum(part.rows for part in of)) for what, of in parts.items()}


class Retrieval:
    """One run: the stages in order, each leaving references to the next."""

    def __init__(
        self,
        config: RetrieveConfig,
        manifest: Manifest,
        table: SideManifest,
        made_with: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._config, self._manifest, self._table = config, manifest, table
        self._resolved = resolved(config, table)
        self._made_with, self._say = made_with, say
        each, nodes = {"CPU": float(config.cpus_per_task)}, live_nodes()
        check_room(Need("tasks", each), nodes, keys="cpus_per_task")
        # A cluster that grows may have no room yet; what is submitted is what makes it grow.
        limit = max(1, room_for(each, nodes))
        if config.num_cpus is not None:
            limit = max(1, config.num_cpus // config.cpus_per_task)
        self._tasks = Tasks(config.cpus_per_task, limit, say)
        self._facts: Facts = {}

    def run(self) -> SideManifest:
        """Runs all stages; a table that is there stays until all of its successor is found."""
        config, table = self._config, self._table
        items = self._indexed(self._load_items())
        content: list[ObjectRef] = []
        windows = None
        if table.window_parts:
            windows, content = self._load_windows()
            windows = self._indexed(windows)
        found_items = self._search(items)
        found_windows = self._search(windows) if windows is not None else []
        clear_table(config.store_uri, "neighbors", config.table)
        item_parts = self._write_items(items, found_items)
        written = []
        if windows is not None:
            written = self._write_windows(windows, content, found_windows)
        made = SideManifest(
            kind="neighbors",
            store_hash=manifest_hash(self._manifest),
            made_with=self._made_with,
            windows=table.windows,
            held_out=config.held_out,
            max_len=table.max_len,
            dimension=table.dimension,
            num_neighbors=config.num_neighbors,
            items=tuple(item_parts),
            window_parts=tuple(shard.windows for shard in written),
            pools=tuple(shard.pool for shard in written),
            facts=self._facts,
        )
        with one_place_for_all(self._config.store_uri):
            check_part_sizes(self._config.store_uri, self._config.table, made)
        write_manifest(config.store_uri, config.table, made)
        storage.delete(found_folder(config.store_uri, config.table))
        return made

    def _load_items(self) -> Vectors:
        config, table = self._config, self._table
        ends = list(accumulate(part.rows for part in table.items))
        launches = [
            self._tasks.of(load_items, config.store_uri, table, part, end - part.rows + 1)
            for part, end in zip(table.items, ends, strict=True)
        ]
        return self._vectors("items", self._tasks.run("load items", launches, _size))

    def _load_windows(self) -> tuple[Vectors, list[ObjectRef]]:
        """The vectors of all shards, and references to what else there is of their windows."""
        config, table, shards = self._config, self._table, self._manifest.sequences
        ends = list(accumulate(shard.rows for shard in shards))
        launches = [
            self._tasks.of(load_windows, config, table, number, shard, end - shard.rows)
            for number, (shard, end) in enumerate(zip(shards, ends, strict=True))
        ]
        loaded = self._tasks.run("load windows", launches, _size)
        return self._vectors("windows", loaded), [references[1] for _, references in loaded]

    def _vectors(self, what: str, loaded: list[tuple[Loaded, list[ObjectRef]]]) -> Vectors:
        sizes = [summary.size for summary, _ in loaded]
        self._facts[f"{what}_pooled"] = sum(sizes)
        self._facts[f"{what}_zero"] = sum(summary.num_zero for summary, _ in loaded)
        self._facts[f"{what}_sought"] = sum(summary.num_sought for summary, _ in loaded)
        starts = [end - size for end, size in zip(accumulate(sizes), sizes, strict=True)]
        pools = tuple(references[0] for _, references in loaded)
        return Vectors(what, tuple(starts), tuple(sizes), pools)

    def _indexed(self, vectors: Vectors) -> Vectors:
        """The vectors with an index whose recall is high enough, unless none is needed.

        Raises:
            ConfigError: If the recall is too low.
        """
        what, config = vectors.what, self._resolved[vectors.what]
        self._facts[f"{what}_index"] = config.index
        if config.index == "exact" or self._facts[f"{what}_sought"] == 0:
            return vectors
        taken_over = self._found_before(vectors)
        if taken_over is None:
            vectors, config, facts = indexed(
                vectors, config, self._tasks, widen=self._config.num_probes is None
            )
            keep_facts(self._kept_facts(what), facts)
        else:
            config, facts = taken_over
        self._resolved[what] = config
        self._facts |= {f"{what}_{name}": value for name, value in facts.items()}
        return vectors

    def _found_before(self, vectors: Vectors) -> tuple[RetrieveConfig, Facts] | None:
        """How an earlier run searched, if it kept all that it found; no index is needed then.

        Of what was kept torn the neighbors are found exactly.
        """
        what, config = vectors.what, self._resolved[vectors.what]
        facts = kept_facts(self._kept_facts(what))
        if facts is None or float(facts["recall"]) + ROUNDED < config.min_recall:
            return None
        if "num_probes" in facts:
            config = config.model_copy(update={"num_probes": int(facts["num_probes"])})
        kept = {info.base_name for info in storage.listing(self._kept_folder(what, config))}
        if not all(_name(what, *some) in kept for some in self._ranges(vectors)):
            return None
        self._say(f"all {what} were searched by an earlier run: no index is built")
        return config, facts

    def _search(self, vectors: Vectors) -> list[list[ObjectRef]]:
        """For each piece, references to the neighbors of its vectors, in order."""
        config = self._resolved[vectors.what]
        start, ranges = time.monotonic(), self._ranges(vectors)
        folder = self._kept_folder(vectors.what, config)
        launches = [
            self._tasks.of(
                search, config, vectors, *some, storage.join(folder, _name(vectors.what, *some))
            )
            for some in ranges
        ]
        finished = self._tasks.run(f"search {vectors.what}", launches, lambda s: s.num_queries)
        taken_over = sum(summary.taken_over for summary, _ in finished)
        if taken_over:
            self._say(f"{taken_over} of {len(finished)} searches were done by an earlier run")
        found: list[list[ObjectRef]] = [[] for _ in vectors.sizes]
        for (piece, _, _), (_, references) in zip(ranges, finished, strict=True):
            found[piece].append(references[0])
        if config.index != "exact":
            repeated = sum(summary.num_repeated for summary, _ in finished)
            self._facts[f"{vectors.what}_searched_again"] = repeated
        self._facts[f"{vectors.what}_search_s"] = round(time.monotonic() - start, 1)
        return found

    def _ranges(self, vectors: Vectors) -> list[tuple[int, int, int]]:
        """What each task searches for: a piece, its first row, and the row after its last."""
        most, ranges = self._config.queries_per_task, []
        for piece, size in enumerate(vectors.sizes):
            bounds = np.linspace(0, size, -(-size // most) + 1).astype(int).tolist()
            ranges += [(piece, low, high) for low, high in pairwise(bounds)]
        return ranges

    def _kept_folder(self, what: str, config: RetrieveConfig) -> str:
        """Where tasks that search in this way keep what they find."""
        # With the probes that are used, which need not be those that were begun with.
        how = {**self._made_with, what: config.knobs}
        key = found_key(manifest_hash(self._manifest), how)
        return storage.join(found_folder(self._config.store_uri, self._config.table), key)

    def _kept_facts(self, what: str) -> str:
        """Where it is kept what was measured of an index."""
        folder = found_folder(self._config.store_uri, self._config.table)
        key = found_key(manifest_hash(self._manifest), self._made_with)
        return storage.join(folder, key, f"{what}-index.json")

    def _write_items(self, items: Vectors, found: list[list[ObjectRef]]) -> list[Part]:
        launches = [
            self._tasks.of(write_items, self._config, number, start + 1, of_part)
            for number, (start, of_part) in enumerate(zip(items.starts, found, strict=True))
        ]
        written = self._tasks.run("write items", launches, lambda part: part[0].rows)
        self._facts["items_short"] = sum(num_short for (_, num_short), _ in written)
        return [part for (part, _), _ in written]

    def _write_windows(
        self, windows: Vectors, content: list[ObjectRef], found: list[list[ObjectRef]]
    ) -> list[Written]:
        config, dimension = self._config, self._table.dimension
        launches = [
            self._tasks.of(write_windows, config, windows, content, dimension, shard, of_shard)
            for shard, of_shard in enumerate(found)
        ]
        finished = self._tasks.run("write windows", launches, lambda made: made.windows.rows)
        written = [summary for summary, _ in finished]
        counts = total([shard.counts for shard in written])
        neighbors = max(counts.neighbors, 1)
        self._facts["windows_short"] = counts.short
        self._facts["windows_alone"] = counts.alone
        self._facts["windows_same_user_share"] = round(counts.same_user / neighbors, 4)
        self._facts["windows_held_out_share"] = round(counts.held_out / neighbors, 4)
        return written


def _name(what: str, piece: int, low: int, high: int) -> str:
    """Of the file that keeps what a task found."""
    return f"{what}-{piece:05d}-{low}-{high}.npz"


def _size(loaded: Loaded) -> int:
    return loaded.size
