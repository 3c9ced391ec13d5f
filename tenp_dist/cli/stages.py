"""The pipeline as data: every stage, what it reads, and the few lines that call the rooms below.

inspect -> calibrate -> score -> [select ->] plan -> [compensate ->] write -> verify -> evaluate -> report; every
arrow is a file.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION, digest_of, file_digest, read_json, write_json
from tenp_dist.budget.layouts import check_layouts, layout_warnings, layouts_of
from tenp_dist.budget.plan import Plan, control_budget, make_plan, planning_statistics
from tenp_dist.budget.plan_files import read_plan, write_plan
from tenp_dist.budget.shape import MoeLayer, Shape, plan_shape
from tenp_dist.calibration.corpus import (
    Corpus,
    build_corpus,
    build_split,
    check_sources,
    joined,
    read_corpus,
    seen_share,
    write_corpus,
)
from tenp_dist.checkpoint.facts import checkpoint_facts
from tenp_dist.checkpoint.families import family_of
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import layer_name, read_kept
from tenp_dist.checkpoint.uniform import uniform_config, uniform_size
from tenp_dist.cli.compensation import DOCUMENT, FOLDER, compensate, compensated_index, recheck
from tenp_dist.config import Budget, Job, Text
from tenp_dist.engine.checkpoints import verify_layout, write_layout
from tenp_dist.engine.compute import Compute
from tenp_dist.engine.controller import Ledger
from tenp_dist.engine.coordinator import Context, Output, Stage
from tenp_dist.engine.parallel import check_parallel
from tenp_dist.engine.places import check_not_uploaded
from tenp_dist.engine.scoring import layers_of_facts, score_model
from tenp_dist.engine.shard import ScoreTask
from tenp_dist.errors import BudgetError
from tenp_dist.evaluation.metrics import SOURCE
from tenp_dist.evaluation.plans import (
    NamedPlan,
    check_distinct,
    entry,
    given_plans,
    grid_budgets,
    store_plans,
    with_controls,
)
from tenp_dist.evaluation.selection import candidates, chosen_budget, selection_document
from tenp_dist.evaluation.streams import EvaluateTask, Pass, evaluate_model
from tenp_dist.evaluation.variants import Variant
from tenp_dist.report.page import write_report
from tenp_dist.runtime.ragged_config import modeling_module, ragged_config
from tenp_dist.runtime.transformers import modeling_source
from tenp_dist.scoring.statistics import MERGE_RULES, LayerStatistics, read_statistics

CORPUS = "calibration/calibration.arrow"
SELECTION = "calibration/selection.arrow"
HELD_OUT = "evaluation/evaluation.arrow"
SEEN_LIMIT = 0.01
_REMOTE = frozenset({"score", "select", "compensate", "write", "verify", "evaluate"})


@functools.cache
def _index(model: Path):
    return open_index(model)


def _inspect(context: Context) -> Output:
    facts = checkpoint_facts(_index(context.job.model))
    path = context.run_dir / "facts.json"
    context.replace()
    write_json(path, facts)
    keys = ("model", "family", "num_layers", "num_experts", "intermediate_size", "top_k")
    summary = {key: facts[key] for key in keys} | {
        "moe_layers": len(facts["moe_layers"]),
        "bytes": facts["bytes"]["total"],
    }
    return Output([path], digest_of(facts), summary)


def _calibrate(context: Context) -> Output:
    job, path = context.job, context.run_dir / CORPUS
    corpus, aside = build_split(job.calibration, job.model, _facts(context)["vocab_size"], job.selection_share)
    context.replace()
    write_corpus(path, corpus)
    summary = {"tokens": corpus.tokens_by_domain(), "sequences": len(corpus.tokens_NS)}
    if aside is None:
        return Output([path], corpus.digest, summary)
    write_corpus(context.run_dir / SELECTION, aside)
    summary["set_aside"] = aside.tokens_by_domain()
    return Output([path, context.run_dir / SELECTION], digest_of([corpus.digest, aside.digest]), summary)


def _score(context: Context) -> Output:
    job, scores = context.job, context.run_dir / "scores"
    context.replace()
    compute = _compute(context, job.score.batch_tokens)
    task = ScoreTask(job.model, context.run_dir / CORPUS, scores, context.key, compute, waves=job.score.waves)
    layers = layers_of_facts(_facts(context), compute.torch_dtype.itemsize)
    done = score_model(context.pool, task, layers, job.cluster, task.count_waves(), context.progress)
    files = _score_files(context)
    digest = digest_of({path.name: file_digest(path) for path in files})
    rate = round(done.tokens / done.seconds) if done.seconds else None
    summary = {"layers": len(files), "tokens": done.tokens, "tokens_per_second": rate, "mode": done.mode}
    return Output(files, digest, summary | {"shards": done.shards, "resumed": round(done.resumed_share, 3)})


def _select(context: Context) -> Output:
    """Choose the budget's `auto` keys on calibration text that was set aside."""
    job, folder = context.job, context.run_dir / "selection"
    context.replace()
    plans, infeasible = store_plans(candidates(job.budget), folder / "plans", _maker(context), _writer(context))
    corpus, passes = context.run_dir / SELECTION, (_masks(job, plans),)
    figures = _measure(context, "select", passes, corpus, folder, job.score.batch_tokens)
    source = figures.pop(SOURCE)
    document = {
        "schema_version": SCHEMA_VERSION,
        **selection_document(job.budget, plans, figures, source, _domain_weights(job)),
        "infeasible": infeasible,
    }
    path = context.run_dir / "selection.json"
    write_json(path, document)
    shutil.rmtree(folder)  # what was not chosen can be made again from the scores
    return Output([path], digest_of(document), {key: document[key] for key in ("chosen", "criterion", "infeasible")})


def _budget(context: Context) -> Budget:
    """The job's budget, its `auto` keys as chosen."""
    budget = context.job.budget
    return chosen_budget(budget, read_json(context.run_dir / "selection.json")) if budget.auto else budget


def _maker(context: Context) -> Callable[[Budget], Plan]:
    """Makes plans from the stored scores."""
    layers, weights = _moe_layers(context), _domain_weights(context.job)
    return lambda budget: make_plan(budget, layers, _statistics(context, budget), domain_weights=weights)


def _writer(context: Context) -> Callable[[Path, Plan], list[Path]]:
    return lambda folder, plan: _write_plan(context, folder, plan)


def _plan(context: Context) -> Output:
    plan = _maker(context)(_budget(context))
    missing = layout_warnings(context.job, plan.shape, len(_facts(context)["mtp_layers"]))
    plan = replace(plan, warnings=(*missing, *plan.warnings))
    context.replace()
    files = _write_plan(context, context.run_dir, plan)
    document = read_plan(context.run_dir)
    keys = ("retention", "experts", "narrow_width", "leftover_neurons", "warnings")
    digest = digest_of({path.name: file_digest(path) for path in files})
    return Output(files, digest, {key: document[key] for key in keys})


def _compensate(context: Context) -> Output:
    read_plan(context.run_dir)  # its two files belong together
    return compensate(context, *_calibration_pass(context))


def _calibration_pass(context: Context) -> tuple[dict, Path, Compute, dict[str, Fraction]]:
    """Facts, corpus, compute and domain weights: what a pass of the calibration tokens needs."""
    compute = _compute(context, context.job.score.batch_tokens)
    return _facts(context), context.run_dir / CORPUS, compute, _domain_weights(context.job)


def _write(context: Context) -> Output:
    job, facts = context.job, _facts(context)
    read_plan(context.run_dir)  # its two files belong together
    files, summary = [], {}
    for layout in layouts_of(job):
        written = write_layout(
            context.pool,
            index=_index(job.model),
            kept=read_kept(context.run_dir / "plan.safetensors"),
            folder=context.run_dir / "checkpoint" / layout,
            layout=layout,
            **_layout_files(context, layout),
            shard_size=job.output.shard_size,
            writers=job.cluster.writers,
            key=digest_of([context.key, layout]),
            compensated=compensated_index(job),
            overwrite=context.overwrite,
            repair=context.repair,
            replace=context.replace,
            progress=context.progress,
        )
        files += written.files
        summary[layout] = {
            "folder": f"checkpoint/{layout}",
            "bytes": written.nbytes,
            "bytes_before": facts["bytes"]["total"],
            "shards": written.shards,
            "reused_shards": written.reused,
        }
    digest = digest_of([context.digests, {name: _index_digest(context, name) for name in summary}])
    return Output(files, digest, {"layouts": summary})


def _layout_files(context: Context, layout: str) -> dict[str, Any]:
    """config.json of a layout and the files of its own that it brings."""
    index = _index(context.job.model)
    if layout == "padded":
        return {"config": index.config, "extra_files": {}}
    kept = read_kept(context.run_dir / "plan.safetensors")
    if layout == "uniform":
        family = family_of(index.config)
        config = uniform_config(index.config, family, uniform_size(index.config, family, kept))
        return {"config": config, "extra_files": {}}
    widths = {layer: neurons.widths.tolist() for layer, neurons in kept.items()}
    retention, family = str(context.job.budget.retention), str(index.config["model_type"])
    config = ragged_config(
        dict(index.config), widths_by_layer=widths, retention=retention, fingerprint=index.fingerprint
    )
    return {"config": config, "extra_files": {f"{modeling_module(family)}.py": modeling_source(family)}}


def _verify(context: Context) -> Output:
    job = context.job
    layouts = {}
    for layout in layouts_of(job):
        verified = verify_layout(
            context.pool,
            source=_index(job.model),
            folder=context.run_dir / "checkpoint" / layout,
            plan=context.run_dir / "plan.safetensors",
            layout=layout,
            compensated=compensated_index(job),
            progress=context.progress,
        )
        layouts[layout] = {
            "ok": True,
            "tensors": verified.tensors,
            "bytes": verified.nbytes,
            "pruned_tensors": verified.pruned_tensors,
            "untouched_tensors": verified.untouched_tensors,
        }
    path = context.run_dir / "verify.json"
    document = {"schema_version": SCHEMA_VERSION, "layouts": layouts}
    if job.output.compensate:
        document["compensation"] = recheck(context, *_calibration_pass(context))
    context.replace()
    write_json(path, document)
    return Output([path], digest_of(document), {key: document[key] for key in document if key != "schema_version"})


def _evaluate(context: Context) -> Output:
    job, run_dir = context.job, context.run_dir
    corpus = build_corpus(job.evaluation, job.model, _facts(context)["vocab_size"])
    given = given_plans(job.evaluation.plans, _index(job.model).fingerprint)
    context.replace()
    write_corpus(run_dir / HELD_OUT, corpus)
    plans, refused = _plans_beside(context, given)
    control = [_control(context)] if job.evaluation.checkpoint else []
    passes = [_masks(job, [*control, *plans])]
    layouts = layouts_of(job)
    layout = "ragged" if "ragged" in layouts else layouts[0]
    if job.evaluation.checkpoint:
        passes.append(Pass(run_dir / "checkpoint" / layout, {"pruned": Variant()}))
    folder = run_dir / "evaluation"
    figures = _measure(context, "evaluate", passes, run_dir / HELD_OUT, folder, job.evaluation.batch_tokens)
    seen = seen_share(corpus, _calibrated_on(run_dir))
    document = {
        "schema_version": SCHEMA_VERSION,
        "sequence_length": job.evaluation.sequence_length,
        "variants": {name: figures[name] for name in (SOURCE, "pruned", "random") if name in figures},
        "plans": [entry(plan, figures[plan.name]) for plan in plans],
        "pruned_from": f"checkpoint/{layout}" if job.evaluation.checkpoint else None,
        "seen_in_calibration": seen,
        "warnings": [*_seen_warnings(seen), *_refused_warnings(refused)],
    }
    path = run_dir / "evaluation.json"
    write_json(path, document)
    made = [file for plan in (*control, *plans) if plan not in given for file in (plan.text, plan.tensors)]
    return Output([path, run_dir / HELD_OUT, *made], digest_of(document), document)


def _plans_beside(context: Context, given: Sequence[NamedPlan]) -> tuple[list[NamedPlan], list[str]]:
    """The plans that the job asks for besides the checkpoint, with their random controls; and those refused."""
    asked = context.job.evaluation
    if not asked.many:
        return [], []
    budgets, out_of_range = grid_budgets(_budget(context), asked.grid) if asked.grid else ({}, [])
    budgets |= {plan.name: plan.budget for plan in given}
    controls = {name: budget for name, budget in with_controls(budgets).items() if name not in budgets}
    for plan in given:
        del budgets[plan.name]
    folder = context.run_dir / "evaluation" / "plans"
    plans, refused = store_plans({**budgets, **controls}, folder, _maker(context), _writer(context))
    plans = [*(plan for plan in plans if plan.name in budgets), *given, *(p for p in plans if p.name in controls)]
    check_distinct(plans)
    return plans, [*out_of_range, *refused]


def _control(context: Context) -> NamedPlan:
    """The random control of the written checkpoint, called `random`."""
    plan = _maker(context)(control_budget(_budget(context)))
    tensors, text = _write_plan(context, context.run_dir / "evaluation" / "random", plan)
    return NamedPlan("random", text, tensors, {})


def _masks(job: Job, plans: Sequence[NamedPlan]) -> Pass:
    """One pass over the source, as it is and under every plan."""
    return Pass(job.model, {SOURCE: Variant(), **{plan.name: Variant(plan.tensors) for plan in plans}})


def _measure(
    context: Context, stage: str, passes: Sequence[Pass], corpus: Path, folder: Path, batch_tokens: int
) -> dict[str, dict[str, Any]]:
    """variant -> its figures."""
    job, run_dir = context.job, context.run_dir
    compute = _compute(context, batch_tokens)
    task = EvaluateTask(passes, corpus, folder, context.key, compute, waves=job.score.waves)
    nbytes = layers_of_facts(_facts(context), compute.torch_dtype.itemsize).nbytes
    ledger = Ledger(run_dir / "stages" / f"{stage}.ledger.jsonl")
    return evaluate_model(context.pool, task, nbytes, job.cluster, context.progress, ledger).summary()


def _calibrated_on(run_dir: Path) -> Corpus:
    """All text that had a say in the plan."""
    return joined(*(read_corpus(run_dir / name) for name in (CORPUS, SELECTION) if (run_dir / name).exists()))


def _report(context: Context) -> Output:
    context.replace()
    files = write_report(context.run_dir, job=context.job.model_dump(mode="json"))
    written = [files.page, files.data]  # cards lie in the checkpoint folders, which the write stage owns
    return Output(written, digest_of([file_digest(path) for path in written]), {"page": "report/index.html"})


def preflight(job: Job) -> dict[str, Any]:
    """Everything that can be refused from headers and the job alone, before anything is computed; the facts.

    Raises:
        SourceError, UnsupportedModelError, BudgetError, JobError, CalibrationError.
    """
    check_not_uploaded(job.run_dir)
    facts = checkpoint_facts(_index(job.model))
    check_layouts(job, _shapes(job.budget, _layers_of(job, facts)))
    config = _index(job.model).config
    check_parallel(family_of(config), config, job.cluster.tensor_parallel)
    for text in filter(None, (job.calibration, job.evaluation)):
        check_sources(text)
    if job.evaluation:
        given_plans(job.evaluation.plans, _index(job.model).fingerprint)
    return facts


def _shapes(budget: Budget, layers: Sequence[MoeLayer]) -> list[Shape]:
    """Sizes of the plan, or of all that an `auto` budget may become. Raises what planning would, if none can be met."""
    budgets, shapes, errors = list(candidates(budget).values()) if budget.auto else [budget], [], []
    for one in budgets:
        try:
            shapes.append(plan_shape(one, layers))
        except BudgetError as error:
            errors.append(error)
    if not shapes:
        raise errors[0]
    return shapes


def stages_for(job: Job) -> list[Stage]:
    """The stages of a job in order; `select`, `compensate` and `evaluate` are there if the job asks for them."""
    select = ("select",) if job.budget.auto else ()
    evaluate = ("evaluate",) if job.evaluation else ()
    compensated = ("compensate",) if job.output.compensate else ()
    tokens = ("inspect", "calibrate") if compensated else ()  # verify solves again from them
    stages = [
        Stage("inspect", "Inspect the source", (), _inspect_fields, _inspect, ("facts.json",)),
        Stage("calibrate", "Tokenise calibration text", ("inspect",), _calibrate_fields, _calibrate, ("calibration",)),
        Stage("score", "Score experts and neurons", ("inspect", "calibrate"), _score_fields, _score, ("scores",)),
        Stage(
            "select",
            "Choose the budget",
            ("inspect", "calibrate", "score"),
            _select_fields,
            _select,
            ("selection", "selection.json"),
        ),
        Stage(
            "plan",
            "Plan the budget",
            ("inspect", "score", *select),
            _plan_fields,
            _plan,
            ("plan.json", "plan.safetensors"),
        ),
        Stage(
            "compensate",
            "Compensate kept neurons",
            ("inspect", "calibrate", "plan"),
            _compensate_fields,
            _compensate,
            (FOLDER, DOCUMENT),
        ),
        Stage(
            "write", "Write the checkpoint", ("inspect", "plan", *compensated), _write_fields, _write, ("checkpoint",)
        ),
        Stage(
            "verify",
            "Verify the checkpoint",
            (*tokens, "plan", *compensated, "write"),
            _no_fields,
            _verify,
            ("verify.json",),
        ),
        Stage(
            "evaluate",
            "Evaluate on held-out text",
            _evaluate_needs(job),
            _evaluate_fields,
            _evaluate,
            ("evaluation", "evaluation.json"),
        ),
        Stage(
            "report",
            "Write the report",
            ("score", *select, "plan", *compensated, "write", "verify", *evaluate),
            _no_fields,
            _report,
            ("report",),
        ),
    ]
    asked = {"select": job.budget.auto, "evaluate": job.evaluation, "compensate": job.output.compensate}
    return [replace(stage, remote=stage.name in _REMOTE) for stage in stages if asked.get(stage.name, True)]


def _evaluate_needs(job: Job) -> tuple[str, ...]:
    """Only a written checkpoint has to be planned and written; other plans are made from the scores."""
    needs = ["inspect", "calibrate"]
    if job.evaluation and job.evaluation.many:
        needs += ["score", *(["select"] if job.budget.auto and job.evaluation.grid else [])]
    if job.evaluation and job.evaluation.checkpoint:
        needs += ["plan", "write"]
    return tuple(needs)


def _no_fields(job: Job) -> dict:
    return {}


def _inspect_fields(job: Job) -> dict:
    return {"model": _index(job.model).fingerprint}


def _calibrate_fields(job: Job) -> dict:
    share = {"selection_share": str(job.selection_share)}
    return _text_fields(job, job.calibration) | share | {"tokenizer": _tokenizer_digest(job.model)}


def _score_fields(job: Job) -> dict:
    cluster = {"device": job.cluster.device, "tensor_parallel": job.cluster.tensor_parallel}
    return job.score.model_dump(mode="json") | cluster | {"statistics": sorted(MERGE_RULES)}


def _select_fields(job: Job) -> dict:
    tried = [budget.model_dump(mode="json") for budget in candidates(job.budget).values()]
    return _plan_fields(job) | _score_fields(job) | {"candidates": digest_of(tried)}


def _plan_fields(job: Job) -> dict:
    weights = {domain: str(weight) for domain, weight in _domain_weights(job).items()}
    # layouts: a plan warns of what its checkpoint leaves out
    return job.budget.model_dump(mode="json") | {"weights": weights, "uniform": "uniform" in layouts_of(job)}


def _compensate_fields(job: Job) -> dict:
    weights = {domain: str(weight) for domain, weight in _domain_weights(job).items()}
    return _score_fields(job) | {"ridge": str(job.output.ridge), "weights": weights}


def _write_fields(job: Job) -> dict:
    return job.output.model_dump(mode="json", exclude={"ridge"}) | {"layouts": layouts_of(job)}


def _evaluate_fields(job: Job) -> dict:
    compute = {"dtype": job.score.dtype} | {key: getattr(job.cluster, key) for key in ("device", "tensor_parallel")}
    fields = _text_fields(job, job.evaluation) | compute | {"tokenizer": _tokenizer_digest(job.model)}
    given = given_plans(job.evaluation.plans, _index(job.model).fingerprint)
    fields["plans"] = {plan.name: [file_digest(plan.text), file_digest(plan.tensors)] for plan in given}
    return fields | (_plan_fields(job) if job.evaluation.many else {})


def _text_fields(job: Job, text: Text) -> dict:
    """The text's settings; files enter by content, so that moving them changes nothing."""
    fields = text.model_dump(mode="json")
    for source, values in zip(text.sources, fields["sources"], strict=True):
        values.pop("weight")
        if source.path is not None:
            values["path"] = file_digest(source.path) if source.path.is_file() else str(source.path)
    return fields


def _tokenizer_digest(model: Path) -> str:
    names = sorted(path for path in model.glob("*token*") if path.is_file())
    names += sorted(
        path for pattern in ("vocab*", "merges*", "*.model", "chat_template*") for path in model.glob(pattern)
    )
    return digest_of({path.name: file_digest(path) for path in names})


def _facts(context: Context) -> dict:
    return read_json(context.run_dir / "facts.json")


def _moe_layers(context: Context) -> list[MoeLayer]:
    return _layers_of(context.job, _facts(context))


def _layers_of(job: Job, facts: dict) -> list[MoeLayer]:
    config = _index(job.model).config
    family = family_of(config)
    sizes = (facts["num_experts"], facts["intermediate_size"], family.groups(config), family.least_experts(config))
    return [MoeLayer(layer, *sizes) for layer in facts["moe_layers"]]


def _score_files(context: Context) -> list[Path]:
    return [context.run_dir / "scores" / f"{layer_name(layer)}.safetensors" for layer in _facts(context)["moe_layers"]]


def _statistics(context: Context, budget: Budget):
    """layer -> its statistics, only those that the budget's method reads."""
    names = planning_statistics(budget)

    def read(layer: int) -> LayerStatistics:
        return read_statistics(context.run_dir / "scores" / f"{layer_name(layer)}.safetensors", names)

    return read


def _write_plan(context: Context, folder: Path, plan) -> list[Path]:
    return write_plan(
        folder,
        plan,
        source_fingerprint=_index(context.job.model).fingerprint,
        scores_digest=context.digests.get("score", context.digests.get("plan", "")),
    )


def _domain_weights(job: Job) -> dict[str, Fraction]:
    """Domain -> weight: the weight of its first source."""
    weights: dict[str, Decimal] = {}
    for source in job.calibration.sources:
        weights.setdefault(source.domain, source.weight)
    return {domain: Fraction(weight) for domain, weight in weights.items()}


def _index_digest(context: Context, layout: str) -> str:
    return open_index(context.run_dir / "checkpoint" / layout).fingerprint


def _compute(context: Context, batch_tokens: int) -> Compute:
    """How workers compute, settled: all of a run agree."""
    device = context.job.cluster.device
    on_gpu = device == "cuda" or (device == "auto" and context.pool.gpus > 0)
    return Compute("cuda" if on_gpu else "cpu", context.job.score.dtype, batch_tokens, context.pool.threads).settled()


def _seen_warnings(seen: dict[str, float]) -> list[str]:
    return [
        f"{share:.1%} of the evaluation text of domain {domain} was also calibrated on: its figures flatter"
        for domain, share in seen.items()
        if share > SEEN_LIMIT
    ]


def _refused_warnings(refused: Sequence[str]) -> list[str]:
    return [f"not measured, no plan meets it: {name}" for name in refused]
