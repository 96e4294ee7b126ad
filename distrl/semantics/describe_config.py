"""What a language model is asked about a store, where, and how much it may cost."""

import math
import string
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

from annotated_types import Le
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from distrl.schema import Config

_WINDOW_SYSTEM = """\
Assume you are a $domain recommendation expert. You are given the $behavior of a user in \
chronological order, in this form: <title 1>; <title 2>; ...
Summarize the specific preference of this user in $domain. Answer with one coherent paragraph of \
at most 100 words and nothing else."""

_ITEM_SYSTEM = "Assume you are a $domain recommendation expert."

_ITEM_USER = """\
An item of $domain has these attributes:
$attributes
Histories of users, each in chronological order and each ending with this item:
$examples
Write (1) a brief description of the item and (2) an analysis of which type of users would buy it, \
at a finer granularity than "enthusiasts".
Answer with JSON of two keys and nothing else: "item summary" (at most 80 words) and "potential \
user analysis" (at most 50 words)."""


_OF_ENDPOINTS = {"response_format", "cache_prompt", "reasoning_effort", "store", "user"}
_BOUND = "set generation.max_tokens_item and generation.max_tokens_window, which the budget knows"
_SET_ELSEWHERE = {
    "model": "set generation.model",
    "temperature": "set generation.temperature",
    "top_p": "set generation.top_p",
    "max_tokens": _BOUND,
    "max_completion_tokens": _BOUND,
    "messages": "set prompts",
    "stream": "a reply is read in one piece",
    "n": "one reply a request is kept",
}
"""What a request has already, and why nothing else may give it."""


class ItemTextsConfig(Config):
    """Where what is known of items lies: JSON lines, one an item, a key a field."""

    uri: str
    """A file; `.gz` and the like are decompressed."""
    id: str = "item"
    """Field with the item's id as the log has it, a string or a whole number."""
    title: tuple[str, ...] = ("title",)
    """Fields that histories show of an item: the first of them that an item has."""
    text: str = "text"
    """Field with the text that stands in for a reply; the attributes where an item has none."""
    attributes: dict[str, str] = Field(
        default_factory=lambda: {
            name: name for name in ("title", "brand", "categories", "price", "description")
        }
    )
    """What item prompts say of an item: label to field. A field that is missing is shown so."""
    max_chars: PositiveInt = 500
    """Characters of one attribute at most."""


class PromptsConfig(Config):
    """What is said to the model; $names are filled in, and $$ is a dollar sign.

    Source: SRA-CL sections 3.1 and 3.2 in content; the words are this project's own.
    """

    domain: str = "products"
    """What the items are, in the plural: $domain."""
    behavior: str = "historical purchases"
    """What users did with them: $behavior."""
    window_system: str = _WINDOW_SYSTEM
    """Knows $domain and $behavior."""
    window_item: str = "<$title>"
    """An item of a window; knows $title and $attributes."""
    window_separator: str = "; "
    """Between the items of a window."""
    item_system: str = _ITEM_SYSTEM
    """Knows $domain and $behavior."""
    item_user: str = _ITEM_USER
    """Knows $domain, $behavior, $attributes and $examples."""
    item_keys: tuple[str, str] = ("item summary", "potential user analysis")
    """Keys that the reply about an item must have."""
    num_examples: NonNegativeInt = 5
    """Most histories shown that end with the item, drawn from all of them."""
    example_len: Annotated[PositiveInt, Le(100)] = 11
    """Items of such a history at most, the item itself included."""
    example_seed: NonNegativeInt = 0
    """Decides which histories are drawn where there are more."""

    @model_validator(mode="after")
    def _known_names(self) -> "PromptsConfig":
        general = {"domain", "behavior"}
        for name, known in (
            ("window_system", general),
            ("window_item", {"title", "attributes"}),
            ("item_system", general),
            ("item_user", general | {"attributes", "examples"}),
        ):
            template = string.Template(getattr(self, name))
            if not template.is_valid():
                raise ValueError(f"{name} has a lone $: write $$ for a dollar sign")
            for other in template.get_identifiers():
                if other not in known:
                    raise ValueError(f"{name} has ${other}; it knows ${', $'.join(sorted(known))}")
        return self


class GenerationConfig(Config):
    """The model and how it draws; with the prompt, this is what a reply is kept under."""

    model: str
    """Its name at the endpoint, or what vLLM loads."""
    temperature: NonNegativeFloat | None = 0.0
    """None leaves it to the endpoint."""
    top_p: PositiveFloat | None = 0.001
    reask_temperature: NonNegativeFloat | None = 0.7
    """Of a prompt that is asked again for a malformed reply, with top_p 1: at temperature 0 the
    same reply would come back. What is None above stays out here too."""
    max_tokens_item: PositiveInt = 400
    """Tokens of a reply about an item at most."""
    max_tokens_window: PositiveInt = 300
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls this bound."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further keys of the request's body, such as {"cache_prompt": false}; with engine=vllm of
    its SamplingParams. They are written to the table's manifest: no credentials."""
    extra_item: dict[str, Any] = Field(default_factory=dict)
    """The same for items alone, such as a `response_format`."""

    @model_validator(mode="after")
    def _extra_is_other(self) -> "GenerationConfig":
        for section in ("extra", "extra_item"):
            for name in getattr(self, section):
                if name in _SET_ELSEWHERE:
                    raise ValueError(f"{section} has {name}: {_SET_ELSEWHERE[name]}")
        return self


class EndpointConfig(Config):
    """A server that speaks OpenAI's chat API."""

    base_url: str = "https://api.openai.com/v1"
    """Without credentials."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; None for an endpoint without keys."""
    concurrency: Annotated[PositiveInt, Le(1000)] = 200
    """Requests in flight at most; the client opens as many connections."""
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    """Of prompts and replies together; a request counts as its prompt and its longest reply until
    it is answered."""
    timeout_s: PositiveFloat = 200.0
    """Until a request without its whole reply is given up and sent again. The endpoint may bill
    it all the same, so the budget counts it whole."""
    retries: NonNegativeInt = 8
    """How often a request that failed is sent again: statuses 408, 409, 429 and 5xx, timeouts,
    broken connections, and answers that are no chat completion. With the waits below, eight
    outlast three minutes."""
    first_wait_s: PositiveFloat = 1.0
    """Before the first retry; it doubles with each, times a random factor of 0.5 to 1."""
    max_wait_s: PositiveFloat = 120.0
    """Longest wait before a retry, whatever Retry-After says."""
    give_up_after: PositiveInt = 5
    """Prompts in a row without a reply that end the job. Fewer leave those prompts with raw
    texts, and so does a refusal of a prompt's own, once another one has had its reply."""

    @model_validator(mode="after")
    def _no_credentials(self) -> "EndpointConfig":
        # Of the section and not of the field: a message about a field shows its value.
        url = urlsplit(self.base_url)
        if url.username or url.password or url.query or url.fragment:
            raise ValueError(
                "base_url carries credentials or a query; put the key into the environment "
                f"variable {self.api_key_env or 'that api_key_env names'} instead"
            )
        if url.scheme not in ("http", "https") or not url.hostname or not _port_is_right(url):
            raise ValueError(f"base_url={self.base_url} is not of the form https://host/v1")
        return self


def _port_is_right(url: SplitResult) -> bool:
    try:
        return url.port is None or url.port > 0
    except ValueError:
        return False


class PricesConfig(Config):
    """What tokens cost, in any one currency; zero where nothing is charged."""

    input_per_million: NonNegativeFloat = 0.0
    output_per_million: NonNegativeFloat = 0.0

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """Of so many tokens, in the currency of the prices."""
        return (tokens_in * self.input_per_million + tokens_out * self.output_per_million) / 1e6


class BudgetConfig(Config):
    """What one run may spend; a request is sent only if its longest reply would still fit."""

    max_cost: PositiveFloat | None = None
    """In the currency of `prices`."""
    max_tokens: PositiveInt | None = None
    """Of prompts and replies together."""


class VllmConfig(Config):
    """vLLM on the cluster's GPUs, through ray.data.llm."""

    concurrency: PositiveInt = 1
    """Copies of the model."""
    batch_size: PositiveInt = 64
    accelerator_type: str | None = None
    """Such as "H200"; None takes any GPU."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Of vLLM, such as {"tensor_parallel_size": 2, "max_model_len": 8192}."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Of the model's chat template, such as {"enable_thinking": false}."""

    @property
    def gpus(self) -> int:
        """That all copies take together."""
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        return self.concurrency * math.prod(int(self.engine_kwargs.get(name, 1)) for name in sizes)


class DescribeConfig(Config):
    """Texts about the items and windows of a store, by a language model."""

    store_uri: str
    """A folder that jobs/prepare.py wrote; the table becomes descriptions/<name> in it."""
    name: str = "llm"
    """The table's name."""
    replies_uri: str | None = None
    """Where replies are kept, for any number of tables; None: the store's folder `replies`."""
    items: bool = True
    """Whether items are described."""
    windows: Literal["every", "last", "none"] = "every"
    """Which prefixes of histories are: those before every training target, before the last of each
    user, or none."""
    held_out: bool = False
    """Also the inputs of validation and test, as SRA-CL's code has it. The examples of items then
    show the validation target."""
    max_len: PositiveInt = 20
    """Items that a window shows at most, the newest."""
    reask: NonNegativeInt = 1
    """How often a prompt is asked again whose reply is malformed, before the raw text is taken."""
    engine: Literal["endpoint", "vllm"] = "endpoint"
    item_texts: ItemTextsConfig
    prompts: PromptsConfig = PromptsConfig()
    generation: GenerationConfig
    endpoint: EndpointConfig = EndpointConfig()
    prices: PricesConfig = PricesConfig()
    budget: BudgetConfig = BudgetConfig()
    vllm: VllmConfig = VllmConfig()
    num_cpus: PositiveInt | None = None
    """Tasks of one CPU each that look for examples at a time; None: as many as the cluster has
    CPUs."""

    @model_validator(mode="after")
    def _combinations(self) -> "DescribeConfig":
        if not self.items and self.windows == "none":
            raise ValueError("items=false and windows=none leave nothing to describe")
        if self.name in ("", ".", "..") or not all(c.isalnum() or c in "._-" for c in self.name):
            raise ValueError(
                f"name={self.name!r} becomes a folder: letters, digits, '.', '_' and '-' only"
            )
        prices, budget = self.prices, self.budget
        if budget.max_cost and not prices.input_per_million + prices.output_per_million:
            raise ValueError(
                f"budget.max_cost={budget.max_cost:g} needs prices.input_per_million and "
                "prices.output_per_million"
            )
        if self.engine == "vllm" and (budget.max_cost or budget.max_tokens):
            raise ValueError("budget is of engine=endpoint; vllm runs on the cluster's own GPUs")
        extra = self.generation.extra | self.generation.extra_item
        if self.engine == "vllm" and (names := extra.keys() & _OF_ENDPOINTS):
            raise ValueError(
                f"generation.extra has {', '.join(sorted(names))}, which endpoints know and vLLM's "
                "SamplingParams does not (for JSON it has structured_outputs)"
            )
        return self

    @property
    def kept_uri(self) -> str:
        """Where replies are kept."""
        return self.replies_uri or f"{self.store_uri.rstrip('/')}/replies"
