"""Makes the ragged families known to the Auto classes of `transformers` and writes their modeling files.

`import tenp_dist` calls the two `register_*` functions when transformers loads its Auto modules.
"""

import functools
import importlib
import inspect
import re
import sys
from types import ModuleType
from typing import Any

from tenp_dist.runtime import ragged_config

_INTERNAL_IMPORT = re.compile(r"^from tenp_dist\.\S+ import (\([^)]*\)|.*)\n", re.MULTILINE)


_PARTS = (
    "ragged_config",
    "pretrained_config",
    "buckets",
    "stored_fp8",
    "stored_compressed",
    "stored_mxfp4",
    "ragged_model",
)


_HEADER = "# The runtime of this checkpoint, written by tenp-dist. Needs torch and transformers only.\n"


_FOOTER = """

{config} = ragged_config_class("{family}", __name__)
{model} = ragged_model_class({config}, __name__)
{config}.register_for_auto_class()
{register}"""


def modeling_source(family: str) -> str:
    """Text of `modeling_tenp_<family>.py`, which needs torch and transformers only.

    It is the text of the modules that the package itself runs, without the imports between them,
    and a footer that makes the two classes of the family. Line numbers aside, there is one runtime.

    Args:
        family: model_type of the source, e.g. "deepseek_v3".

    Raises:
        ValueError: unknown family.
    """
    prefix = ragged_config.class_prefix(family)
    parts = [inspect.getsource(importlib.import_module(f"tenp_dist.runtime.{name}")) for name in _PARTS]
    model, kinds = ragged_config.class_name(family), [*ragged_config.auto_map(family)][1:]
    register = "".join(f'{model}.register_for_auto_class("{kind}")\n' for kind in kinds[:1])
    footer = _FOOTER.format(family=family, config=f"{prefix}Config", model=model, register=register)
    return _HEADER + _INTERNAL_IMPORT.sub("", "\n\n".join(parts)) + footer


def register_configs(configuration_auto: ModuleType) -> None:
    """Register the config classes with AutoConfig, by name.

    The public `AutoConfig.register` wants classes. They cannot be made yet: this runs while
    transformers is being imported, perhaps from the very config module that a class derives from
    (its docstring decorator imports the Auto modules). So names go into the lazy mapping, like those
    of stock families, and the mapping asks `__getattr__` below when a class is wanted.
    """
    mapping = configuration_auto.CONFIG_MAPPING
    for family in ragged_config.FAMILIES:
        model_type = ragged_config.PREFIX + family
        mapping._mapping[model_type] = f"{ragged_config.class_prefix(family)}Config"
        mapping._modules[model_type] = sys.modules[__name__]


def register_models(modeling_auto: ModuleType) -> None:
    """Register the model classes with AutoModelForCausalLM, by name (see `register_configs`).

    Those with towers beside their language model are known to AutoModelForImageTextToText too, as the stock ones are.
    """
    causal, towers = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    for family in ragged_config.FAMILIES:
        model_type, prefix = ragged_config.PREFIX + family, ragged_config.class_prefix(family)
        for mapping in (causal, towers) if family in ragged_config.SECTIONS else (causal,):
            mapping._model_mapping[model_type] = ragged_config.class_name(family)
            mapping._reverse_config_mapping[f"{prefix}Config"] = model_type
            mapping._modules[model_type] = sys.modules[__name__]


@functools.cache
def config_class(family: str) -> Any:
    """Config class of a family, e.g. TenpDeepseekV3Config for "deepseek_v3"."""
    from tenp_dist.runtime.pretrained_config import ragged_config_class

    made: Any = ragged_config_class(family, __name__)
    # these classes do not live in a modeling file that transformers could copy when it saves
    made.modeling_source = _ModelingText()
    return made


@functools.cache
def model_class(family: str) -> type:
    """Model class of a family, e.g. TenpDeepseekV3ForCausalLM for "deepseek_v3"."""
    from tenp_dist.runtime.ragged_model import ragged_model_class

    return ragged_model_class(config_class(family), __name__)


class _ModelingText:
    """Class attribute that makes the text when it is read: only saving needs it."""

    def __get__(self, instance: object, owner: Any) -> str:
        return modeling_source(owner.model_type.removeprefix(ragged_config.PREFIX))


def __getattr__(name: str) -> type:
    """The classes by name, made on first use: for the lazy mappings of transformers and for unpickling."""
    for family in ragged_config.FAMILIES:
        prefix = ragged_config.class_prefix(family)
        if name == f"{prefix}Config":
            return config_class(family)
        if name == ragged_config.class_name(family):
            return model_class(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
