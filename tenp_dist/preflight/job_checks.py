"""What is refused before anything runs, from headers and the job alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tenp_dist.artifacts import read_json
from tenp_dist.budget.kinds.table import form_of, kind_of
from tenp_dist.budget.sizes import MoeLayer, Shape, moe_layers
from tenp_dist.calibration.rows import check_sources
from tenp_dist.checkpoint.expert_parallel import too_many_ranks
from tenp_dist.checkpoint.layer_names import experts_by_name
from tenp_dist.checkpoint.output_form import output_form, packed_step
from tenp_dist.checkpoint.source import Source
from tenp_dist.config import AUTO, JOINT, Budget, Job
from tenp_dist.errors import BudgetError, JobError
from tenp_dist.evaluation.plans import check_apart, given_plans
from tenp_dist.evaluation.selection import candidates
from tenp_dist.layouts.engine_widths import check_engine_widths
from tenp_dist.layouts.table import (
    check_expected_of,
    check_layouts,
    check_width,
    layouts_of,
    main_layout,
    written_source,
)
from tenp_dist.passes.placement import cut_layers
from tenp_dist.passes.ranks import check_parallel
from tenp_dist.preflight.node_checks import check_not_uploaded
from tenp_dist.preflight.search_checks import check_search
from tenp_dist.preflight.training_checks import check_training
from tenp_dist.run_files import RunFiles


def check_job(job: Job, source: Source) -> None:
    """Refuse what headers and the job alone show to be wrong.

    Raises:
        SourceError, UnsupportedModelError, BudgetError, JobError, CalibrationError, ClusterError.
    """
    check_not_uploaded(job.run_dir)
    _check_tensors(RunFiles(job.run_dir), source)
    layers = moe_layers(source)
    cut_layers(job.cluster, [1] * source.facts.num_layers)
    if job.budget.method == AUTO:
        _check_groups(job, source, [None])
        tried_budgets(job, source)
    else:
        _check_plan(job, source, layers)
    output_form(source, job.output.dtype)
    _check_benchmark(job)
    _check_publish(job)
    check_parallel(source.family, source.index.config, job.cluster.tensor_parallel)
    for text in filter(None, (job.calibration, job.evaluation)):
        check_sources(text)
    if job.evaluation:
        check_apart(job.evaluation.plans, RunFiles(job.run_dir).evaluation_folder)
        given_plans(job.evaluation.plans, source.fingerprint)


def tried_budgets(job: Job, source: Source) -> dict[str, Budget]:
    """Name -> what an `auto` budget may become; of `method: auto` only methods that the job could ask for by name.

    Raises:
        JobError, BudgetError: there is none.
    """
    budgets = candidates(job.budget)
    if job.budget.method != AUTO:
        return budgets
    output = job.output.model_copy(update={"layouts": tuple(layout.name for layout in layouts_of(job))})
    layers, errors = moe_layers(source), {}
    for name, budget in budgets.items():
        try:
            _check_plan(job.model_copy(update={"budget": budget, "output": output}), source, layers)
        except (JobError, BudgetError) as error:
            errors[name] = error
    if len(errors) == len(budgets):
        raise next(iter(errors.values()))
    return {name: budget for name, budget in budgets.items() if not isinstance(errors.get(name), JobError)}


def _check_plan(job: Job, source: Source, layers: Sequence[MoeLayer]) -> None:
    shapes = _shapes(job.budget, layers)
    check_layouts(job, layers, shapes)
    check_width(job, source.family, layers, shapes)
    _check_groups(job, source, [form_of(job.budget, shape).widths for shape in shapes])
    check_engine_widths(job, source, layers, shapes)
    check_expected_of(job, source)
    _check_expert_ranks(job, source, shapes)
    _check_compensation(job)
    check_training(job)
    check_search(job, source, shapes)


def _check_tensors(files: RunFiles, source: Source) -> None:
    """Hold every tensor against the model, unless that was done when the run's facts of this source were written."""
    if not (files.facts.is_file() and read_json(files.facts).get("fingerprint") == source.fingerprint):
        from tenp_dist.model.tensor_names import check_tensors  # imports torch and transformers

        check_tensors(source.index)


def _check_expert_ranks(job: Job, source: Source, shapes: Sequence[Shape]) -> None:
    ranks, facts = job.output.expert_ranks, source.facts
    if ranks is None:
        return
    owners = experts_by_name(source.index.tensors, source.family, facts.num_layers)
    if not {layer for layer, _ in owners.values()}.issuperset(facts.moe_layers):
        raise JobError(
            "Experts that share a tensor cannot be divided among files",
            where="output.layout_by",
            found=f"a {facts.family} checkpoint with one tensor for all experts of a layer",
            wanted="a tensor for every matrix of every expert",
            next_step="leave output.layout_by out",
        )
    leave = kind_of(job.budget).experts_leave
    stay = min(min(shape.whole) for shape in shapes) if leave else facts.num_experts
    if ranks > stay:
        raise too_many_ranks(ranks, stay, f"method {job.budget.method}")


def _check_groups(job: Job, source: Source, stated: Sequence[Collection[int] | None]) -> None:
    """Refuse narrow experts that would leave a group of packed numbers unfilled: no engine reads these.

    stated: widths of a plan that the job may get, None where they may be any multiples of `width_step`.
    """
    written = written_source(job, source)
    form = output_form(written, job.output.dtype)
    step, align = packed_step(written, form), job.budget.width_step
    if step == 1 or not any(layout.saves_space for layout in layouts_of(job)):
        return
    known = {width for widths in stated for width in widths or ()} - {source.facts.intermediate_size}
    unfilled = sorted(width for width in known if width % step)
    if unfilled or (align % step and None in stated):
        raise JobError(
            f"Experts of such widths cannot be written in {form.name}",
            where="budget.align",
            found=f"{unfilled[0]} neurons" if unfilled else f"multiples of {align}",
            wanted=f"multiples of {step}, neurons that share a factor or a word in W_down",
            next_step=f"set budget.align to {step}, or output.dtype to bfloat16",
        )


def _check_compensation(job: Job) -> None:
    if job.output.compensate and kind_of(job.budget).layers_leave:
        raise JobError(
            f"Method {job.budget.method} removes layers and leaves others as they are: there is nothing to compensate",
            where="output.compensate",
            found=str(job.output.compensate).lower(),
            wanted="false",
            next_step="set output.compensate to false, or use a method that removes or narrows experts",
        )
    if job.output.compensate is True and not kind_of(job.budget).leaves_narrow:
        raise JobError(
            f"Method {job.budget.method} leaves no narrow expert to compensate",
            where="output.compensate",
            wanted=f"a method that narrows experts, or {JOINT}",
            next_step=f"set output.compensate to {JOINT}, or to false",
        )


def _check_benchmark(job: Job) -> None:
    asked, written = job.benchmark, [layout.name for layout in layouts_of(job)]
    if asked and asked.layout is None and main_layout(layouts_of(job)) is None:
        raise JobError(
            "No layout of the job loads in transformers, so none can be measured on tasks",
            where="benchmark.layout",
            found=", ".join(written),
            next_step="write such a layout as well, or name one that a server serves",
        )
    if asked and asked.layout and asked.layout not in written:
        raise JobError(
            "The benchmark measures a layout that is not written",
            where="benchmark.layout",
            found=asked.layout,
            wanted=" or ".join(written),
            next_step="correct it, or add the layout to output.layouts",
        )
    if asked and asked.tasks_folder and not asked.tasks_folder.is_dir():
        raise JobError(
            "The folder of tasks is not there",
            where="benchmark.tasks_folder",
            found=asked.tasks_folder,
            wanted="a folder with tasks as lm-eval describes them",
            next_step="correct the path; scripts/stdlib_tasks.py makes such a folder",
        )


def _check_publish(job: Job) -> None:
    asked, written = job.publish, [layout.name for layout in layouts_of(job)]
    known = asked is None or (asked.layout in written if asked.layout else main_layout(layouts_of(job)) is not None)
    if asked is not None and not known:
        raise JobError(
            "The layout to publish is not written",
            where="publish.layout",
            found=asked.layout or "none that loads in transformers",
            wanted=" or ".join(written) or "a layout that is written",
            next_step="correct it, or add the layout to output.layouts",
        )


def _shapes(budget: Budget, layers: Sequence[MoeLayer]) -> list[Shape]:
    """Sizes of the plan, or of all that an `auto` budget may become. Raises what planning would, if none can be met."""
    budgets, shapes, errors = list(candidates(budget).values()) if budget.auto else [budget], [], []
    for one in budgets:
        try:
            shapes.append(kind_of(one).shape(layers))
        except BudgetError as error:
            errors.append(error)
    if not shapes:
        raise errors[0]
    return shapes
