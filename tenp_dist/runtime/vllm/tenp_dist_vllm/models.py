"""The ragged models: each family's stock class of vLLM, built with ragged experts in the layers that were pruned.

Attribute access makes the classes (`models.TenpDeepseekV3ForCausalLM`), so that one family costs no import of another.
"""

import importlib
from typing import Any

from tenp_dist_vllm import compatibility
from tenp_dist_vllm.families import FAMILIES, architecture


def __getattr__(name: str) -> type:
    found = next((family for family in FAMILIES if architecture(family) == name), None)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    compatibility.check_version()
    compatibility.check_parts()
    family = FAMILIES[found]
    try:
        stock = getattr(importlib.import_module(f"vllm.model_executor.models.{family.module}"), family.model)
    except (ImportError, AttributeError) as error:
        raise compatibility.refusal(f"it has no {family.model}") from error
    globals()[name] = made = ragged_model(stock, name)
    return made


def ragged_model(stock: type, name: str) -> type:
    """Subclass of a stock model class whose layers that `tenp.layers` names get ragged experts."""
    from tenp_dist_vllm.placing import check_layers, ragged_layers
    from tenp_dist_vllm.settings import refuse_unsupported

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        refuse_unsupported(vllm_config)
        with ragged_layers():
            stock.__init__(self, vllm_config=vllm_config, prefix=prefix)
        check_layers(self, vllm_config)

    return type(name, (stock,), {"__module__": __name__, "__init__": __init__, "__doc__": f"Ragged {stock.__name__}."})
