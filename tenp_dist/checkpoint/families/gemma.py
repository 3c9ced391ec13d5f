"""Gemma 4: experts beside a dense block, fused, behind a router that scales each of them; alone, and with towers."""

from __future__ import annotations

from functools import partial

from tenp_dist.checkpoint.families.base import ANY, DOWN, GATE, UP, Family, FusedTensor

gemma = partial(
    Family,
    experts_keys=("num_experts",),
    top_k_key="top_k_experts",
    experts="experts",
    expert_tensor="experts.{expert}.{matrix}.weight",
    fused=(FusedTensor("experts.gate_up_proj", (GATE, UP)), FusedTensor("experts.down_proj", (DOWN,))),
    block_norm="pre_feedforward_layernorm",
    router="router",
    router_tensors=("router.proj.", "router.per_expert_scale"),
    # keys and values, and embeddings, that layers get from elsewhere than the one before; no published MoE has them
    refused={"num_kv_shared_layers": ANY, "hidden_size_per_layer_input": ANY},
)

ROWS = (
    gemma(model_type="gemma4_text"),
    gemma(
        model_type="gemma4",
        section="text_config",
        layer="model.language_model.layers.{layer}.",
        decoder="model.language_model",
    ),
)
