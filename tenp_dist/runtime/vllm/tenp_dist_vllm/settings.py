"""What ragged experts are not served with. Refused by name before the model is built, and per layer."""

from typing import Any

from vllm.platforms import current_platform

from tenp_dist_vllm.forms import Form, not_served

FORMATS = {"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "dummy"}
GPU_KERNELS = ("triton", "deep_gemm", "marlin")  # these honour any map of expert ids


def refuse_unsupported(vllm_config: Any) -> None:
    """Raises NotImplementedError that names every setting under which a ragged model is not served."""
    parallel, found = vllm_config.parallel_config, []
    if parallel.data_parallel_size > 1:
        found.append("data parallelism (--data-parallel-size): start one server per replica")
    if parallel.prefill_context_parallel_size > 1:
        found.append("prefill context parallelism (--prefill-context-parallel-size): leave it out")
    if parallel.enable_eplb:
        found.append("expert load balancing (--enable-eplb): leave it out")
    if vllm_config.lora_config is not None:
        found.append("LoRA adapters (--enable-lora): merge them before pruning")
    if vllm_config.load_config.load_format not in FORMATS:
        found.append(f"--load-format {vllm_config.load_config.load_format}: use one of {', '.join(sorted(FORMATS))}")
    if reason := not_served(vllm_config.quant_config):
        found.append(reason)
    found += _kernel(vllm_config.kernel_config.moe_backend)
    if found:
        raise NotImplementedError("a ragged checkpoint is not served with " + "; nor with ".join(found))


def refuse_layer(moe_config: Any, experts: int, fused_shared: int, name: str) -> None:
    """Raises NotImplementedError for experts of a form that has no buckets, ValueError for another number of them."""
    forms = {
        "biases": moe_config.has_bias,
        "no gate": not moe_config.is_act_and_mul,
        "shared experts fused into the routed ones": fused_shared > 0,
        "sequence parallelism": moe_config.is_sequence_parallel,
        "redundant experts": moe_config.num_experts != moe_config.num_logical_experts,
    }
    if found := [form for form, present in forms.items() if present]:
        raise NotImplementedError(f"{name}: ragged experts with {' and '.join(found)} are not supported")
    if experts != moe_config.num_experts:
        raise ValueError(
            f"{name}: config.json has widths of {experts} experts in `tenp` and {moe_config.num_experts} experts in "
            "the model; write the checkpoint again"
        )


def kernel_of_buckets(asked: str, form: Form) -> str:
    """The value of `moe_backend` for a bucket: on a GPU one that honours its map of expert ids."""
    if asked != "auto" or not current_platform.is_cuda_alike():
        return asked
    return form.kernel if current_platform.is_cuda() else "triton"


def _kernel(asked: str) -> list[str]:
    if current_platform.is_cuda_alike():
        usable = asked in ("auto", *GPU_KERNELS)
        return [] if usable else [f"--moe-backend {asked}: use {', '.join(GPU_KERNELS)}"]
    return [] if current_platform.is_cpu() else [f"{current_platform.device_name} devices: use GPUs or CPUs"]
