"""gpt-oss in bfloat16: experts fused and transposed, the neurons of gate and up in turns, all with biases."""

from __future__ import annotations

from tenp_dist.checkpoint.families.base import (
    BIASED,
    DOWN,
    DOWN_BIAS,
    GATE,
    GATE_BIAS,
    UP,
    UP_BIAS,
    Family,
    FusedTensor,
)

ROWS = (
    Family(
        model_type="gpt_oss",
        experts_keys=("num_local_experts", "num_experts"),
        width_key="intermediate_size",
        expert_tensor="mlp.experts.{expert}.{matrix}",
        matrices=BIASED,
        fused=(
            FusedTensor("mlp.experts.gate_up_proj", (GATE, UP), interleaved=True, transposed=True),
            FusedTensor("mlp.experts.gate_up_proj_bias", (GATE_BIAS, UP_BIAS), interleaved=True, transposed=None),
            FusedTensor("mlp.experts.down_proj", (DOWN,), transposed=True),
            FusedTensor("mlp.experts.down_proj_bias", (DOWN_BIAS,), transposed=None),
        ),
        router="mlp.router",
        router_tensors=("mlp.router.",),
    ),
)
