"""The tokenizer of a model, loaded from its files, and what to do where that cannot be done."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tenp_dist.checkpoint.index import read_config
from tenp_dist.checkpoint.stock_config import transformers_config
from tenp_dist.errors import CalibrationError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Failure(Exception):
    """What another library raised, as one line."""


@contextlib.contextmanager
def any_failure() -> Iterator[None]:
    """Whatever tokenizers raise, of any type, as `Failure`: a broken tokenizer.json ends in a panic of Rust."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # which is no Exception
            raise
        raise Failure(f"{type(error).__name__}: {one_line(error)}") from error


def token_ids(tokenizer: PreTrainedTokenizerBase, batch: list[str]) -> tuple[list[list[int]], list[str]]:
    """The tokens of every text, without special ones around them, and what they decode to.

    Raises:
        CalibrationError: the tokenizer fails.
    """
    try:
        with any_failure():
            encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            return encoded, tokenizer.batch_decode(encoded, clean_up_tokenization_spaces=False)
    except Failure as error:
        raise CalibrationError(
            "The tokenizer fails on the text",
            where=tokenizer.name_or_path,
            found=error,
            wanted="tokens",
            next_step="use the tokenizer.json and tokenizer_config.json that were published with the weights",
        ) from error


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """From files of data alone: code that comes with a model is never run.

    Raises:
        CalibrationError: whatever is wrong with its files. SourceError: with config.json.
    """
    from transformers import AutoTokenizer

    config = transformers_config(read_config(model))
    try:
        with any_failure():
            return AutoTokenizer.from_pretrained(model, config=config, trust_remote_code=False)
    except Failure as error:
        code, whole = _names_code(model), (model / "tokenizer.json").is_file()
        raise CalibrationError(
            "Tokenizer cannot be loaded",
            where=model,
            found="a class of its own by auto_map, which is never run" if code else str(error),
            wanted="tokenizer.json or what the model's tokenizer needs",
            next_step=_tokenizer_step(code, whole),
        ) from error


def _names_code(model: Path) -> bool:
    """Whether tokenizer_config.json asks for code of the model's own."""
    try:
        stated = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stated, dict) and "auto_map" in stated


def _tokenizer_step(code: bool, whole: bool) -> str:
    """What to do. code: it asks for code of its own. whole: tokenizer.json is there."""
    if not code:
        return "put the model's tokenizer files next to config.json" + ", whole ones" * whole
    if whole:
        return "take auto_map and tokenizer_class out of tokenizer_config.json: tokenizer.json is enough"
    return "put a tokenizer.json that says the same next to config.json, and take auto_map out of tokenizer_config.json"
