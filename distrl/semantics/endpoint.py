"""One request to a server that speaks OpenAI's chat API, and what can go wrong with it.

The only file that imports `openai`. Its own retries are off: waiting, counting and paying for a
request is the business of `distrl.semantics.asking`.
"""

import asyncio
import email.utils
import json
import os
import time
from typing import Any, NamedTuple

from distrl.errors import ConfigError
from distrl.semantics.describe_config import EndpointConfig
from distrl.semantics.item_replies import stored
from distrl.semantics.prompts import Request

_AGAIN = (408, 409, 429)
_TOO_MANY = 1 << 31
_SHOWN = 200
"""Characters of a server's own words that are passed on."""


class Answer(NamedTuple):
    """A reply and its length in tokens, or None where the server does not say."""

    text: str
    tokens_in: int | None
    tokens_out: int | None


class Unanswered(Exception):  # noqa: N818
    """A request without a reply."""

    def __init__(
        self,
        kind: str,
        said: str,
        *,
        again: bool,
        retry_after_s: float | None = None,
        may_be_billed: bool = False,
        key: str | None = None,
    ) -> None:
        super().__init__(said)
        self.kind = kind
        """In a word or two, for counts."""
        self.again = again
        """Whether the same request may succeed later."""
        self.retry_after_s = retry_after_s
        """How long the server asks to wait."""
        self.may_be_billed = may_be_billed
        """Whether the server may have made a reply that did not arrive."""
        self.key = key
        """Where the key is from that may be at fault, and not the prompt."""


def api_key(config: EndpointConfig) -> str:
    """The key out of the environment.

    Raises:
        ConfigError: If it is not there.
    """
    if config.api_key_env is None:
        return "none"
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"endpoint.api_key_env={config.api_key_env} is not in the environment: export the key "
            "of the endpoint under that name, or set endpoint.api_key_env=null if it takes none"
        )
    if not key.isprintable() or not key.isascii():
        raise ConfigError(
            f"the key in {config.api_key_env} has characters that no HTTP header can carry"
        )
    return key


class Endpoint:
    """A connection to one server; to be used within one event loop."""

    def __init__(self, config: EndpointConfig, model: str, key: str) -> None:
        import openai  # takes a second, and only who asks needs it

        self._openai, self._config, self._model = openai, config, model
        self._secret = key if config.api_key_env else None
        self._client = openai.AsyncOpenAI(
            api_key=key, base_url=config.base_url, max_retries=0, timeout=config.timeout_s
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.close()

    async def ask(self, request: Request) -> Answer:
        """Sends a request once.

        Raises:
            Unanswered: If no reply came.
            ConfigError: If none can come: the key, the model or the account is at fault.
        """
        openai = self._openai
        try:
            # A server that sends a byte now and then keeps every timeout of the client's at bay.
            async with asyncio.timeout(self._config.timeout_s):
                response = await self._client.chat.completions.with_raw_response.create(
                    model=self._model,
                    messages=list(request.messages),  # pyright: ignore[reportArgumentType]
                    extra_body=request.parameters,
                )
                return _read(response.content)
        except (TimeoutError, openai.APITimeoutError):
            said = f"no reply within endpoint.timeout_s={self._config.timeout_s:g}"
            raise Unanswered("timeout", said, again=True, may_be_billed=True) from None
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            name = type(cause).__name__
            said, was_open = self._clean(f"{name}: {cause}"), name != "ConnectError"
            raise Unanswered("connection", said, again=True, may_be_billed=was_open) from None

    def _refused(self, error: Any) -> Exception:  # noqa: ANN401
        """What a status other than 2xx means."""
        status, base_url = error.status_code, self._config.base_url
        said = f"{status}: {self._clean(str(error.message))}"
        if status == 401:
            return ConfigError(
                f"endpoint.base_url={base_url} refuses the key in {self._config.api_key_env} "
                f"({said})"
            )
        if status == 404:
            return ConfigError(
                f"endpoint.base_url={base_url} knows no generation.model={self._model}, or is not "
                f"the root of a chat API, such as https://host/v1 ({said})"
            )
        if status == 402 or error.code == "insufficient_quota":
            return ConfigError(f"the account at endpoint.base_url={base_url} is spent ({said})")
        again = status in _AGAIN or status >= 500
        wait_s = _retry_after_s(error.response.headers) if again else None
        # Some refuse a prompt that they find indecent like a key that they do not know.
        key = self._config.api_key_env if status == 403 else None
        return Unanswered(f"status {status}", said, again=again, retry_after_s=wait_s, key=key)

    def _clean(self, said: str) -> str:
        """A server's words on one line, without the key that some of them repeat."""
        if self._secret is not None:
            said = said.replace(self._secret, "***")
        return " ".join(said.split())[:_SHOWN]


def _read(content: bytes) -> Answer:
    """What a 200 holds.

    Raises:
        Unanswered: If it is no chat completion.
    """
    try:
        body = json.loads(content)
        message = body["choices"][0]["message"]
        usage = body.get("usage") or {}
        text = message.get("content") or ""
        if not isinstance(text, str):
            raise TypeError
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        what = f"{len(content)} bytes that are no chat completion" if content else "an empty body"
        said = f"200 with {what}"
        raise Unanswered("no completion", said, again=True, may_be_billed=True) from None
    tokens_in, tokens_out = (
        count if isinstance(count, int) and 0 <= count < _TOO_MANY else None for count in counts
    )
    return Answer(stored(text), tokens_in, tokens_out)


def _retry_after_s(headers: Any) -> float | None:  # noqa: ANN401
    """Seconds that Retry-After asks for, which may be a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        date = email.utils.parsedate_tz(value)
    return None if date is None else max(email.utils.mktime_tz(date) - time.time(), 0.0)
