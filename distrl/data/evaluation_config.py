"""How models are ranked, against the catalog or a sample of it."""

from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from distrl.schema import Config

RankingProtocol = Literal["full", "sampled99"]


class EvaluationConfig(Config):
    """Ranking of held-out items. Nothing here but the first seven changes a metric."""

    protocol: RankingProtocol = "full"
    """`full` ranks each target against the whole catalog. `sampled99` ranks it against 99 different
    random items that are nowhere in the user's sequence up to the target, and the target loses a
    tie: the protocol of STEAM and TCLARec, LACLRec's predecessors. Its figures are not comparable
    with those of full ranking, so a training and a promotion, which choose by a ranking, refuse
    it."""
    negatives_seed: NonNegativeInt = 0
    """With a user's id and the split it decides the 99 items, whatever the batch and the shard."""
    cutoffs: tuple[PositiveInt, ...] = (5, 10, 20)
    """The k of HR@k, NDCG@k and MRR@k, rising."""
    length_bounds: tuple[PositiveInt, ...] = (5, 8, 20, 50)
    """Inclusive upper ends, rising, of the buckets of the table by length; a user's length counts
    the held-out items too, as in MCLRec's Table 5."""
    validation_users: PositiveInt | None = None
    """Users that the validation split is ranked for, or a few more: those of the store's first
    shards, which are as random as any. None: all. The test split is always ranked whole."""
    noise_share: Annotated[float, Ge(0), Le(1)] = 0.0
    """Random items put into each history before the model reads it, as a share of the items that
    it would read: robustness to noise, as in MCLRec's Fig. 7, which leaves the procedure open.
    Ours is `distrl.ops.sequences.with_random_items`. Only on the test split, so that no checkpoint
    is chosen by it; the targets, the seen items and the baselines are those of the clean
    history."""
    noise_seed: NonNegativeInt = 0
    """With a user's id it decides which items and where, whatever the batch and the shard."""
    dtype: Literal["float64", "float32"] = "float64"
    """Precision of the encoder's pass. float64 keeps ranks the same in any batch; float32 halves
    the time of the pass and moves a near-tie now and then. Scores are exact either way."""
    batch_size: PositiveInt = 4096
    """Users ranked at once. Histories of like length are encoded together, so more users are less
    padding."""
    item_chunk: PositiveInt = 512
    """Items scored at once: batch_size * item_chunk scores of 8 bytes are held."""
    num_workers: NonNegativeInt = 2
    """Ray actors that rank shards side by side; 0 ranks in the calling process, without Ray."""
    cpus_per_worker: NonNegativeFloat = 1.0
    """Ray's share of CPUs for each; its whole part is the number of threads, at least one."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """Ray's share of GPUs for each; above 0 the model is ranked on the GPU."""

    @model_validator(mode="after")
    def _rising(self) -> "EvaluationConfig":
        for name in ("cutoffs", "length_bounds"):
            values = self.cutoffs if name == "cutoffs" else self.length_bounds
            if list(values) != sorted(set(values)):
                raise ValueError(f"{name}={list(values)} is not rising")
        if not self.cutoffs:
            raise ValueError("cutoffs is empty; name at least one, 10 say")
        return self
