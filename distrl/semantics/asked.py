"""What a run has asked so far, what came of it, and what it took."""

import time
from collections import Counter
from dataclasses import dataclass, field

from distrl.semantics.describe_config import BudgetConfig, PricesConfig


@dataclass
class Asked:
    """What a run has done so far."""

    total: int
    """Prompts that there are, if that is known."""
    prompts: int = 0
    """Prompts looked at."""
    from_cache: int = 0
    """Prompts that needed nothing: their replies were kept before this run."""
    repeated: int = 0
    """Prompts equal to one before them in this run."""
    asked: int = 0
    """Replies to prompts that were asked for the first time."""
    reasked: int = 0
    """Replies to prompts that were asked again for a malformed one."""
    malformed: int = 0
    """Of those replies, how many say nothing that can be used."""
    unanswered: int = 0
    """Prompts without a reply after all retries, or refused."""
    retries: int = 0
    """Requests that were sent again because none was answered."""
    failures: Counter[str] = field(default_factory=Counter)
    """Requests without a reply, by what went wrong."""
    last_failure: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    lost_in: int = 0
    lost_out: int = 0
    """Tokens, at most, of requests that brought no reply and may be billed nevertheless."""
    started_s: float = field(default_factory=time.monotonic)

    @property
    def came(self) -> int:
        """Replies of this run."""
        return self.asked + self.reasked

    def spend(self, tokens_in: int, tokens_out: int, prices: PricesConfig) -> None:
        """Counts the tokens of a reply."""
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out
        self.cost = prices.cost(self.tokens_in, self.tokens_out)

    def lose(self, tokens_in: int, tokens_out: int) -> None:
        """Counts the most that a request without a reply may be billed for."""
        self.lost_in += tokens_in
        self.lost_out += tokens_out

    def beyond(self, budget: BudgetConfig) -> str:
        """That a budget is spent, and what for."""
        limits = [
            f"budget.{name}={value:g}"
            for name, value in (("max_cost", budget.max_cost), ("max_tokens", budget.max_tokens))
            if value is not None
        ]
        said = (
            f"{' and '.join(limits)} leave no room for another request: this run used "
            f"{self.tokens_in:,} + {self.tokens_out:,} tokens, cost {self.cost:,.4f}"
        )
        lost = self.lost_in + self.lost_out
        if lost:
            said += f", and up to {lost:,} tokens in requests without a reply that may be billed"
        return said

    def line(self, in_flight: int) -> str:
        """How far it is, for people."""
        elapsed_s = time.monotonic() - self.started_s
        left_s = elapsed_s * max(self.total - self.prompts, 0) / max(self.prompts, 1)
        failed = sum(self.failures.values())
        return (
            f"ask  {self.prompts:,}/{self.total:,} prompts  {self.came:,} replies  "
            f"{self.came / max(elapsed_s, 1e-9):,.1f}/s  {in_flight} in flight  "
            f"{self.tokens_in:,} + {self.tokens_out:,} tokens  cost {self.cost:,.4f}"
            + (f"  {self.malformed:,} malformed" if self.malformed else "")
            + (f"  {failed:,} failed, last: {self.last_failure}" if failed else "")
            + f"  {elapsed_s:,.0f} s, ETA {left_s:,.0f} s"
        )
