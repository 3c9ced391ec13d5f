"""config.json of a ragged checkpoint, for transformers' AutoConfig.

The object is one of the family's stock config class with its stock `model_type`: vLLM tells by these whether a model
has latent attention or a layer for multi-token prediction. `tenp` and the ragged `architectures` stay on it: a stock
architecture that `--hf-overrides` puts there would load narrow experts into wide parameters and say nothing.
"""

import functools
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
        stock = stock_class(FAMILIES[model_type].config)
        kept = {key: value for key, value in unsealed(config_dict).items() if key not in ("model_type", "auto_map")}
        return stock.from_dict(kept | {"architectures": [architecture(model_type)]}, **kwargs)


class KeepsArchitecture:
    """In front of a stock config class: no architecture but the ragged one, and those of drafts made from it."""

    def __setattr__(self, key: str, value: Any) -> None:
        """Raises ValueError for the name of another model class."""
        if key == "architectures":
            own = {architecture(family) for family in FAMILIES}
            others = [name for name in value or () if name not in own and "MTP" not in name]
            if others:
                raise ValueError(
                    f"the checkpoint is ragged, its experts have different widths: {', '.join(others)} would load them "
                    "into experts of one width and say nothing. Leave `architectures` out of --hf-overrides"
                )
        super().__setattr__(key, value)


@functools.cache
def stock_class(name: str) -> type:
    """transformers' config class of this name, guarded. It keeps the name, by which tokenizers are found."""
    stock = getattr(transformers, name)
    return type(
        name, (KeepsArchitecture, stock), {"__module__": __name__, "__doc__": f"{name} of a ragged checkpoint."}
    )


def __getattr__(name: str) -> type:
    """The guarded classes by name: processes of an engine send configs to each other."""
    if name in {family.config for family in FAMILIES.values()}:
        return stock_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
