"""Whether views collapse: how close positives are, how widely views spread, in how many directions.

Dimensions: P views, D hidden. Everything is computed in float64, whatever type the views have.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def alignment(first: Float[Tensor, "P D"], second: Float[Tensor, "P D"]) -> Float[Tensor, ""]:
    """Mean squared distance of the two views of a pair, on the unit sphere: 0 to 4, 0 is best.

    Source: Wang & Isola (ICML 2020, arXiv:2005.10242), L_align with alpha = 2. It equals 2 minus
        twice the mean cosine of the pairs. A view of zeros stays at the origin.

    Args:
        first: One view, any scale.
        second: The other view, row-aligned with `first`.

    Raises:
        ValueError: If there is no pair.
    """
    if first.shape[0] == 0:
        raise ValueError("alignment needs at least 1 pair, got none")
    apart = F.normalize(first.double(), dim=1) - F.normalize(second.double(), dim=1)
    return apart.square().sum(dim=1).mean()


def uniformity(views: Float[Tensor, "P D"]) -> Float[Tensor, ""]:
    """How evenly views spread over the unit sphere: 0 for one point, lower is more even.

    The log of the mean Gaussian potential of distinct pairs, in nats. Uniform points in many
    dimensions are near -4, and no views are below -8.

    Source: Wang & Isola (ICML 2020, arXiv:2005.10242), L_uniform with t = 2, over unordered pairs
        as in their code.

    Args:
        views: Of different sequences, any scale.

    Raises:
        ValueError: If there are fewer than 2 views, which leaves no pair.
    """
    if views.shape[0] < 2:
        raise ValueError(f"uniformity needs at least 2 views, got {views.shape[0]}")
    distances = torch.pdist(F.normalize(views.double(), dim=1))
    return distances.square().mul(-2.0).exp().mean().log()


def effective_rank(views: Float[Tensor, "P D"]) -> Float[Tensor, ""]:
    """Directions that the views use: 1 if they lie on one line, min(P, D) if all count alike.

    The exponential of the entropy of the singular values, divided by their sum. Views are taken
    as they are, neither centered nor normalized: views that share a large mean have a rank near 1,
    which centering would hide. Views that are all zero have rank 1.

    Source: Roy & Vetterli (EUSIPCO 2007), Definition 1; on representations as in RankMe (ICML
        2023, arXiv:2210.02885).

    Args:
        views: At least one, finite.

    Raises:
        ValueError: If there are none.
    """
    if views.shape[0] == 0:
        raise ValueError("effective_rank needs at least 1 view, got none")
    values = torch.linalg.svdvals(views.double())
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum().exp()


def mean_norm(views: Float[Tensor, "P D"]) -> Float[Tensor, ""]:
    """Mean length of a view: what normalization hides from the others.

    Raises:
        ValueError: If there are no views.
    """
    if views.shape[0] == 0:
        raise ValueError("mean_norm needs at least 1 view, got none")
    return views.double().norm(dim=1).mean()


def view_diagnostics(first: Float[Tensor, "P D"], second: Float[Tensor, "P D"]) -> dict[str, float]:
    """All of them for one kind of view: `alignment`, `uniformity`, `effective_rank`, `norm`.

    The last three are means over the two views, each taken alone: two views of one sequence are no
    sample of different sequences, and learned views may use different directions.

    Args:
        first: One view of at least 2 sequences, finite.
        second: The other view, row-aligned with `first`.

    Raises:
        ValueError: If there are fewer than 2 pairs.
    """
    of_each = {"uniformity": uniformity, "effective_rank": effective_rank, "norm": mean_norm}
    means = {
        name: (measure(first) + measure(second)).item() / 2 for name, measure in of_each.items()
    }
    return {"alignment": alignment(first, second).item(), **means}
