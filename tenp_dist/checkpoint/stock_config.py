"""config.json as the object that transformers makes of it: for the tokenizer and for the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tenp_dist.checkpoint.families.table import family_and_config, stock_config
from tenp_dist.errors import SourceError, TenpError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def transformers_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' own config of the model that a checkpoint is, or was made from.

    It goes by the family's own `model_type`: transformers would make a bare config of a name that it does not know
    (`kimi_k2`), and that cannot bear every field of a real one.

    Raises:
        SourceError: transformers refuses a value of the config. UnsupportedModelError: as `family_of`.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family, stock = family_and_config(stock_config(config))
    with refusing_config():
        return CONFIG_MAPPING[family.model_type].from_dict(plain_floats(stock))


@contextlib.contextmanager
def refusing_config() -> Iterator[None]:
    """Whatever transformers raises of a config, or of a model made from it, as an error with its whole message."""
    try:
        yield
    except TenpError:
        raise
    except Exception as error:  # of any type: its checks are those of many authors
        raise SourceError(
            "transformers makes no model of this config.json",
            where="config.json",
            found=f"{type(error).__name__}: {one_line(error)}",
            wanted="the config that was published with these weights",
            next_step="download config.json again, or correct the value that is named",
        ) from error


def plain_floats(value: Any) -> Any:
    """The value with infinities and NaN as floats, which transformers writes as `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: plain_floats(inner) for key, inner in value.items()}
    return [plain_floats(inner) for inner in value] if isinstance(value, list) else value
