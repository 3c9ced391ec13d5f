"""Reads the files of a run into one dictionary, which is `report.json`.

The page, the charts and the model card are made from this dictionary and from nothing else. It
holds no absolute paths, host names or times: the same run gives the same bytes.

| key         | what it holds                                                                   |
|-------------|---------------------------------------------------------------------------------|
| model       | `facts.json`, the parts a reader needs                                          |
| headline    | the figures at the top of the page; None where a stage was not run              |
| plan        | method, budget, totals and warnings of `plan.json`                              |
| method      | what kind of method it is, and whose expert scores the map shows                |
| layers      | one entry per MoE layer: plan, importance [E] and routed tokens [E]             |
| routing     | experts that no, or nearly no, calibration token reached, over the whole model  |
| checkpoints | layout -> files, bytes on disk, mtp (of prediction layers), effective bits        |
| evaluation  | `evaluation.json` with the increase in NLL per variant and domain, or None      |
| benchmark   | `benchmark.json`: tasks, both columns and their paired differences, or None       |
| selection   | `selection.json`: the curve that an `auto` budget was chosen on, or None          |
| verify      | `verify.json`, or None                                                          |
| training    | `training.json`: what trained, and the loss of every step, or None                |
| compensation | `compensation.json` and what verify says of it, or None                        |
| job         | what was asked for, paths cut to their last part                                |
| provenance  | digests of inputs and stages, versions of the libraries                         |
| absent      | one sentence for every part that is not there                                   |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from tenp_dist.artifacts import read_json
from tenp_dist.budget.plan_files import refuse_synthetic
from tenp_dist.checkpoint.facts import Facts
from tenp_dist.errors import StaleError
from tenp_dist.layouts.table import sorted_names
from tenp_dist.pipeline.names import STAGE_NAMES
from tenp_dist.report.described import described_job, domain_weights, is_auto, plain
from tenp_dist.report.layers import layer_figures, routing_total
from tenp_dist.report.method import method_facts
from tenp_dist.run_files import RunFiles

SCHEMA_VERSION = 1
LIBRARIES = ("tenp-dist", "torch", "transformers", "safetensors", "numpy", "matplotlib")
MODEL_KEYS = (
    "family",
    "architecture",
    "num_layers",
    "moe_layers",
    "mtp_layers",
    "num_experts",
    "top_k",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "dtypes",
    "parameters",
    "bytes",
    "shards",
    "tensors",
)
PLAN_KEYS = ("method", "budget", "retention", "experts", "narrow_width", "leftover_neurons")


def collect(run_dir: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of `report.json` for the run in `run_dir`.

    Raises:
        StaleError: `facts.json` or `plan.json` is missing, or they are of different models, or the plan of none.
    """
    files = RunFiles(run_dir)
    facts = Facts.from_plain(_required(files.facts, "inspect"))
    plan = _required(files.plan, "plan")
    refuse_synthetic(plan, files.plan)
    if plan["source_fingerprint"] != facts.fingerprint:
        raise StaleError(
            "The plan was made from another model",
            where=files.plan,
            found=plan["source_fingerprint"],
            wanted=facts.fingerprint,
            next_step="plan again for this model, or report on the run that the plan belongs to",
        )
    verify = _optional(files.verify)
    compensation = _compensation(files, job, verify)
    evaluation = _evaluation(_optional(files.evaluation))
    benchmark = _optional(files.benchmark) if job.get("benchmark") else None
    checkpoints = _checkpoints(files)
    layers = layer_figures(files, plan, domain_weights(job))
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {"name": facts.model, **{key: facts.plain()[key] for key in MODEL_KEYS}},
        "headline": _headline(facts, plan, checkpoints, evaluation, verify),
        "warnings": [
            warning
            for part in (plan, compensation, evaluation, benchmark)
            for warning in (part or {}).get("warnings", [])
        ],
        "absent": _absent(layers, checkpoints, verify, evaluation),
        "plan": {key: plan.get(key) for key in PLAN_KEYS},
        "method": method_facts(plan),
        "routing": routing_total(layers),
        "layers": layers,
        "checkpoints": checkpoints,
        "verify": verify and verify["layouts"],
        "compensation": compensation,
        "training": _optional(files.training) if job.get("train") else None,
        "evaluation": evaluation,
        "benchmark": benchmark,
        "selection": _optional(files.selection) if is_auto(job) else None,
        "job": described_job(job),
        "provenance": _provenance(files, facts, plan),
    }


def _headline(
    facts: Facts,
    plan: Mapping[str, Any],
    checkpoints: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    verify: Mapping[str, Any] | None,
) -> dict[str, Any]:
    layout, asked = _main_layout(checkpoints, evaluation), plan["retention"].get("activated_asked")
    means = {name: variant["mean"] for name, variant in (evaluation or {"variants": {}})["variants"].items()}

    def mean(variant: str, key: str) -> float | None:
        return means[variant][key] if variant in means else None

    return {
        "retention_asked": float(Fraction(plan["retention"]["asked"])),
        "retention_realised": plan["retention"]["realised"],
        "activated": plan["retention"]["activated"],
        "activated_asked": asked and float(asked),
        "layout": layout,
        "bytes_before": facts.bytes.stored,
        "bytes_after": checkpoints[layout]["bytes"] if layout else None,
        "nll_before": mean("source", "nll"),
        "nll_after": mean("pruned", "nll"),
        "nll_random": mean("random", "nll"),
        "top1_agreement": mean("pruned", "top1_agreement"),
        "top1_agreement_random": mean("random", "top1_agreement"),
        "verified": None if verify is None else all(entry["ok"] for entry in verify["layouts"].values()),
    }


def _main_layout(checkpoints: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str | None:
    """The layout that was evaluated; else the first that is there."""
    evaluated = PurePath(evaluation["pruned_from"]).name if evaluation and evaluation.get("pruned_from") else None
    return evaluated if evaluated in checkpoints else next(iter(checkpoints), None)


def _checkpoints(files: RunFiles) -> dict[str, dict[str, Any]]:
    """`effective_bits` is None where an earlier version wrote the checkpoint."""
    folders = {path.parent.name: path.parent for path in files.checkpoints.glob("*/config.json")}
    sizes = {
        name: [path.stat().st_size for path in folders[name].glob("*.safetensors")] for name in sorted_names(folders)
    }
    written = (_optional(files.record("write")) or {}).get("summary", {}).get("layouts", {})
    told = {name: {key: written.get(name, {}).get(key) for key in ("mtp", "effective_bits")} for name in sizes}
    return {name: {"files": len(found), "bytes": sum(found), **told[name]} for name, found in sizes.items()}


def _evaluation(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`evaluation.json` with `nll_increase` (nats per token over the source) beside every NLL."""
    if evaluation is None:
        return None
    source = evaluation["variants"]["source"]

    def extended(variant: Mapping[str, Any]) -> dict[str, Any]:
        rows = {
            domain: {**row, "nll_increase": row["nll"] - source["domains"][domain]["nll"]}
            for domain, row in variant["domains"].items()
        }
        mean = {**variant["mean"], "nll_increase": variant["mean"]["nll"] - source["mean"]["nll"]}
        return {"compensated": variant.get("compensated", False), "domains": rows, "mean": mean}

    return {
        "sequence_length": evaluation["sequence_length"],
        "pruned_from": evaluation.get("pruned_from"),
        "warnings": evaluation.get("warnings", []),
        "variants": {name: extended(variant) for name, variant in evaluation["variants"].items()},
        "plans": [{**plan, **extended(plan)} for plan in evaluation.get("plans", [])],
    }


def _compensation(files: RunFiles, job: Mapping[str, Any], verify: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What was compensated; a document that another job left behind does not count."""
    document = _optional(files.compensation)
    if document is None or document.get("form") == "none" or not (job.get("output") or {}).get("compensate"):
        return None
    return {"form": "apart", "on": "source", **document, "verified": (verify or {}).get("compensation")}


def _absent(
    layers: Sequence[Mapping[str, Any]],
    checkpoints: Mapping[str, Any],
    verify: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
) -> list[str]:
    unscored = [layer["layer"] for layer in layers if layer["importance"] is None]
    findings = [
        (bool(unscored), f"Scores of {len(unscored)} of {len(layers)} layers are not in the run folder."),
        (not checkpoints, "No finished checkpoint is in the run folder: size after pruning unknown, no model card."),
        (verify is None, "The checkpoint was not verified against the plan (no verify.json)."),
        (evaluation is None, "Quality was not measured (no evaluation.json): give the job an evaluation part."),
        (
            evaluation is not None and not _controlled(evaluation),
            "No random control was measured: the quality figures have nothing of the same size to stand against.",
        ),
    ]
    return [sentence for is_absent, sentence in findings if is_absent]


def _controlled(evaluation: Mapping[str, Any]) -> bool:
    return "random" in evaluation["variants"] or any(plan["control"] for plan in evaluation["plans"])


def _provenance(files: RunFiles, facts: Facts, plan: Mapping[str, Any]) -> dict[str, Any]:
    records = {stage: _optional(files.record(stage)) for stage in STAGE_NAMES[: STAGE_NAMES.index("report")]}
    return {
        "source_fingerprint": facts.fingerprint,
        "scores_digest": plan.get("scores_digest"),
        "stages": {
            stage: {"digest": record["digest"], "summary": plain(record.get("summary", {}))}
            for stage, record in records.items()
            if record
        },
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


def _required(path: Path, stage: str) -> Any:
    if not path.exists():
        raise StaleError(
            f"The report needs {path.name}",
            where=path,
            found="no such file",
            next_step=f"run the {stage} stage of this job first",
        )
    return read_json(path)


def _optional(path: Path) -> Any:
    return read_json(path) if path.exists() else None
