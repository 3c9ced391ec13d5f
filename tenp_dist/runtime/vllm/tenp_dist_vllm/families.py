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
    "afmoe": Family("AfmoeConfig", "afmoe", "AfmoeForCausalLM"),
    "axk1": Family("AXK1Config", "AXK1", "AXK1ForCausalLM"),
    "cohere2_moe": Family("Cohere2MoeConfig", "cohere2_moe", "Cohere2MoeForCausalLM"),
    "deepseek_v2": Family("DeepseekV2Config", "deepseek_v2", "DeepseekV2ForCausalLM"),
    "deepseek_v3": Family("DeepseekV3Config", "deepseek_v2", "DeepseekV3ForCausalLM"),
    "ernie4_5_moe": Family("Ernie4_5_MoeConfig", "ernie45_moe", "Ernie4_5_MoeForCausalLM"),
    "exaone_moe": Family("ExaoneMoeConfig", "exaone_moe", "ExaoneMoeForCausalLM"),
    "glm4_moe": Family("Glm4MoeConfig", "glm4_moe", "Glm4MoeForCausalLM"),
    "glm4_moe_lite": Family("Glm4MoeLiteConfig", "glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
    "granitemoe": Family("GraniteMoeConfig", "granitemoe", "GraniteMoeForCausalLM"),
    "granitemoe_swa": Family("GraniteMoeSWAConfig", "granitemoeshared", "GraniteMoeSharedForCausalLM"),
    "granitemoehybrid": Family("GraniteMoeHybridConfig", "granitemoehybrid", "GraniteMoeHybridForCausalLM"),
    "granitemoeshared": Family("GraniteMoeSharedConfig", "granitemoeshared", "GraniteMoeSharedForCausalLM"),
    "hy_v3": Family("HYV3Config", "hy_v3", "HYV3ForCausalLM"),
    "lfm2_moe": Family("Lfm2MoeConfig", "lfm2_moe", "Lfm2MoeForCausalLM"),
    "mimo_v2_flash": Family("MiMoV2FlashConfig", "mimo_v2", "MiMoV2FlashForCausalLM"),
    "minimax_m2": Family("MiniMaxM2Config", "minimax_m2", "MiniMaxM2ForCausalLM"),
    "mixtral": Family("MixtralConfig", "mixtral", "MixtralForCausalLM"),
    "olmoe": Family("OlmoeConfig", "olmoe", "OlmoeForCausalLM"),
    "phimoe": Family("PhimoeConfig", "phimoe", "PhiMoEForCausalLM"),
    "qwen2_moe": Family("Qwen2MoeConfig", "qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3_moe": Family("Qwen3MoeConfig", "qwen3_moe", "Qwen3MoeForCausalLM"),
}


def architecture(model_type: str) -> str:
    """Name of the ragged model class of a family, as config.json has it: TenpDeepseekV3ForCausalLM."""
    return f"{class_prefix(model_type)}ForCausalLM"
