"""Which experts share a bucket, and how wide it is. Plain arithmetic, no vLLM."""

import math

CPU_STEP = 32  # neurons: vLLM's CPU kernels fill a rank's share up to this
GPU_STEP = 16  # neurons: rows of 32 bytes in bfloat16
BLOCK_STEP = 64  # neurons: FP8 scales of 128 are refined to 64 or 32 without loss; finer ones no kernel takes
SMALLEST_BLOCK = 32


def width_step(tensor_parallel: int, *, cpu: bool, block_fp8: bool) -> int:
    """What the width of a bucket is a multiple of, so that every tensor-parallel rank gets an equal, aligned share."""
    if block_fp8:
        return math.lcm(BLOCK_STEP, SMALLEST_BLOCK * tensor_parallel)
    return (CPU_STEP if cpu else GPU_STEP) * tensor_parallel


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
