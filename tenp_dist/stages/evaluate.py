"""evaluate: the source, the written checkpoint and whatever plans the job names, on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION, digest_of, file_digest, write_json
from tenp_dist.budget.plan_files import read_plan, read_plan_pair
from tenp_dist.calibration.corpus import Corpus, build_corpus, joined, read_corpus, seen_share, write_corpus
from tenp_dist.config import AUTO, COMPENSATE, Compensate, Evaluation
from tenp_dist.errors import JobError
from tenp_dist.evaluation.measure import VariantsPass
from tenp_dist.evaluation.metrics import SOURCE
from tenp_dist.evaluation.plans import (
    NamedPlan,
    check_distinct,
    entry,
    given_plans,
    grid_budgets,
    in_forms,
    solvable,
    store_plans,
    with_controls,
)
from tenp_dist.evaluation.variants import Variant
from tenp_dist.job_file import no_evaluation
from tenp_dist.layouts.table import main_layout
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.run_files import COMPENSATION, HIDDEN, PLANS, RunFiles
from tenp_dist.stages.base import RunStage, bits_fields, text_fields, tokenizer_digest
from tenp_dist.stages.compensate import compensate_fields
from tenp_dist.stages.eliminate import budgets_of, needed_by
from tenp_dist.stages.measured_plans import Measured, measure
from tenp_dist.stages.plan import plan_fields
from tenp_dist.stages.run import Run

SEEN_LIMIT = 0.01


def evaluate_fields(run: Run) -> dict[str, Any]:
    asked = _asked(run)
    compute = {"dtype": run.job.score.dtype} | bits_fields(run)
    fields = text_fields(asked) | compute | {"tokenizer": tokenizer_digest(run)}
    given = given_plans(asked.plans, run.source.fingerprint)
    fields["plans"] = {plan.name: [file_digest(plan.text), file_digest(plan.tensors)] for plan in given}
    return fields | (plan_fields(run) if asked.many else {}) | _solved_fields(run)


def _solved_fields(run: Run) -> dict[str, Any]:
    """What changes the figures of an evaluation in which something is compensated."""
    own, asked = run.job.output.compensate, _asked(run)
    forms = asked.grid.get(COMPENSATE, (own,)) if asked.many else ()
    if not (any(forms) or (own and asked.checkpoint)):
        return {}
    return {"compensation": compensate_fields(run) | {"compensate": own}}


def evaluate(run: Run, context: StageContext) -> Output:
    asked, files = _asked(run), run.files
    corpus = build_corpus(asked, run.model, run.source.facts.vocab_size)
    given = given_plans(asked.plans, run.source.fingerprint)
    context.replace()
    write_corpus(files.held_out, corpus)
    plans, refused = _plans_beside(run, context, given)
    plans = [*_around_training(run), *plans]
    control = [_control(run, context)] if asked.checkpoint else []
    layout = main_layout(run.layouts) if asked.checkpoint else None
    written = [VariantsPass(files.checkpoint(layout.name), {"pruned": Variant()})] if layout else []
    measured = Measured("evaluate", files.held_out, files.evaluation_folder, asked.batch_tokens)
    seen = seen_share(corpus, _calibrated_on(files))
    figures = measure(run, context, measured, [*control, *plans], written)
    document = {
        "schema_version": SCHEMA_VERSION,
        "sequence_length": asked.sequence_length,
        "variants": _variants(run, control, figures),
        "plans": [entry(plan, figures[plan.name]) for plan in plans],
        "pruned_from": files.relative(files.checkpoint(layout.name)) if layout else None,
        "seen_in_calibration": seen,
        "warnings": [*_seen_warnings(seen), *_refused_warnings(refused)],
    }
    write_json(files.evaluation, document)
    found = dict.fromkeys(file for plan in (*control, *plans) for file in (plan.text, plan.tensors))
    theirs = {file for plan in (*given, *_around_training(run)) for file in (plan.text, plan.tensors)}
    made = [file for file in found if file not in theirs]
    return Output([files.evaluation, files.held_out, *made], digest_of(document), document)


def _asked(run: Run) -> Evaluation:
    if run.job.evaluation is None:
        raise no_evaluation(run.job.run_dir)
    return run.job.evaluation


def _plans_beside(run: Run, context: StageContext, given: Sequence[NamedPlan]) -> tuple[list[NamedPlan], list[str]]:
    """The plans that the job asks for besides the checkpoint, with their random controls; and those refused."""
    asked = _asked(run)
    if not asked.many:
        return [], []
    budgets, out_of_range = grid_budgets(run.budget, asked.grid) if asked.grid else ({}, [])
    budgets |= {plan.name: plan.budget for plan in given}
    controls = {name: budget for name, budget in with_controls(budgets).items() if name not in budgets}
    for plan in given:
        del budgets[plan.name]
    write = partial(run.store_plan, digests=context.digests)
    folder = run.files.evaluation_folder / PLANS
    plans, refused = store_plans({**budgets, **controls}, folder, run.make_plan, write)
    plans = [*(plan for plan in plans if plan.name in budgets), *given, *(p for p in plans if p.name in controls)]
    if COMPENSATE in asked.grid:
        plans = in_forms(plans, asked.grid[COMPENSATE])
    else:
        plans = [plan.compensate(run.compensate) for plan in plans]
    check_distinct(plans)
    return plans, [*out_of_range, *refused]


def _around_training(run: Run) -> list[NamedPlan]:
    """The job's plan without what was trained; and with it where no checkpoint is measured that has it."""
    if not run.job.train:
        return []
    files = run.files
    plan = NamedPlan("untrained", files.plan, files.plan_tensors, read_plan(files.run_dir)).compensate(run.compensate)
    plan = replace(plan, solved=files.compensation_folder) if plan.compensated else plan
    trained = replace(plan, name="trained", training=files.training_folder)
    return [plan] if _asked(run).checkpoint else [plan, trained]


def _control(run: Run, context: StageContext) -> NamedPlan:
    """The random control of the written checkpoint, called `random`."""
    plan = run.make_plan(run.kind.control())
    tensors, text = run.store_plan(run.files.random_control, plan, context.digests)
    control = NamedPlan("random", text, tensors, read_plan_pair(text, tensors))
    return control.compensate(run.compensate)


def _variants(run: Run, control: Sequence[NamedPlan], figures: Mapping[str, Any]) -> dict[str, dict]:
    """The figures of the source and, if the checkpoint is measured, of it and its control; which are compensated."""
    compensated: dict[str, Compensate] = {SOURCE: False}
    for random in control:
        form = run.compensate
        own = form if solvable(read_plan(run.files.run_dir), form) else False
        compensated |= {"pruned": own, random.name: random.compensated}
    return {name: {"compensated": value, **figures[name]} for name, value in compensated.items()}


def _calibrated_on(files: RunFiles) -> Corpus:
    """All text that had a say in the plan."""
    return joined(*(read_corpus(path) for path in (files.calibration, files.selection_text) if path.exists()))


def _seen_warnings(seen: Mapping[str, float]) -> list[str]:
    return [
        f"{share:.1%} of the evaluation text of domain {domain} was also calibrated on: its figures flatter"
        for domain, share in seen.items()
        if share > SEEN_LIMIT
    ]


def _refused_warnings(refused: Sequence[str]) -> list[str]:
    return [f"not measured, no plan meets it: {name}" for name in refused]


def _needs(run: Run) -> Sequence[str]:
    """Only a written checkpoint has to be planned and written; other plans are made from the scores."""
    asked, needs = _asked(run), ["inspect", "fetch", "calibrate"]
    if asked.many:
        chosen = ["select"] if asked.grid or run.job.output.compensate == AUTO else []
        needs += ["score", *needed_by(*budgets_of(run)), *chosen, *(["search"] if asked.grid else [])]
    if asked.checkpoint:
        needs += ["plan", "write"]
    return needs + (["plan", "compensate", "train"] if run.job.train and not asked.checkpoint else [])


def _not_asked(run: Run) -> JobError | None:
    return None if run.job.evaluation else no_evaluation(run.job.run_dir)


STAGE = RunStage(
    title="Evaluate on held-out text",
    run=evaluate,
    needs=_needs,
    fields=evaluate_fields,
    not_asked=_not_asked,
    owns=("evaluation", "evaluation.json"),
    remote=True,
    scratch=(f"evaluation/{HIDDEN}", f"evaluation/{COMPENSATION}"),
)
