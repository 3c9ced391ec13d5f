"""The documents of a source: plain text of its rows, or their chat messages through the model's template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tenp_dist.calibration.messages import as_messages, handed_on
from tenp_dist.calibration.rows import Row, label_of, rows_of
from tenp_dist.calibration.tally import Tally
from tenp_dist.config import Source
from tenp_dist.errors import CalibrationError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def documents_of(source: Source, seed: int, tokenizer: PreTrainedTokenizerBase, tally: Tally) -> Iterator[str]:
    """Non-empty texts of a source, each row's counted in `tally`.

    Raises:
        CalibrationError: it cannot be read, or a row holds no text; the row's number is in the message.
    """
    for row in rows_of(source, seed):
        text = _text(source, row, tokenizer, tally)
        if tally.count(text):
            yield text


def _text(source: Source, row: Row, tokenizer: PreTrainedTokenizerBase, tally: Tally) -> str:
    column = source.messages_column or source.text_column
    if column not in row.values:
        raise CalibrationError(
            "Source has no such column",
            where=label_of(source),
            found=", ".join(row.values),
            wanted=column,
            next_step="set text_column or messages_column",
        )
    value = row.values[column]
    if source.messages_column is not None:
        return _rendered(source, row.number, value, tokenizer, tally)
    if not isinstance(value, str):
        raise CalibrationError(
            "Column holds no text",
            where=f"{label_of(source)}: {column}, row {row.number}",
            found=f"{type(value).__name__} {str(value)[:40]}",
            wanted="a string in every row",
            next_step="set text_column or messages_column, or drop such rows",
        )
    return value


def _rendered(source: Source, number: int, value: Any, tokenizer: PreTrainedTokenizerBase, tally: Tally) -> str:
    from jinja2 import TemplateError

    where = f"{label_of(source)}: {source.messages_column}, row {number}"
    try:
        messages = as_messages(value)
    except ValueError as error:
        raise CalibrationError(
            "Row holds no chat messages",
            where=where,
            found=error,
            wanted="[{role, content}, ...] or ShareGPT's [{from, value}, ...], content as text",
            next_step="use text_column, or correct the rows",
        ) from error
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CalibrationError(
            "Messages do not go through the chat template",
            where=where,
            found=f"{type(error).__name__}: {one_line(error)}",
            wanted="a tokenizer with a chat template that takes these roles",
            next_step="use text_column, or correct the rows",
        ) from error
    given, taken = handed_on(messages, text)
    if given and not taken:
        raise CalibrationError(
            "The chat template hands on no word of a conversation",
            where=where,
            found=f"{given} characters of {', '.join(str(one['role']) for one in messages)}; rendered {text[:60]!r}",
            wanted="roles that the template knows",
            next_step="correct the rows, or render them yourself and use text_column",
        )
    tally.messages(given, taken)
    return text
