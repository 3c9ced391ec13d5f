"""layers: in which order decoder layers leave, by the loss without them, for methods that ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tenp_dist.artifacts import digest_of, file_digest
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.plan import planning_statistics
from tenp_dist.config import AUTO, Budget
from tenp_dist.depth.files import read_steps, write_steps
from tenp_dist.depth.measured import LayersLeftOut
from tenp_dist.depth.order import Step, greedy_steps
from tenp_dist.errors import JobError
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.run_files import HIDDEN, PLANS
from tenp_dist.scoring.statistics import LAYER_CHOICES
from tenp_dist.stages.base import RunStage, bits_fields, reads, weight_fields
from tenp_dist.stages.eliminate import budgets_of
from tenp_dist.stages.measured_plans import part_of
from tenp_dist.stages.run import Run


def layers_fields(run: Run) -> dict[str, Any]:
    score = run.job.score.model_dump(mode="json") | bits_fields(run)
    return score | {"weights": weight_fields(run), "candidates": _candidates(run), "steps": _steps(run)}


def choose_layers(run: Run, context: StageContext) -> Output:
    """Steps are stored as they are found: an interrupted run goes on from the last."""
    job, folder, facts = run.job, run.files.layers_folder, run.source.facts
    context.replace()
    compute = run.compute(context, job.score.batch_tokens)
    where, count = run.pass_context(context, "layers", compute), _steps(run)
    measured = LayersLeftOut(
        model=job.model,
        corpus=run.files.calibration,
        folder=folder,
        key=context.key,
        compute=compute,
        waves=job.score.waves,
        sizes=(facts.num_experts, facts.intermediate_size),
        weights=run.domain_weights,
    )
    done = read_steps(folder, context.key)
    begun = [len(done)]

    def losses(sets: Sequence[tuple[int, ...]]) -> list[float]:
        return measured.losses(part_of(where, begun[0], count), sets)

    def store(steps: Sequence[Step]) -> None:
        begun[0] = len(steps)
        write_steps(folder, context.key, steps)

    steps = greedy_steps(_candidates(run), count, losses, done, store)
    path = write_steps(folder, context.key, steps)
    summary = {"removed": [step.removed for step in steps], "losses": [step.loss for step in steps]}
    return Output([path], digest_of(file_digest(path)), summary)


def _asking(run: Run) -> list[Budget]:
    """Budgets of the job whose plans read what this stage leaves."""
    budgets = [budget for budget in budgets_of(run) if budget.method != AUTO]
    return [budget for budget in budgets if set(LAYER_CHOICES) & set(planning_statistics(budget))]


def _candidates(run: Run) -> list[int]:
    """Layers that may leave under some budget, ascending."""
    kinds = [kind_of(budget) for budget in _asking(run)]
    return sorted({layer for kind in kinds for layer in kind.may_leave(run.layers)})


def _steps(run: Run) -> int:
    """Layers that leave under the budget that removes most; the order of single losses needs the first step alone."""
    counts = [1]
    for budget in _asking(run):
        if "greedy_step" in planning_statistics(budget):
            shape = kind_of(budget).shape(run.layers)
            counts.append(sum(not whole for whole in shape.whole))
    return max(counts)


def _not_asked(run: Run) -> JobError | None:
    if _asking(run):
        return None
    return JobError(
        "No method of the job asks in which order layers leave",
        where=run.job.run_dir,
        next_step="set budget.method to greedy or leave-one-out, or plan from the scores alone",
    )


def _gist(summary: Mapping[str, Any]) -> str:
    return "layers " + ", ".join(map(str, summary["removed"]))


STAGE = RunStage(
    title="Measure which layers leave",
    run=choose_layers,
    needs=reads("inspect", "calibrate"),
    fields=layers_fields,
    not_asked=_not_asked,
    owns=("layers",),
    remote=True,
    scratch=(f"layers/{HIDDEN}", f"layers/{PLANS}"),
    gist=_gist,
)
