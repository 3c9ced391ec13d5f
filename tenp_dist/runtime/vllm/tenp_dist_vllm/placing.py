"""Where ragged experts take the place of vLLM's: in the pruned layers of the model being built, nowhere else."""

import contextlib
from collections.abc import Iterator
from typing import Any

from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot

from tenp_dist_vllm.experts import RaggedRoutedExperts
from tenp_dist_vllm.ragged_config import widths_by_layer

REPLACED = "RoutedExperts"


@contextlib.contextmanager
def ragged_layers() -> Iterator[None]:
    """`RoutedExperts(...)` makes `RaggedRoutedExperts` meanwhile.

    Models built outside, drafts of speculative decoding among them, get vLLM's own.

    Raises:
        NotImplementedError: another plugin of this environment replaces the same class.
    """
    if REPLACED in op_registry_oot:
        raise NotImplementedError(
            f"{op_registry_oot[REPLACED].__module__} has already replaced vLLM's {REPLACED}; a ragged checkpoint "
            "cannot be served beside that plugin. Leave it out with VLLM_PLUGINS=tenp_dist, or serve another layout."
        )
    PluggableLayer.register_oot(RaggedRoutedExperts, name=REPLACED)
    try:
        yield
    finally:
        del op_registry_oot[REPLACED]


def check_layers(model: Any, vllm_config: Any) -> None:
    """Compare the layers of a model that got ragged experts with those that config.json lists, for this pipeline stage.

    Raises:
        RuntimeError: a listed layer was built otherwise: its narrow tensors would be loaded into wide parameters.
    """
    config = vllm_config.model_config.hf_text_config
    start, stop = getattr(model.model, "start_layer", 0), getattr(model.model, "end_layer", config.num_hidden_layers)
    wanted = {layer for layer in widths_by_layer({"tenp": config.tenp}) if start <= layer < stop}
    made = {m.layer for m in model.modules() if isinstance(m, RaggedRoutedExperts) and m.listed}
    if made != wanted:
        raise RuntimeError(
            f"ragged experts were made for layers {sorted(made)}, config.json lists {sorted(wanted)} of layers {start} "
            f"to {stop - 1}; this vLLM builds {type(model).__name__} in a way that the plugin does not know"
        )
