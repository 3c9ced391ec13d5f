"""The `transformers` config classes of ragged checkpoints; imports no modeling code."""

import json
import os

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tenp_dist.runtime.ragged_config import PREFIX, class_prefix, modeling_module, sealed, unsealed, widths_by_layer


class RaggedConfig:
    """Goes in front of a stock config class: reads, checks and saves the `tenp` entry. Only files are sealed."""

    # text of the modeling file, for classes that do not live in one (see `save_pretrained`)
    modeling_source: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # transformers builds configs without arguments to learn the defaults: None must pass
        if self.tenp is not None:
            self.expert_widths()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        return super().from_dict(unsealed(config_dict), **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike):
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def expert_widths(self) -> dict[int, list[int]]:
        """Pruned decoder layer -> width of each expert. Raises ValueError on a malformed entry."""
        return widths_by_layer({"tenp": self.tenp})

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True):
        """Like stock, sealed. A config without a `tenp` entry describes no checkpoint and stays open."""
        text = self.to_json_string(use_diff=use_diff)
        if self.tenp is not None:
            text = json.dumps(sealed(json.loads(text)), indent=2, sort_keys=True) + "\n"
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(text)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Like stock, plus the modeling file that `auto_map` points to.

        transformers copies that file only when the class was loaded from it. It is written here and
        not in the model because a model saves its config before it looks for files to upload.
        """
        if self.modeling_source is not None:
            os.makedirs(save_directory, exist_ok=True)
            name = modeling_module(self.model_type.removeprefix(PREFIX)) + ".py"
            with open(os.path.join(save_directory, name), "w", encoding="utf-8") as file:
                file.write(self.modeling_source)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def ragged_config_class(family: str, module: str) -> type:
    """Config class of a family, e.g. TenpDeepseekV3Config.

    Args:
        family: model_type of the source, a key of `FAMILIES`.
        module: name of the module that will hold the class.
    """
    name = f"{class_prefix(family)}Config"
    stock = getattr(transformers, CONFIG_MAPPING_NAMES[family])
    body = {
        "__module__": module,
        "__doc__": f"{stock.__name__} of a ragged checkpoint: `tenp` holds the width of every expert.",
        "__annotations__": {"tenp": dict | None},
        "model_type": PREFIX + family,
        "tenp": None,
        # Buckets have no sharding rules: under tensor parallelism experts are replicated.
        "base_model_tp_plan": _without_experts(stock.base_model_tp_plan),
        "base_model_ep_plan": _without_experts(stock.base_model_ep_plan),
    }
    return type(name, (RaggedConfig, stock), body)


def _without_experts(plan: dict[str, str] | None) -> dict[str, str] | None:
    return plan and {name: rule for name, rule in plan.items() if ".experts" not in name}
