"""What this machine can do at most: products a second, and bytes a second."""

from collections.abc import Callable

import torch

SIZES = ((1024, 1024, 1024), (2048, 2048, 512), (512, 4096, 512))
"""Products tried; the fastest stands for the machine."""
CACHE_BYTES, MEMORY_BYTES = 1 << 20, 1 << 27
"""Array sizes of the two copies: one stays in a cache, one passes through memory."""
BATCH_BYTES = 1 << 26
"""A cached copy is repeated until it has moved this much, so that a clock can time it."""


def product(size: tuple[int, int, int], dtype: torch.dtype) -> tuple[float, Callable[[], object]]:
    """Operations of one product, and the product."""
    rows, inner, columns = size
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    return 2.0 * rows * inner * columns, lambda: torch.mm(left, right, out=out)


def copy(num_bytes: int) -> tuple[float, Callable[[], object]]:
    """Bytes read and written by some copies of an array, and the copies."""
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    repeats = max(BATCH_BYTES // num_bytes, 1)

    def run() -> None:
        for _ in range(repeats):
            target.copy_(source)

    return 2.0 * num_bytes * repeats, run


def exponentials(dtype: torch.dtype) -> tuple[float, Callable[[], object]]:
    """How many a softmax takes of rows that stay in a cache, and how."""
    rows = torch.randn(CACHE_BYTES // 4096, 1024).to(dtype)
    out = torch.empty_like(rows)
    repeats = BATCH_BYTES // CACHE_BYTES // 4

    def run() -> None:
        for _ in range(repeats):
            torch.softmax(rows, dim=1, out=out)

    return float(rows.numel() * repeats), run


def candidates() -> dict[str, tuple[float, Callable[[], object]]]:
    """What is timed, by `kind/size`: the amount done, and how."""
    found = {}
    for dtype, kind in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for size in SIZES:
            found[f"{kind}/{'x'.join(map(str, size))}"] = product(size, dtype)
    found["cache/copy"] = copy(CACHE_BYTES)
    found["memory/copy"] = copy(MEMORY_BYTES)
    found["exponentials/fp32"] = exponentials(torch.float32)
    found["exponentials/bf16"] = exponentials(torch.bfloat16)
    return found
