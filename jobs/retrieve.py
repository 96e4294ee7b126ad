r"""Find for each item and each training window of a store the nearest ones by their embeddings.

    python jobs/retrieve.py configs/retrieve/beauty.yaml store_uri=... key=value ...
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/retrieve.py configs/retrieve/beauty.yaml store_uri=...

Reads the table that jobs/embed.py made and writes <store>/neighbors/<name>. The same command again
goes on where it was killed, and finds a finished table and does nothing. Without RAY_ADDRESS a Ray
is started on this machine.
"""

import time

from distrl.cluster import connect
from distrl.data.side_tables import SideManifest
from distrl.semantics.retrieve import retrieve
from distrl.semantics.retrieve_config import RetrieveConfig
from distrl.storage import absolute
from jobs.command import arguments, resolve, run


def main() -> None:
    """Resolves the config, makes the table, and prints what it holds.

    Raises:
        DistrlError: If the config, the store, its embeddings or its place is wrong.
    """
    parser = arguments(__doc__)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a table made with other settings, or a torn one",
    )
    args = parser.parse_intermixed_args()
    config = resolve(RetrieveConfig, args)
    # Tasks work in folders of their own, where a relative path would mean another place.
    config = config.model_copy(update={"store_uri": absolute(config.store_uri)})
    start = time.monotonic()
    table = retrieve(
        config,
        overwrite=args.overwrite,
        connect=lambda: connect(num_cpus=config.num_cpus or config.cpus_per_task),
        say=lambda line: print(line, flush=True),
    )
    print(summary(config, table, time.monotonic() - start), flush=True)


def summary(config: RetrieveConfig, table: SideManifest, elapsed_s: float) -> str:
    """What a table holds, in lines."""
    lines = {
        "store": config.store_uri,
        "table": f"neighbors/{config.table} of embeddings/{config.embeddings}",
        "listed for each": f"{table.num_neighbors:,} at most",
        "items": of_items(table),
    }
    if table.window_parts:
        lines |= of_windows(table)
    size = sum(part.bytes for part in table.parts) / 1e6
    lines |= {"size": f"{size:,.1f} MB in {len(table.parts)}", "time": f"{elapsed_s:.1f} s"}
    return "\n".join(f"{name:<18}{value}" for name, value in lines.items())


def of_items(table: SideManifest) -> str:
    """What there is to say of the items."""
    facts = table.facts
    return (
        f"{sum(part.rows for part in table.items):,}, {facts['items_zero']:,} without text, "
        f"{facts['items_short']:,} with fewer; {searched(table, 'items')}"
    )


def of_windows(table: SideManifest) -> dict[str, str]:
    """What there is to say of the windows, in lines."""
    facts = table.facts
    return {
        "windows": (
            f"{sum(part.rows for part in table.window_parts):,} ({table.windows}) among "
            f"{facts['windows_pooled']:,}, {facts['windows_zero']:,} without text; "
            f"{searched(table, 'windows')}"
        ),
        "with fewer": f"{facts['windows_short']:,}, {facts['windows_alone']:,} of them have none",
        "neighbors": (
            f"{float(facts['windows_same_user_share']):.1%} of the same user, "
            f"{float(facts['windows_held_out_share']):.1%} inputs of validation or test"
        ),
    }


def searched(table: SideManifest, what: str) -> str:
    """How the neighbors were found, and how many of them."""
    facts = table.facts
    said = f"{facts[f'{what}_index']} in {facts[f'{what}_search_s']} s"
    if f"{what}_recall" not in facts:
        return said
    count = facts[f"{what}_indexes"]
    probed = f", {facts[f'{what}_num_probes']} probes" if f"{what}_num_probes" in facts else ""
    return (
        f"{said}{probed}, {'index' if count == 1 else f'{count} indexes'} of "
        f"{facts[f'{what}_index_mb']} MB in {facts[f'{what}_index_s']} s, recall "
        f"{facts[f'{what}_recall']} on {facts[f'{what}_recall_queries']:,} queries, "
        f"{facts[f'{what}_searched_again']:,} searched again exactly"
    )


if __name__ == "__main__":
    run(main)
