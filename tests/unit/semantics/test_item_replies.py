import json

import pytest

from distrl.semantics.item_replies import item_text

KEYS = ("item summary", "potential user analysis")
SUMMARY, USERS = "A red nail", "All who paint"
WHOLE = json.dumps({KEYS[0]: SUMMARY, KEYS[1]: USERS})


@pytest.mark.parametrize(
    "reply",
    [
        WHOLE,
        f"```json\n{WHOLE}\n```",
        f"```\n{WHOLE}```",
        f"Sure! Here is the JSON:\n{WHOLE}\nI hope that helps {{you}}.",
        f"<think>A {{ is hard.</think>\n{WHOLE}",
        '{"item summary": "A red nail", "potential user analysis": "All who paint",}',
        "{'item summary': 'A red nail', 'potential user analysis': 'All who paint'}",
        '{"item summary": "A red nail", "potential user analysis": "All who paint"',
        '{"item summary": "A red nail", "potential user analysis": "All who paint',
        '"item summary": "A red nail",\n"potential user analysis": "All who paint"',
        '{"Item Summary": "A red nail", "potential_user_analysis": "All who paint"}',
        '{"item summary": "A red\nnail", "potential user analysis": "All who\npaint"}',
        '{"item summary": ["A red", "nail"], "potential user analysis": {"who": "All who paint"}}',
        '{"item summary": "A red nail" "potential user analysis": "All who paint"}',
        "**Item summary:** A red nail\n\n**Potential user analysis:** All who paint",
        "Item summary: A red nail\nPotential user analysis: All who paint",
    ],
)
def test_both_fields_are_found_however_they_are_written(reply):
    assert item_text(reply, KEYS) == f"{SUMMARY} {USERS}"


def test_apostrophes_do_not_end_a_value_in_single_quotes():
    reply = "{'item summary': 'A child's toy', 'potential user analysis': 'Parents' friends'}"
    assert item_text(reply, KEYS) == "A child's toy Parents' friends"


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "   \n",
        "I am sorry, I cannot help with that.",
        "{}",
        "null",
        "{" * 5000,
        '{"item summary": ' + "[" * 100_000,
        '{"item summary": "A red nail"}',
        '{"item summary": "", "potential user analysis": "People"}',
        '{"item summary": null, "potential user analysis": "People"}',
        '{"item summary": "A red nail pol',
        '{"potential user analysis": "All who paint"}',
        '["item summary", "potential user analysis"]',
    ],
    ids=lambda reply: repr(reply[:24]),
)
def test_a_reply_without_both_fields_is_malformed(reply):
    assert item_text(reply, KEYS) is None


def test_no_cut_and_no_lost_character_makes_the_reading_fail():
    texts = [
        item_text(reply, KEYS)
        for place in range(len(WHOLE))
        for reply in (WHOLE[:place], WHOLE[place:], WHOLE[:place] + WHOLE[place + 1 :])
    ]
    assert all(text is None or text.strip() for text in texts)
    # A lost letter of a value is no harm, a lost key is.
    assert any(texts)
    assert not all(texts)


def test_half_a_surrogate_pair_can_be_stored():
    reply = '{"item summary": "cut \\ud83d", "potential user analysis": "all"}'
    text = item_text(reply, KEYS)
    assert text is not None
    assert text.encode() == b"cut ? all"


def test_keys_are_words_and_not_patterns():
    assert item_text('{"a (b": "x", "c": "y"}', ("a (b", "c")) == "x y"
    assert item_text("a (b: x\nc: y", ("a (b", "c")) == "x y"


def test_a_long_reply_of_line_breaks_and_quotes_says_nothing():
    # A pattern that looks on from each of them to the last would take an hour.
    assert item_text("\n" * 300_000 + '"' * 300_000, KEYS) is None
