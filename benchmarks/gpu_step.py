"""The training step on a GPU: attention, loss, feeding, and how near to the chip's limit.

    python -m benchmarks.gpu_step
    python -m benchmarks.gpu_step --device cpu     # tries the script out; figures mean nothing

MCLRec's three steps in bf16 without Ray, on generated users of Beauty's lengths, d 64 and d 256,
catalogs of 12 k, 100 k and 1 M items: three ways to attend (benchmarks/gpu_attention.py), batches
fed plainly or from pinned memory one ahead; then the next-item loss alone (benchmarks/
gpu_losses.py). Without a GPU it says so, claims nothing and ends with status 0.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat

import numpy as np
import torch

from benchmarks.gpu_attention import ROW_LENGTH, attention
from benchmarks.gpu_losses import forward_backward, losses
from benchmarks.record import Record, Table, arguments
from benchmarks.roofline import step_work
from benchmarks.store import MEAN_LENGTH, MIN_LENGTH
from distrl.contract import Batch, Catalog, Packed, Unit
from distrl.data.config import AugmentConfig, DataConfig
from distrl.data.samples import BatchMaker, Samples
from distrl.engine.collectives import ensure_process_group
from distrl.engine.config import EngineConfig
from distrl.engine.zero import Engines
from distrl.methods import MethodConfig, build, parse_method
from distrl.ops.ragged import Ragged

CATALOGS, WIDTHS = (12_101, 100_000, 1_000_000), (64, 256)
SHARES: dict[Unit, float] = {"target": 1.0, "pair": 1.0}
WARM_UP = 3


def batch_of(users: int, num_items: int, row_length: int, seed: int) -> Batch:
    """A batch of generated users, made as the stream makes its own."""
    rng = np.random.default_rng(seed)
    lengths = MIN_LENGTH - 2 + rng.geometric(1 / (MEAN_LENGTH - MIN_LENGTH + 1), users)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = Ragged(rng.integers(1, num_items + 1, offsets[-1]), offsets)
    augment = AugmentConfig(mask_with="token")
    config = DataConfig(store_uri="", augment=augment, row_length=row_length)
    nothing = np.zeros(users, dtype=np.int64)
    samples = Samples(nothing, nothing, np.arange(users), items)
    return BatchMaker(config, 2, num_items, seed).make(samples)


def pinned(batch: Batch) -> Batch:
    """The same batch where a GPU can fetch it from by itself."""
    return _mapped(batch, lambda tensor: tensor.pin_memory())


def _mapped(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    def pack(packed: Packed) -> Packed:
        parts = (packed.items, packed.segment, packed.position, packed.last)
        return Packed(*map(change, parts))

    views = None if batch.views is None else (pack(batch.views[0]), pack(batch.views[1]))
    return Batch(pack(batch.clean), change(batch.target_at), change(batch.targets), views)


def fed(batches: Iterator[Batch], device: torch.device, *, ahead: bool) -> Iterator[Batch]:
    """Batches on the device; `ahead` copies the next one on a stream of its own meanwhile."""
    if not ahead:
        yield from (batch.to(device) for batch in batches)
        return
    stream, waiting = torch.cuda.Stream(), None
    for batch in chain(batches, [None]):
        following = None
        if batch is not None:
            with torch.cuda.stream(stream):
                following = batch.to(device)
        if waiting is not None:
            yield waiting
        torch.cuda.current_stream().wait_stream(stream)
        waiting = None if following is None else _mapped(following, _used_here)


def _used_here(tensor: torch.Tensor) -> torch.Tensor:
    """Keeps the memory of a tensor that another stream made until this one is done with it."""
    tensor.record_stream(torch.cuda.current_stream())
    return tensor


def engines_for(config: MethodConfig, num_items: int, device: torch.device) -> Engines:
    """A method in bf16."""
    torch.manual_seed(0)
    method = build(config, Catalog(num_items, ROW_LENGTH["sdpa"])).train()
    engine = EngineConfig(precision="bf16")
    return Engines(method, engine, device=device, micro_batch_size=256, num_workers=1)


def seconds(run: Callable[[], object], device: torch.device, times: int) -> float:
    """Mean seconds of some runs, the device's queue emptied before and after."""
    for _ in range(WARM_UP):
        run()
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    _wait(device)
    return (time.perf_counter() - start) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _restart_peak(device: torch.device) -> None:
    gc.collect()  # engines of the row before refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def peak_rate(device: torch.device) -> float:
    """bf16 operations a second of a large product."""
    size = 8192 if device.type == "cuda" else 256
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2.0 * size**3 / seconds(lambda: square @ square, device, 10)


def step_row(
    kind: str, ahead: bool, width: int, catalog: int, args: argparse.Namespace, rate: float
) -> tuple[float, float, float]:
    """Targets/s, share of the measured peak, and peak memory in GB of one way to step."""
    device = torch.device(args.device)
    config = parse_method(
        {"name": "mclrec", "hidden_size": width, "inner_size": 4 * width,
         "attention_dropout": 0.0, "products": "bf16"}
    )  # fmt: skip
    _restart_peak(device)
    engines = engines_for(config, catalog, device)
    plain = [batch_of(args.users, catalog, ROW_LENGTH[kind], seed) for seed in range(4)]
    made = [pinned(batch) for batch in plain] if ahead else plain
    stream = fed(chain.from_iterable(repeat(made)), device, ahead=ahead)

    def run() -> None:
        batch = next(stream)
        for phase in engines.method.phases(0):
            engines.step(batch, phase, SHARES, step=0)

    with attention(kind):
        took = seconds(run, device, args.steps)
    work = step_work(engines.method, config, plain[0])
    targets = sum(batch.num_targets for batch in plain) / len(plain)
    share = (work.fp32_flops + work.bf16_flops) / took / rate
    return targets / took, share, _peak_gb(device)


def steps_table(args: argparse.Namespace, record: Record, sizes: list[tuple[int, int]]) -> None:
    """Every way to step at every size; a way that fails is named with its reason."""
    device = torch.device(args.device)
    rate = peak_rate(device)
    record.figures["bf16_tflops_measured"] = rate / 1e12
    on_gpu = device.type == "cuda"
    ways = [("sdpa", False)]
    ways += [("sdpa", True), ("flex", True), ("varlen", True)] if on_gpu else []
    rows = []
    for width, catalog in sizes:
        for kind, ahead in ways:
            name = f"d {width}, {catalog:,} items, {kind}{', pinned' if ahead else ''}"
            try:
                found = step_row(kind, ahead, width, catalog, args, rate)
            except (RuntimeError, NotImplementedError, ImportError) as error:
                record.note(f"{name}: not possible here, {str(error).strip().splitlines()[0]}")
                continue
            record.figures[name] = found
            rows.append((width, catalog, kind, "pinned" if ahead else "plain", *found))
    header = ("d", "items", "attention", "feeding", "targets/s", "of peak", "peak GB")
    record.table(Table(f"MCLRec, bf16, {args.users:,} users a step", header, rows))


def losses_table(args: argparse.Namespace, record: Record, sizes: list[tuple[int, int]]) -> None:
    """Every fused loss at every size, forward and backward."""
    device = torch.device(args.device)
    found, lacking = losses()
    for line in lacking:
        record.note(line)
    targets, rows = int(args.users * (MEAN_LENGTH - 3)), []
    for width, catalog in sizes:
        for name, loss in found.items():
            _restart_peak(device)
            try:
                run = forward_backward(loss, targets, catalog, width, args.device)
                took = seconds(run, device, args.steps)
            except (RuntimeError, NotImplementedError) as error:
                record.note(f"{name}, d {width}, {catalog:,} items: {str(error).splitlines()[0]}")
                continue
            rows.append((width, catalog, name, 1e3 * took, _peak_gb(device)))
            record.figures[f"loss, d {width}, {catalog:,} items, {name}"] = rows[-1][3:]
    header = ("d", "items", "loss", "ms", "peak GB")
    record.table(Table(f"Next-item loss and its gradients, {targets:,} targets", header, rows))


def main() -> int:
    """Measures on the GPU, or says that there is none."""
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--users", type=int, default=4096, help="users a step")
    parser.add_argument("--steps", type=int, default=20, help="counted steps of each way")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured, nothing is claimed")
        return 0
    sizes = [(width, catalog) for width in WIDTHS for catalog in CATALOGS]
    if args.quick or args.device == "cpu":
        sizes = [(16, 500)]
        args.users, args.steps = min(args.users, 32), min(args.steps, 2)
    ensure_process_group("nccl" if args.device == "cuda" else "gloo")
    record = Record("gpu_step", args)
    if args.device == "cuda":
        record.note(f"GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}.")
    else:
        record.note("On a CPU, to try the script out: these figures mean nothing.")
    steps_table(args, record, sizes)
    losses_table(args, record, sizes)
    if args.device == "cuda":
        record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
