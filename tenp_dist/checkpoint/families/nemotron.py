"""Nemotron 3: Mamba, attention and experts without a gate, a layer each."""

from __future__ import annotations

from tenp_dist.checkpoint.families.base import ANY, DOWN, PROJECTIONS, UP, Family

UP_AND_DOWN = {part: PROJECTIONS[part] for part in (UP, DOWN)}

ROWS = (
    Family(
        model_type="nemotron_h",
        layers_keys=("layers_block_type", "hybrid_override_pattern", "num_hidden_layers"),
        experts_keys=("n_routed_experts",),
        layer="backbone.layers.{layer}.",
        experts="mixer.experts",
        expert_tensor="mixer.experts.{expert}.{matrix}.weight",
        matrices=UP_AND_DOWN,
        final_norm="norm_f",
        block_norm="norm",
        router="mixer.gate",
        router_tensors=("mixer.gate.",),
        groups_key="n_group",
        chosen_groups_key="topk_group",
        group_scorers=2,
        output_projections=("mixer.o_proj", "mixer.out_proj"),
        shared_experts="mixer.shared_experts",
        shared_matrices=UP_AND_DOWN,
        refused={"moe_latent_size": ANY},
    ),
)
