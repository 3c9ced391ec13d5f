"""gpt-oss: experts fused, the neurons of gate and up in turns, all with biases.

Published in MXFP4 (`formats/mxfp4.py`), whose blocks and scales lie as torch's matrices do; in bfloat16 matrices are
transposed.
"""

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
    StoredPart,
)

BLOCKS = StoredPart("_blocks", group=32, each=(16,))
SCALES = StoredPart("_scales", group=32)

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
            *(
                FusedTensor(f"mlp.experts.{name}{part.suffix}", parts, interleaved=len(parts) > 1, stored=part)
                for name, parts in (("gate_up_proj", (GATE, UP)), ("down_proj", (DOWN,)))
                for part in (BLOCKS, SCALES)
            ),
        ),
        router="mlp.router",
        router_tensors=("mlp.router.",),
    ),
)
