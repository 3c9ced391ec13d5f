"""EXAONE MoE, whose files name the router's bias as if it lay in the block."""

from __future__ import annotations

from tenp_dist.checkpoint.families.base import Family

ROWS = (
    Family(
        model_type="exaone_moe",
        experts_keys=("num_experts", "num_local_experts"),
        router_tensors=("mlp.gate.", "mlp.e_score_correction_bias"),
        groups_key="n_group",
        chosen_groups_key="topk_group",
        group_scorers=2,
        shared_key="num_shared_experts",
        mtp_tensors=("mtp.",),
    ),
)
