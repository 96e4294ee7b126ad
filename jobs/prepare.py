r"""Prepare a sequence store from raw events.

    python jobs/prepare.py configs/prepare/beauty.yaml section.key=value ...
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/prepare.py configs/prepare/beauty.yaml

The same command again finds the finished store and does nothing. Without RAY_ADDRESS a Ray is
started on this machine.
"""

import time

from distrl.cluster import connect
from distrl.data.prepare import prepare
from distrl.data.prepare_config import PrepareConfig
from distrl.schema import Manifest
from jobs.command import arguments, resolve, run


def main() -> None:
    """Resolves the config, makes the store, and prints what it holds.

    Raises:
        DistrlError: If the config, the input or a place is wrong.
    """
    parser = arguments(__doc__)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a store made with other settings or input"
    )
    args = parser.parse_intermixed_args()
    config = resolve(PrepareConfig, args)
    start = time.monotonic()
    manifest = prepare(
        config,
        overwrite=args.overwrite,
        connect=lambda: connect(num_cpus=config.num_cpus or 1),
        say=lambda line: print(line, flush=True),
    )
    print(summary(config.store_uri, manifest, time.monotonic() - start), flush=True)


def summary(store_uri: str, manifest: Manifest, elapsed_s: float) -> str:
    """What a store holds, as a table."""
    files = (*manifest.sequences, *manifest.items)
    lines = {
        "store": store_uri,
        "users": f"{manifest.num_users:,}",
        "items": f"{manifest.num_items:,}",
        "interactions": f"{manifest.num_interactions:,}",
        "training targets": f"{manifest.num_prefixes:,} in {manifest.num_trainable_rows:,} users",
        "shards": f"{len(manifest.sequences):,}",
        "size": f"{sum(file.bytes for file in files) / 1e6:,.1f} MB",
        "time": f"{elapsed_s:.1f} s ({manifest.num_interactions / elapsed_s:,.0f} events/s kept)",
    }
    return "\n".join(f"{name:<18}{value}" for name, value in lines.items())


if __name__ == "__main__":
    run(main)
