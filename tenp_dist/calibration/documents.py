"""The documents of a source, in a seeded order: files or `datasets` names, plain text or chat messages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenp_dist.config import Source, Text
from tenp_dist.errors import CalibrationError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
_SHUFFLE_BUFFER = 10_000


def check_sources(text: Text) -> None:
    """Raise CalibrationError where a file that a source names is not there or of no known kind."""
    for source in text.sources:
        if source.path is not None:
            _builder(source.path)


def documents_of(source: Source, seed: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Non-empty texts of a source. Raises CalibrationError where it cannot be read."""
    column = source.messages_column or source.text_column
    with _readable(source):
        records = iter(_load(source).shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER))
    while True:
        with _readable(source):
            record = next(records, None)
        if record is None:
            return
        if column not in record:
            raise CalibrationError(
                "Source has no such column",
                where=label_of(source),
                found=", ".join(record),
                wanted=column,
                next_step="set text_column or messages_column",
            )
        value = record[column]
        if source.messages_column is not None:
            value = _chat_text(value, source, tokenizer)
        if not isinstance(value, str):
            raise CalibrationError(
                "Column holds no text",
                where=f"{label_of(source)}: {column}",
                found=f"{type(value).__name__} {str(value)[:40]}",
                wanted="a string in every row",
                next_step="set text_column or messages_column, or drop such rows",
            )
        if value.strip():
            yield value


@contextlib.contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Turn what `datasets` and the readers below it raise into a CalibrationError."""
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    others = (DatasetsError, ArrowException)
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, *others) as error:
        cause = error.__cause__ or error
        raise CalibrationError(
            "Source cannot be read",
            where=f"{label_of(source)} (domain {source.domain})",
            found=f"{type(cause).__name__}: {first_line(cause)}",
            wanted="jsonl with one object a line, json, parquet, arrow, or a dataset that exists",
            next_step="correct the file, or `path`, `name`, `subset` and `split`",
        ) from error


def _chat_text(messages: Any, source: Source, tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CalibrationError(
            "Messages do not go through the chat template",
            where=f"{label_of(source)}: {source.messages_column}",
            found=f"{type(error).__name__}: {first_line(error)}",
            wanted="a tokenizer with a chat template, and rows of [{role, content}, ...]",
            next_step="use text_column, or correct the rows",
        ) from error


def _load(source: Source) -> Any:
    """A streaming `datasets` dataset: nothing is copied into a cache."""
    import datasets

    datasets.disable_progress_bars()
    if source.path is None:
        return datasets.load_dataset(source.name, source.subset, split=source.split, streaming=True)
    builder = _builder(source.path)
    if builder is None:
        return datasets.load_from_disk(str(source.path)).to_iterable_dataset()
    return datasets.load_dataset(builder, data_files=str(source.path), split="train", streaming=True)


def _builder(path: Path) -> str | None:
    """The `datasets` builder that reads a file, None for a folder saved by `datasets`."""
    if not path.exists():
        raise CalibrationError(
            "Calibration source not found", where=path, wanted="a file or a folder", next_step="correct `path`"
        )
    if path.is_dir():
        return None
    if path.stat().st_size == 0:
        raise CalibrationError(
            "Calibration file is empty", where=path, found="0 bytes", wanted="text", next_step="give another file"
        )
    if path.suffix not in _BUILDERS:
        raise CalibrationError(
            "Unknown kind of calibration file",
            where=path,
            found=path.suffix or "no suffix",
            wanted=", ".join(sorted(_BUILDERS)),
            next_step="convert the file to jsonl",
        )
    return _BUILDERS[path.suffix]


def label_of(source: Source) -> str:
    """What to call a source in a message."""
    return str(source.path or source.name)
