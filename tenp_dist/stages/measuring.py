"""The stages that measure: `select` on calibration text that was set aside, `evaluate` on held-out text.

Where the job compensates, both compensate what they measure first, on the text that scores were made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION, digest_of, write_json
from tenp_dist.budget.plan import control_budget
from tenp_dist.budget.plan_files import read_plan, read_plan_pair
from tenp_dist.calibration.corpus import Corpus, build_corpus, joined, read_corpus, seen_share, write_corpus
from tenp_dist.checkpoint.source import source_index
from tenp_dist.config import COMPENSATE, Job
from tenp_dist.evaluation.measure import EvaluateTask, VariantsPass, evaluate_model
from tenp_dist.evaluation.metrics import SOURCE
from tenp_dist.evaluation.plans import (
    NamedPlan,
    check_distinct,
    entry,
    given_plans,
    grid_budgets,
    in_forms,
    narrows,
    store_plans,
    with_controls,
)
from tenp_dist.evaluation.selection import candidates, selection_document
from tenp_dist.evaluation.variants import Variant
from tenp_dist.layouts.table import layouts_of
from tenp_dist.passes.run_pass import PassContext
from tenp_dist.pipeline.stage import Context, Output
from tenp_dist.progress import Progress
from tenp_dist.stages.compensation import variants_of
from tenp_dist.stages.run import (
    CORPUS,
    HELD_OUT,
    SELECTION,
    domain_weights,
    facts_of,
    pass_context,
    plan_maker,
    plan_writer,
    settled_budget,
    settled_compute,
    store_plan,
)

SEEN_LIMIT = 0.01


@dataclass(frozen=True)
class Measured:
    """A stage that measures: on what corpus, its folder for what is made on the way, tokens per microbatch."""

    stage: str
    corpus: Path
    folder: Path
    batch_tokens: int


def select_stage(context: Context) -> Output:
    """Choose the budget's `auto` keys on calibration text that was set aside."""
    job, folder = context.job, context.run_dir / "selection"
    context.replace()
    plans, infeasible = store_plans(candidates(job.budget), folder / "plans", plan_maker(context), plan_writer(context))
    plans = [plan.compensate(job.output.compensate) for plan in plans]
    measured = Measured("select", context.run_dir / SELECTION, folder, job.score.batch_tokens)
    figures = _measure(context, measured, plans)
    source = figures.pop(SOURCE)
    document = {
        "schema_version": SCHEMA_VERSION,
        "compensated": any(plan.compensated for plan in plans),
        **selection_document(job.budget, plans, figures, source, domain_weights(job)),
        "infeasible": infeasible,
    }
    path = context.run_dir / "selection.json"
    write_json(path, document)
    return Output([path], digest_of(document), {key: document[key] for key in ("chosen", "criterion", "infeasible")})


def evaluate_stage(context: Context) -> Output:
    """Compare the source, the written checkpoint and whatever plans the job names on held-out text."""
    job, run_dir = context.job, context.run_dir
    corpus = build_corpus(job.evaluation, job.model, facts_of(context)["vocab_size"])
    given = given_plans(job.evaluation.plans, source_index(job.model).fingerprint)
    context.replace()
    write_corpus(run_dir / HELD_OUT, corpus)
    plans, refused = _plans_beside(context, given)
    control = [_control(context)] if job.evaluation.checkpoint else []
    layouts = layouts_of(job)
    layout = "ragged" if "ragged" in layouts else layouts[0]
    written = (
        [VariantsPass(run_dir / "checkpoint" / layout, {"pruned": Variant()})] if job.evaluation.checkpoint else []
    )
    measured = Measured("evaluate", run_dir / HELD_OUT, run_dir / "evaluation", job.evaluation.batch_tokens)
    seen = seen_share(corpus, _calibrated_on(run_dir))
    figures = _measure(context, measured, [*control, *plans], written)
    document = {
        "schema_version": SCHEMA_VERSION,
        "sequence_length": job.evaluation.sequence_length,
        "variants": _variants(context, control, figures),
        "plans": [entry(plan, figures[plan.name]) for plan in plans],
        "pruned_from": f"checkpoint/{layout}" if job.evaluation.checkpoint else None,
        "seen_in_calibration": seen,
        "warnings": [*_seen_warnings(seen), *_refused_warnings(refused)],
    }
    path = run_dir / "evaluation.json"
    write_json(path, document)
    found = dict.fromkeys(file for plan in (*control, *plans) for file in (plan.text, plan.tensors))
    theirs = {file for plan in given for file in (plan.text, plan.tensors)}
    made = [file for file in found if file not in theirs]
    return Output([path, run_dir / HELD_OUT, *made], digest_of(document), document)


def _plans_beside(context: Context, given: Sequence[NamedPlan]) -> tuple[list[NamedPlan], list[str]]:
    """The plans that the job asks for besides the checkpoint, with their random controls; and those refused."""
    asked = context.job.evaluation
    if not asked.many:
        return [], []
    budgets, out_of_range = grid_budgets(settled_budget(context), asked.grid) if asked.grid else ({}, [])
    budgets |= {plan.name: plan.budget for plan in given}
    controls = {name: budget for name, budget in with_controls(budgets).items() if name not in budgets}
    for plan in given:
        del budgets[plan.name]
    folder = context.run_dir / "evaluation" / "plans"
    plans, refused = store_plans({**budgets, **controls}, folder, plan_maker(context), plan_writer(context))
    plans = [*(plan for plan in plans if plan.name in budgets), *given, *(p for p in plans if p.name in controls)]
    if COMPENSATE in asked.grid:
        plans = in_forms(plans, asked.grid[COMPENSATE])
    else:
        plans = [plan.compensate(context.job.output.compensate) for plan in plans]
    check_distinct(plans)
    return plans, [*out_of_range, *refused]


def _control(context: Context) -> NamedPlan:
    """The random control of the written checkpoint, called `random`."""
    plan = plan_maker(context)(control_budget(settled_budget(context)))
    tensors, text = store_plan(context, context.run_dir / "evaluation" / "random", plan)
    control = NamedPlan("random", text, tensors, read_plan_pair(text, tensors))
    return control.compensate(context.job.output.compensate)


def _variants(context: Context, control: Sequence[NamedPlan], figures: Mapping[str, Any]) -> dict[str, dict]:
    """The figures of the source and, if the checkpoint is measured, of it and its control; which are compensated."""
    compensated = {SOURCE: False}
    for random in control:
        own = context.job.output.compensate and narrows(read_plan(context.run_dir))
        compensated |= {"pruned": own, random.name: random.compensated}
    return {name: {"compensated": value, **figures[name]} for name, value in compensated.items()}


def _measure(
    context: Context, measured: Measured, plans: Sequence[NamedPlan], written: Sequence[VariantsPass] = ()
) -> dict[str, dict[str, Any]]:
    """variant -> its figures: the source, every plan of it, and what was written."""
    job, parts = context.job, 1 + any(plan.compensated for plan in plans)
    compute = settled_compute(context, measured.batch_tokens)
    site = pass_context(context, measured.stage, compute)
    variants = variants_of(context, _part(site, 0, parts), plans, measured.folder)
    passes = [VariantsPass(job.model, {SOURCE: Variant(), **variants}), *written]
    task = EvaluateTask(passes, measured.corpus, measured.folder, context.key, compute, waves=job.score.waves)
    return evaluate_model(_part(site, parts - 1, parts), task).summary()


def _part(site: PassContext, number: int, parts: int) -> PassContext:
    """The site, telling the progress of one of `parts` equal parts as that of the whole."""
    if parts == 1:
        return site

    def tell(step: Progress) -> None:
        site.progress(replace(step, done=number + step.done / step.total, total=parts))

    return replace(site, progress=tell)


def _calibrated_on(run_dir: Path) -> Corpus:
    """All text that had a say in the plan."""
    return joined(*(read_corpus(run_dir / name) for name in (CORPUS, SELECTION) if (run_dir / name).exists()))


def _seen_warnings(seen: dict[str, float]) -> list[str]:
    return [
        f"{share:.1%} of the evaluation text of domain {domain} was also calibrated on: its figures flatter"
        for domain, share in seen.items()
        if share > SEEN_LIMIT
    ]


def _refused_warnings(refused: Sequence[str]) -> list[str]:
    return [f"not measured, no plan meets it: {name}" for name in refused]


def evaluate_needs(job: Job) -> tuple[str, ...]:
    """Only a written checkpoint has to be planned and written; other plans are made from the scores."""
    needs = ["inspect", "calibrate"]
    if job.evaluation and job.evaluation.many:
        needs += ["score", *(["select"] if job.budget.auto and job.evaluation.grid else [])]
    if job.evaluation and job.evaluation.checkpoint:
        needs += ["plan", "write"]
    return tuple(needs)
