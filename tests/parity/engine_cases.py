"""What each process of the engine tests runs: many cases, one start of torch and DeepSpeed.

Usage: python -m tests.parity.engine_cases all|resume OUT [OTHER]; OUT gets what this process group
saves and results.json, OTHER is the OUT of a process group of another size.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from distrl.engine import checkpoint
from distrl.engine.collectives import (
    broadcast_object,
    ensure_process_group,
    gather_objects,
    rank,
    sum_over_ranks,
    together,
    world_size,
)
from distrl.engine.config import EngineConfig
from distrl.engine.vendor import load_deepspeed
from distrl.engine.zero import Engines
from distrl.errors import CheckpointError, DivergedError, StorageError
from tests.packed import batch_of
from tests.parity.engine_methods import (
    CPU,
    MOST_INSERTED,
    POISON,
    Reference,
    batches_of,
    cut,
    empty,
    lopsided,
    make,
    phases_of,
    shares_of,
    with_prefixes,
)
from tests.ranks import end_rank

STEPS = 3
MENDING = {"operations": "argmax", "max_inserted": MOST_INSERTED, "pretrain_epochs": 1}
"""Of LACLRec, whose views must not depend on which rank draws them."""


def engines_of(method, **settings):
    config = EngineConfig(**settings)
    return Engines(method, config, device=CPU, micro_batch_size=4, num_workers=world_size())


def take(engines, batches, phase, step=0):
    return engines.step(batches[rank()], phase, shares_of(batches)[rank()], step=step)


def train(engines, first):
    for step in range(first, first + STEPS):
        for phase in engines.method.phases(0):
            take(engines, batches_of(step, world_size()), phase, step)
    return engines


def bits(engines):
    """The weights that the method computes with."""
    with engines.gathered():
        return {n: p.detach().clone() for n, p in engines.method.named_parameters()}


def state(engines):
    """Master weights and optimizer state; on rank 0 alone."""
    found = checkpoint.full_weights(engines)
    for part in engines.parts:
        of_part = checkpoint.full_optimizer_state(engines, part)
        found |= {f"{part}/{name}": value for name, value in of_part.items()}
    return found


def same(first, second):
    equal = all(torch.equal(value, second[name]) for name, value in first.items())
    return equal and first.keys() == second.keys()


def worst(found, expected):
    """Largest difference, and the largest weight to hold it against; rank 0 alone knows."""
    if not found:
        return {}
    return {
        "diff": max((found[n] - value).abs().max().item() for n, value in expected.items()),
        "scale": max(value.abs().max().item() for value in expected.values()),
    }


def against_torch(name, batches, *, model=None, seeded=False, **settings):
    """Steps of all phases, here and in plain torch on all ranks' batches."""
    method = make(name, **(model or {}))
    start = {n: p.detach().clone() for n, p in method.named_parameters()}
    reference = Reference(method, EngineConfig(**settings))
    engines = engines_of(method, **settings)
    for step in range(STEPS):
        of_all = with_prefixes(method, batches(step, world_size()))
        for number, phase in enumerate(phases_of(method)):
            seeds = [1000 * step + 10 * number + r for r in range(world_size())]
            torch.manual_seed(seeds[rank()])
            take(engines, of_all, phase, step)
            reference.step(of_all, phase, seeds if seeded else None)
    found = checkpoint.full_weights(engines)
    return worst(found, reference.master) | {"moved": worst(found, start).get("diff")}


def parity(stage):
    sgd = {"zero_stage": stage, "optimizer": "sgd", "lr": 0.1}
    bf16 = {"precision": "bf16", **sgd}
    adam = {"zero_stage": stage, "lr": 1e-2, "lr_of": {"head": 3e-3}}
    clip = {"model": {"model_weight": 0.4}, "max_grad_norm": 0.05}
    drop = {"model": {"dropout": 0.5}, "seeded": True}
    meta = {"model": {"meta": "second_order", "meta_lr": 0.1, "model_weight": 0.4}}
    for steps in (3, 2, "joint"):
        model = {"steps_per_batch": steps}
        yield f"mclrec-{steps}", against_torch("mclrec", lopsided, model=model, **sgd)
    yield "second-order", against_torch("mclrec", lopsided, **meta, **sgd)
    for base in ("mclrec", "gru4rec"):
        model = {"base": base, "inter_weight": 0.4, "intra_weight": 0.4}
        yield f"sracl-{base}", against_torch("sracl", lopsided, model=model, **sgd)
    for stages in ("two", "joint"):
        model = {"stages": stages, "data_weight": 0.4, "triplet_weight": 0.01, **MENDING}
        yield f"laclrec-{stages}", against_torch("laclrec", lopsided, model=model, **sgd)
    yield "tiny", against_torch("tiny", lopsided, **sgd)
    yield "dropout", against_torch("tiny", batches_of, **drop, **sgd)
    yield "clipped", against_torch("mclrec", batches_of, **clip, **sgd)
    yield "momentum", against_torch("mclrec", batches_of, momentum=0.9, **sgd)
    yield "adam", against_torch("tiny", batches_of, **adam)
    yield "bf16", against_torch("mclrec", lopsided, **bf16)
    yield "bf16-clipped", against_torch("mclrec", batches_of, **clip, **bf16)
    yield "bf16-adam", against_torch("tiny", batches_of, precision="bf16", **adam)


def union(stage, name="sasrec", **model):
    """Unequal batches on this many ranks against all their rows in one batch."""
    method = make(name, **model)
    reference = Reference(method, EngineConfig(optimizer="sgd", lr=0.1))
    engines = engines_of(method, zero_stage=stage, optimizer="sgd", lr=0.1)
    for step in range(STEPS):
        split, whole = batches_of(step, world_size()), cut(step, 0, 7)
        if world_size() == 2 and step == 1:
            split = [empty(), whole]
        if world_size() == 2 and step == 2:
            split = [cut(step, 0, 6), cut(step, 6, 7)]
        split, (whole,) = (with_prefixes(method, batches) for batches in (split, [whole]))
        for phase in phases_of(method):
            take(engines, split, phase, step)
            reference.step([whole], phase)
    return worst(checkpoint.full_weights(engines), reference.master)


def all_workers(stage):
    """Negatives of all workers: a loss that does not depend on how pairs are spread."""
    shared = {"negatives": "all_workers", "false_negatives": "same_sample_or_target"}
    yield "mclrec", union(stage, "mclrec", data_weight=0.3, model_weight=0.3, **shared)
    joint = {"steps_per_batch": "joint", "negatives": "all_workers"}
    yield "mclrec-joint", union(stage, "mclrec", model_weight=0.3, **joint)
    yield "cl4srec", union(stage, "cl4srec", data_weight=0.3, **shared)
    weights = {"inter_weight": 0.3, "intra_weight": 0.3, "synthesizer": "gatv2"}
    yield "sracl", union(stage, "sracl", base="sasrec", **weights, **shared)
    mending = {"data_weight": 0.3, "triplet_weight": 0.01, **MENDING, **shared}
    for stages in ("two", "joint"):
        yield f"laclrec-{stages}", union(stage, "laclrec", stages=stages, **mending)


def moved_parts(stage):
    """Parts of which a bit has changed, phase by phase, with Adam's moments at work."""
    method = make("mclrec")
    engines = engines_of(method, zero_stage=stage, lr=1e-2)
    moved = []
    for step in range(2):
        for phase in method.phases(0):
            before = bits(engines)
            take(engines, batches_of(step, world_size()), phase, step)
            after = bits(engines)
            changed = {n.split(".")[0] for n in after if not torch.equal(before[n], after[n])}
            moved.append([phase.name, sorted(changed)])
    return moved


def poisoned(stage, item, precision):
    """What every rank says when the last rank's batch is bad, and whether a weight has moved."""
    method = make("tiny")
    engines = engines_of(method, zero_stage=stage, lr=1e-2, precision=precision)
    phase = method.phases(0)[0]
    take(engines, batches_of(0, world_size()), phase)
    before = bits(engines)
    batches = batches_of(1, world_size())
    batches[-1] = batch_of([[1, 2], [3]], [item, 4], None, 6)
    try:
        take(engines, batches, phase, 41)
        said = None
    except DivergedError as error:
        said = str(error)
    return {"said": gather_objects(said), "still": gather_objects(same(before, bits(engines)))}


def interrupted(folder, **settings):
    """Trains, saves, trains on; the same once more from the checkpoint."""
    settings = {"lr": 1e-2, **settings}
    engines = train(engines_of(make("tiny"), **settings), 0)
    checkpoint.save(engines, folder)
    train(engines, STEPS)
    checkpoint.save(engines, folder.with_name(f"{folder.name}-later"))
    again = engines_of(make("tiny"), **settings)
    checkpoint.load(again, folder)
    train(again, STEPS)
    both = [gather_objects(same(f(engines), f(again))) for f in (bits, state)]
    return {"same": both, "compared": len(state(engines))}


def unstepped(folder):
    """A checkpoint from before the first step."""
    checkpoint.save(engines_of(make("tiny")), folder)
    loaded = engines_of(make("tiny"))
    checkpoint.load(loaded, folder)
    return same(state(train(loaded, 0)), state(train(engines_of(make("tiny")), 0)))


def changed_world(other, wrote, reads):
    """Goes on from a checkpoint of another world size and stage, as its writer went on."""
    engines = engines_of(make("tiny"), zero_stage=reads, lr=1e-2)
    train(engines, 0)  # an optimizer that has stepped already must forget that
    checkpoint.load(engines, other / f"fp32-{wrote}")
    train(engines, STEPS)
    expected = make("tiny")
    checkpoint.load_weights(expected, other / f"fp32-{wrote}-later")
    return worst(checkpoint.full_weights(engines), expected.state_dict())


def refused(engines, folder):
    """What every rank says to a checkpoint, and whether a weight has moved on any."""
    before = bits(engines)
    try:
        checkpoint.load(engines, folder)
        said = None
    except CheckpointError as error:
        said = str(error)
    return {"said": gather_objects(said), "still": gather_objects(same(before, bits(engines)))}


def refusals(out):
    """Checkpoints that do not fit, and one that is torn on the last rank alone."""
    whole, mine = out / "whole", out / "whole"
    checkpoint.save(engines_of(make("tiny"), lr=1e-2), whole)
    if rank() == world_size() - 1:
        mine = out / "torn"
        mine.mkdir()
        for file in whole.iterdir():
            (mine / file.name).write_bytes(file.read_bytes())
        path = mine / "optimizer-head.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
    return {
        "torn": refused(train(engines_of(make("tiny")), 0), mine),
        "optimizer": refused(train(engines_of(make("tiny"), optimizer="sgd"), 0), whole),
        "method": refused(engines_of(make("sasrec")), whole),
    }


def from_rank_0():
    """What ranks train that drew different weights."""
    method = make("tiny")
    method.head[0].weight.data.fill_(float(rank()))
    method.scale.fill_(float(rank()))
    engines_of(method)
    return gather_objects([method.head[0].weight.sum().item(), method.scale.sum().item()])


def kept(stage):
    """Elements that this rank sees and masters between two steps, the most over the ranks."""
    engines = train(engines_of(make("tiny"), zero_stage=stage), 0)
    visible = sum(parameter.data.numel() for parameter in engines.method.parameters())
    masters = {}
    for parameter in engines.parameters():
        shard = engines.shard(parameter)
        if shard is not None:
            masters[id(shard.master)] = shard.master.numel()
    return max(gather_objects([visible, sum(masters.values())]))


def small_collectives():
    return {
        "sum": sum_over_ranks([1.0, float(rank()), 2.0**53]),
        "gathered": gather_objects({"rank": rank()}),
        "broadcast": gather_objects(broadcast_object(f"from {rank()}")),
    }


def failing_on(lost):
    """What `together` makes of work that one rank alone cannot do, and of work that all can."""

    def work():
        if rank() == lost:
            raise StorageError(f"rank {lost} sees no table")
        return f"{rank()}"

    def answer(do):
        try:
            return together(do)
        except StorageError as error:
            return str(error)

    return gather_objects([answer(work), answer(lambda: "read")])


def every_case(out):
    yield "world", world_size()
    yield "together", failing_on(world_size() - 1)
    yield "collectives", small_collectives()
    yield "from-rank-0", from_rank_0()
    for stage in (1, 2, 3):
        for name, figures in parity(stage):
            yield f"{name}-z{stage}", figures
        yield f"union-z{stage}", union(stage)
        for name, figures in all_workers(stage):
            yield f"all-workers-{name}-z{stage}", figures
        yield f"moved-z{stage}", moved_parts(stage)
        yield f"kept-z{stage}", kept(stage)
        for precision in ("fp32", "bf16"):
            of_stage = {"zero_stage": stage, "precision": precision}
            yield f"loss-{precision}-z{stage}", poisoned(stage, POISON, precision)
            yield f"gradient-{precision}-z{stage}", poisoned(stage, POISON + 1, precision)
            name = f"{precision}-{stage}"
            yield f"interrupted-{precision}-z{stage}", interrupted(out / name, **of_stage)
    yield "interrupted-sgd", interrupted(out / "sgd", optimizer="sgd", momentum=0.9)
    yield "unstepped", unstepped(out / "unstepped")
    yield "refused", refusals(out)


def resumptions(other):
    for wrote, reads in ((1, 3), (3, 1), (2, 2)):
        yield f"changed-{wrote}-{reads}", changed_world(other, wrote, reads)


def main(mode, out, other=None):
    torch.set_num_threads(1)
    ensure_process_group("gloo")
    load_deepspeed("cpu")
    gc.freeze()  # DeepSpeed collects garbage at every start of stage 3, of which there are many
    results = dict(every_case(Path(out))) if mode == "all" else {}
    if other is not None:
        results |= dict(resumptions(Path(other)))
    if rank() == 0:
        (Path(out) / "results.json").write_text(json.dumps(results))
    end_rank()


if __name__ == "__main__":
    main(*sys.argv[1:])
