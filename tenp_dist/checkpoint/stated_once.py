"""A config whose language model's part says how the weights are stored, seen as one that says so at the top.

Kimi-K2.5 states `quantization_config` in `text_config`, and once more at the top where a program has saved the config.
Engines and transformers look at the top: what is written states it there alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenp_dist.errors import SourceError

KEY = "quantization_config"


def stated_once(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config with `quantization_config` at the top, where it or a part of it states one.

    Args:
        where: the config's file, for the message.

    Raises:
        SourceError: two places state different ones.
    """
    parts = {key: part for key, part in config.items() if isinstance(part, Mapping) and part.get(KEY)}
    found = {KEY: config[KEY]} if config.get(KEY) else {}
    for name, part in parts.items():
        if found and found[KEY] != part[KEY]:
            raise SourceError(
                "The config states two forms of stored weights",
                where=where,
                found=f"{KEY} and {name}.{KEY}, which differ",
                wanted="the same in both places, or one of them",
                next_step="take out the one that the files are not stored in, or download config.json again",
            )
        found = {KEY: part[KEY]}
    once = {name: {key: value for key, value in part.items() if key != KEY} for name, part in parts.items()}
    return {**config, **once, **found}
