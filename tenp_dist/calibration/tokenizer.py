"""The tokenizer of a model, loaded from its files, and what to do where that cannot be done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tenp_dist.checkpoint.index import read_config
from tenp_dist.checkpoint.stock_config import transformers_config
from tenp_dist.errors import CalibrationError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """From files of data alone: code that comes with a model is never run.

    Raises:
        CalibrationError: whatever is wrong with its files. SourceError: with config.json.
    """
    from transformers import AutoTokenizer

    config = transformers_config(read_config(model))
    try:
        return AutoTokenizer.from_pretrained(model, config=config, trust_remote_code=False)
    except (
        BaseException
    ) as error:  # of any type: a broken tokenizer.json ends in a panic of Rust, which is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        code, whole = _names_code(model), (model / "tokenizer.json").is_file()
        raise CalibrationError(
            "Tokenizer cannot be loaded",
            where=model,
            found="a class of its own by auto_map, which is never run" if code else one_line(error),
            wanted="tokenizer.json or what the model's tokenizer needs",
            next_step=_tokenizer_step(code, whole),
        ) from error


def _names_code(model: Path) -> bool:
    """Whether tokenizer_config.json asks for code of the model's own."""
    try:
        return "auto_map" in json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _tokenizer_step(code: bool, whole: bool) -> str:
    """What to do. code: it asks for code of its own. whole: tokenizer.json is there."""
    if not code:
        return "put the model's tokenizer files next to config.json" + ", whole ones" * whole
    if whole:
        return "take auto_map and tokenizer_class out of tokenizer_config.json: tokenizer.json is enough"
    return "put a tokenizer.json that says the same next to config.json, and take auto_map out of tokenizer_config.json"
