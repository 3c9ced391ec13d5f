"""The pipeline as data: every stage, what it reads, and the few lines that call the rooms below.

inspect -> calibrate -> score -> [select ->] plan -> [compensate ->] write -> verify -> evaluate -> report; every
arrow is a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION, digest_of, file_digest, write_json
from tenp_dist.budget.plan_files import read_plan
from tenp_dist.calibration.corpus import build_split, write_corpus
from tenp_dist.checkpoint.facts import checkpoint_facts
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import read_kept
from tenp_dist.checkpoint.source import source_index
from tenp_dist.config import Job
from tenp_dist.layouts.table import layout_warnings, layouts_of
from tenp_dist.layouts.uniform import uniform_config, uniform_size
from tenp_dist.pipeline.stage import Context, Output, Stage
from tenp_dist.report.page import write_report
from tenp_dist.report.text import size
from tenp_dist.run_files import layer_name
from tenp_dist.runtime.auto_classes import modeling_source
from tenp_dist.runtime.ragged_config import modeling_module, ragged_config
from tenp_dist.scoring.score_pass import ScoreTask, score_model
from tenp_dist.stages.compensation import DOCUMENT, FOLDER, compensate, compensated_index, recheck
from tenp_dist.stages.fields import (
    calibrate_fields,
    compensate_fields,
    evaluate_fields,
    inspect_fields,
    no_fields,
    plan_fields,
    score_fields,
    select_fields,
    write_fields,
)
from tenp_dist.stages.measuring import evaluate_needs, evaluate_stage, select_stage
from tenp_dist.stages.run import (
    CORPUS,
    SELECTION,
    facts_of,
    pass_context,
    plan_maker,
    settled_budget,
    settled_compute,
    store_plan,
)
from tenp_dist.stages.written import MARK, verify_layout, write_layout

_REMOTE = frozenset({"score", "select", "compensate", "write", "verify", "evaluate"})


def _inspect(context: Context) -> Output:
    facts = checkpoint_facts(source_index(context.job.model))
    path = context.run_dir / "facts.json"
    context.replace()
    write_json(path, facts)
    keys = ("model", "family", "num_layers", "num_experts", "intermediate_size", "top_k")
    summary = {key: facts[key] for key in keys} | {
        "moe_layers": len(facts["moe_layers"]),
        "bytes": facts["bytes"]["stored"],
        "warnings": _fp8_warnings(facts),
    }
    return Output([path], digest_of(facts), summary)


def _fp8_warnings(facts: Mapping[str, Any]) -> list[str]:
    stored, read = facts["bytes"]["stored"], facts["bytes"]["total"]
    if stored == read:
        return []
    return [
        f"the source is in FP8 ({size(stored)}): it is read as bfloat16 ({size(read)}), "
        "and that is what checkpoints are written in"
    ]


def _calibrate(context: Context) -> Output:
    job, path = context.job, context.run_dir / CORPUS
    corpus, aside = build_split(job.calibration, job.model, facts_of(context)["vocab_size"], job.selection_share)
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
    compute = settled_compute(context, job.score.batch_tokens)
    task = ScoreTask(job.model, context.run_dir / CORPUS, scores, context.key, compute, waves=job.score.waves)
    done = score_model(pass_context(context, "score", compute), task, facts_of(context)["moe_layers"])
    files = _score_files(context)
    digest = digest_of({path.name: file_digest(path) for path in files})
    rate = round(done.tokens / done.seconds) if done.seconds else None
    summary = {"layers": len(files), "tokens": done.tokens, "tokens_per_second": rate, "mode": done.mode}
    return Output(files, digest, summary | {"shards": done.shards, "resumed": round(done.resumed_share, 3)})


def _plan(context: Context) -> Output:
    plan = plan_maker(context)(settled_budget(context))
    missing = layout_warnings(context.job, plan.shape, len(facts_of(context)["mtp_layers"]))
    plan = replace(plan, warnings=(*missing, *plan.warnings))
    context.replace()
    files = store_plan(context, context.run_dir, plan)
    document = read_plan(context.run_dir)
    keys = ("retention", "experts", "narrow_width", "leftover_neurons", "warnings")
    digest = digest_of({path.name: file_digest(path) for path in files})
    return Output(files, digest, {key: document[key] for key in keys})


def _compensate(context: Context) -> Output:
    read_plan(context.run_dir)  # its two files belong together
    return compensate(context)


def _write(context: Context) -> Output:
    job, facts = context.job, facts_of(context)
    read_plan(context.run_dir)  # its two files belong together
    files, summary = [], {}
    for layout in layouts_of(job):
        written = write_layout(
            context.pool,
            index=source_index(job.model),
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
            "bytes_before": facts["bytes"]["stored"],
            "shards": written.shards,
            "reused_shards": written.reused,
        }
    digest = digest_of([context.digests, {name: _index_digest(context, name) for name in summary}])
    return Output(files, digest, {"layouts": summary})


def _layout_files(context: Context, layout: str) -> dict[str, Any]:
    """config.json of a layout and the files of its own that it brings."""
    index = source_index(context.job.model)
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
            source=source_index(job.model),
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
        document["compensation"] = recheck(context)
    context.replace()
    write_json(path, document)
    return Output([path], digest_of(document), {key: document[key] for key in document if key != "schema_version"})


def _report(context: Context) -> Output:
    context.replace()
    files = write_report(context.run_dir, job=context.job.model_dump(mode="json"))
    written = [files.page, files.data]  # cards lie in the checkpoint folders, which the write stage owns
    return Output(written, digest_of([file_digest(path) for path in written]), {"page": "report/index.html"})


def stages_for(job: Job) -> list[Stage]:
    """The stages of a job in order; `select`, `compensate` and `evaluate` are there if the job asks for them."""
    needs = _needs(job)
    asked = {"select": job.budget.auto, "evaluate": job.evaluation, "compensate": job.output.compensate}
    return [
        Stage(name, title, needs[name], fields, run, owns, name in _REMOTE, _SCRATCH.get(name, ()))
        for name, title, fields, run, owns in _STAGES
        if asked.get(name, True)
    ]


_STAGES = (  # name, title, what it reads of the job, what it does, the paths that it replaces as a whole
    ("inspect", "Inspect the source", inspect_fields, _inspect, ("facts.json",)),
    ("calibrate", "Tokenise calibration text", calibrate_fields, _calibrate, ("calibration",)),
    ("score", "Score experts and neurons", score_fields, _score, ("scores",)),
    ("select", "Choose the budget", select_fields, select_stage, ("selection", "selection.json")),
    ("plan", "Plan the budget", plan_fields, _plan, ("plan.json", "plan.safetensors")),
    ("compensate", "Compensate kept neurons", compensate_fields, _compensate, (FOLDER, DOCUMENT)),
    ("write", "Write the checkpoint", write_fields, _write, ("checkpoint",)),
    ("verify", "Verify the checkpoint", no_fields, _verify, ("verify.json",)),
    ("evaluate", "Evaluate on held-out text", evaluate_fields, evaluate_stage, ("evaluation", "evaluation.json")),
    ("report", "Write the report", no_fields, _report, ("report",)),
)


_SCRATCH = {  # what can be made again from what the stage reads
    "select": ("selection",),
    "write": (f"checkpoint/*/{MARK}",),
    "verify": ("verify",),
    "evaluate": ("evaluation/hidden", f"evaluation/{FOLDER}"),
}


def _needs(job: Job) -> dict[str, tuple[str, ...]]:
    """Stage -> the stages whose results it reads."""
    select = ("select",) if job.budget.auto else ()
    evaluate = ("evaluate",) if job.evaluation else ()
    compensate = ("compensate",) if job.output.compensate else ()
    tokens = ("inspect", "calibrate") if compensate else ()  # verify solves again from them
    return {
        "inspect": (),
        "calibrate": ("inspect",),
        "score": ("inspect", "calibrate"),
        "select": ("inspect", "calibrate", "score"),
        "plan": ("inspect", "score", *select),
        "compensate": ("inspect", "calibrate", "plan"),
        "write": ("inspect", "plan", *compensate),
        "verify": (*tokens, "plan", *compensate, "write"),
        "evaluate": evaluate_needs(job),
        "report": ("score", *select, "plan", *compensate, "write", "verify", *evaluate),
    }


def _score_files(context: Context) -> list[Path]:
    return [
        context.run_dir / "scores" / f"{layer_name(layer)}.safetensors" for layer in facts_of(context)["moe_layers"]
    ]


def _index_digest(context: Context, layout: str) -> str:
    return open_index(context.run_dir / "checkpoint" / layout).fingerprint
