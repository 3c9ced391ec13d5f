"""The `ragged` layout: every expert at its own width, under the names of the source.

Stock engines do not know it, so its config has a `model_type` of its own and its folder the modeling code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tenp_dist.budget.sizes import MoeLayer
from tenp_dist.budget.widths.layer_optimum import legal_widths
from tenp_dist.checkpoint.entries import TensorEntry
from tenp_dist.checkpoint.recipes import Cut, OutputTensor
from tenp_dist.checkpoint.source import Source
from tenp_dist.config import Budget, Job
from tenp_dist.errors import BudgetError
from tenp_dist.layouts.base import Layout, OutputSizes, Pruned, under_same_names, with_length
from tenp_dist.runtime.auto_classes import modeling_source
from tenp_dist.runtime.ragged_config import modeling_module, ragged_config


class Ragged(Layout):
    name = "ragged"
    sentence = "Every expert is stored at its own width, under the tensor names of the source."
    needs_package = True

    def check_loadable(self, budget: Budget, layers: Sequence[MoeLayer]) -> None:
        from tenp_dist.runtime.buckets import MAX_BUCKETS, bucket_width  # imports transformers

        check_buckets(budget, layers, bucket_width, MAX_BUCKETS)

    def tensors(self, pruned: Pruned) -> list[OutputTensor]:
        widths = {layer: neurons.widths.tolist() for layer, neurons in pruned.kept.items()}

        def cut(entry: TensorEntry, axis: int, layer: int, expert: int) -> Cut:
            shape = with_length(entry.shape, axis, widths[layer][expert])
            return Cut(entry.name, entry.dtype, shape, axis, layer, expert)

        return under_same_names(pruned, cut)

    def config(self, pruned: Pruned) -> Mapping[str, Any]:
        return ragged_config(
            dict(pruned.source.index.config),
            widths_by_layer={layer: neurons.widths.tolist() for layer, neurons in pruned.kept.items()},
            retention=pruned.retention,
            fingerprint=pruned.source.fingerprint,
            full_width=pruned.source.facts.intermediate_size,
        )

    def extra_files(self, source: Source) -> Mapping[str, str]:
        family = source.facts.family
        return {f"{modeling_module(family)}.py": modeling_source(family)}

    def carries(self, side_file: Path) -> bool:
        """The source's modeling code stays behind: it would load these tensors wrongly."""
        return not (side_file.suffix == ".py" and side_file.name.startswith(("modeling", "configuration")))

    def nbytes(self, sizes: OutputSizes, job: Job) -> int:
        return sizes.total - sizes.dropped(job)


def check_buckets(budget: Budget, layers: Sequence[MoeLayer], bucket: Callable[[int], int], limit: int) -> None:
    """Refuse widths that a ragged checkpoint could not be loaded with.

    Args:
        bucket: width -> width of the bucket that it runs in. limit: buckets of a layer that the runtime has.

    Raises:
        BudgetError: a layer may get more.
    """
    for facts in layers:
        legal = legal_widths(facts.intermediate_size, budget.width_step, budget.minimum_width).tolist()
        buckets = min(len({bucket(width) for width in legal}), facts.experts, budget.max_widths)
        if buckets > limit:
            raise BudgetError(
                "A layer may get more distinct widths than the ragged runtime loads",
                where=f"budget.max_widths, layer {facts.layer}",
                found=f"up to {buckets}",
                wanted=f"at most {limit}",
                next_step=f"set budget.max_widths to {limit} or less, or raise budget.align",
            )


LAYOUT = Ragged()
