"""What CL4SRec and MCLRec share: which views stand against which. P pairs, D hidden."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from distrl.contract import Batch, Term
from distrl.methods.encoding import EncoderConfig
from distrl.ops.losses import info_nce
from distrl.schema import Config


class NegativesConfig(Config):
    """How alike two states are, and who is a negative."""

    temperature: PositiveFloat = 1.0
    """Divides similarities; the authors of MCLRec and of SRA-CL take 1 and raw dot products."""
    negatives: Literal["worker", "all_workers"] = "worker"
    """The pairs of the same worker's batch, as in the papers, or of the batches of all workers:
    then the loss is that of one worker with all of them."""
    false_negatives: Literal["keep", "same_sample", "same_sample_or_target"] = "keep"
    """Which pairs are no negatives of each other: none (the papers), those of the same sample (two
    prefixes of a user), or those whose prefixes are followed by the same item too."""


class ContrastConfig(EncoderConfig, NegativesConfig):
    """The contrast of two augmented views."""

    similarity: Literal["dot", "cosine"] = "dot"
    """Of the contrast between the two data views; contrasts with learned views take the dot."""
    data_weight: NonNegativeFloat = 0.0
    """Weight of the contrast between the two data views."""


class Contrasted(NamedTuple):
    """Views that stand against each other, of this worker's pairs or of all workers'."""

    views: tuple[Float[Tensor, "P D"], ...]
    alike: Bool[Tensor, "P P"] | None


def contrasted(
    config: NegativesConfig,
    batch: Batch,
    views: tuple[Float[Tensor, "P D"], ...],
    gather: Callable[[Tensor], Tensor],
) -> Contrasted:
    """The views, from all workers where the config says so, and which of them are alike.

    Collective with `negatives: all_workers`, where a worker without pairs takes part too.
    """
    if config.negatives == "all_workers":
        views = gather(torch.stack(views, dim=1)).unbind(dim=1)
    if config.false_negatives == "keep":
        return Contrasted(views, None)
    assert batch.pair_sample is not None, "a batch with views numbers their samples"
    assert batch.pair_target is not None, "a batch with views names their targets"
    numbers = torch.stack([batch.pair_sample, batch.pair_target], dim=1)
    if config.negatives == "all_workers":
        numbers = gather(numbers)
    same = numbers[:, None] == numbers
    if config.false_negatives == "same_sample":
        return Contrasted(views, same[..., 0])
    return Contrasted(views, same.any(dim=-1))


def takes_part(config: NegativesConfig, batch: Batch) -> bool:
    """Whether this worker's views are encoded: always where a collective may wait for them."""
    if batch.views is None and batch.neighbors is None and batch.semantic_views is None:
        return False
    return config.negatives == "all_workers" or batch.num_pairs > 0


def data_contrast(config: ContrastConfig, pairs: Contrasted) -> dict[str, Term]:
    """InfoNCE between the first two views; nothing without negatives or weight."""
    h1, h2 = pairs.views[:2]
    if config.data_weight == 0 or len(h1) < 2:
        return {}
    if config.similarity == "cosine":
        h1, h2 = F.normalize(h1, dim=1), F.normalize(h2, dim=1)
    value = info_nce(h1, h2, temperature=config.temperature, alike=pairs.alike)
    return {"data_contrast": Term(config.data_weight, value, "pair")}
