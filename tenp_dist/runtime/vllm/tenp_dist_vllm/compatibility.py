"""Whether this vLLM has the parts that the plugin takes hold of. Asked before a ragged model is built."""

import dataclasses
import inspect

WORKS = ("0.32", "0.33")
LOADER_PARAMETERS = ["self", "param", "loaded_weight", "weight_name", "shard_id", "expert_id", "return_success"]
NAMES = {"ckpt_gate_proj_name", "ckpt_down_proj_name", "ckpt_up_proj_name"}
CONFIG_FIELDS = {
    "num_experts", "num_local_experts", "num_logical_experts", "hidden_dim", "intermediate_size", "moe_backend",
    "hidden_dim_unpadded", "intermediate_size_per_partition_unpadded", "has_bias", "is_lora_enabled",
}  # fmt: skip
SCHEME_METHODS = ("get_scheme_dict", "_add_fused_moe_to_target_scheme_map")
MAP_PROPERTIES = ("local_num_experts", "expert_map", "expert_mask", "placement_strategy", "routing_tables")


class UnsupportedVllmError(RuntimeError):
    """This vLLM is not one of `WORKS`, or is built otherwise."""


def check_version() -> None:
    """Raises UnsupportedVllmError unless vLLM's version is one that was tried."""
    import vllm

    if ".".join(vllm.__version__.split(".")[:2]) not in WORKS:
        raise refusal("its version is not one that was tried")


def check_parts() -> None:
    """Raises UnsupportedVllmError unless the classes that the plugin derives from look as it expects them."""
    try:
        wrong = list(_differences())
    except ImportError as error:
        raise refusal(f"it lacks what is imported here: {error}") from error
    if wrong:
        raise refusal("; ".join(wrong))


def refusal(reason: str) -> UnsupportedVllmError:
    """The error that names this vLLM, what is wrong with it and the versions that work."""
    import vllm

    works = " and ".join(WORKS)
    return UnsupportedVllmError(
        f"tenp-dist-vllm cannot serve a ragged checkpoint with vLLM {vllm.__version__}: {reason}. It works with vLLM "
        f"{works}: install one of these, or a newer tenp-dist-vllm. Other models are not affected."
    )


def _differences():
    from vllm.model_executor.custom_op import op_registry, op_registry_oot
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    if op_registry.get("routed_experts") is not RoutedExperts or not isinstance(op_registry_oot, dict):
        yield "RoutedExperts cannot be replaced by name"
    if list(inspect.signature(RoutedExperts.weight_loader).parameters) != LOADER_PARAMETERS:
        yield "RoutedExperts.weight_loader takes other arguments"
    if list(inspect.signature(RoutedExperts._get_quant_method).parameters) != [
        "self", "prefix", "quant_config", "moe_config",
    ]:  # fmt: skip
        yield "RoutedExperts._get_quant_method takes other arguments"
    if not set(inspect.signature(RoutedExperts.__init__).parameters) >= NAMES:
        yield "RoutedExperts does not know what a checkpoint calls its matrices"
    missing = CONFIG_FIELDS - {field.name for field in dataclasses.fields(FusedMoEConfig)}
    if missing:
        yield f"FusedMoEConfig lacks {', '.join(sorted(missing))}"
    if not all(hasattr(ExpertMapManager, name) for name in MAP_PROPERTIES):
        yield "ExpertMapManager lacks properties"
    if not all(hasattr(CompressedTensorsConfig, name) for name in SCHEME_METHODS):
        yield "CompressedTensorsConfig lacks methods"
