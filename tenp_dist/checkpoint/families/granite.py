"""Granite MoE, whose files hold the experts of a layer in two tensors, with shared experts and Mamba or without."""

from __future__ import annotations

from functools import partial

from tenp_dist.checkpoint.families.base import DOWN, GATE, UP, Family, FusedTensor

granite = partial(
    Family,
    experts_keys=("num_local_experts",),
    width_key="intermediate_size",
    experts="block_sparse_moe.experts",
    expert_tensor="block_sparse_moe.experts.{expert}.{matrix}.weight",
    router="block_sparse_moe.router",
    router_tensors=("block_sparse_moe.router.",),
)
linears = (
    FusedTensor("block_sparse_moe.input_linear.weight", (GATE, UP)),
    FusedTensor("block_sparse_moe.output_linear.weight", (DOWN,)),
)
shared = {GATE: "input_linear", UP: "input_linear", DOWN: "output_linear"}

ROWS = (
    granite(model_type="granitemoe", fused=linears),
    granite(model_type="granitemoeshared", fused=linears, shared_experts="shared_mlp", shared_matrices=shared),
    granite(
        model_type="granitemoehybrid",
        fused=linears,
        shared_experts="shared_mlp",
        shared_matrices=shared,
        output_projections=("self_attn.o_proj", "mamba.out_proj"),
    ),
    granite(
        model_type="granitemoe_swa",
        fused=(
            FusedTensor("block_sparse_moe.experts.gate_up_proj", (GATE, UP)),
            FusedTensor("block_sparse_moe.experts.down_proj", (DOWN,)),
        ),
        shared_experts="shared_mlp",
        shared_matrices=shared,
    ),
)
