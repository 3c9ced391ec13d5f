"""Qwen MoE, and the multimodal checkpoints that have one as their language model."""

from __future__ import annotations

from functools import partial

from tenp_dist.checkpoint.families.base import DOWN, FUSED, GATE, UP, Family, FusedTensor

qwen = partial(Family, experts_keys=("num_experts", "num_local_experts"))
gated = partial(qwen, shared_experts="mlp.shared_expert", shared_gate="mlp.shared_expert_gate")
inside = partial(
    Family,
    experts_keys=("num_experts", "num_local_experts"),
    section="text_config",
    layer="model.language_model.layers.{layer}.",
    decoder="model.language_model",
)
with_linear = ("self_attn.o_proj", "linear_attn.out_proj")
either = (  # Qwen publishes them transposed, transformers saves them in torch's layout under the same names
    FusedTensor("mlp.experts.gate_up_proj", (GATE, UP), transposed=None),
    FusedTensor("mlp.experts.down_proj", (DOWN,), transposed=None),
)

ROWS = (
    gated(model_type="qwen2_moe", tensor_parallel=True),
    qwen(model_type="qwen3_moe", tensor_parallel=True),
    gated(model_type="qwen3_next", mtp_tensors=("mtp.",), output_projections=with_linear),
    gated(model_type="qwen3_5_moe_text", mtp_tensors=("mtp.",), output_projections=with_linear),
    inside(
        model_type="qwen3_5_moe",
        mtp_tensors=("mtp.",),
        fused=FUSED,
        output_projections=with_linear,
        shared_experts="mlp.shared_expert",
        shared_gate="mlp.shared_expert_gate",
    ),
    inside(model_type="qwen3_vl_moe", fused=either),
)
