"""Does `samples: prefix` train as the authors' code does? Loss curves on Beauty, step for step.

Both start from the same weights and take the same batches and views: ours through packed rows,
DeepSpeed and fused losses, theirs as tests/parity/authors_recipe.py restates it from the
specification of their code (one padded prefix a row, three passes a batch). Without dropout the
terms must be equal; with the papers' dropout of .5 the two draw differently, and curves must lie
on each other.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.record import Record, Table, arguments
from benchmarks.store import training_store
from distrl.contract import Catalog
from distrl.data.config import DataConfig
from distrl.data.plan import Ledger
from distrl.data.samples import BatchMaker
from distrl.data.store import read_manifest
from distrl.data.stream import local_batches
from distrl.engine.collectives import ensure_process_group
from distrl.engine.config import EngineConfig
from distrl.engine.zero import Engines
from distrl.methods import build, parse_method

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.parity.authors_recipe import AuthorsTrainer, padded, with_weights_of

MAX_LEN, BATCH, SEED = 50, 256, 0
DATA_WEIGHT, MODEL_WEIGHT = 0.04, 0.05
TERMS = ("next_item", "data_contrast", "model_contrast", "margin")


def curves(store_uri, manifest, steps, dropout):
    """Terms of the first encoder pass and the augmenters' pass of each step: ours, theirs."""
    torch.manual_seed(SEED)
    settings = {"name": "mclrec", "data_weight": DATA_WEIGHT, "model_weight": MODEL_WEIGHT}
    settings |= {"dropout": dropout, "attention_dropout": dropout}
    method = build(parse_method(settings), Catalog(manifest.num_items, MAX_LEN)).train()
    encoder, augmenters = with_weights_of(method, manifest.num_items, MAX_LEN, dropout=dropout)
    theirs = AuthorsTrainer(
        encoder.train(), augmenters, data_weight=DATA_WEIGHT, model_weight=MODEL_WEIGHT
    )
    engines = Engines(
        method,
        EngineConfig(),
        device=torch.device("cpu"),
        micro_batch_size=BATCH,
        num_workers=1,
    )
    data = DataConfig(store_uri=store_uri, samples="prefix", batch_size=BATCH, max_len=MAX_LEN)
    maker = BatchMaker(data, 2, manifest.num_items, SEED)
    stream = local_batches(manifest, data, maker, epochs=1, ledger=Ledger("recipe"))
    shares = {"target": 1.0, "pair": 1.0}
    for step, (batch, _) in zip(range(steps), stream, strict=False):
        ours = {}
        for phase in method.phases(0):
            found = engines.step(batch, phase, shares, step=step)
            ours[phase.name] = {name: value.item() for name, value in found.items()}
        first, second = (padded(view, MAX_LEN) for view in batch.views)
        yield ours, theirs.step(padded(batch.clean, MAX_LEN), batch.targets, first, second)
    stream.close()


def draw(runs, path):
    """One panel a term: ours and theirs, without dropout and with it."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, term in zip(axes.flat, TERMS, strict=True):
        for (dropout, pairs), color in zip(runs.items(), ("tab:blue", "tab:orange"), strict=True):
            for side, (name, style) in enumerate((("distrl", "-"), ("authors' recipe", "--"))):
                values = [pair[side]["encoder"][term] for pair in pairs]
                label = f"{name}, dropout {dropout}"
                axis.plot(values, style, color=color, alpha=0.8, label=label)
        axis.set(title=term, xlabel="step", ylabel="nats" if term != "margin" else "margin")
    axes.flat[0].legend()
    figure.suptitle("MCLRec in prefix mode beside the authors' recipe, 256 prefixes a step")
    figure.savefig(path, dpi=110)


def main() -> None:
    args = arguments(__doc__).parse_args()
    record = Record("authors_recipe", args)
    ensure_process_group("gloo")
    store_uri, said = training_store()
    record.note(said)
    manifest = read_manifest(store_uri)
    steps = 5 if args.quick else 40
    runs = {dropout: list(curves(store_uri, manifest, steps, dropout)) for dropout in (0.0, 0.5)}
    rows = []
    for dropout, pairs in runs.items():
        for phase in ("encoder", "augmenters", "encoder_again"):
            worst = max(
                abs(ours[phase][term] / theirs[phase][term] - 1.0)
                for ours, theirs in pairs
                for term in TERMS
                if term in ours[phase]
            )
            rows.append([dropout, phase, len(pairs), f"{worst:.1e}"])
    record.table(
        Table("Largest relative difference of any term", ["dropout", "phase", "steps", "is"], rows)
    )
    args.results.mkdir(parents=True, exist_ok=True)
    draw(runs, args.results / "authors_recipe.png")
    record.figures["largest_relative_difference"] = {f"{r[0]}/{r[1]}": float(r[3]) for r in rows}
    record.write()


if __name__ == "__main__":
    main()
