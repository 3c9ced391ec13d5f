"""Which experts share a bucket, and how wide it is. Plain arithmetic, no vLLM."""

import math

from tenp_dist_vllm.forms import Form

CPU_STEP = 32  # neurons: vLLM's CPU kernels fill a rank's share up to this
GPU_STEP = 16  # neurons: rows of 32 bytes in bfloat16


def width_step(tensor_parallel: int, form: Form, *, cpu: bool) -> int:
    """What the width of a bucket is a multiple of, so that every tensor-parallel rank gets an equal, aligned share."""
    share = form.share or (CPU_STEP if cpu else GPU_STEP)
    return math.lcm(form.whole, share * tensor_parallel)


def group_by_width(widths: dict[int, int], step: int) -> dict[int, list[int]]:
    """Bucket width -> ids of its experts, both ascending.

    Args:
        widths: expert id -> neurons that it keeps. An expert of width 0 is in no bucket: it contributes zero.
        step: see `width_step`.
    """
    buckets: dict[int, list[int]] = {}
    for expert, width in sorted(widths.items()):
        if width:
            buckets.setdefault(-(-width // step) * step, []).append(expert)
    return dict(sorted(buckets.items()))
