"""The layouts by name, which of them a job writes, and what is refused or said before anything is written."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence

from tenp_dist import config, job_parts
from tenp_dist.budget.kinds.table import form_of, kind_of
from tenp_dist.budget.sizes import MoeLayer, Shape
from tenp_dist.checkpoint.families.base import Family
from tenp_dist.checkpoint.mtp import without_mtp
from tenp_dist.checkpoint.output_form import output_form
from tenp_dist.checkpoint.source import Source
from tenp_dist.config import Budget, Job
from tenp_dist.errors import JobError
from tenp_dist.layouts.base import Layout

LAYOUTS: dict[str, Layout] = {
    name: importlib.import_module(f"tenp_dist.layouts.{name}").LAYOUT for name in job_parts.LAYOUTS
}
"""Name -> layout, as the file of that name defines it; in the order of `job_parts.LAYOUTS`."""


def layouts_of(job: Job) -> tuple[Layout, ...]:
    """What the job writes; where experts or layers leave and the job names no layout, the one that can hold that."""
    taken_out = job.budget.method != config.AUTO and kind_of(job.budget).takes_out
    if taken_out and "layouts" not in job.output.model_fields_set:
        return (next(layout for layout in LAYOUTS.values() if layout.holds_removal),)
    return tuple(LAYOUTS[name] for name in job.output.layouts)


def main_layout(layouts: Sequence[Layout]) -> Layout | None:
    """The one that is evaluated: the default, or the first that can be read where that is not written; None of none."""
    default = LAYOUTS[job_parts.LAYOUTS[0]]
    return default if default in layouts else next((layout for layout in layouts if layout.readable), None)


def sorted_names(names: Iterable[str]) -> list[str]:
    """Names of layouts as people are shown them: those that save space first, unknown ones last."""
    known = sorted(LAYOUTS.values(), key=lambda layout: not layout.saves_space)
    places = {layout.name: place for place, layout in enumerate(known)}
    return sorted(names, key=lambda name: (places.get(name, len(places)), name))


def written_source(job: Job, source: Source) -> Source:
    """The source as checkpoints are made from it: without prediction layers where the job drops them.

    Where its config counts some that it has no tensors of, as many converted models do, the count goes: engines would
    look for them.
    """
    text = source.family.text(source.index.config)
    empty = any(text.get(key) for key in source.family.mtp_keys) and not source.facts.mtp_layers
    return without_mtp(source) if job.output.mtp == "drop" or empty else source


def plan_settings(job: Job) -> dict[str, bool]:
    """What of the layouts is a setting of the plan: it warns of prediction layers that are pruned without scores."""
    written = layouts_of(job) if job.output.mtp == "keep" else ()
    return {layout.name: layout in written for layout in LAYOUTS.values() if layout.prunes_mtp}


def layout_warnings(job: Job, shape: Shape, mtp_layers: int) -> list[str]:
    """What the job's layouts ask of engines or keep without evidence. mtp_layers: prediction layers in them."""
    return [warning for layout in layouts_of(job) for warning in layout.warnings(shape, mtp_layers)]


def check_layouts(job: Job, layers: Sequence[MoeLayer], shapes: Sequence[Shape]) -> None:
    """Refuse, before anything is computed, what a plan of one of these shapes does not have.

    Raises:
        JobError: a layout cannot hold the plan.
        BudgetError: the runtime of a layout could not load it.
    """
    layouts, forms = layouts_of(job), [form_of(job.budget, shape) for shape in shapes]
    if any(form.experts_leave or form.layers_leave for form in forms):
        _check_removal(job, layouts)
    for layout in layouts:
        refusal = layout.refusal(job.budget, forms)
        if refusal:
            raise refusal
    for layout in layouts:
        layout.check_loadable(job.budget, layers)


def check_width(job: Job, family: Family, layers: Sequence[MoeLayer], shapes: Sequence[Shape]) -> None:
    """Refuse narrow experts where the config has one number for their width and for that of other modules.

    Raises:
        JobError: a layout would state another width for these too.
    """
    states = [layout.name for layout in layouts_of(job) if layout.states_width]
    widths = {width for shape in shapes for width in form_of(job.budget, shape).widths or ()}
    if states and family.width_of_others and widths - {facts.intermediate_size for facts in layers}:
        raise JobError(
            f"A {states[0]} checkpoint of {family.model_type} cannot have narrow experts",
            where="output.layouts",
            found=f"{family.width_key} is the width of {', '.join(family.width_of_others)} too",
            wanted="layout ragged or padded",
            next_step="use layout ragged, or a method that removes experts",
        )


def check_expected_of(job: Job, source: Source) -> None:
    """Refuse, before anything is computed, what a layout cannot do with this source or for the rest of the job.

    Raises:
        UnsupportedModelError: a layout has no form of this source.
        JobError: nothing that is written can be evaluated, or divided as asked.
    """
    layouts, written = layouts_of(job), written_source(job, source)
    for layout in layouts:
        layout.check_source(written)
    fused = [layout.name for layout in layouts if layout.keeps_fused and source.index.fused]
    together = fused + [layout.name for layout in layouts if not layout.experts_apart]
    if together and job.output.expert_ranks:
        raise JobError(
            "Experts that share a tensor cannot be divided among files",
            where="output.layout_by",
            found=f"layout {together[0]}",
            wanted="layouts with tensors for every expert",
            next_step="leave output.layout_by, or that layout, out",
        )
    stored = output_form(written, job.output.dtype)
    form = stored.name
    plain = [layout.name for layout in layouts if layout.plain_only and form]
    if plain:
        raise JobError(
            f"A {plain[0]} checkpoint holds plain tensors only",
            where="output.dtype",
            found=f"{job.output.dtype}, which is {form} here",
            wanted="bfloat16",
            next_step="set output.dtype to bfloat16, or use layout ragged",
        )
    if fused and not stored.fuses(written):
        raise JobError(
            f"A {fused[0]} checkpoint of this source has fused experts, which are written as plain tensors only",
            where="output.dtype",
            found=f"{job.output.dtype}, which is {form} here",
            wanted="bfloat16",
            next_step="set output.dtype to bfloat16, or use layout ragged, where every expert has tensors of its own",
        )
    if job.evaluation and job.evaluation.checkpoint and main_layout(layouts) is None:
        raise JobError(
            "No layout of the job can be evaluated",
            where="output.layouts",
            found=", ".join(layout.name for layout in layouts),
            wanted=f"one of {', '.join(layout.name for layout in LAYOUTS.values() if layout.readable)} too",
            next_step="write such a layout as well, or set evaluation.checkpoint to false",
        )


def _check_removal(job: Job, layouts: Sequence[Layout]) -> None:
    able = [layout.name for layout in LAYOUTS.values() if layout.holds_removal]
    others = [layout.name for layout in layouts if not layout.holds_removal]
    if others:
        raise JobError(
            f"Method {job.budget.method} removes {_removed(job.budget)}, which only the {' or '.join(able)} layout can "
            "hold",
            where="output.layouts",
            found=", ".join(others),
            wanted=" or ".join(able),
            next_step=f"set output.layouts to [{able[0]}], or use a method that narrows experts",
        )


def _removed(budget: Budget) -> str:
    return "layers" if kind_of(budget).layers_leave else "experts"
