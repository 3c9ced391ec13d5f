"""config.json of a ragged checkpoint, for transformers' AutoConfig.

The object is one of the family's stock config class with its stock `model_type`: vLLM tells by these whether a model
has latent attention or a layer for multi-token prediction. `tenp` and the ragged `architectures` stay on it.
"""

from typing import Any

import transformers

from tenp_dist_vllm.families import FAMILIES, architecture
from tenp_dist_vllm.ragged_config import PREFIX, unsealed, widths_by_layer


def config_class(model_type: str) -> type[transformers.PretrainedConfig]:
    """Class that AutoConfig calls for `tenp_<model_type>`."""
    return type(f"Tenp_{model_type}_config", (RaggedConfig,), {"model_type": PREFIX + model_type})


class RaggedConfig(transformers.PretrainedConfig):
    """Reads and checks the entry `tenp`; what it returns is a stock config."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Stock config of a ragged checkpoint.

        Raises:
            ValueError: no `tenp` entry, another format version, another source than `model_type` says.
        """
        widths_by_layer(config_dict)
        model_type = cls.model_type.removeprefix(PREFIX)
        source = config_dict["tenp"].get("source", {}).get("model_type")
        if source != model_type:
            raise ValueError(
                f"config.json has model_type {cls.model_type!r} but was made from {source!r}; write it again"
            )
        stock = getattr(transformers, FAMILIES[model_type].config)
        kept = {key: value for key, value in unsealed(config_dict).items() if key not in ("model_type", "auto_map")}
        return stock.from_dict(kept | {"architectures": [architecture(model_type)]}, **kwargs)
