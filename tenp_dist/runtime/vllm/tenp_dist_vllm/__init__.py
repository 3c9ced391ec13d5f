"""vLLM plugin for ragged checkpoints of tenp-dist, whose experts have different widths.

vLLM calls `register` in every process, for every model that it serves: it says where the ragged families are found and
imports nothing of theirs. `configs` reads their config.json, `models` builds them with `experts` in place of vLLM's
routed experts; `buckets` are what these consist of.
"""

import logging

from tenp_dist_vllm.families import FAMILIES, architecture

__version__ = "0.1.0"
_log = logging.getLogger(__name__)


def register() -> None:
    """Make the ragged families known to transformers' Auto classes and to vLLM's registry.

    It may be called more than once. It raises nothing: an error here would keep vLLM from serving any other model.
    """
    try:
        from transformers import AutoConfig
        from vllm import ModelRegistry

        from tenp_dist_vllm.configs import config_class

        for model_type in FAMILIES:
            made = config_class(model_type)
            AutoConfig.register(made.model_type, made, exist_ok=True)
            name = architecture(model_type)
            if name not in ModelRegistry.get_supported_archs():
                ModelRegistry.register_model(name, f"tenp_dist_vllm.models:{name}")
    except (ImportError, AttributeError, TypeError, ValueError):
        _log.exception("tenp-dist-vllm could not register itself: ragged checkpoints are refused, others are served")
