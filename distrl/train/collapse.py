"""Collapse diagnostics of the views while training: the same sequences, looked at again."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from distrl.contract import Batch, Method
from distrl.engine.collectives import gather_objects, world_size
from distrl.engine.zero import Engines
from distrl.ops.diagnostics import view_diagnostics

T = TypeVar("T")
States = Mapping[str, tuple[Tensor, Tensor]]

MAX_PAIRS = 1024
"""Pairs that are looked at over all workers: effective rank and uniformity cost more than linearly,
and move little beyond some hundreds."""


class CollapseProbe:
    """Holds one batch of this worker's and measures its views whenever asked.

    The batch is the first of those with most pairs, so a curve shows the model change and not the
    users, and the short batch at an epoch's end, whose rank could not be high, is passed over. A
    worker that starts again holds another one.
    """

    def __init__(self, method: Method, engines: Engines) -> None:
        self._method, self._engines = method, engines
        self._batch: Batch | None = None

    def watched(self, batches: Iterator[tuple[Batch, T]]) -> Iterator[tuple[Batch, T]]:
        """The same batches, on the device of the method."""
        for batch, taken in batches:
            if batch.num_pairs > (0 if self._batch is None else self._batch.num_pairs):
                self._batch = batch
            yield batch, taken

    def read(self) -> dict[str, float]:
        """`views/<kind>/<diagnostic>` over the pairs of all workers; the same on all. Collective.

        In evaluation mode and without gradient: draws nothing, moves nothing. Empty for a method
        without views, before any worker has had a pair, and where a view is not finite: the next
        step's loss is not either, and says more.
        """
        method = self._method
        if not (method.num_views or method.wants_neighbors or method.wants_semantic_views):
            return {}
        return diagnostics(gather_objects(self._states()))

    def _states(self) -> States:
        """This worker's views on the host; none where it holds no pairs. Collective."""
        was_training = self._method.training
        share = max(2, MAX_PAIRS // world_size())
        self._method.eval()
        try:
            # At ZeRO 3 all ranks gather the parameters, those without a batch too.
            with self._engines.gathered(), torch.no_grad():
                found = {} if self._batch is None else self._method.view_states(self._batch)
                return {kind: (_host(a, share), _host(b, share)) for kind, (a, b) in found.items()}
        finally:
            self._method.train(was_training)


def diagnostics(found: list[States]) -> dict[str, float]:
    """The diagnostics of each kind of view, over the pairs of all workers.

    Args:
        found: Each worker's views by kind; a worker without pairs has none.
    """
    measured: dict[str, float] = {}
    for kind in sorted({kind for states in found for kind in states}):
        first, second = (
            torch.cat([states[kind][side] for states in found if kind in states]) for side in (0, 1)
        )
        if torch.isfinite(first).all() and torch.isfinite(second).all():
            values = view_diagnostics(first, second)
            measured |= {f"views/{kind}/{name}": value for name, value in values.items()}
    return measured


def _host(states: Tensor, share: int) -> Tensor:
    """Some rows, in memory of their own: what travels is these rows and not all."""
    return states[:share].to("cpu", torch.float32, copy=True)
