"""Asks an endpoint for all replies that are not kept yet.

    prompts, a block at a time -> [not kept, not asked yet] -> requests in flight -> replies

Until the first reply has come there is one request at a time, so that a wrong key is found out once
and not two hundred times. A retry waits by itself; a 429 holds all requests. Whatever ends the job,
an interrupt excepted, requests in flight are waited for: they are paid.
"""

import asyncio
from collections.abc import Callable, Iterator

from distrl.errors import ConfigError, DistrlError, StorageError
from distrl.semantics.asked import Asked
from distrl.semantics.describe_config import DescribeConfig
from distrl.semantics.endpoint import Answer, Endpoint, Unanswered
from distrl.semantics.judged import judged
from distrl.semantics.pace import Estimate, Pace, Purse
from distrl.semantics.patience import Patience
from distrl.semantics.prompts import Prompt, Request, request_of, text_of
from distrl.semantics.replies import Replies, Reply

COMMIT_S = 0.8
_QUIET_S = 5.0
_WRITES = 5
"""Failed writes in a row that end the job; what they held is tried again with the next."""
_LOOKED_AT = 20
"""Replies about items after which somebody should know that none can be used."""
_SHOWN = 200
_BYTES_PER_TOKEN = 3
"""Of a reply that nobody counted: rather too many tokens than too few."""


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
        blocks: All prompts; read in a thread of its own.
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
        self._in_flight = self._of_items = 0
        self._opened = self._spent = False
        self._error: DistrlError | None = None

    async def run(self) -> Asked:
        """Asks; what came is not flushed yet."""
        config = self._endpoint_config
        self._endpoint = Endpoint(config, self._config.generation.model, self._key)
        self._queue: asyncio.Queue[tuple[Prompt, int] | None] = asyncio.Queue(config.concurrency)
        self._door = asyncio.Lock()
        self._requests, self._tokens = (
            Pace(config.requests_per_minute),
            Pace(config.tokens_per_minute),
        )
        self._patience = Patience(config, self._asked, self._requests)
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
        if self._error is not None:
            raise type(self._error)(f"{self._error}; {self._kept()}") from None
        if self._spent:
            raise ConfigError(
                f"{self._asked.beyond(self._config.budget)}; {self._kept()} with as much again, or "
                "raise the budget"
            )
        return self._asked

    @property
    def _ends(self) -> bool:
        """Whether no further request may be sent."""
        return self._spent or self._error is not None

    async def _feed(self) -> None:
        """Puts what must be asked into the queue, and an end for every worker."""
        try:
            while (
                not self._ends
                and (block := await asyncio.to_thread(next, self._blocks, None)) is not None
            ):
                missing = judged(block, self._config, self._replies).missing
                for prompt, attempt in zip(block, missing, strict=True):
                    self._asked.prompts += 1
                    if self._must_ask(prompt, attempt):
                        await self._queue.put((prompt, attempt or 0))
                await asyncio.sleep(0)
        except DistrlError as error:
            self._error = self._error or error
        for _ in range(self._endpoint_config.concurrency):
            await self._queue.put(None)

    def _must_ask(self, prompt: Prompt, attempt: int | None) -> bool:
        if attempt is None:
            self._asked.from_cache += 1
            return False
        key = request_of(prompt, self._config.generation, attempt).key
        if key in self._pending or self._replies.is_new(key):
            self._asked.repeated += 1
            return False
        self._pending.add(key)
        return True

    async def _work(self) -> None:
        while not self._ends and (asked := await self._queue.get()) is not None:
            try:
                await self._in_turn(*asked)
            except DistrlError as error:
                self._error = self._error or error

    async def _in_turn(self, prompt: Prompt, attempt: int) -> None:
        """One prompt alone until the first has its reply, then as many as there are workers."""
        if not self._opened:
            async with self._door:
                if not self._opened:
                    await self._complete(prompt, attempt)
                    return
        await self._complete(prompt, attempt)

    async def _complete(self, prompt: Prompt, attempt: int) -> None:
        """Asks until there is a well-formed reply, or no attempt left."""
        config = self._config
        first = request_of(prompt, config.generation, attempt).key
        for number in range(attempt, config.reask + 1):
            request = request_of(prompt, config.generation, number)
            answer = await self._paid(request)
            if answer is None:
                # It stays pending: the same prompt once more would fare no better in this run.
                return
            malformed = text_of(prompt, answer[0], config.prompts.item_keys) is None
            self._replies.add(Reply(request.key, config.generation.model, malformed, *answer))
            self._count(prompt, number, answer[0], malformed)
            if not malformed:
                break
        self._pending.discard(first)

    def _count(self, prompt: Prompt, attempt: int, text: str, malformed: bool) -> None:
        asked = self._asked
        asked.reasked += attempt > 0
        asked.asked += attempt == 0
        asked.malformed += malformed
        self._of_items += prompt.about_item
        if malformed and self._of_items == asked.malformed == _LOOKED_AT:
            self._say(
                f"the first {_LOOKED_AT} replies about items are all malformed, and each is paid; "
                f"the last is {text[:_SHOWN]!r}. If that cannot be meant: prompts.item_user must "
                f"ask for prompts.item_keys={list(self._config.prompts.item_keys)}, in a reply of "
                "at most generation.max_tokens_item"
            )

    async def _paid(self, request: Request) -> tuple[str, int, int] | None:
        """A reply and its tokens in and out, within the budget; None if there is none."""
        expected = self._estimate.tokens(request.messages)
        held = (expected, request.max_tokens)
        if self._ends:
            return None
        if not await self._purse.hold(*held):
            self._spent = True
            return None
        spent = (0, 0)
        try:
            answer = await self._sent(request, held)
            if answer is None:
                return None
            tokens_in, tokens_out = answer.tokens_in, answer.tokens_out
            if tokens_in is not None:
                self._estimate.learn(request.messages, tokens_in)
            spent = (
                expected if tokens_in is None else tokens_in,
                _num_tokens(answer.text) if tokens_out is None else tokens_out,
            )
            return answer.text, *spent
        finally:
            await self._purse.settle(held, spent)

    async def _sent(self, request: Request, held: tuple[int, int]) -> Answer | None:
        """Sends a request until it is answered, refused, or has no retry left.

        Args:
            request: What is sent.
            held: Tokens in and out that are set aside for it, at most.
        """
        config, most_tokens = self._endpoint_config, sum(held)
        for number in range(config.retries + 1):
            await self._requests.take(1)
            await self._tokens.take(most_tokens)
            if self._error is not None:
                # Others wait for their turn when one of them ends the run.
                return None
            self._in_flight += 1
            try:
                answer = await self._endpoint.ask(request)
            except Unanswered as failure:
                self._tokens.give_back(most_tokens)
                if failure.may_be_billed and not await self._purse.lose(*held):
                    self._spent = True
                if not await self._may_go_on(failure, number):
                    return None
                continue
            finally:
                self._in_flight -= 1
            used = (answer.tokens_in or 0) + (answer.tokens_out or 0)
            self._tokens.give_back(most_tokens - used if used else 0)
            self._opened = True
            self._patience.was_answered()
            return answer
        return None

    async def _may_go_on(self, failure: Unanswered, number: int) -> bool:
        """Counts a failure and waits as long as it takes before a retry, if there is one.

        Raises:
            ConfigError: If the endpoint refuses the key.
            StorageError: If too many prompts in a row got no reply.
        """
        may_retry = self._patience.may_retry(failure, number)
        if self._ends:
            return False
        if may_retry:
            self._asked.retries += 1
            await asyncio.sleep(self._patience.wait_s(failure, number))
            return not self._ends
        if self._patience.leaves(failure):
            self._opened = True
        return False

    async def _commit(self) -> None:
        """Keeps what came, about every second; what could not be written is tried again."""
        failed = 0
        while True:
            await asyncio.sleep(COMMIT_S)
            try:
                await asyncio.to_thread(self._replies.flush)
                failed = 0
            except StorageError as error:
                failed += 1
                self._say(f"replies could not be written, {failed} of {_WRITES} times: {error}")
                if failed == _WRITES:
                    self._error = self._error or error

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(_QUIET_S)
            self._say(self._asked.line(self._in_flight))

    def _kept(self) -> str:
        return (
            f"{self._asked.came:,} replies of this run are kept in {self._replies.uri}: the same "
            "command goes on from there"
        )


def _num_tokens(text: str) -> int:
    """Of a reply whose length the endpoint does not say; text beyond Latin has more of them."""
    return len(text.encode()) // _BYTES_PER_TOKEN + 1
