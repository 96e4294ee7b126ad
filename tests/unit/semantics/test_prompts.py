import pytest

from distrl.ops.ragged import Ragged
from distrl.semantics.describe_config import DescribeConfig, GenerationConfig
from distrl.semantics.examples import examples_of, lowest, no_examples
from distrl.semantics.item_records import read_item_records
from distrl.semantics.prompts import Prompter, item_blocks, pieces, request_of, text_of
from tests.store_factory import make_store

LINES = """\
{"item": "item-1", "title": "Antz", "genres": ["Animation", "Comedy"]}
{"item": "item-2", "title": "The Fly", "genres": []}
{"item": "item-3", "title": "Alien $9", "genres": ["Horror"], "text": "Alien; in space"}
"""


@pytest.fixture
def prompter(tmp_path):
    def made(examples=None, **prompts):
        if not (tmp_path / "store").exists():
            make_store(tmp_path / "store", [[1, 2, 3, 1, 2], [3, 2, 1]], num_shards=1)
        (tmp_path / "items.jsonl").write_text(LINES)
        config = DescribeConfig.model_validate(
            {
                "store_uri": str(tmp_path / "store"),
                "item_texts": {
                    "uri": str(tmp_path / "items.jsonl"),
                    "attributes": {"title": "title", "kinds": "genres", "price": "price"},
                },
                "prompts": {"domain": "movies", **prompts},
                "generation": {"model": "m"},
            }
        )
        from distrl.data.store import read_manifest

        manifest = read_manifest(config.store_uri)
        records = read_item_records(
            config.item_texts, config.prompts.window_item, config.store_uri, manifest
        )
        return Prompter(config, records, examples or no_examples(11))

    return made


def test_a_window_shows_its_titles_in_order(prompter):
    first, second = prompter().windows(Ragged.of([[1, 3], [2]]))
    system, user = first.messages
    assert user == {"role": "user", "content": "<Antz>; <Alien $9>"}
    assert system["role"] == "system"
    assert "movies recommendation expert" in system["content"]
    assert "historical purchases of a user in chronological order" in system["content"]
    assert "100 words" in system["content"]
    assert first.raw == "<Antz>; <Alien $9>"
    assert second.messages[1]["content"] == "<The Fly>"
    assert not first.about_item


def test_an_item_shows_its_attributes_and_histories_that_end_with_it(prompter):
    examples = lowest([examples_of(Ragged.of([[1, 3, 2, 1, 3]]), 11, 0, held_out=False)], 5)
    prompts = prompter(examples).items(1, 3)
    one, two, three = (prompt.messages[1]["content"] for prompt in prompts)
    assert "title: Antz; kinds: Animation, Comedy; price: missing\n" in one
    assert "\n[None]\n" in one
    assert "title: The Fly; kinds: missing; price: missing\n" in two
    assert "\n[<Antz> -> <Alien $9>] # \n" in three
    assert "item summary" in one
    assert [prompt.raw for prompt in prompts] == [
        "title: Antz; kinds: Animation, Comedy; price: missing",
        "title: The Fly; kinds: missing; price: missing",
        "Alien; in space",
    ]
    assert all(prompt.about_item for prompt in prompts)


def test_windows_may_be_records_of_attributes(prompter):
    made = prompter(window_item="< $attributes >", window_separator=".\n")
    (prompt,) = made.windows(Ragged.of([[2, 3]]))
    assert prompt.messages[1]["content"] == (
        "< title: The Fly; kinds: missing; price: missing >.\n"
        "< title: Alien $9; kinds: Horror; price: missing >"
    )


def test_a_key_is_of_all_that_is_asked_and_of_nothing_else(prompter):
    item = prompter().items(1, 1)[0]
    window = prompter().windows(Ragged.of([[1]]))[0]
    generation = GenerationConfig(model="m")
    keys = {
        request_of(item, generation, 0).key,
        request_of(item, generation, 1).key,
        request_of(item, generation, 2).key,
        request_of(window, generation, 0).key,
        request_of(item, GenerationConfig(model="n"), 0).key,
        request_of(item, GenerationConfig(model="m", temperature=0.5), 0).key,
        request_of(item, GenerationConfig(model="m", max_tokens_item=7), 0).key,
        request_of(item, GenerationConfig(model="m", extra={"cache_prompt": False}), 0).key,
        request_of(prompter(domain="films").items(1, 1)[0], generation, 0).key,
    }
    assert len(keys) == 9
    assert all(len(key) == 64 for key in keys)
    other = GenerationConfig(model="m", max_tokens_window=7, extra_item={})
    assert request_of(item, other, 0).key == request_of(item, generation, 0).key


def test_parameters_are_what_the_endpoint_calls_them(prompter):
    item, window = prompter().items(1, 1)[0], prompter().windows(Ragged.of([[1]]))[0]
    generation = GenerationConfig(
        model="m",
        top_p=None,
        max_tokens_name="max_completion_tokens",
        extra={"seed": 3},
        extra_item={"response_format": {"type": "json_object"}},
    )
    assert request_of(window, generation, 0).parameters == {
        "max_completion_tokens": 300,
        "temperature": 0.0,
        "seed": 3,
    }
    # What was not sent at first, for the endpoint may not take it, is not sent again either.
    assert request_of(item, generation, 1).parameters == {
        "max_completion_tokens": 400,
        "temperature": 0.7,
        "seed": 3,
        "response_format": {"type": "json_object"},
    }
    usual = request_of(window, GenerationConfig(model="m"), 1).parameters
    assert (usual["temperature"], usual["top_p"]) == (0.7, 1.0)
    silent = GenerationConfig(model="m", temperature=None, top_p=None)
    assert request_of(window, silent, 1).parameters == {"max_tokens": 300}
    assert request_of(window, silent, 1).key != request_of(window, silent, 0).key


def test_a_window_reply_is_taken_as_it_is_unless_it_is_empty(prompter):
    (window,) = prompter().windows(Ragged.of([[1]]))
    assert text_of(window, " Likes\nants. ", ("a", "b")) == " Likes\nants. "
    assert text_of(window, " \n", ("a", "b")) is None


def test_blocks_cover_every_item_once():
    for num in (1, 1023, 1024, 1025, 3000):
        covered = [item for first, last in item_blocks(1, num) for item in range(first, last + 1)]
        assert covered == list(range(1, num + 1))
        assert [place for some in pieces(num) for place in some] == list(range(num))
    assert list(pieces(0)) == []
