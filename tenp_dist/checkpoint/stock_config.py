"""config.json as the object that transformers makes of it: for the tokenizer and for the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tenp_dist.checkpoint.families.table import family_and_config, stock_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def transformers_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' own config of the model that a checkpoint is, or was made from.

    It goes by the family's own `model_type`: transformers would make a bare config of a name that it does not know
    (`kimi_k2`), and that cannot bear every field of a real one. Raises as `family_of`.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family, stock = family_and_config(stock_config(config))
    return CONFIG_MAPPING[family.model_type].from_dict(plain_floats(stock))


def plain_floats(value: Any) -> Any:
    """The value with infinities and NaN as floats, which transformers writes as `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: plain_floats(inner) for key, inner in value.items()}
    return [plain_floats(inner) for inner in value] if isinstance(value, list) else value
