"""Chat messages as they are stored, as a template takes them, and how much of them it hands on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_ROLES = {  # ShareGPT and its kin: `from` -> role
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_THOUGHT = re.compile(r"</?think(?:ing)?>")
Message = dict[str, Any]


def as_messages(value: Any) -> list[Message]:
    """A conversation in the form that chat templates take: `role` and `content` as a string.

    `from` and `value` of ShareGPT are mapped, parts of text are joined; other keys (tool calls, names) stay.

    Args:
        value: what a row holds.

    Raises:
        ValueError: it is no conversation of text; the message says which part is not.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{type(value).__name__} {str(value)[:40]!r} is no list of messages")
    if not value:
        raise ValueError("no message")
    return [_message(number, one) for number, one in enumerate(value)]


def _message(number: int, value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"message {number} is {type(value).__name__}, not role and content")
    present = {key: part for key, part in value.items() if part is not None}
    if "role" in present:
        role, content = present["role"], present.get("content")
    elif "from" in present:
        role, content = _ROLES.get(str(present["from"]).lower()), present.get("value")
        if role is None:
            raise ValueError(f"message {number} is from {present['from']!r}, known are {', '.join(_ROLES)}")
    else:
        raise ValueError(f"message {number} has {', '.join(value) or 'no key'}, not role and content")
    others = {key: part for key, part in present.items() if key not in ("role", "content", "from", "value")}
    return {"role": role, "content": _text(number, content, others), **others}


def _text(number: int, content: Any, others: Mapping[str, Any]) -> str:
    if isinstance(content, str):
        return content
    if content is None and {"tool_calls", "function_call"} & set(others):
        return ""
    if content is None:
        raise ValueError(f"message {number} has neither content nor tool calls")
    if not isinstance(content, Sequence):
        raise ValueError(f"the content of message {number} is {type(content).__name__}, not text")
    return "".join(_part(number, part) for part in content)


def _part(number: int, part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise ValueError(f"message {number} has a part of type {kind}, not text")
    return text


def handed_on(messages: Sequence[Message], rendered: str) -> tuple[int, int]:
    """Characters of the messages, and those of them that a template's text holds.

    A message counts by its pieces between marks of reasoning (`<think>`), each found as a whole or not at all;
    white space at the ends of a piece does not count.
    """
    pieces = [stripped for one in messages for part in _THOUGHT.split(one["content"]) if (stripped := part.strip())]
    return sum(map(len, pieces)), sum(len(piece) for piece in pieces if piece in rendered)
