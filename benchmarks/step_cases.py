"""The methods and the batches that `training_step` compares."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice

import torch

from benchmarks.roofline import Work
from distrl.contract import Batch, Catalog, Packed, Unit
from distrl.data.config import DataConfig
from distrl.data.plan import Ledger
from distrl.data.samples import BatchMaker
from distrl.data.store import manifest_hash
from distrl.data.stream import local_batches
from distrl.engine.config import EngineConfig
from distrl.engine.zero import Engines
from distrl.methods import MethodConfig, build, parse_method
from distrl.schema import Manifest

METHODS = {
    "CE-SASRec, 1 update": {"name": "sasrec", "updates_per_batch": 1},
    "CE-SASRec, 2 updates": {"name": "sasrec", "updates_per_batch": 2},
    "MCLRec, 3 steps": {"name": "mclrec", "model_weight": 0.005},
}
BATCHES = ("packed", "prefix", "padded")
SHARES: dict[Unit, float] = {"target": 1.0, "pair": 1.0}
BATCH_SIZE = 256


@dataclass
class Case:
    """A method on one kind of batch, ready to step."""

    method: str
    batch: str
    products: str
    config: MethodConfig
    engines: Engines
    upcoming: Iterator[Batch]
    steps: int
    """Taken in each run; few where one takes long."""
    targets: float = 0.0
    """In a run."""
    work: Work = field(default_factory=Work)
    """Counted for one step, on average."""

    @property
    def name(self) -> str:
        """Of the case in tables."""
        return f"{self.method} | {self.batch} | {self.products}"

    def step(self) -> Batch:
        """All phases on the next batch."""
        batch, method = next(self.upcoming), self.engines.method
        for phase in method.phases(0):
            self.engines.step(batch, phase, SHARES, step=0)
        return batch


def padded(batch: Batch, length: int) -> Batch:
    """The same prefixes, each in a row of its own, as the authors' code lays them out."""
    views = batch.views
    rows = None if views is None else (_padded(views[0], length), _padded(views[1], length))
    clean = _padded(batch.clean, length)
    return Batch(clean, clean.last, batch.targets, rows)


def _padded(packed: Packed, length: int) -> Packed:
    count = len(packed.last)
    inside = packed.segment >= 0
    row, column = packed.segment[inside], packed.position[inside]
    items = torch.zeros(count, length, dtype=torch.int64)
    segment, position = torch.full_like(items, -1), torch.zeros_like(items)
    items[row, column], segment[row, column] = packed.items[inside], row
    position[row, column] = column
    newest = packed.position.flatten()[packed.last]
    return Packed(items, segment, position, torch.arange(count) * length + newest)


def batches(manifest: Manifest, store: str, kind: str, views: int, count: int) -> list[Batch]:
    """The first `count` batches of an epoch, made beforehand: the stream has its own benchmark."""
    samples = "all_positions" if kind == "packed" else "prefix"
    config = DataConfig(store_uri=store, batch_size=BATCH_SIZE, samples=samples)
    maker = BatchMaker(config, 2 if views else 0, manifest.num_items, 0)
    ledger = Ledger(manifest_hash(manifest))
    stream = local_batches(manifest, config, maker, epochs=1, ledger=ledger)
    made = [batch for batch, _ in islice(stream, count)]
    stream.close()
    return [padded(b, config.max_len) for b in made] if kind == "padded" else made


def cases(manifest: Manifest, store: str, steps: int, count: int) -> list[Case]:
    """Every method on every kind of batch; bf16 products where batches are packed."""
    data = {
        (kind, views): batches(manifest, store, kind, views, count)
        for kind in BATCHES
        for views in (0, 2)
    }
    made = []
    for label, settings in METHODS.items():
        for kind in BATCHES:
            for products in ("fp32", "bf16") if kind == "packed" else ("fp32",):
                config = parse_method({**settings, "products": products})
                torch.manual_seed(0)
                method = build(config, Catalog(manifest.num_items, 50)).train()
                engines = Engines(
                    method,
                    EngineConfig(),
                    device=torch.device("cpu"),
                    micro_batch_size=BATCH_SIZE,
                    num_workers=1,
                )
                ready = data[kind, method.num_views]
                few = max(steps // 3, 1) if kind == "padded" else steps
                made.append(Case(label, kind, products, config, engines, cycle(ready), few))
    return made
