r"""Have a language model describe the items and windows of a store (the first stage of SRA-CL).

    export OPENAI_API_KEY=...
    python jobs/describe.py configs/describe/beauty.yaml key=value ...
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/describe.py configs/describe/beauty.yaml store_uri=s3://...

Every reply is kept within about a second, so the same command goes on where a run ended, by
whatever end: a kill, a spent budget, an endpoint that went away. A finished table is found and
nothing done. With engine=endpoint Ray looks for example histories of items and nothing else; with
engine=vllm the model runs on the cluster's GPUs.
"""

import time

from distrl.cluster import connect
from distrl.semantics.describe import Described, describe
from distrl.semantics.describe_config import DescribeConfig
from distrl.storage import absolute
from jobs.command import arguments, resolve, run


def main() -> None:
    """Resolves the config, makes the table, and prints what it holds and what it took.

    Raises:
        DistrlError: If the config, the store, the item texts or the endpoint is wrong.
    """
    parser = arguments(__doc__)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a table made with other settings"
    )
    args = parser.parse_intermixed_args()
    config = resolve(DescribeConfig, args)
    # Tasks work in folders of their own, where a relative path would mean another place.
    config = config.model_copy(
        update={
            "store_uri": absolute(config.store_uri),
            "replies_uri": absolute(config.kept_uri),
        }
    )
    start = time.monotonic()
    described = describe(
        config,
        overwrite=args.overwrite,
        connect=lambda: connect(num_cpus=config.num_cpus or 1),
        say=lambda line: print(line, flush=True),
    )
    print(summary(config, described, time.monotonic() - start), flush=True)


def summary(config: DescribeConfig, described: Described, elapsed_s: float) -> str:
    """What a table holds and what this run did for it, in lines."""
    table, asked = described
    facts = table.facts
    lines = {
        "store": config.store_uri,
        "table": f"descriptions/{config.name}",
        "items": f"{facts['items_reply']:,} replies, {facts['items_raw']:,} raw",
        "windows": f"{facts['windows_reply']:,} replies, {facts['windows_raw']:,} raw",
        "its tokens": f"{facts['tokens_in']:,} in, {facts['tokens_out']:,} out",
        "its cost": f"{facts['cost']:,.4f}",
        "size": f"{sum(part.bytes for part in table.parts) / 1e6:,.1f} MB in {len(table.parts)}",
    }
    if facts["items_without_text"]:
        lines["items without text"] = f"{facts['items_without_text']:,}"
    if asked is not None:
        failures = ", ".join(f"{num:,} {kind}" for kind, num in sorted(asked.failures.items()))
        lines |= {
            "asked": f"{asked.asked:,}",
            "asked again": f"{asked.reasked:,}",
            "malformed": f"{asked.malformed:,}",
            "from cache": f"{asked.from_cache:,}",
            "repeated": f"{asked.repeated:,}",
            "without a reply": f"{asked.unanswered:,}",
            "requests failed": f"{sum(asked.failures.values()):,}"
            + (f" ({failures})" if failures else ""),
            "sent again": f"{asked.retries:,}",
            "tokens now": f"{asked.tokens_in:,} in, {asked.tokens_out:,} out",
            "cost now": f"{asked.cost:,.4f}",
        }
        if asked.lost_in + asked.lost_out:
            # Requests without a reply, which may be billed all the same.
            lines["lost at most"] = f"{asked.lost_in:,} tokens in, {asked.lost_out:,} out"
    lines["time"] = f"{elapsed_s:.1f} s"
    text = "\n".join(f"{name:<20}{value}" for name, value in lines.items())
    if asked is not None and asked.unanswered:
        text += (
            f"\n{asked.unanswered:,} prompts have raw texts for want of a reply (the last: "
            f"{asked.last_failure}): --overwrite asks for them again, and for nothing else"
        )
    return text


if __name__ == "__main__":
    run(main)
