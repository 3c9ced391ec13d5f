"""layers: in which order decoder layers leave, by the loss without them or by weights that they learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import digest_of, file_digest
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.plan import planning_statistics
from tenp_dist.config import AUTO, Budget
from tenp_dist.depth.files import read_learning, read_steps, write_learning, write_steps
from tenp_dist.depth.learn import Learning, Settings, learn
from tenp_dist.depth.learnt import WeightSteps
from tenp_dist.depth.measured import LayersLeftOut
from tenp_dist.depth.order import Step, greedy_steps
from tenp_dist.errors import JobError
from tenp_dist.passes.compute import Compute
from tenp_dist.passes.run_pass import PassContext
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.run_files import HIDDEN, PLANS
from tenp_dist.scoring.statistics import LAYER_CHOICES
from tenp_dist.stages.base import RunStage, bits_fields, reads, weight_fields
from tenp_dist.stages.eliminate import budgets_of
from tenp_dist.stages.measured_plans import part_of
from tenp_dist.stages.run import Run

_GREEDY, _LEARNT = ("greedy_step", "alone_loss"), ("trsp_step", "trsp_weight")
"""What each of the two finds: an order, and what its first round says of every layer."""


def layers_fields(run: Run) -> dict[str, Any]:
    score = run.job.score.model_dump(mode="json") | bits_fields(run)
    found = {"greedy": _count(run, *_GREEDY), "trsp": _count(run, *_LEARNT)}
    learning = {"learning": run.job.trsp.model_dump(mode="json")} if found["trsp"] else {}
    return score | found | learning | {"weights": weight_fields(run), "candidates": _candidates(run)}


def choose_layers(run: Run, context: StageContext) -> Output:
    """Steps are stored as they are found: an interrupted run goes on from the last."""
    context.replace()
    compute = run.compute(context, run.job.score.batch_tokens)
    where = run.pass_context(context, "layers", compute)
    counts = {_greedy: _count(run, *_GREEDY), _learnt: _count(run, *_LEARNT)}
    parts = {find: count for find, count in counts.items() if count}
    files: list[Path] = []
    summary: dict[str, Any] = {}
    for number, (find, count) in enumerate(parts.items()):
        path, said = find(run, context, part_of(where, number, len(parts)), compute, count)
        files, summary = [*files, path], summary | said
    return Output(files, digest_of({path.name: file_digest(path) for path in files}), summary)


def _greedy(
    run: Run, context: StageContext, where: PassContext, compute: Compute, count: int
) -> tuple[Path, dict[str, Any]]:
    """By the loss without them: a step is one pass for all layers that may leave."""
    folder, facts = run.files.layers_folder, run.source.facts
    measured = LayersLeftOut(
        model=run.model,
        corpus=run.files.calibration,
        folder=folder,
        key=context.key,
        compute=compute,
        waves=run.job.score.waves,
        sizes=(facts.num_experts, facts.intermediate_size),
        weights=run.domain_weights,
    )
    done = read_steps(folder, context.key)

    def losses(sets: Sequence[tuple[int, ...]]) -> list[float]:
        return measured.losses(part_of(where, len(sets[0]) - 1, count), sets)

    def store(steps: Sequence[Step]) -> None:
        write_steps(folder, context.key, steps)

    steps = greedy_steps(_candidates(run), count, losses, done, store)
    said = {"removed": [step.removed for step in steps], "losses": [step.loss for step in steps]}
    return write_steps(folder, context.key, steps), {"greedy": said}


def _learnt(
    run: Run, context: StageContext, where: PassContext, compute: Compute, count: int
) -> tuple[Path, dict[str, Any]]:
    """By weights that they learn: a step is a pass up and back."""
    folder, asked = run.files.layers_folder, run.job.trsp
    engine = WeightSteps(
        model=run.model,
        corpus=run.files.calibration,
        folder=folder,
        key=context.key,
        compute=compute,
        layers=run.source.facts.num_layers,
        ranks=run.cluster.tensor_parallel,
        sequences=asked.sequences,
        seed=asked.seed,
        weights=run.domain_weights,
    )

    def gradients(
        weights: Mapping[int, float], gone: tuple[int, ...], number: int
    ) -> tuple[float, Mapping[int, float]]:
        return engine.gradients(part_of(where, number, count * asked.steps), weights, gone, number)

    def store(state: Learning) -> None:
        write_learning(folder, context.key, state)

    settings = Settings(asked.penalty, asked.rate, asked.steps)
    state = learn(_candidates(run), count, settings, gradients, read_learning(folder, context.key), store)
    weights = [{str(layer): round(weight, 4) for layer, weight in one.weights.items()} for one in state.rounds]
    return write_learning(folder, context.key, state), {"trsp": {"removed": list(state.gone), "weights": weights}}


def _asking(run: Run) -> list[Budget]:
    """Budgets of the job whose plans read what this stage leaves."""
    budgets = [budget for budget in budgets_of(run) if budget.method != AUTO]
    return [budget for budget in budgets if set(LAYER_CHOICES) & set(planning_statistics(budget))]


def _candidates(run: Run) -> list[int]:
    """Layers that may leave under some budget, ascending."""
    kinds = [kind_of(budget) for budget in _asking(run)]
    return sorted({layer for kind in kinds for layer in kind.may_leave(run.layers)})


def _count(run: Run, order: str, first: str) -> int:
    """Layers to find of an order: as many as leave under the budget that removes most; 0 where no budget asks.

    order, first: statistics of the whole order, and of its first round alone.
    """
    counts = [0]
    for budget in _asking(run):
        names = planning_statistics(budget)
        leaving = sum(not whole for whole in kind_of(budget).shape(run.layers).whole)
        counts.append(max(leaving, 1) if order in names else int(first in names))
    return max(counts)


def _not_asked(run: Run) -> JobError | None:
    if _asking(run):
        return None
    return JobError(
        "No method of the job asks in which order layers leave",
        where=run.job.run_dir,
        next_step="set budget.method to greedy or trsp, or plan from the scores alone",
    )


def _gist(summary: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: layers {', '.join(map(str, said['removed']))}" for name, said in summary.items())


STAGE = RunStage(
    title="Find which layers leave",
    run=choose_layers,
    needs=reads("inspect", "fetch", "calibrate"),
    fields=layers_fields,
    not_asked=_not_asked,
    owns=("layers",),
    remote=True,
    scratch=(f"layers/{HIDDEN}", f"layers/{PLANS}", "layers/step"),
    gist=_gist,
)
