"""What do SRA-CL's losses cost on top of their base? CPU time of a step, in turns.

    python -m benchmarks.semantic_step

Beauty with its table of neighbors (jobs/embed.py, jobs/retrieve.py), one thread, no Ray: CE-SASRec
alone, with either loss and with both, at 64 users a step, one prefix of each contrasted and 10
neighbors, and as configs/sracl/beauty.yaml has it. An epoch has as many steps with the losses as
without, so the ratio of steps is that of epochs. Beside it how many slots an encoder has to fill:
the authors' code pads each of 14 sequences a prefix. Without the table nothing is measured.
"""

import sys
from pathlib import Path

import torch

from benchmarks.cpu_steps import in_turns, prepared, steps
from benchmarks.record import Record, arguments
from distrl.contract import Batch
from distrl.errors import DistrlError

CONFIG = Path("configs/sracl/beauty.yaml")
PAPERS = ("data.contrasted_prefixes=1", "data.num_neighbors=10")
CASES = {
    "CE-SASRec": (*PAPERS, "method.inter_weight=0", "method.intra_weight=0"),
    "intra-user alone": (*PAPERS, "method.inter_weight=0"),
    "inter-user alone": (*PAPERS, "method.intra_weight=0"),
    "both": PAPERS,
    "both, 4 prefixes, 3 neighbors": ("data.contrasted_prefixes=4", "data.num_neighbors=3"),
    "the same, a random neighbor": (
        "data.contrasted_prefixes=4",
        "data.num_neighbors=3",
        "method.synthesizer=random",
    ),
}
PADDED_SEQUENCES = 14
"""Sequences of a prefix in a step of the authors' code, at 10 neighbors."""
ROW = 50
"""Slots of a padded sequence at this length; the authors cut to 20."""


def filled(batches: list[Batch]) -> dict[str, float]:
    """Slots with an item, means a batch."""
    size = len(batches)
    found = [batch.neighbors for batch in batches if batch.neighbors is not None]
    return {
        "prefixes": sum(batch.num_pairs for batch in batches) / size,
        "clean": sum(int((batch.clean.segment >= 0).sum()) for batch in batches) / size,
        "neighbors": sum(len(one.sequences.last) for one in found) / size,
        "segments": sum(int(one.sequences.segment.max()) + 1 for one in found) / size,
        "neighbor slots": sum(int((one.sequences.segment >= 0).sum()) for one in found) / size,
    }


def main() -> int:
    """Measures, prints, writes."""
    args = arguments(__doc__).parse_args()
    record = Record("semantic_step", args)
    torch.set_num_threads(1)
    count, runs = (4, 1) if args.quick else (40, 5)
    try:
        made = {name: prepared(CONFIG, overrides, count) for name, overrides in CASES.items()}
    except DistrlError as error:
        record.note(f"Nothing was measured: {error}")
        record.write()
        return 0
    timed = {name: steps(*one) for name, one in made.items()}
    found, table = in_turns(timed, runs, count=count, of="CE-SASRec")
    record.figures["cpu_ms_a_step"] = found
    record.figures["slots"] = filled(made["both"][1])
    slots = record.figures["slots"]
    padded = slots["prefixes"] * PADDED_SEQUENCES * ROW
    record.note(
        f"{slots['prefixes']:.0f} prefixes a step have {slots['neighbors']:.0f} different "
        f"neighbors in {slots['segments']:.0f} segments of {slots['neighbor slots']:,.0f} items; "
        f"14 padded sequences a prefix would be {padded:,.0f} slots."
    )
    record.table(table)
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
