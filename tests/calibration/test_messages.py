"""Chat messages in the forms that people store them in."""

import pytest

from tenp_dist.calibration.messages import as_messages, handed_on

SHARE_GPT = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]
WANTED = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (WANTED, WANTED),
        (SHARE_GPT, WANTED),
        ([one | {"from": None, "value": None} for one in WANTED], WANTED),  # columns that a table filled up
        ([{"role": "user", "content": [{"type": "text", "text": "o"}, {"type": "text", "text": "ne"}]}], WANTED[:1]),
        ([{"role": "user", "content": ["one"]}], WANTED[:1]),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}],
            [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}],
        ),
    ],
    ids=["as it is", "sharegpt", "filled up", "parts", "parts of strings", "tool call"],
)
def test_forms(stored, wanted):
    assert as_messages(stored) == wanted


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ("text", "str 'text' is no list"),
        (None, "NoneType"),
        ([], "no message"),
        (["a"], "message 0 is str"),
        ([WANTED[0], {"from": "critic", "value": "x"}], "message 1 is from 'critic'"),
        ([{"text": "a"}], "message 0 has text, not role"),
        ([{"role": "user", "content": None}], "message 0 has neither content nor tool calls"),
        ([{"role": "user", "content": [{"type": "image_url", "url": "x"}]}], "message 0 has a part of type image_url"),
        ([{"role": "user", "content": 7}], "the content of message 0 is int"),
    ],
)
def test_refused(stored, words):
    with pytest.raises(ValueError, match=words):
        as_messages(stored)


def test_what_a_template_hands_on():
    thought = {"role": "assistant", "content": "<think>twelve chars</think> four "}
    messages = [{"role": "user", "content": " hello "}, thought]
    assert handed_on(messages, "U: hello A: four") == (5 + 12 + 4, 5 + 4)
    assert handed_on(messages, f"U: hello A: {thought['content']}") == (21, 21)
    assert handed_on(messages, "U:  A: ") == (21, 0)
