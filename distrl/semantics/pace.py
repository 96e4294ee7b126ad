"""How fast and how much may be asked: limits a minute, and a budget."""

import asyncio

from distrl.semantics.asked import Asked
from distrl.semantics.describe_config import BudgetConfig, PricesConfig

_BYTES_PER_TOKEN = 3.0
"""At first; prompts of more tokens a byte are learned from."""
_TOKENS_PER_MESSAGE = 8


class Pace:
    """An even flow of so much a minute, without bursts; None flows freely."""

    def __init__(self, per_minute: int | None) -> None:
        self._seconds_each = 60.0 / per_minute if per_minute else 0.0
        self._free = self._held_until = self._held_s = 0.0

    async def take(self, amount: float) -> None:
        """Waits until what was taken before has flowed, and takes more."""
        loop = asyncio.get_running_loop()
        start = max(loop.time(), self._free, self._held_until)
        self._free = start + amount * self._seconds_each
        held_before = self._held_s
        # Who has a turn already is held too, and keeps its distance to the others.
        while (left := start + self._held_s - held_before - loop.time()) > 0:
            await asyncio.sleep(left)

    def give_back(self, amount: float) -> None:
        """Of what was taken, this was not needed; a negative amount was needed besides."""
        self._free -= amount * self._seconds_each

    def hold(self, seconds: float) -> None:
        """Lets nothing flow for a while."""
        now = asyncio.get_running_loop().time()
        longer = now + seconds - max(now, self._held_until)
        if longer > 0:
            self._held_until, self._held_s = now + seconds, self._held_s + longer
            self._free = max(self._free, now) + longer


class Estimate:
    """Tokens of prompts that nobody has counted yet: a bound that learns."""

    def __init__(self) -> None:
        self._tokens_per_byte = 1.0 / _BYTES_PER_TOKEN

    def tokens(self, messages: tuple[dict[str, str], ...]) -> int:
        """Of a prompt, rather too many than too few."""
        return int(_bytes(messages) * self._tokens_per_byte) + _TOKENS_PER_MESSAGE * len(messages)

    def learn(self, messages: tuple[dict[str, str], ...], tokens: int) -> None:
        """A prompt's tokens, as counted by who answered it."""
        counted = (tokens - _TOKENS_PER_MESSAGE * len(messages)) / max(_bytes(messages), 1)
        self._tokens_per_byte = max(self._tokens_per_byte, counted)


class Purse:
    """What a run has spent, and what requests in flight may still cost."""

    def __init__(self, budget: BudgetConfig, prices: PricesConfig, asked: Asked) -> None:
        self._budget, self._prices, self._asked = budget, prices, asked
        self._held_in = self._held_out = 0
        self._settled = asyncio.Condition()

    async def hold(self, tokens_in: int, tokens_out: int) -> bool:
        """Sets the most that a request can cost aside; False if the budget has not as much left.

        Waits while requests in flight may turn out cheaper than what is set aside for them.
        """
        async with self._settled:
            while not self._fits(tokens_in, tokens_out):
                if not self._held_in + self._held_out:
                    return False
                await self._settled.wait()
            self._held_in += tokens_in
            self._held_out += tokens_out
            return True

    async def lose(self, tokens_in: int, tokens_out: int) -> bool:
        """Counts a request that may be billed and brought nothing.

        Returns:
            Whether the budget still lasts for all that is set aside.
        """
        async with self._settled:
            self._asked.lose(tokens_in, tokens_out)
            return self._fits(0, 0)

    async def settle(self, held: tuple[int, int], spent: tuple[int, int]) -> None:
        """Replaces what was set aside by what it came to."""
        async with self._settled:
            self._held_in -= held[0]
            self._held_out -= held[1]
            self._asked.spend(*spent, self._prices)
            self._settled.notify_all()

    def _fits(self, tokens_in: int, tokens_out: int) -> bool:
        asked = self._asked
        tokens_in += asked.tokens_in + asked.lost_in + self._held_in
        tokens_out += asked.tokens_out + asked.lost_out + self._held_out
        budget = self._budget
        if budget.max_tokens is not None and tokens_in + tokens_out > budget.max_tokens:
            return False
        return budget.max_cost is None or self._prices.cost(tokens_in, tokens_out) <= (
            budget.max_cost
        )


def _bytes(messages: tuple[dict[str, str], ...]) -> int:
    return sum(len(message["content"].encode("utf-8", "replace")) for message in messages)
