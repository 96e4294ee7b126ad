"""Asks an endpoint for all replies that are not kept yet.

    prompts, a block at a time -> [not kept, not asked yet] -> requests in flight -> replies

Until the first reply has come there is one request at a time, so that a wrong key is found out once
and not two hundred times. A retry waits by itself; a 429 holds all requests.
"""

import asyncio
import random
from collections.abc import Callable, Iterator

from distrl.errors import ConfigError, StorageError
from distrl.semantics.asked import Asked
from distrl.semantics.describe_config import DescribeConfig
from distrl.semantics.endpoint import Answer, Endpoint, Unanswered
from distrl.semantics.pace import Estimate, Pace, Purse
from distrl.semantics.prompts import Prompt, Request, request_of, text_of
from distrl.semantics.replies import Replies, Reply

COMMIT_S = 0.8
_QUIET_S = 5.0


def missing_attempt(prompt: Prompt, config: DescribeConfig, replies: Replies) -> int | None:
    """The first attempt at a prompt that has no reply; None if there is no need of another."""
    for attempt in range(config.reask + 1):
        key = request_of(prompt, config.generation, attempt).key
        malformed = replies.malformed(key)
        if malformed is None:
            return attempt
        if not malformed:
            return None
    return None


def ask_all(
    config: DescribeConfig,
    key: str,
    blocks: Iterator[list[Prompt]],
    replies: Replies,
    total: int,
    say: Callable[[str], None],
) -> Asked:
    """Has a reply kept for every prompt that the endpoint answers.

    Args:
        config: Whom to ask, how fast, and for how much.
        key: Of the endpoint.
        blocks: All prompts; read in a thread of its own, a block ahead.
        replies: Where they are kept.
        total: Prompts that there are.
        say: Told of progress, a line at a time.

    Raises:
        ConfigError: If the endpoint refuses the key or the model, or the budget is spent.
        StorageError: If several prompts in a row got no reply, or replies cannot be kept.
    """
    try:
        return asyncio.run(_Asking(config, key, blocks, replies, total, say).run())
    finally:
        # Whatever happened, what came is kept: an interrupt too, or a write that failed once.
        replies.flush()


class _Asking:
    def __init__(
        self,
        config: DescribeConfig,
        key: str,
        blocks: Iterator[list[Prompt]],
        replies: Replies,
        total: int,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._endpoint_config = config, config.endpoint
        self._key, self._blocks, self._replies, self._say = key, blocks, replies, say
        self._asked = Asked(total)
        self._pending: set[str] = set()
        self._in_flight = self._failed_in_a_row = 0
        self._opened = self._spent = False

    async def run(self) -> Asked:
        """Asks; what came is not flushed yet."""
        config = self._endpoint_config
        self._endpoint = Endpoint(config, self._config.generation.model, self._key)
        self._queue: asyncio.Queue[Prompt | None] = asyncio.Queue(config.concurrency)
        self._door = asyncio.Lock()
        self._requests, self._tokens = (
            Pace(config.requests_per_minute),
            Pace(config.tokens_per_minute),
        )
        self._estimate = Estimate()
        self._purse = Purse(self._config.budget, self._config.prices, self._asked)
        try:
            async with asyncio.TaskGroup() as group:
                busy = [group.create_task(self._work()) for _ in range(config.concurrency)]
                others = [
                    group.create_task(one()) for one in (self._feed, self._commit, self._tell)
                ]
                await asyncio.wait(busy)
                for task in others:
                    task.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            await self._endpoint.close()
            self._say(self._asked.line(self._in_flight))
        if self._spent:
            raise ConfigError(self._budget_line())
        return self._asked

    async def _feed(self) -> None:
        """Puts what must be asked into the queue, and an end for every worker."""
        while (block := await asyncio.to_thread(next, self._blocks, None)) is not None:
            for prompt in block:
                self._asked.prompts += 1
                if self._must_ask(prompt):
                    await self._queue.put(prompt)
            await asyncio.sleep(0)
        for _ in range(self._endpoint_config.concurrency):
            await self._queue.put(None)

    def _must_ask(self, prompt: Prompt) -> bool:
        first = request_of(prompt, self._config.generation, 0).key
        if first in self._pending or self._replies.is_new(first):
            self._asked.repeated += 1
            return False
        if missing_attempt(prompt, self._config, self._replies) is None:
            self._asked.from_cache += 1
            return False
        self._pending.add(first)
        return True

    async def _work(self) -> None:
        while not self._spent and (prompt := await self._queue.get()) is not None:
            if not self._opened:
                async with self._door:
                    if not self._opened:
                        await self._complete(prompt)
                        continue
            await self._complete(prompt)

    async def _complete(self, prompt: Prompt) -> None:
        """Asks until there is a well-formed reply, or no attempt left."""
        config = self._config
        while (attempt := missing_attempt(prompt, config, self._replies)) is not None:
            request = request_of(prompt, config.generation, attempt)
            answer = await self._paid(request)
            if answer is None:
                break
            malformed = text_of(prompt, answer[0], config.prompts.item_keys) is None
            self._replies.add(Reply(request.key, config.generation.model, malformed, *answer))
            if attempt:
                self._asked.reasked += 1
            else:
                self._asked.asked += 1
        self._pending.discard(request_of(prompt, config.generation, 0).key)

    async def _paid(self, request: Request) -> tuple[str, int, int] | None:
        """A reply and its tokens in and out, within the budget; None if there is none."""
        expected = self._estimate.tokens(request.messages)
        held = (expected, request.max_tokens)
        if self._spent or not await self._purse.hold(*held):
            self._spent = True
            return None
        spent = (0, 0)
        try:
            answer = await self._sent(request, sum(held))
            if answer is None:
                return None
            tokens_in, tokens_out = answer.tokens_in, answer.tokens_out
            if tokens_in is not None:
                self._estimate.learn(request.messages, tokens_in)
            spent = (
                expected if tokens_in is None else tokens_in,
                len(answer.text) // 4 + 1 if tokens_out is None else tokens_out,
            )
            return answer.text, *spent
        finally:
            await self._purse.settle(held, spent)

    async def _sent(self, request: Request, most_tokens: int) -> Answer | None:
        """Sends a request until it is answered, refused, or has no retry left."""
        config = self._endpoint_config
        for number in range(config.retries + 1):
            await self._requests.take(1)
            await self._tokens.take(most_tokens)
            self._in_flight += 1
            try:
                answer = await self._endpoint.ask(request)
            except Unanswered as failure:
                self._tokens.give_back(most_tokens)
                if not await self._may_go_on(failure, number):
                    return None
                continue
            finally:
                self._in_flight -= 1
            used = (answer.tokens_in or 0) + (answer.tokens_out or 0)
            self._tokens.give_back(most_tokens - used if used else 0)
            self._opened, self._failed_in_a_row = True, 0
            return answer
        return None

    async def _may_go_on(self, failure: Unanswered, number: int) -> bool:
        """Counts a failure and waits as long as it takes before a retry, if there is one.

        Raises:
            StorageError: If too many prompts in a row got no reply.
        """
        config, asked = self._endpoint_config, self._asked
        asked.failures[failure.kind] += 1
        asked.last_failure = str(failure)
        wait_s = min(config.first_wait_s * 2.0**number, config.max_wait_s)
        wait_s *= random.uniform(0.5, 1.0)
        too_long = (failure.retry_after_s or 0.0) > config.max_wait_s
        if too_long:
            asked.last_failure += (
                f" (asks to wait {failure.retry_after_s:,.0f} s, more than endpoint.max_wait_s)"
            )
        if failure.again and number < config.retries and not too_long:
            if failure.retry_after_s is not None:
                self._requests.hold(failure.retry_after_s)
                wait_s = max(wait_s, failure.retry_after_s)
            asked.retries += 1
            await asyncio.sleep(wait_s)
            return True
        asked.unanswered += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= config.give_up_after:
            raise StorageError(
                f"endpoint.base_url={config.base_url} gave no reply to {self._failed_in_a_row} "
                f"prompts in a row, the last time: {asked.last_failure}; {self._kept()}"
            )
        return False

    async def _commit(self) -> None:
        """Keeps what came, about every second."""
        while True:
            await asyncio.sleep(COMMIT_S)
            await asyncio.to_thread(self._replies.flush)

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(_QUIET_S)
            self._say(self._asked.line(self._in_flight))

    def _budget_line(self) -> str:
        budget, asked = self._config.budget, self._asked
        limits = [
            f"budget.{name}={value:g}"
            for name, value in (("max_cost", budget.max_cost), ("max_tokens", budget.max_tokens))
            if value is not None
        ]
        return (
            f"{' and '.join(limits)} leave no room for another request: this run used "
            f"{asked.tokens_in:,} + {asked.tokens_out:,} tokens, cost {asked.cost:,.4f}; "
            f"{self._kept()} with as much again, or raise the budget"
        )

    def _kept(self) -> str:
        return (
            f"{self._asked.came:,} replies of this run are kept in {self._replies.uri}: the same "
            "command goes on from there"
        )
