"""The families that are served: a row says which classes of transformers and vLLM the ragged ones are made from."""

from dataclasses import dataclass

from tenp_dist_vllm.ragged_config import class_prefix


@dataclass(frozen=True)
class Family:
    """Where the stock classes of a family are.

    config: the config class, in transformers.
    module: the module of the model class, in `vllm.model_executor.models`.
    model: the model class.
    """

    config: str
    module: str
    model: str


# model_type of the source -> its row. The experts of all of them are vLLM's `RoutedExperts`.
FAMILIES = {
    "deepseek_v2": Family("DeepseekV2Config", "deepseek_v2", "DeepseekV2ForCausalLM"),
    "deepseek_v3": Family("DeepseekV3Config", "deepseek_v2", "DeepseekV3ForCausalLM"),
    "qwen2_moe": Family("Qwen2MoeConfig", "qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3_moe": Family("Qwen3MoeConfig", "qwen3_moe", "Qwen3MoeForCausalLM"),
}


def architecture(model_type: str) -> str:
    """Name of the ragged model class of a family, as config.json has it: TenpDeepseekV3ForCausalLM."""
    return f"{class_prefix(model_type)}ForCausalLM"
