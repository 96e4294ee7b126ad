"""What methods share: the encoder's settings and the next-item term."""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt
from jaxtyping import Float
from pydantic import PositiveInt, model_validator
from torch import Tensor

from distrl.contract import Batch, Catalog, Packed
from distrl.nn.encoder import SequenceEncoder, stack
from distrl.nn.gru_encoder import GRUEncoder
from distrl.ops.losses import next_item_loss
from distrl.schema import Config

Probability = Annotated[float, Ge(0), Lt(1)]


class MethodConfig(Config):
    """What a run asks of the config of any method."""

    @property
    def epochs_before_ranking(self) -> int:
        """Epochs at most in which nothing is trained that could be ranked with."""
        return 0

    @property
    def takes_neighbors(self) -> bool:
        """Whether the method learns from a store's neighbors."""
        return False

    @property
    def text_width(self) -> int:
        """Of the text vectors it takes; 0 where it takes none."""
        return 0


class NextItemConfig(MethodConfig):
    """What every encoder and its next-item loss have."""

    hidden_size: PositiveInt = 64
    """Width D of states and item vectors."""
    products: Literal["fp32", "bf16"] = "fp32"
    """Type of the products of states and item vectors in the next-item loss. bf16 costs a gradient
    some .3 % of its norm and, where the processor multiplies bf16, takes two thirds of the time."""


class EncoderConfig(NextItemConfig):
    """Sizes of the SASRec encoder; the defaults are the MCLRec authors' for Amazon data."""

    inner_size: PositiveInt = 256
    """Width of the feed-forward networks."""
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 2
    dropout: Probability = 0.5
    """After the embeddings and in each block; the papers leave it unsaid."""
    attention_dropout: Probability = 0.5
    """On attention probabilities."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "EncoderConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}"
            )
        return self

    def build_encoder(self, catalog: Catalog) -> SequenceEncoder:
        """The untrained encoder for one catalog."""
        return SequenceEncoder(
            num_items=catalog.num_items,
            max_len=catalog.max_len,
            hidden_size=self.hidden_size,
            inner_size=self.inner_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
        )


def target_states(
    encoder: Callable[[Packed, Tensor], Tensor], batch: Batch, extra: Sequence[Packed] = ()
) -> tuple[Float[Tensor, "T D"], list[Float[Tensor, "P D"]]]:
    """States that predict the batch's targets, and the last states of further packed sequences.

    All of it is one pass of the encoder, a SequenceEncoder or what computes as one.
    """
    stacked = stack([batch.clean, *extra]) if extra else batch.clean
    num_segments = batch.clean.last.shape[0]
    at = torch.cat([batch.target_at, stacked.last[num_segments:]])
    states, *last = torch.split(
        encoder(stacked, at),
        [batch.num_targets, *(packed.last.shape[0] for packed in extra)],
    )
    return states, last


def next_item(
    encoder: SequenceEncoder | GRUEncoder,
    states: Float[Tensor, "T D"],
    batch: Batch,
    config: NextItemConfig,
) -> Float[Tensor, ""]:
    """Cross entropy over the whole catalog; row numbers of the table are item ids."""
    return next_item_loss(states, encoder.item_vectors, batch.targets, products=config.products)
