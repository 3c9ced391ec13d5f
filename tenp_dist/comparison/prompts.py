"""The prompts of a comparison, from a file."""

from __future__ import annotations

import json
from pathlib import Path

from tenp_dist.errors import CalibrationError

_KEYS = ("prompt", "text")


def read_prompts(path: Path) -> list[str]:
    """A prompt a line, or the `prompt` (or `text`) of every line of a .jsonl file; empty lines are left out.

    Raises:
        CalibrationError: no such file, a line of another form, or no prompt.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = [_of_json(line) for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refusal(path, error) from error
    if not prompts:
        raise _refusal(path, "no prompt")
    return prompts


def _of_json(line: str) -> str:
    values = json.loads(line)
    found = [values[key] for key in _KEYS if key in values]
    if not found or not isinstance(found[0], str):
        raise ValueError(f"a line without {' or '.join(_KEYS)}: {line[:60]}")
    return found[0]


def _refusal(path: Path, found: object) -> CalibrationError:
    return CalibrationError(
        "The prompts cannot be read",
        where=path,
        found=found,
        wanted="a text file with a prompt a line, or .jsonl with `prompt` or `text`",
        next_step="correct --prompts",
    )
