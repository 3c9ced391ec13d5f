"""The two files of a plan: `plan.json` for people, `plan.safetensors` for the writer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION, atomic_write, digest_of, read_json
from tenp_dist.budget.plan import LayerPlan, Plan
from tenp_dist.budget.trapezoid import exact_string
from tenp_dist.checkpoint.kept import write_kept
from tenp_dist.config import AUTO
from tenp_dist.errors import StaleError
from tenp_dist.run_files import PLAN_JSON, PLAN_TENSORS

SYNTHETIC = "synthetic_scores"
"""Key of plan.json that real plans do not have."""


def describe(
    plan: Plan, *, source_fingerprint: str, scores_digest: str, synthetic: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of plan.json. synthetic: what to say of scores that nobody measured, None for real ones."""
    budget, shape = plan.budget, plan.shape
    return {
        "schema_version": SCHEMA_VERSION,
        **({} if synthetic is None else {SYNTHETIC: dict(synthetic)}),
        "method": budget.method,
        "source_fingerprint": source_fingerprint,
        "scores_digest": scores_digest,
        "budget": {
            "retention": exact_string(budget.retention_exact),
            **({} if budget.activated is None else {"activated": exact_string(Fraction(budget.activated))}),
            "experts": budget.experts,
            "neurons": budget.neurons,
            "important": exact_string(plan.important),
            "slope": exact_string(Fraction(budget.slope)),
            "align": budget.align,
            **({"neuron_groups": budget.neuron_groups} if budget.neuron_groups > 1 else {}),
            "max_widths": budget.max_widths,
            "minimum_important": budget.minimum_important,
            "minimum_width": budget.minimum_width,
            "minimum_layer_retention": exact_string(Fraction(budget.minimum_layer_retention)),
            "protect": [] if budget.protect == AUTO else list(budget.protect),
            **({} if budget.expert_domains == "scaled" else {"expert_domains": budget.expert_domains}),
            "neuron_domains": budget.neuron_domains,
            "never_routed": budget.never_routed,
            "seed": budget.seed,
            **({} if budget.drop_layers is None else {"drop_layers": str(budget.drop_layers)}),
        },
        "retention": {
            "asked": exact_string(plan.asked),
            "realised": float(plan.retention),
            **({} if budget.activated is None else {"activated_asked": exact_string(Fraction(budget.activated))}),
            "activated": plan.activated,
        },
        "experts": {
            "total": shape.total_experts,
            "whole": plan.whole_total,
            "removed": sum(layer.removed for layer in plan.layers.values()),
            "never_routed": sum(len(layer.never_routed) for layer in plan.layers.values()),
        },
        **({"leaving_layers": list(plan.leaving_layers)} if plan.leaving_layers else {}),
        "narrow_width": plan.narrow_width,
        "leftover_neurons": plan.leftover_neurons,
        "warnings": list(plan.warnings),
        "layers": {str(layer): _describe_layer(entry) for layer, entry in plan.layers.items()},
    }


def _describe_layer(plan: LayerPlan) -> dict[str, Any]:
    counts = Counter(plan.kept.widths[plan.kept.routed].tolist())
    return {
        "experts": plan.facts.experts,
        "intermediate_size": plan.facts.intermediate_size,
        "widths": {str(width): counts[width] for width in sorted(counts)},
        "retention": float(plan.retention),
        "activated": plan.activated,
        "whole": list(plan.whole),
        "removed": plan.removed,
        **({} if plan.kept.merging is None else {"merged": len(plan.kept.merged)}),
        "never_routed": list(plan.never_routed),
    }


def write_plan(
    folder: Path,
    plan: Plan,
    *,
    source_fingerprint: str,
    scores_digest: str,
    synthetic: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write plan.safetensors, then plan.json; returns both paths. Each file carries what ties it to the other.

    synthetic: as in `describe`.

    Raises:
        DiskFullError: no space left.
    """
    document = describe(plan, source_fingerprint=source_fingerprint, scores_digest=scores_digest, synthetic=synthetic)
    origin = {
        "schema_version": SCHEMA_VERSION,
        **({} if synthetic is None else {SYNTHETIC: dict(synthetic)}),
        "source_fingerprint": source_fingerprint,
        "scores_digest": scores_digest,
        "plan_digest": digest_of(document),
    }
    # One key: safetensors writes several in an order that changes from run to run.
    metadata = {"plan": json.dumps(origin)}
    tensors, text = Path(folder) / PLAN_TENSORS, Path(folder) / PLAN_JSON
    write_kept(tensors, plan.kept, metadata)
    with atomic_write(text) as stream:
        stream.write(_readable(document).encode())
    return [tensors, text]


def _readable(document: Mapping[str, Any]) -> str:
    """JSON with one line per key, per layer and per warning."""

    def compact(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    lines = []
    for key, value in document.items():
        if key == "layers":
            items = ",\n    ".join(f"{compact(layer)}: {compact(entry)}" for layer, entry in value.items())
            lines.append(f'"layers": {{\n    {items}\n  }}')
        elif key == "warnings" and value:
            lines.append('"warnings": [\n    ' + ",\n    ".join(map(compact, value)) + "\n  ]")
        else:
            lines.append(f"{compact(key)}: {compact(value)}")
    return "{\n  " + ",\n  ".join(lines) + "\n}\n"


def read_plan(folder: Path, *, synthetic: bool = False) -> dict[str, Any]:
    """The content of plan.json, once it is known to belong to the plan.safetensors beside it.

    synthetic: whether one from scores that nobody measured will do.

    Raises:
        StaleError: a file is missing or unreadable, of another schema, or the two are not of one plan; or it was made
            from synthetic scores.
    """
    return read_plan_pair(Path(folder) / PLAN_JSON, Path(folder) / PLAN_TENSORS, synthetic=synthetic)


def plan_pair(path: Path) -> tuple[Path, Path]:
    """The two files of a plan, named by a folder or by the .json beside which its .safetensors lies."""
    text = path / PLAN_JSON if path.is_dir() else path
    return text, text.with_suffix(".safetensors")


def read_plan_pair(text: Path, tensors: Path, *, synthetic: bool = False) -> dict[str, Any]:
    """`read_plan` of files of any name."""
    for path in (text, tensors):
        if not path.is_file():
            raise _stale("There is no plan", path, "a file")
    try:
        document = read_json(text)
    except ValueError as error:
        raise _stale("plan.json is not valid JSON", text, "the file as it was written") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise _stale(f"The plan has schema version {version}", text, f"schema version {SCHEMA_VERSION}")
    if _plan_digest(tensors) != digest_of(document):
        raise _stale("plan.json and plan.safetensors are not of one plan", text.parent, "two files written together")
    if not synthetic:
        refuse_synthetic(document, text)
    return document


def refuse_synthetic(document: Mapping[str, Any], where: Path) -> None:
    """Raises StaleError for a plan from scores that nobody measured. document: the content of a plan.json."""
    if SYNTHETIC in document:
        raise StaleError(
            "The plan was made from synthetic scores, which nobody measured",
            where=where,
            found=f"{SYNTHETIC}: seed {document[SYNTHETIC].get('seed')}",
            wanted="a plan from the scores of the model",
            next_step="run `tenp-dist score` and `tenp-dist plan`; `tenp-dist write --dry-run` takes synthetic plans",
        )


def _plan_digest(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        return json.loads(metadata.get("plan", "{}")).get("plan_digest")
    except (SafetensorError, ValueError) as error:
        raise _stale("plan.safetensors cannot be read", path, "the file as it was written") from error


def _stale(what: str, where: object, wanted: str) -> StaleError:
    return StaleError(what, where=where, wanted=wanted, next_step="run the plan stage again")
