"""What the stages that measure share: plans and checkpoints through the model on one text, compensated first if asked.

`select` measures on calibration text that was set aside, `evaluate` on held-out text. Where the job compensates, both
compensate what they measure first, on the text that scores were made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import file_digest
from tenp_dist.compensation.compensate_pass import Target, compensate_model
from tenp_dist.config import Compensate
from tenp_dist.evaluation.measure import EvaluateTask, VariantsPass, evaluate_model
from tenp_dist.evaluation.metrics import SOURCE
from tenp_dist.evaluation.plans import NamedPlan
from tenp_dist.evaluation.variants import Variant
from tenp_dist.passes.run_pass import PassContext
from tenp_dist.pipeline.stage import StageContext
from tenp_dist.progress import Progress
from tenp_dist.run_files import COMPENSATION, HIDDEN
from tenp_dist.stages.compensate import task_of, tokens_again
from tenp_dist.stages.run import Run


@dataclass(frozen=True)
class Measured:
    """A stage that measures.

    stage: its name.
    corpus: tokens to measure on.
    folder: for what is made on the way.
    batch_tokens: tokens per microbatch.
    """

    stage: str
    corpus: Path
    folder: Path
    batch_tokens: int


def measure(
    run: Run,
    context: StageContext,
    measured: Measured,
    plans: Sequence[NamedPlan],
    written: Sequence[VariantsPass] = (),
) -> dict[str, dict[str, Any]]:
    """variant -> its figures: the source, every plan of it, and what was written."""
    job, parts = run.job, 1 + len(_forms(plans))
    compute = run.compute(context, measured.batch_tokens)
    where = run.pass_context(context, measured.stage, compute)
    variants = _variants_of(run, context, where, plans, measured.folder)
    passes = [VariantsPass(run.model, {SOURCE: Variant(), **variants}), *written]
    task = EvaluateTask(passes, measured.corpus, measured.folder, context.key, compute, waves=job.score.waves)
    return evaluate_model(part_of(where, parts - 1, parts), task).summary()


def _variants_of(
    run: Run, context: StageContext, where: PassContext, plans: Sequence[NamedPlan], folder: Path
) -> dict[str, Variant]:
    """The plans as variants of the source, by name; those to be measured compensated are solved first, a pass a form.

    folder: of the stage. Equal plans share a folder in its `compensation/`, which holds W_down of their narrow
    experts; the stage removes it when it has its figures.
    """
    home = {plan.name: plan.solved for plan in plans if plan.solved}
    forms = _forms(plans)
    for number, form in enumerate(forms):
        own = [plan for plan in plans if plan.compensated == form and not plan.solved]
        name = COMPENSATION if form is True else f"{COMPENSATION}.{form}"
        home |= {plan.name: folder / COMPENSATION / _folder_name(plan) for plan in own}
        targets = {home[plan.name]: Target(plan.tensors, home[plan.name]) for plan in own}
        hidden = f"{HIDDEN}/{name}"  # beside those of the evaluation, which come after it
        again = tokens_again(run, context)
        task = task_of(run, form, **again, folder=folder, hidden=hidden, targets=tuple(targets.values()))
        compensate_model(part_of(where, number, len(forms) + 1), task)
    return {plan.name: Variant(plan.tensors, home.get(plan.name), plan.training) for plan in plans}


def _forms(plans: Sequence[NamedPlan]) -> list[Compensate]:
    """How some plan is to be compensated."""
    return list(dict.fromkeys(plan.compensated for plan in plans if plan.compensated and not plan.solved))


def _folder_name(plan: NamedPlan) -> str:
    """Of its compensated W_down: equal for plans that are equal and compensated alike."""
    digest = file_digest(plan.tensors)[:16]
    return digest if plan.compensated is True else f"{digest}.{plan.compensated}"


def part_of(where: PassContext, number: int, parts: int) -> PassContext:
    """The same, telling the progress of one of `parts` equal parts as that of the whole."""
    if parts == 1:
        return where

    def tell(step: Progress) -> None:
        where.progress(replace(step, done=number + step.done / step.total, total=parts))

    return replace(where, progress=tell)
