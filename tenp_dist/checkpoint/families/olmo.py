"""OLMoE and FlexOlmo; the latter normalises what leaves its blocks, so that the MoE block reads the residual stream."""

from __future__ import annotations

from functools import partial

from tenp_dist.checkpoint.families.base import Family

olmo = partial(Family, experts_keys=("num_experts", "num_local_experts"), width_key="intermediate_size")

ROWS = (olmo(model_type="olmoe"), olmo(model_type="flex_olmo", block_norm="mlp"))
