"""The stages of a retrieval in their order; `distrl.semantics.retrieve` says what it makes."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from ray import ObjectRef

from distrl import storage
from distrl.cluster import check_room, live_nodes, room_for
from distrl.data.ray_stage import Stage, run_tasks
from distrl.data.side_tables import (
    Part,
    SideManifest,
    check_part_sizes,
    clear_table,
    write_manifest,
)
from distrl.data.store import manifest_hash, one_place_for_all
from distrl.errors import ConfigError
from distrl.schema import Manifest
from distrl.semantics.neighbor_table import total
from distrl.semantics.retrieve_config import RetrieveConfig
from distrl.semantics.retrieve_tasks import (
    Loaded,
    PartIndex,
    Vectors,
    Written,
    build_index,
    load_items,
    load_windows,
    measure_recall,
    nearest_in_piece,
    sampled,
    search,
    write_items,
    write_windows,
)
from distrl.semantics.searched import found_folder, found_key

Facts = dict[str, float | int | str]


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
        check_room("tasks", each, 1, nodes, keys="cpus_per_task")
        self._limit = room_for(each, nodes)
        if config.num_cpus is not None:
            self._limit = max(1, config.num_cpus // config.cpus_per_task)
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

    def _run(
        self, name: str, launches: Sequence[Callable[[], Any]], rows_of: Callable[[Any], int]
    ) -> list[tuple[Any, list[ObjectRef]]]:
        with Stage(name, len(launches), self._say) as stage:
            return run_tasks(launches, self._limit, stage, rows_of)

    def _task(self, task: Any, *given: object) -> Callable[[], Any]:  # noqa: ANN401
        """Starts a task of this run's size when called."""
        return partial(task.options(num_cpus=self._config.cpus_per_task).remote, *given)

    def _load_items(self) -> Vectors:
        config, table = self._config, self._table
        ends = list(accumulate(part.rows for part in table.items))
        launches = [
            self._task(load_items, config.store_uri, table, part, end - part.rows + 1)
            for part, end in zip(table.items, ends, strict=True)
        ]
        return self._vectors("items", self._run("load items", launches, _size))

    def _load_windows(self) -> tuple[Vectors, list[ObjectRef]]:
        """The vectors of all shards, and references to what else there is of their windows."""
        config, table, shards = self._config, self._table, self._manifest.sequences
        ends = list(accumulate(shard.rows for shard in shards))
        launches = [
            self._task(load_windows, config, table, number, shard, end - shard.rows)
            for number, (shard, end) in enumerate(zip(shards, ends, strict=True))
        ]
        loaded = self._run("load windows", launches, _size)
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
        """The vectors with an index whose recall is high enough, unless search is exact.

        Raises:
            ConfigError: If the recall is too low.
        """
        what, config = vectors.what, self._resolved[vectors.what]
        self._facts[f"{what}_index"] = config.index
        if config.index == "exact" or self._facts[f"{what}_sought"] == 0:
            return vectors
        from distrl.semantics.ann import sample_size  # FAISS takes a second to load

        start = time.monotonic()
        trained_on = self._sample(vectors, sample_size(config))
        cut = vectors.cut(config.vectors_per_index)
        builds = [self._task(build_index, config, vectors, some, trained_on) for some in cut]
        built = self._run(f"build {what} index", builds, _none)
        self._facts[f"{what}_indexes"] = len(built)
        self._facts[f"{what}_index_mb"] = round(sum(size for size, _ in built) / 1e6, 1)
        self._facts[f"{what}_index_s"] = round(time.monotonic() - start, 1)
        indexes = [content for _, (content,) in built]
        vectors = vectors.with_indexes(list(map(PartIndex, indexes, cut)))
        self._check_recall(vectors)
        return vectors

    def _sample(self, vectors: Vectors, wanted: int) -> list[ObjectRef]:
        """References to queries evenly spread over all, about as many as wanted."""
        total = sum(vectors.sizes)
        numbers = np.unique(np.linspace(0, total - 1, min(wanted, total)).astype(np.int64))
        launches = []
        for start, size, pool in zip(vectors.starts, vectors.sizes, vectors.pools, strict=True):
            rows = numbers[(numbers >= start) & (numbers < start + size)] - start
            launches.append(self._task(sampled, start, pool, rows))
        found = self._run(f"sample {vectors.what}", launches, int)
        return [references[0] for _, references in found]

    def _check_recall(self, vectors: Vectors) -> None:
        """Measures the recall of an index, with more probes where these are left to distrl.

        Raises:
            ConfigError: If it stays too low.
        """
        what, config = vectors.what, self._resolved[vectors.what]
        sample = self._sample(vectors, config.recall_sample)
        launches = [
            self._task(nearest_in_piece, config, sample, start, pool)
            for start, pool in zip(vectors.starts, vectors.pools, strict=True)
        ]
        exact = self._run(f"exact {what} sample", launches, int)
        pieces = [references[0] for _, references in exact]
        while True:
            measure = self._task(measure_recall, config, vectors, sample, pieces)
            (((count, found), _),) = self._run(f"recall of {what} index", [measure], _first)
            wider = config.wider() if self._config.num_probes is None else None
            if found >= config.min_recall or wider is None:
                break
            self._say(
                f"{found:.3f} of the nearest {what} are found with num_probes={config.num_probes}, "
                f"min_recall is {config.min_recall}: {wider.num_probes} are tried"
            )
            self._resolved[what] = config = wider
        self._facts[f"{what}_recall_queries"] = count
        self._facts[f"{what}_recall"] = round(found, 4)
        if config.index == "ivf":
            self._facts[f"{what}_num_probes"] = config.num_probes or 0
        if found < config.min_recall:
            raise _too_low(what, config, found, count)

    def _search(self, vectors: Vectors) -> list[list[ObjectRef]]:
        """For each piece, references to the neighbors of its vectors, in order."""
        config, most = self._resolved[vectors.what], self._config.queries_per_task
        start, ranges = time.monotonic(), []
        for piece, size in enumerate(vectors.sizes):
            bounds = np.linspace(0, size, -(-size // most) + 1).astype(int).tolist()
            ranges += [(piece, low, high) for low, high in pairwise(bounds)]
        launches = [
            self._task(search, config, vectors, *some, self._kept(vectors.what, *some))
            for some in ranges
        ]
        finished = self._run(f"search {vectors.what}", launches, lambda s: s.num_queries)
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

    def _kept(self, what: str, piece: int, low: int, high: int) -> str:
        """Where a task keeps what it found."""
        config = self._config
        key = found_key(manifest_hash(self._manifest), self._made_with)
        folder = found_folder(config.store_uri, config.table)
        return storage.join(folder, key, f"{what}-{piece:05d}-{low}-{high}.npz")

    def _write_items(self, items: Vectors, found: list[list[ObjectRef]]) -> list[Part]:
        launches = [
            self._task(write_items, self._config, number, start + 1, of_part)
            for number, (start, of_part) in enumerate(zip(items.starts, found, strict=True))
        ]
        written = self._run("write items", launches, lambda part: part[0].rows)
        self._facts["items_short"] = sum(num_short for (_, num_short), _ in written)
        return [part for (part, _), _ in written]

    def _write_windows(
        self, windows: Vectors, content: list[ObjectRef], found: list[list[ObjectRef]]
    ) -> list[Written]:
        config, dimension = self._config, self._table.dimension
        launches = [
            self._task(write_windows, config, windows, content, dimension, shard, of_shard)
            for shard, of_shard in enumerate(found)
        ]
        finished = self._run("write windows", launches, lambda made: made.windows.rows)
        written = [summary for summary, _ in finished]
        counts = total([shard.counts for shard in written])
        neighbors = max(counts.neighbors, 1)
        self._facts["windows_short"] = counts.short
        self._facts["windows_alone"] = counts.alone
        self._facts["windows_same_user_share"] = round(counts.same_user / neighbors, 4)
        self._facts["windows_held_out_share"] = round(counts.held_out / neighbors, 4)
        return written


def _too_low(what: str, config: RetrieveConfig, found: float, count: int) -> ConfigError:
    advice = f"raise ef_search={config.ef_search} (num_links={config.num_links}), or"
    if config.index == "ivf":
        lists, probes = config.num_lists or 1, config.num_probes or 1
        all_of_them = f"num_probes={probes} is all of num_lists={lists}:"
        some = f"raise num_probes={probes} (num_lists={lists}) or leave it out, or"
        advice = all_of_them if probes >= lists else some
    return ConfigError(
        f"the {config.index} index finds {found:.3f} of the {config.num_neighbors} nearest {what} "
        f"of {count} queries, min_recall is {config.min_recall}: {advice} take index=exact"
    )


def _size(loaded: Loaded) -> int:
    return loaded.size


def _none(summary: object) -> int:
    return 0


def _first(measured: tuple[int, float]) -> int:
    return measured[0]
