"""The `padded` layout: the source's shapes and config, pruned neurons zero. For evaluation; it saves no memory."""

from __future__ import annotations

from tenp_dist.checkpoint.entries import TensorEntry
from tenp_dist.checkpoint.recipes import OutputTensor, Zero
from tenp_dist.config import Job
from tenp_dist.layouts.base import Layout, OutputSizes, Pruned, under_same_names


class Padded(Layout):
    name = "padded"
    sentence = (
        "Tensors have the source's shapes and pruned neurons are zero: it runs wherever the source runs, and "
        "saves neither memory nor time."
    )
    saves_space = False
    keeps_fused = True

    def tensors(self, pruned: Pruned) -> list[OutputTensor]:
        return under_same_names(pruned, _zero)

    def nbytes(self, sizes: OutputSizes, job: Job) -> int:
        return sizes.total


def _zero(entry: TensorEntry, axis: int, layer: int, expert: int) -> Zero:
    return Zero(entry.name, entry.dtype, entry.shape, axis, layer, expert)


LAYOUT = Padded()
