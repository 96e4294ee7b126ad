"""What do LACLRec's stages cost beside CL4SRec? CPU time of a step, in turns.

    python -m benchmarks.laclrec_step

Beauty, or something of its shape, one thread, no Ray: configs/laclrec/beauty.yaml at 64 users a
step and four prefixes of each, CL4SRec in the same regime. An epoch has as many steps with one as
with the other, so the ratio of steps is that of epochs (goal: at most 3). The second stage begins
after some steps of the first, in which the augmenter learns to keep most items: untrained, it would
insert at a third of the gaps, and cost more.
"""

import sys
from pathlib import Path

import torch

from benchmarks.cpu_steps import in_turns, prepared, steps
from benchmarks.record import Record, arguments
from benchmarks.store import training_store

CONFIG = Path("configs/laclrec/beauty.yaml")
CL4SREC = (
    "method={name: cl4srec, data_weight: 0.05, false_negatives: same_sample, products: bf16}",
)
CASES = {
    "CL4SRec": (CL4SREC, 0),
    "LACLRec, first stage": ((), 0),
    "LACLRec, second stage": ((), 12),
    "LACLRec, both in one step": (("method.stages=joint",), 12),
    "CL4SRec with its third block": (("method.learned_view=false", "method.triplet_weight=0"), 0),
}
"""Overrides, and the epoch whose phases are run."""
LEARNING_PASSES = 4
"""Of the first stage over all batches, before the second is measured."""


def main() -> int:
    """Measures, prints, writes."""
    args = arguments(__doc__).parse_args()
    record = Record("laclrec_step", args)
    torch.set_num_threads(1)
    count, runs = (4, 1) if args.quick else (40, 5)
    store, sentence = training_store()
    record.note(sentence)
    timed = {}
    for name, (overrides, epoch) in CASES.items():
        method, batches = prepared(CONFIG, (f"data.store_uri={store}", *overrides), count)
        if epoch:
            learn = steps(method, batches, 0)
            for _ in range(LEARNING_PASSES):
                learn()
        timed[name] = steps(method, batches, epoch)
    found, table = in_turns(timed, runs, count=count, of="CL4SRec")
    record.figures["cpu_ms_a_step"] = found
    record.table(table)
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
