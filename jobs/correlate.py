r"""List for each item of a store the items that go with it, for views that substitute.

    python jobs/correlate.py configs/correlate.yaml store_uri=... key=value ...
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/correlate.py configs/correlate.yaml store_uri=...

Counts the training parts alone: all but the last two items of each sequence. The same command again
finds the finished table and does nothing. Without RAY_ADDRESS a Ray is started on this machine.
"""

import time

from distrl.cluster import connect
from distrl.data.correlation import CorrelateConfig, correlate
from distrl.data.correlation_table import CorrelationManifest
from distrl.storage import absolute
from jobs.command import arguments, resolve, run


def main() -> None:
    """Resolves the config, makes the table, and prints what it holds.

    Raises:
        DistrlError: If the config, the store or its place is wrong.
    """
    parser = arguments(__doc__)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a table made with other settings"
    )
    args = parser.parse_intermixed_args()
    config = resolve(CorrelateConfig, args)
    # Tasks work in folders of their own, where a relative path would mean another place.
    config = config.model_copy(update={"store_uri": absolute(config.store_uri)})
    start = time.monotonic()
    table = correlate(
        config,
        overwrite=args.overwrite,
        connect=lambda: connect(num_cpus=config.num_cpus or 1),
        say=lambda line: print(line, flush=True),
    )
    print(summary(config.store_uri, table, time.monotonic() - start), flush=True)


def summary(store_uri: str, table: CorrelationManifest, elapsed_s: float) -> str:
    """What a table holds, in lines."""
    lines = {
        "store": store_uri,
        "items": f"{sum(part.rows for part in table.parts):,}",
        "without any": f"{table.num_empty:,}",
        "listed for each": f"{table.num_correlated:,} at most",
        "window": f"{table.window:,}",
        "size": f"{sum(part.bytes for part in table.parts) / 1e6:,.1f} MB in {len(table.parts)}",
        "time": f"{elapsed_s:.1f} s",
    }
    return "\n".join(f"{name:<18}{value}" for name, value in lines.items())


if __name__ == "__main__":
    run(main)
