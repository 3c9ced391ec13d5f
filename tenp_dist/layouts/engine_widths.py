"""Widths that engines run, where a checkpoint's config states one width: chosen, warned of or refused before any work.

Rows of the matrices that are multiplied in groups are multiples of 16 bytes (torch and the stock modeling code). In FP8
with blocks, stock transformers takes the size of a block from the shapes, which is wrong for a width between multiples
of it, and vLLM takes whole blocks only. Layouts that our own runtimes read may have any width: these fill up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tenp_dist.budget.kinds.table import form_of, kind_of
from tenp_dist.budget.sizes import MoeLayer, Shape
from tenp_dist.checkpoint.entries import ITEM_SIZE
from tenp_dist.checkpoint.output_form import output_form, routed_matrices
from tenp_dist.checkpoint.source import Source
from tenp_dist.config import AUTO, Job
from tenp_dist.errors import JobError
from tenp_dist.layouts.table import layouts_of, written_source

ROW_BYTES = 16


def with_engine_widths(job: Job, source: Source) -> Job:
    """The job with an `align` whose widths engines run, where it names none and a layout states one width."""
    budget, states = job.budget, any(layout.states_width for layout in layouts_of(job))
    narrows = budget.method == AUTO or "align" not in kind_of(budget).unused_keys
    if "align" in budget.model_fields_set or not states or not narrows:
        return job
    block, width = output_form(written_source(job, source), job.output.dtype).width_step, source.facts.intermediate_size
    step = math.lcm(_row_step(source), block if block < width else 1)
    return job.model_copy(update={"budget": budget.model_copy(update={"align": math.lcm(step, budget.neuron_groups)})})


def check_engine_widths(job: Job, source: Source, layers: Sequence[MoeLayer], shapes: Sequence[Shape]) -> None:
    """Refuse a stated width that cuts a block of the stored form in two.

    Raises:
        JobError: no engine would read the checkpoint as it is.
    """
    states = [layout.name for layout in layouts_of(job) if layout.states_width]
    block = output_form(written_source(job, source), job.output.dtype).width_step if states else 1
    full = {facts.intermediate_size for facts in layers}
    widths = {width for shape in shapes for width in form_of(job.budget, shape).widths or ()} - full
    broken = sorted(width for width in widths if width > block and width % block)
    if block > 1 and broken:
        raise JobError(
            f"No engine reads a {states[0]} checkpoint in FP8 whose width is between multiples of its blocks",
            where="budget.align",
            found=f"align {job.budget.align}: experts of {broken[0]} neurons, blocks of {block}",
            wanted=f"a multiple of {block}",
            next_step=f"set budget.align to {block}, or leave it out; or set output.dtype to bfloat16, or use layout "
            "ragged",
        )


def block_warnings(job: Job, source: Source, shape: Shape) -> list[str]:
    """That a stated width is smaller than a block of the stored form."""
    if not any(layout.states_width for layout in layouts_of(job)):
        return []
    block = output_form(written_source(job, source), job.output.dtype).width_step
    small = sorted(width for width in form_of(job.budget, shape).widths or () if 0 < width < block)
    return [
        f"vLLM runs FP8 experts in blocks of {block} neurons: {width} are fewer, so only transformers loads the "
        "checkpoint. output.dtype: bfloat16 runs in both."
        for width in small
    ]


def _row_step(source: Source) -> int:
    """Neurons of a row of `ROW_BYTES`, for numbers as they are read."""
    return max(1, ROW_BYTES // ITEM_SIZE[source.index.entry(next(routed_matrices(source))).dtype])
