"""What a run does about requests that brought no reply: wait, leave the prompt, or give up."""

import random

from distrl.errors import ConfigError, DistrlError, StorageError
from distrl.semantics.asked import Asked
from distrl.semantics.describe_config import EndpointConfig
from distrl.semantics.endpoint import Unanswered
from distrl.semantics.pace import Pace


class Patience:
    """Tells an outage, which ends a run, from prompts that are refused for what they say."""

    def __init__(self, config: EndpointConfig, asked: Asked, requests: Pace) -> None:
        self._config, self._asked, self._requests = config, asked, requests
        self._failed_in_a_row = 0
        self._answered = False

    def was_answered(self) -> None:
        """A reply came."""
        self._answered, self._failed_in_a_row = True, 0

    def may_retry(self, failure: Unanswered, number: int) -> bool:
        """Whether a request that failed for that time, counted from 0, is worth another one."""
        self._asked.failures[failure.kind] += 1
        self._asked.last_failure = str(failure)
        return failure.again and number < self._config.retries

    def wait_s(self, failure: Unanswered, number: int) -> float:
        """How long a retry waits; a server that asks for a pause has one from all requests."""
        config, asked_s = self._config, failure.retry_after_s
        wait_s = min(config.first_wait_s * 2.0**number, config.max_wait_s)
        wait_s *= random.uniform(0.5, 1.0)
        if asked_s is None:
            if failure.kind == "status 429":
                self._requests.hold(min(wait_s, config.first_wait_s))
            return wait_s
        if asked_s > config.max_wait_s:
            self._asked.last_failure += (
                f" (asks to wait {asked_s:,.0f} s, more than endpoint.max_wait_s)"
            )
        # Those that are held would be too many again if they all came at once.
        wait_s = max(wait_s, min(asked_s, config.max_wait_s) * random.uniform(1.0, 1.2))
        self._requests.hold(wait_s)
        return wait_s

    def leaves(self, failure: Unanswered) -> bool:
        """Leaves a prompt without a reply; whether for its own fault, as others are answered.

        Raises:
            ConfigError: If the key was refused as often as `give_up_after`, and nothing answered.
            StorageError: If as many prompts in a row had no reply for any other reason.
        """
        self._asked.unanswered += 1
        if not failure.again and (self._answered or self._others_were(failure)):
            return True
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self._config.give_up_after:
            raise self._given_up(failure)
        return False

    def _others_were(self, failure: Unanswered) -> bool:
        """Replies are kept under the same parameters; of the key they say nothing."""
        return failure.key is None and self._asked.from_cache > 0

    def _given_up(self, failure: Unanswered) -> DistrlError:
        url = f"endpoint.base_url={self._config.base_url}"
        times = f"{self._failed_in_a_row} prompts in a row"
        if failure.key is not None:
            said = self._asked.last_failure
            return ConfigError(f"{url} refuses the key in {failure.key}, or {times} ({said})")
        return StorageError(
            f"{url} gave no reply to {times}, the last time: {self._asked.last_failure}"
        )
