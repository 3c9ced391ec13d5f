"""Which checkpoint layouts a job writes, and which of them its plan has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.sizes import MoeLayer, Shape
from tenp_dist.budget.widths.layer_optimum import legal_widths
from tenp_dist.config import Budget, Job
from tenp_dist.errors import BudgetError, JobError

ENGINE_ALIGN = 8  # 16 bytes: torch's grouped matrix multiplication refuses other strides


def layouts_of(job: Job) -> tuple[str, ...]:
    """The job's layouts; where a method removes experts and the job names none, `uniform`."""
    if "layouts" not in job.output.model_fields_set and kind_of(job.budget).experts_leave:
        return ("uniform",)
    return job.output.layouts


def layout_warnings(job: Job, shape: Shape, mtp_layers: int) -> list[str]:
    """What the job's layouts leave out or ask of engines. mtp_layers: multi-token prediction layers of the source."""
    if "uniform" not in layouts_of(job):
        return []
    warnings = []
    if mtp_layers:
        warnings.append(
            f"The uniform checkpoint leaves out {mtp_layers} multi-token prediction layers of the source: they share "
            "the config's expert numbers and were not scored."
        )
    narrow = {width for width in shape.narrow if width is not None and width % ENGINE_ALIGN}
    if narrow and kind_of(job.budget).leaves_narrow:
        warnings.append(
            f"Stock engines multiply experts in groups whose width is a multiple of {ENGINE_ALIGN} in bfloat16: "
            f"{min(narrow)} neurons may not run. Set align to {ENGINE_ALIGN} or 16."
        )
    return warnings


def check_layouts(job: Job, shapes: Sequence[Shape]) -> None:
    """Refuse, before anything is computed, what a plan of one of these shapes does not have.

    Raises:
        JobError: `uniform` for experts of several widths; another layout, or compensation, where experts are removed.
    """
    kind, layouts = kind_of(job.budget), layouts_of(job)
    others = [layout for layout in layouts if layout != "uniform"]
    if kind.experts_leave and others:
        raise JobError(
            f"Method {job.budget.method} removes experts, which only the uniform layout can hold",
            where="output.layouts",
            found=", ".join(others),
            wanted="uniform",
            next_step="set output.layouts to [uniform], or use a method that narrows experts",
        )
    if not kind.leaves_narrow and job.output.compensate:
        raise JobError(
            f"Method {job.budget.method} leaves no narrow expert to compensate",
            where="output.compensate",
            wanted="a method that narrows experts",
            next_step="set output.compensate to false",
        )
    if "uniform" in layouts and any(kind.form(shape).widths is None for shape in shapes):
        raise JobError(
            f"Method {job.budget.method} gives experts widths of their own, a uniform checkpoint needs one",
            where="output.layouts",
            found="uniform",
            wanted="layout ragged or padded",
            next_step="use layout ragged, or method enp for one width",
        )
    widths = max((_widths(shape) for shape in shapes), key=len)
    if "uniform" in layouts and not kind.experts_leave and len(widths) > 1:
        raise JobError(
            "A uniform checkpoint needs one width for all experts",
            where="output.layouts",
            found=f"experts of {', '.join(map(str, sorted(widths)))} neurons",
            wanted="layout ragged or padded",
            next_step="use method enp (or important 0) for one width, a method that removes experts, or layout ragged",
        )


def check_buckets(budget: Budget, layers: Sequence[MoeLayer], bucket: Callable[[int], int], limit: int) -> None:
    """Refuse widths that a ragged checkpoint could not be loaded with.

    Args:
        bucket: width -> width of the bucket that it runs in. limit: buckets of a layer that the runtime has.

    Raises:
        BudgetError: a layer may get more.
    """
    for facts in layers:
        legal = legal_widths(facts.intermediate_size, budget.align, budget.minimum_width).tolist()
        buckets = min(len({bucket(width) for width in legal}), facts.experts, budget.max_widths)
        if buckets > limit:
            raise BudgetError(
                "A layer may get more distinct widths than the ragged runtime loads",
                where=f"budget.max_widths, layer {facts.layer}",
                found=f"up to {buckets}",
                wanted=f"at most {limit}",
                next_step=f"set budget.max_widths to {limit} or less, or raise budget.align",
            )


def _widths(shape: Shape) -> set[int | None]:
    return {
        width
        for layer, m, narrow in zip(shape.layers, shape.whole, shape.narrow, strict=True)
        for width, count in ((layer.intermediate_size, m), (narrow, layer.experts - m))
        if count
    }
