"""Items that models answer: multiple choice and exact match, as sequences of tokens with their answers marked.

A line of the file is `{"prompt": ..., "choices": [...], "answer": number of the right one}`, or `{"prompt": ...,
"answer": text}`. As in lm-eval, an answer is read behind its prompt and one space (none where either has its own
there), blanks at the prompt's end belong to the answer, and its tokens are those of both together that follow those of
the prompt. Every choice is a sequence.

Shape letters: N sequences, S tokens of the longest, M items.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tenp_dist.artifacts import read_json, write_json
from tenp_dist.calibration.corpus import Corpus, read_corpus, write_corpus
from tenp_dist.calibration.tokenizer import load_tokenizer, token_ids
from tenp_dist.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXACT = -1  # in place of the number of a right choice
_DOMAIN = "items"
_FORMS = '{"prompt": text, "choices": [text, text, ...], "answer": number from 0} or {"prompt": text, "answer": text}'


@dataclass(frozen=True)
class Item:
    """One line of the file.

    line: its number, from 1.
    prompt: what the answers follow.
    answers: the choices, or the one text to match.
    right: number of the right choice, `EXACT` where a text is to match.
    """

    line: int
    prompt: str
    answers: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Items:
    """Items as tokens.

    corpus: a sequence for every answer, item by item.
    begin_N, end_N: where the answer's tokens begin in the sequence, and where they end.
    item_N: the sequence's item, ascending.
    letters_N: length of the answer's text.
    right_M: number of the right one among an item's sequences; `EXACT` where the one is to be matched.
    """

    corpus: Corpus
    begin_N: np.ndarray
    end_N: np.ndarray
    item_N: np.ndarray
    letters_N: np.ndarray
    right_M: np.ndarray

    @property
    def first_M(self) -> np.ndarray:
        """The first sequence of every item."""
        return np.searchsorted(self.item_N, np.arange(len(self.right_M)))

    @property
    def right_N(self) -> np.ndarray:
        """Which sequences are right answers, bool."""
        right_N = np.zeros(len(self.item_N), dtype=bool)
        right_N[self.first_M + np.maximum(self.right_M, 0)] = True
        return right_N


def read_items(path: Path) -> list[Item]:
    """The lines of a file. Raises CalibrationError where one has another form, or where there are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _refusal("File of items cannot be read", path, error, "jsonl in UTF-8", "correct search.items") from error
    items = [_item(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise _refusal("File of items holds none", path, f"{len(lines)} empty lines", _FORMS, "give a line an item")
    return items


def _item(path: Path, number: int, line: str) -> Item:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _refusal("Line is no JSON", where, error, _FORMS, "correct the line") from error
    wrong = _wrong(row)
    if wrong:
        raise _refusal("Line is no item", where, wrong, _FORMS, "correct the line")
    if "choices" in row:
        return Item(number, row["prompt"], tuple(row["choices"]), row["answer"])
    return Item(number, row["prompt"], (row["answer"],), EXACT)


def _wrong(row: Any) -> str | None:
    """What is wrong with a line's value."""
    if not isinstance(row, dict):
        return type(row).__name__
    if not _is_text(row.get("prompt")):
        return f"prompt: {json.dumps(row.get('prompt'))}"
    answer = row.get("answer")
    if "choices" not in row:
        return None if _is_text(answer) else f"answer: {json.dumps(answer)}, without choices"
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(_is_text(one) for one in choices):
        return f"choices: {json.dumps(choices)[:80]}"
    if len(set(choices)) < len(choices):
        return "the same choice twice"
    known = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
    return None if known else f"answer: {json.dumps(answer)}, of {len(choices)} choices"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def build_items(path: Path, items: Sequence[Item], model: Path, vocab_size: int, longest: int) -> Items:
    """Tokenise items. path: of their file. longest: tokens that a sequence may have.

    Raises:
        CalibrationError: no tokenizer; an item too long, an answer without tokens, tokens outside the vocabulary.
    """
    tokenizer = load_tokenizer(model)
    pairs = [(item, _joined(item.prompt, answer)) for item in items for answer in item.answers]
    before, _ = token_ids(tokenizer, [prompt for _, (prompt, _) in pairs])
    whole, _ = token_ids(tokenizer, [text for _, (_, text) in pairs])
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows, begin = [first + tokens for tokens in whole], [len(first) + len(tokens) for tokens in before]
    for (item, _), row, start in zip(pairs, rows, begin, strict=True):
        _check_row(f"{path}, line {item.line}", row, start, vocab_size, longest)
    answers = [(number, answer) for number, item in enumerate(items) for answer in item.answers]
    return Items(
        _corpus(rows, tokenizer, vocab_size),
        np.array(begin),
        np.array([len(row) for row in rows]),
        np.array([number for number, _ in answers]),
        np.array([len(answer) for _, answer in answers]),
        np.array([item.right for item in items]),
    )


def _joined(prompt: str, answer: str) -> tuple[str, str]:
    """The prompt without blanks at its end, and all of both."""
    between = "" if prompt[-1].isspace() or answer[0].isspace() else " "
    return prompt.rstrip(), prompt + between + answer


def _check_row(where: str, row: Sequence[int], start: int, vocab_size: int, longest: int) -> None:
    if len(row) > longest:
        step = "raise calibration.sequence_length, or shorten the item"
        raise _refusal("Item is too long", where, f"{len(row)} tokens", f"at most {longest}", step)
    if not 0 < start < len(row):
        raise _refusal("Answer has no tokens of its own", where, "", "tokens behind the prompt's", "change the item")
    if max(row) >= vocab_size:
        found, wanted = f"token id {max(row)}", f"ids below the model's vocab_size {vocab_size}"
        step = "use the tokenizer that came with the weights"
        raise _refusal("Tokenizer does not belong to the model", where, found, wanted, step)


def _corpus(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Corpus:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    tokens_NS = np.full((len(rows), max(map(len, rows))), pad if pad < vocab_size else 0, dtype=np.int32)
    mask_NS = np.zeros(tokens_NS.shape, dtype=bool)
    for place, row in enumerate(rows):
        tokens_NS[place, : len(row)] = row
        mask_NS[place, : len(row)] = True
    return Corpus(tokens_NS, mask_NS, np.zeros(len(rows), dtype=np.int32), (_DOMAIN,))


def write_items(path: Path, items: Items) -> None:
    """Store tokens as a corpus, and what is said of them beside it."""
    write_corpus(path, items.corpus)
    write_json(_beside(path), {name: getattr(items, name).tolist() for name in _ARRAYS})


def stored_items(path: Path) -> Items:
    """What `write_items` stored."""
    said: Mapping[str, list[int]] = read_json(_beside(path))
    return Items(read_corpus(path), **{name: np.array(said[name]) for name in _ARRAYS})


_ARRAYS = ("begin_N", "end_N", "item_N", "letters_N", "right_M")


def _beside(path: Path) -> Path:
    return path.with_suffix(".json")


def _refusal(what: str, where: object, found: object, wanted: str, step: str) -> CalibrationError:
    return CalibrationError(what, where=where, found=found, wanted=wanted, next_step=step)
